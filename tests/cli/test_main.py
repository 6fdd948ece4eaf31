"""The frame of the command line: help, start, errors, terminals."""

import dataclasses
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers.command_line import (
    Run,
    environment,
    one_line_error,
    rollout_options,
)
from helpers.tiny import TINY_VOCABULARY, build_gpt2, build_tokenizer

from switchkd.__main__ import COMMANDS, main
from switchkd.cli.console import Console
from switchkd.cli.run_folder import RunFolder, json_line, release_folders
from switchkd.commands import rollout
from switchkd.errors import UserError
from switchkd.methods import METHODS
from switchkd.training.config import SwitchConfig

# ---- help and start


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["rollout", "--help"], ["evaluate", "--help"]])
def test_help_answers_without_loading_torch(arguments: list[str]) -> None:
    code = (
        "import sys, time; started = time.perf_counter(); from switchkd.__main__ import main;"
        "code = main(sys.argv[1:]);"
        "print(time.perf_counter() - started, file=sys.stderr);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "switchkd" in done.stdout
    assert float(done.stderr) < 1.5


def test_help_of_a_command_names_its_options(run: Run) -> None:
    for name in COMMANDS:
        code, out, _ = run(name, "--help")
        assert code == 0 and f"usage: switchkd {name}" in out
        place = {"report": "--output_file", "plan": "--card"}.get(name, "--output_dir")  # a plan writes nothing
        for option in ("--config", place, "--json", "--verbose"):
            assert option in out, (name, option)


def test_help_of_train_lists_every_option_of_this_package_once(run: Run) -> None:
    _, out, _ = run("train", "--help")
    from switchkd.commands.train_options import FIXED, RunArguments
    from switchkd.training.options import own_fields

    own = {item.name for item in dataclasses.fields(RunArguments)} | set(own_fields())
    for name in own - FIXED:
        assert out.count(f"  --{name} ") == 1, name
    assert "TrainingArguments" in out


def test_help_and_mistakes_of_train_do_not_wait_for_torch() -> None:
    """They took 6 seconds: torch, peft and the data sets were imported to list the options."""
    code = (
        "import sys, time; from switchkd.__main__ import main; code = main(sys.argv[1:]);"
        "heavy = ('torch', 'transformers.training_args', 'transformers.trainer', 'peft', 'datasets', 'accelerate');"
        "print(code, [name for name in heavy if name in sys.modules], time.process_time(), file=sys.stderr)"
    )
    given = ["--model_name_or_path", "x", "--dataset_name", "y"]
    for arguments, expected, seconds in (
        (["--help"], "0 []", 2.5),
        (["--tempratur", "1"], "2 []", 1.5),
        (["--top_k", "many"], "2 []", 1.5),
        ([*given, "--method", "swich"], "2 []", 1.5),
        ([*given, "--divergence", "rkl"], "2 []", 1.5),
        ([*given, "--temperature", "-1"], "2 []", 1.5),
    ):
        command = [sys.executable, "-c", code, "train", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        found, _, used = done.stderr.splitlines()[-1].rpartition(" ")
        assert found == expected, done.stderr
        assert float(used) < seconds


def test_help_of_train_is_laid_out_by_task_and_by_method(run: Run) -> None:
    _, out, _ = run("train", "--help")
    groups = {part.partition(":\n")[0]: part for part in out.split("\n\n")}
    for title, options in {
        "models": ("model_name_or_path", "teacher_model_name_or_path"),
        "only with --method skd": ("teacher_top_k",),
        "only with --method minillm": ("mixture_weight", "clip_range"),
        "what is learned": ("divergence", "ce_weight"),
        "training (transformers.TrainingArguments)": ("learning_rate", "warmup_steps", "weight_decay", "optim"),
        "evaluation while training": ("eval_strategy", "load_best_model_at_end"),
        "saving and logging": ("save_strategy", "push_to_hub", "report_to"),
    }.items():
        assert all(f"  --{name} " in groups[title] for name in options), title
    for name, method in METHODS.items():
        line = next(line for line in out.splitlines() if line.startswith(f"  {name} "))
        assert line.split(maxsplit=1)[1] in " ".join(method.summary.split()), name


def test_help_all_lists_every_option_once(run: Run) -> None:
    code, out, _ = run("train", "--help-all")
    assert code == 0
    for option in dataclasses.fields(SwitchConfig):
        if option.init:
            assert len(re.findall(rf"^  --{option.name}\b", out, flags=re.MULTILINE)) == 1, option.name
    assert "--adam_beta1" not in run("train", "--help")[1]
    assert run("rollout", "--help_all")[1] == run("rollout", "--help")[1]


def test_without_a_command_the_help_goes_to_standard_error(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "") and "commands:" in err


def test_unknown_command_names_the_nearest(run: Run) -> None:
    assert "'evaluate'" in one_line_error(*run("evalute"))


# ---- terminals


def test_our_warnings_are_one_line_and_those_of_others_wait_for_verbose(
    models: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = models.parent / "wide"
    build_gpt2(seed=2, vocab_size=len(TINY_VOCABULARY) + 6).save_pretrained(wide)
    build_tokenizer().save_pretrained(wide)
    policy = rollout.make_policy
    monkeypatch.setattr(
        rollout,
        "make_policy",
        lambda options: warnings.warn_explicit("noise", UserWarning, "x.py", 1) or policy(options),
    )
    options = rollout_options(models, "--prompt", "a", "--teacher_model_name_or_path", wide)
    code, _, err = run(*options)
    assert code == 0
    assert err.startswith("switchkd: warning: student and teacher score 98 and 104 ids") and err.count("\n") == 1
    assert "noise" in run(*options, "--verbose")[2]


def test_verbose_shows_where_an_error_came_from(run: Run) -> None:
    code, _, err = run("rollout", "--verbose")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("switchkd: error: ")


def test_a_terminal_without_unicode_gets_escapes(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    console = Console()
    assert main(["--version"]) == 0  # sets how streams treat what they cannot show
    console.say("é 日本")
    assert buffer.getvalue().splitlines()[-1] == rb"\xe9 \u65e5\u672c"


def test_nan_is_null_in_json() -> None:
    assert (
        json_line({"a": float("nan"), "b": [1.5, float("inf")], "c": "é"}) == '{"a":null,"b":[1.5,null],"c":"\\u00e9"}'
    )


def test_only_the_first_process_of_a_launch_speaks_and_writes(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    console = Console(json=True)
    console.say("a"), console.progress("b"), console.result({})
    folder = RunFolder(str(tmp_path / "run"), "train")
    folder.check(), folder.claim({}), folder.append("metrics.jsonl", [{}])
    assert capsys.readouterr() == ("", "") and not (tmp_path / "run").exists()


def test_a_reader_that_leaves_is_no_error(models: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "switchkd",
        *map(str, rollout_options(models, "--prompt", "a", "--num_samples", 3)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 0


def test_the_installed_command_refuses_in_one_line(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "switchkd"
    if not script.exists():
        pytest.skip("switchkd is not installed as a console script beside this Python")
    done = subprocess.run(
        [script, "train", "--dataset_name", tmp_path / "missing.jsonl", "--student_layer", "0"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert one_line_error(done.returncode, done.stdout, done.stderr).endswith("did you mean 'student_layers'?")


def test_a_second_command_on_the_folder_of_a_running_one_is_refused(tmp_path: Path) -> None:
    """Both ended with exit code 0 and doubled rows."""
    source = (
        "import sys, time; from switchkd.cli.run_folder import RunFolder; "
        "folder = RunFolder(sys.argv[1], 'train'); folder.claim({}); print('claimed', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", source, tmp_path / "run"], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match="is in use by another switchkd; wait for it, or give another folder"):
            RunFolder(str(tmp_path / "run"), "train").claim({})
    finally:
        first.kill()
        first.wait()
    RunFolder(str(tmp_path / "run"), "train").claim({})  # a process that was killed holds nothing
    RunFolder(str(tmp_path / "run"), "train").claim({})  # nor does one exclude itself
    release_folders()
