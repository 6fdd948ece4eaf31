"""The commands in process: what they print, what they write, and one clear line for every mistake."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import yaml
from conftest import RAGGED_ROWS, TINY_VOCABULARY, build_gpt2, build_llama, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchkd import cli, report
from switchkd.cli import main
from switchkd.commands import rollout, train
from switchkd.errors import nearest_name
from switchkd.options import OptionParser, flag
from switchkd.run_folder import OWN_FILES, RunFolder, json_line, read_config
from switchkd.training.trainer import SwitchTrainer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student`, `teacher` (more layers), `llama`, a tokenizer alone, and data files."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer()
    for name, model in {
        "student": build_gpt2(seed=1),
        "teacher": build_gpt2(seed=2, n_layer=3),
        "llama": build_llama(seed=3, num_hidden_layers=3),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_rows(folder / "train.jsonl", RAGGED_ROWS)
    return folder


@pytest.fixture(autouse=True)
def libraries_as_loud_as_before() -> Iterator[None]:
    """The commands quiet transformers and datasets for the whole process; other tests read what those say."""
    levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    datasets.logging.set_verbosity(levels[1])
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)` -> exit code, standard output, standard error."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_options(models: Path, output_dir: Path, *more: Any) -> list[Any]:
    """Two short optimizer steps of SWITCH."""
    return [
        *("train", "--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher"),
        *("--dataset_name", models / "train.jsonl", "--output_dir", output_dir, "--use_cpu", "--max_steps", 2),
        *("--max_completion_length", 8, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--save_steps", 2),
        *more,
    ]


def one_line_error(code: int, out: str, err: str) -> str:
    """The message of a refused command, which must be the only thing it says."""
    assert code == 2
    assert out == ""
    assert err.startswith("switchkd: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err.removeprefix("switchkd: error: ").strip()


# ---- help and start


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["rollout", "--help"], ["evaluate", "--help"]])
def test_help_answers_without_loading_torch(arguments: list[str]) -> None:
    code = (
        "import sys, time; started = time.perf_counter(); from switchkd.cli import main; code = main(sys.argv[1:]);"
        "print(time.perf_counter() - started, file=sys.stderr);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "switchkd" in done.stdout
    assert float(done.stderr) < 1.5


def test_help_of_a_command_names_its_options(run: Run) -> None:
    for name in cli.COMMANDS:
        code, out, _ = run(name, "--help")
        assert code == 0 and f"usage: switchkd {name}" in out
        for option in ("--config", "--output_dir", "--json", "--verbose"):
            assert option in out, (name, option)


def test_help_of_train_lists_every_option_of_this_package_once(run: Run) -> None:
    _, out, _ = run("train", "--help")
    from switchkd.commands.train_options import RunArguments
    from switchkd.training.config import SwitchConfig

    own = {item.name for item in dataclasses.fields(RunArguments)} | set(SwitchConfig.__annotations__)
    for name in own - {"remove_unused_columns"}:
        assert out.count(f"  --{name} ") == 1, name
    assert "TrainingArguments" in out


def test_without_a_command_the_help_goes_to_standard_error(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "") and "commands:" in err


def test_unknown_command_names_the_nearest(run: Run) -> None:
    assert "'evaluate'" in one_line_error(*run("evalute"))


# ---- options


def parsed(*arguments: Any) -> Any:
    return train.parser().resolve([str(argument) for argument in arguments])


def test_flags_win_over_the_config_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("learning_rate: 1e-3\ntop_k: 7\nmethod: gkd\n")
    options = parsed("--top-k=9", "--config", config)
    assert (options.learning_rate, options.top_k, options.method, options.top_p) == (1e-3, 9, "gkd", 1.0)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 5e-4", "learning_rate", 5e-4),  # YAML 1.1 reads text
        ("eval_strategy: no", "eval_strategy", "no"),  # YAML 1.1 reads False
        ("bf16: yes", "bf16", True),
        ("disable_dropout: off", "disable_dropout", False),
        ("save_steps: null", "save_steps", 500),
        ("max-steps: 3", "max_steps", 3),
        ("run_name: 007", "run_name", "007"),
        ("student_layers: [0, -1]", "student_layers", ["0", "-1"]),
        ("student_layers: 0,4", "student_layers", ["0,4"]),
        ("report_to: [tensorboard, wandb]", "report_to", "tensorboard,wandb"),
        ("report_to: []", "report_to", "none"),
        (
            "model_init_kwargs: {dtype: float32, a: 1e-3, b: true}",
            "model_init_kwargs",
            '{"dtype": "float32", "a": 0.001, "b": true}',
        ),
        ("student_config:\n  n_layer: 2", "student_config", '{"n_layer": 2}'),
    ],
)
def test_a_key_of_the_file_is_read_as_the_flag_would_be(tmp_path: Path, line: str, name: str, value: Any) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"{line}\n")
    assert getattr(parsed("--config", config), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"line 1: unknown key 'learning_rat'; the nearest valid one is 'learning_rate'"),
        ("method: sft\nlmbda: 1", r"line 2: unknown key 'lmbda'; the nearest valid one is 'on_policy_fraction'"),
        ("config: a.yaml", r"line 1: unknown key 'config'"),
        ("learning_rate: fast", r"line 1: learning_rate: invalid float value: 'fast'"),
        ("optim: adamm", r"line 1: optim: invalid choice 'adamm'; the nearest is 'adamw"),
        ("a: 1\nb: [", r"line 2: malformed YAML"),
        ("- a\n- b", r"expected lines of `key: value`"),
        ("method: sft\nmethod: kd", r"line 2: key 'method' stands there twice"),
    ],
)
def test_a_wrong_config_file_is_refused_with_its_line(tmp_path: Path, run: Run, text: str, message: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    error = one_line_error(*run("train", "--config", config))
    assert str(config) in error and message in error


def test_every_command_takes_a_config_file(tmp_path: Path, run: Run) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("tempratur: 1\n")
    for name in ("rollout", "evaluate"):
        assert "'temperature'" in one_line_error(*run(name, "--config", config))
    assert "no config file" in one_line_error(*run("rollout", "--config", tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rat", "1"], "unknown option --learning_rat; the nearest valid one is 'learning_rate'"),
        (["--initial_treshold=1"], "'initial_threshold'"),
        (["--max_new_tokens", "1"], "'max_completion_length'"),
        (["--top_k", "many"], "--top_k: invalid int value: 'many'"),
        (["--json", "maybe"], "expected true or false, got 'maybe'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--top_k"], "--top_k: expected one argument"),
        (["--top"], "unknown option --top;"),  # no abbreviations: they change meaning when options are added
    ],
)
def test_wrong_flags_are_one_line(run: Run, arguments: list[str], message: str) -> None:
    assert message in one_line_error(*run("train", *arguments))


def test_a_switch_is_also_a_key_with_a_value() -> None:
    parser = OptionParser()
    parser.add_argument("--fast", **flag("go"))
    parser.add_shared_options(None)
    assert [parser.resolve(words).fast for words in ([], ["--fast"], ["--fast=no"], ["--fast", "true"])] == [
        *(False, True, False, True)
    ]


def test_nearest_name_prefers_a_common_beginning() -> None:
    assert nearest_name("adamm", ["adalomo", "adamw_torch", "sgd"]) == "adamw_torch"
    assert nearest_name("n_layers", ["n_layer", "n_inner", "layer_norm_epsilon"]) == "n_layer"


# ---- train


def test_train_writes_the_model_and_what_it_did(models: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "run"
    code, out, err = run(*train_options(models, folder))
    assert code == 0, err
    assert "8 of 8 records kept" in out and "loss [nats/token]" in out and str(folder) in out
    assert "step 1/2: loss" in err and "step 2/2: loss" in err
    written = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "versions.json", "metrics.jsonl", "summary.json", "model.safetensors"} <= written
    assert all(any(path.match(own) for own in OWN_FILES) for path in folder.iterdir() if path.is_file())
    versions = json.loads((folder / "versions.json").read_text())
    assert {"switchkd", "python", "torch", "transformers"} <= set(versions)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all({"rollout/teacher_share", "rollout/tokens_per_s"} <= set(row) for row in rows if "loss" in row)
    config = read_config(folder)
    assert config is not None and config["seed"] == 42 and config["max_completion_length"] == 8
    # Resolved: the method's own values stand there, not "null".
    assert (config["divergence"], config["initial_threshold"], config["horizon"]) == ("reverse_kl", 0.3, 8)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (models / "student", folder))
    assert any(not torch.equal(*pair) for pair in zip(before.parameters(), after.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == build_tokenizer().get_vocab()


def test_json_keeps_standard_output_for_one_last_line(models: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run(*train_options(models, tmp_path / "run", "--json"))
    assert code == 0
    assert out.count("\n") == 1 and "loss [nats/token]" in err
    summary = json.loads(out)
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == {**saved, "output_dir": str(tmp_path / "run")}
    assert summary["steps"] == 2 and 0 <= summary["teacher_share"] <= 1 and summary["data"]["train"]["kept"] == 8


def test_a_written_config_starts_the_same_run_again(models: Path, tmp_path: Path, run: Run) -> None:
    steady = ["--draft_length", 4]  # "auto" follows the clock, and the last digits of a loss with it
    kwargs = ["--model_init_kwargs", '{"dtype": "float32"}']
    assert run(*train_options(models, tmp_path / "a", *kwargs, *steady))[0] == 0
    code, _, err = run("train", "--config", tmp_path / "a" / "config.yaml", "--output_dir", tmp_path / "b")
    assert code == 0, err
    first, second = (read_config(tmp_path / name) for name in "ab")
    assert first is not None and second is not None
    assert {name for name in first if first[name] != second[name]} == {"output_dir"}
    weights = [torch.load(tmp_path / name / "checkpoint-2" / "optimizer.pt") for name in "ab"]
    for one, other in zip(*(list(state["state"].values()) for state in weights), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])


def test_evaluation_data_give_an_evaluation_loss_at_the_end(models: Path, tmp_path: Path, run: Run) -> None:
    options = train_options(models, tmp_path / "run", "--eval_dataset_name", models / "train.jsonl", "--json")
    code, out, err = run(*options, "--max_eval_samples", 3, "--max_train_samples", 4, "--eval_rouge_l_samples", 2)
    assert code == 0, err
    summary = json.loads(out)
    assert 0 <= summary["eval_rouge_l"] <= 100 and "eval ROUGE-L" in err
    assert summary["eval_loss"] > 0 and summary["eval_cross_entropy"] > 0
    assert summary["data"]["eval"]["kept"] == 3 and summary["data"]["train"]["kept"] == 4


def test_a_run_goes_on_from_its_checkpoint(models: Path, tmp_path: Path, run: Run) -> None:
    constant = ["--lr_scheduler_type", "constant", "--draft_length", 4]  # "auto" follows the clock
    assert run(*train_options(models, tmp_path / "whole", "--max_steps", 4, *constant))[0] == 0
    assert run(*train_options(models, tmp_path / "parts", *constant))[0] == 0
    # A crash after the checkpoint leaves rows of steps that are made again.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": -1.0}\n')
    again = train_options(models, tmp_path / "parts", "--max_steps", 4, *constant, "--resume_from_checkpoint")
    code, _, err = run(*again)
    assert code == 0, err
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [row["step"] for row in parts if "loss" in row] == [1, 2, 3, 4]
    assert [row["loss"] for row in parts if "loss" in row] == [row["loss"] for row in whole if "loss" in row]


def test_another_run_is_not_resumed(models: Path, tmp_path: Path, run: Run) -> None:
    assert run(*train_options(models, tmp_path / "run"))[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for name, value in (("initial_threshold", 0.1), ("seed", 7), ("learning_rate", 1e-3)):
        options = train_options(models, tmp_path / "run", "--resume_from_checkpoint", "true", f"--{name}", value)
        assert f"that run has {name}=" in one_line_error(*run(*options))
    other = train_options(
        models, tmp_path / "run", "--resume_from_checkpoint", "--model_name_or_path", models / "llama"
    )
    assert "model_name_or_path" in one_line_error(*run(*other))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_checkpoint_elsewhere_goes_on_in_a_new_folder_only(models: Path, tmp_path: Path, run: Run) -> None:
    for name in ("a", "b"):
        assert run(*train_options(models, tmp_path / name))[0] == 0
    more = ["--max_steps", 3, "--resume_from_checkpoint", tmp_path / "a" / "checkpoint-2"]
    assert "holds another run" in one_line_error(*run(*train_options(models, tmp_path / "b", *more)))
    code, _, err = run(*train_options(models, tmp_path / "c", *more))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [3]
    assert "exclude each other" in one_line_error(
        *run(*train_options(models, tmp_path / "a", *more, "--overwrite_output_dir"))
    )


def test_resuming_without_a_checkpoint_is_refused(models: Path, tmp_path: Path, run: Run) -> None:
    for value in ([], ["true"], [tmp_path]):
        options = train_options(models, tmp_path / "run", "--resume_from_checkpoint", *value)
        assert "checkpoint" in one_line_error(*run(*options))


def test_overwriting_removes_the_runs_files_and_nothing_else(models: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "run"
    assert run(*train_options(models, folder))[0] == 0
    (folder / "notes.txt").write_text("mine")
    assert "holds another run" in one_line_error(*run(*train_options(models, folder)))
    failing = train_options(models, folder, "--overwrite_output_dir", "--initial_threshold", 3)
    one_line_error(*run(*failing))
    assert (folder / "checkpoint-2").is_dir()  # a run that cannot start has removed nothing
    options = train_options(models, folder, "--overwrite_output_dir", "--max_steps", 1)
    assert run(*options)[0] == 0
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "checkpoint-2").exists()
    assert "model_name_or_path" in one_line_error(
        *run(*train_options(models, folder, "--overwrite_output_dir", "--model_name_or_path", folder))
    )


def test_a_folder_of_something_else_is_never_touched(models: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "config.yaml").write_text("somebody: else\n")
    for more in ([], ["--overwrite_output_dir"]):
        assert "holds no run of switchkd" in one_line_error(*run(*train_options(models, tmp_path, *more)))
    (tmp_path / "file").write_text("")
    assert "is a file" in one_line_error(*run(*train_options(models, tmp_path / "file")))
    assert "cannot be written" in one_line_error(*run(*train_options(models, tmp_path / "file" / "below")))


def test_interrupted_training_keeps_what_was_written(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_step = SwitchTrainer.training_step

    def step(self: SwitchTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return whole_step(self, *args, **kwargs)

    monkeypatch.setattr(SwitchTrainer, "training_step", step)
    code, _, err = run(*train_options(models, tmp_path / "run", "--max_steps", 4))
    assert code == 130
    assert "--resume_from_checkpoint" in err and err.endswith("switchkd: interrupted\n")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()
    monkeypatch.undo()
    code, _, err = run(*train_options(models, tmp_path / "run", "--max_steps", 4, "--resume_from_checkpoint"))
    assert code == 0, err


def test_lora_trains_an_adapter_that_evaluate_reads(models: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("peft")
    lora = ["--use_peft", "--lora_r", 2, "--lora_target_modules", "c_attn"]
    code, out, err = run(*train_options(models, tmp_path / "run", *lora))
    assert code == 0, err
    assert "of them trained" in out
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"] == 2
    code, out, err = run(*evaluate_options(models, tmp_path / "run", tmp_path / "scores", "--json"))
    assert code == 0, err
    bad = train_options(models, tmp_path / "bad", "--use_peft", "--lora_target_modules", "nothing")
    assert "nothing" in one_line_error(*run(*bad))


# ---- students from scratch


def test_student_from_the_teachers_layers(models: Path, tmp_path: Path, run: Run) -> None:
    frozen = ["--learning_rate", 0, "--max_steps", 1, "--student_layers", "0,-1"]
    options = train_options(models, tmp_path / "run", *frozen)
    del options[1:3]  # no student of its own
    options[options.index("--teacher_model_name_or_path") + 1] = models / "llama"
    code, out, err = run(*options)
    assert code == 0, err
    assert "llama, 2 layers" in out
    small, big = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "run", models / "llama"))
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, big.model.layers[2].mlp.up_proj.weight)
    assert torch.equal(small.model.embed_tokens.weight, big.model.embed_tokens.weight)


def test_taking_every_layer_gives_the_same_model(models: Path) -> None:
    from switchkd.models.untrained import student_from_layers

    ids = torch.arange(1, 9).unsqueeze(0)
    for name in ("llama", "teacher"):
        copy = student_from_layers(str(models / name), [0, 1, 2]).eval()
        whole = AutoModelForCausalLM.from_pretrained(models / name)
        assert torch.equal(copy(ids).logits, whole(ids).logits)


def test_a_new_model_takes_vocabulary_and_ends_from_the_tokenizer(models: Path, tmp_path: Path, run: Run) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
    options = ["train", "--method", "sft", "--student_config", json.dumps(config), "--use_cpu", "--max_steps", 1]
    options += ["--tokenizer_name_or_path", models / "tokenizer", "--dataset_name", models / "train.jsonl"]
    options += ["--max_completion_length", 8, "--seed", 3]
    for name in ("a", "b"):
        code, _, err = run(*options, "--output_dir", tmp_path / name)
        assert code == 0, err
    model, same = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert model.config.vocab_size == len(TINY_VOCABULARY)
    assert model.config.eos_token_id == model.config.pad_token_id == build_tokenizer().eos_token_id
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_smaller_student_follows_the_teachers_configuration(models: Path, tmp_path: Path, run: Run) -> None:
    options = train_options(models, tmp_path / "run", "--student_config", '{"n_layer": 1, "n_embd": 16}')
    del options[1:3]
    code, _, err = run(*options)
    assert code == 0, err
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert (config.n_layer, config.n_embd, config.n_head) == (1, 16, 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"n_layers": 2}', "gpt2 has no option 'n_layers'; the nearest is 'n_layer'"),
        ('{"model_type": "gtp2"}', "no model_type 'gtp2'; the nearest is 'gpt2'"),
        ('{"n_embd": 30}', "student_config makes no model"),
        ('{"n_layer": "two"}', "student_config makes no model"),
        ("{n_layer: 2}", "student_config must be a JSON object"),
        ("[2]", "student_config must be a JSON object"),
    ],
)
def test_wrong_student_configurations_are_one_line(
    models: Path, tmp_path: Path, run: Run, value: str, message: str
) -> None:
    assert message in one_line_error(*run(*train_options(models, tmp_path / "run", "--student_config", value)))


# ---- rollout


def rollout_options(models: Path, *more: Any) -> list[Any]:
    return [
        *("rollout", "--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher"),
        *("--max_new_tokens", 12, *more),
    ]


def test_rollout_prints_the_text_and_a_line_of_numbers(models: Path, run: Run) -> None:
    code, out, err = run(*rollout_options(models, "--prompt", "Hello", "--initial_threshold", 0.1))
    assert code == 0 and err == ""
    assert out.startswith("Hello")
    last = out.splitlines()[-1]
    assert "teacher wrote" in last and "mean divergence" in last and "threshold 0.100 to" in last and "tokens/s" in last


def test_rollout_json_is_the_record_that_was_printed(models: Path, run: Run) -> None:
    options = rollout_options(models, "--prompt", "Hello", "Bye", "--num_samples", 2, "--batch_size", 3)
    code, out, err = run(*options, "--json")
    assert code == 0 and out.count("\n") == 1
    result = json.loads(out)
    assert [record["prompt"] for record in result["rollouts"]] == ["Hello", "Hello", "Bye", "Bye"]
    authors = [author for record in result["rollouts"] for author in record["author"]]
    assert result["teacher_share"] == pytest.approx(authors.count("teacher") / len(authors))
    for record in result["rollouts"]:
        assert report.rollout_text(record, color=False) in err
    # The same rows whatever the batch.
    again = json.loads(run(*options, "--json", "--batch_size", 1)[1])
    for one, other in zip(again["rollouts"], result["rollouts"], strict=True):
        assert (one["completion_ids"], one["author"]) == (other["completion_ids"], other["author"])
        assert one["divergence"] == pytest.approx(other["divergence"], abs=1e-5)


def test_rollout_writes_its_folder_only_when_asked(models: Path, tmp_path: Path, run: Run, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*rollout_options(models, "--prompt", "Hello"))[0] == 0
    assert list(tmp_path.iterdir()) == []
    code, out, _ = run(*rollout_options(models, "--prompt", "Hello", "--output_dir", "run", "--json", "--seed", 5))
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert rows == json.loads(out)["rollouts"]
    config = read_config(tmp_path / "run")
    assert config is not None and config["seed"] == 5 and "json" not in config
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("config.yaml", "versions.json", "metrics.jsonl", "summary.json", "rollouts.jsonl")
    }


def test_the_command_line_knows_every_policy_and_all_of_its_options() -> None:
    from switchkd.commands.policy_options import FLAGS, POLICIES
    from switchkd.methods import METHODS
    from switchkd.training.config import SwitchConfig

    own = {name: method for name, method in METHODS.items() if method.policy_options and name not in ("ssd", "minillm")}
    assert {*own, "student", "teacher", "blend"} == set(POLICIES)
    for name, method in own.items():
        # What is annealed over a training has no meaning in one rollout.
        assert set(POLICIES[name]) == set(method.policy_options) - {"kl_budget_warmup"}
    for name, (kind, _, _) in FLAGS.items():
        assert str(SwitchConfig.__annotations__[name]) == f"{kind.__name__} | None"


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("skd", ("--teacher_top_k", 1)),
        ("adaswitch", ("--divergence_window", 2, "--divergence_multiple", 0.1)),
        ("relay", ("--trigger_threshold", 0.0, "--leg_length", 2)),
        ("trb", ("--kl_budget", 5)),
        ("teacher_first", ("--teacher_tokens", 3)),
        ("student_entropy", ("--initial_threshold", 0.5)),
    ],
)
def test_rollouts_of_the_kin(models: Path, run: Run, policy: str, options: tuple[Any, ...]) -> None:
    code, out, err = run(*rollout_options(models, "--prompt", "a", "--policy", policy, "--json"), *options)
    assert code == 0, err
    assert 0 < json.loads(out)["teacher_share"] <= 1


@pytest.mark.parametrize(("policy", "author"), [("student", "student"), ("teacher", "teacher")])
def test_rollout_of_one_writer(models: Path, run: Run, policy: str, author: str) -> None:
    options = rollout_options(models, "--prompt", "a", "--policy", policy, "--json")
    result = json.loads(run(*options)[1])
    assert set(result["rollouts"][0]["author"]) == {author}
    assert result["teacher_share"] == (policy == "teacher")
    assert result["divergence_nats"] is None and result["threshold_nats"] is None


def test_rollout_blends(models: Path, run: Run) -> None:
    options = rollout_options(models, "--prompt", "a", "--policy", "blend", "--mixture_weight", 0.5, "--json")
    assert run(*options)[0] == 0


def test_rollout_of_data_takes_the_first_prompts(models: Path, run: Run) -> None:
    options = rollout_options(models, "--dataset_name", models / "train.jsonl", "--num_prompts", 2, "--json")
    prompts = [record["prompt"] for record in json.loads(run(*options)[1])["rollouts"]]
    assert prompts == [row["prompt"] for row in RAGGED_ROWS[:2]]


def test_rollout_fills_the_alpaca_template(models: Path, run: Run) -> None:
    options = rollout_options(models, "--prompt", "Add.", "--template", "alpaca", "--max_new_tokens", 2, "--json")
    error = one_line_error(*run(*options))  # 128 tokens of context do not hold the template
    assert "exceed the student's context of 128" in error


def test_colour_is_for_terminals_unless_asked_for(models: Path, run: Run) -> None:
    # Threshold 0: the teacher writes everything, so there is something to colour.
    options = rollout_options(models, "--prompt", "Hello", "--initial_threshold", 0)
    assert "\x1b[" not in run(*options)[1]
    assert report.TEACHER_STYLE in run(*options, "--color", "always")[1]
    assert "\x1b[" not in "".join(run(*options, "--color", "always", "--json")[1:])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "swich"], "policy must be one of"),
        (["--policy", "student", "--initial_threshold", "0.1"], "initial_threshold does nothing with policy 'student'"),
        (["--initial_threshold", "0.7"], "initial_threshold must lie in [0, ln 2"),
        (["--template", "chat"], "chat template"),
        (["--template", "llama"], "template must be one of"),
        (["--dataset_name", "x.jsonl"], "either --prompt or --dataset_name"),
        (["--max_new_tokens", "500"], "exceed the student's context"),
        (["--temperature", "-1"], "temperature must be >= 0"),
        (["--draft_length", "-2"], "draft_length"),
        (["--num_samples", "0"], "num_samples must be >= 1"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--color", "maybe"], "color must be one of"),
        (["--prompt", ""], "the prompt is empty"),
        (["--model_name_or_path", "./missing"], "./missing does not exist"),
        (["--horizon", "0"], "horizon must be > 0"),
    ],
)
def test_wrong_rollouts_are_one_line(models: Path, tmp_path: Path, run: Run, more: list[str], message: str) -> None:
    folder = tmp_path / "run"
    error = one_line_error(*run(*rollout_options(models, "--prompt", "Hello", "--output_dir", folder, *more)))
    assert message in error
    assert not folder.exists()


def test_rollout_needs_a_teacher_unless_the_student_is_alone(models: Path, run: Run) -> None:
    options = ["rollout", "--model_name_or_path", models / "student", "--prompt", "a", "--max_new_tokens", 3]
    assert "--teacher_model_name_or_path" in one_line_error(*run(*options))
    assert run(*options, "--policy", "student")[0] == 0


# ---- evaluate


def evaluate_options(models: Path, model: Path, output_dir: Path, *more: Any) -> list[Any]:
    return [
        *("evaluate", "--model_name_or_path", model, "--dataset_name", models / "train.jsonl"),
        *("--output_dir", output_dir, "--max_new_tokens", 8, "--seeds", "10,20", *more),
    ]


def test_evaluate_writes_summary_and_rows(models: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "scores"
    options = evaluate_options(models, models / "student", folder, "--max_samples", 3, "--json")
    code, out, err = run(*options, "--teacher_model_name_or_path", models / "teacher")
    assert code == 0, err
    summary = json.loads(out)
    assert set(summary["scores"]) == {"10", "20"} and summary["examples"] == 3
    assert summary["reference_losses"]["forward_kl"] > 0
    assert json.loads((folder / "summary.json").read_text()) == {
        name: value for name, value in summary.items() if name != "output_dir"
    }
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["index"]) for row in rows] == [(seed, index) for seed in (10, 20) for index in range(3)]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in metrics] == [10, 20]
    config = read_config(folder)
    assert config is not None and config["seeds"] == [10, 20]
    assert "ROUGE-L" in err and "cross-entropy" in err and "KL(teacher, model)" in err


def test_evaluate_without_a_folder_takes_a_free_one(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = evaluate_options(
        models, models / "llama", tmp_path, "--seeds", 1, "--max_samples", 1, "--max_new_tokens", 2
    )
    del options[options.index("--output_dir") : options.index("--output_dir") + 2]
    assert run(*options)[0] == run(*options)[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["evaluate", "evaluate-2"]
    config = tmp_path / "runs" / "evaluate" / "config.yaml"
    assert run("evaluate", "--config", config, "--output_dir", tmp_path / "again")[0] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "1,x"], "seeds takes integers"),
        (["--seeds", "1,1"], "seeds must be one or more different integers"),
        (["--max_samples", "0"], "max_samples must be >= 1"),
        (["--max_new_tokens", "500"], "context of 128"),
        (["--dataset_name", "missing.jsonl"], "no file or folder missing.jsonl"),
        (["--top_p", "2"], "top_p"),
        (["--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_wrong_evaluations_are_one_line(models: Path, tmp_path: Path, run: Run, more: list[str], message: str) -> None:
    folder = tmp_path / "run"
    code, out, err = run(*evaluate_options(models, models / "student", folder, *more, "--json"))
    assert (code, out) == (2, "") and message in err.splitlines()[-1]
    assert not folder.exists()


def test_data_without_answers_cannot_be_scored(models: Path, tmp_path: Path, run: Run) -> None:
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    code, _, err = run(
        *evaluate_options(models, models / "student", tmp_path / "run", "--dataset_name", data, "--json")
    )
    assert code == 2 and "row 1 of the prepared data set has no reference" in err.splitlines()[-1]


# ---- demo


def test_demo_replaces_an_earlier_demo_and_nothing_else(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from switchkd import demo

    def stand_in(output_dir: Path, *, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
        say(f"seed {seed}")
        return {"seconds": 1.0}

    monkeypatch.setattr(demo, "run_demo", stand_in)
    for seed in (1, 2):
        code, out, err = run("demo", "--output_dir", tmp_path / "demo", "--seed", seed, "--json")
        assert (code, out, err) == (0, '{"seconds":1.0}\n', f"seed {seed}\n")
        config = read_config(tmp_path / "demo")
        assert config is not None and config["seed"] == seed
    assert run(*rollout_options(models, "--prompt", "a", "--output_dir", tmp_path / "other"))[0] == 0
    assert "holds another run" in one_line_error(*run("demo", "--output_dir", tmp_path / "other"))


# ---- bad input: one clear line, exit code 2, nothing lost


def bad_data(folder: Path, kind: str) -> list[Any]:
    """The options that make a good run bad, and write the files they need."""
    path = folder / "bad.jsonl"
    if kind == "missing file":
        return ["--dataset_name", folder / "nothing.jsonl"]
    if kind == "malformed line":
        path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    elif kind == "unknown columns":
        write_rows(path, [{"question": "a", "reply": "b"}])
    elif kind == "nothing within the limit":
        write_rows(path, [{"prompt": "abcdef", "completion": "b"}])
        return ["--dataset_name", path, "--max_prompt_length", 3]
    elif kind == "prompt longer than the context":
        write_rows(path, [{"prompt": "a" * 125, "completion": "b"}])
    elif kind == "no records":
        path.write_text("")
    elif kind == "no answers":
        write_rows(path, [{"prompt": "a"}])
        return ["--dataset_name", path, "--method", "kd"]
    return ["--dataset_name", path]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing file", "no file or folder"),
        ("malformed line", "bad.jsonl, line 2: malformed JSON"),
        ("unknown columns", "unknown columns (question, reply)"),
        ("nothing within the limit", "all 1 prompts are longer than max_prompt_length=3"),
        ("prompt longer than the context", "exceed the student's context of 128 tokens"),
        ("no records", "is empty"),
        ("no answers", "reads dataset answers"),
    ],
)
def test_bad_data_are_one_line(models: Path, tmp_path: Path, run: Run, kind: str, message: str) -> None:
    assert message in one_line_error(*run(*train_options(models, tmp_path / "run", *bad_data(tmp_path, kind))))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--initial_threshold", "0.7"], "initial_threshold must lie in [0, ln 2"),
        (["--final_ratio", "0"], "final_ratio must lie in (0, 1]"),
        (["--schedule", "steps"], "schedule must be one of exponential, linear, constant, increasing"),
        (["--method", "swich"], "unknown method 'swich'; did you mean 'switch'?"),
        (["--divergence", "kl"], "unknown divergence 'kl'"),
        (["--method", "sft", "--final_ratio", "0.5"], "final_ratio=0.5 does nothing with method 'sft'"),
        (["--lora_r", "4"], "lora_r does nothing without use_peft"),
        (["--student_layers", "0", "--student_config", "{}"], "give one of them"),
        (["--student_layers", "9"], "has layers 0 to 1, not 9"),
        (["--student_layers", "first"], "student_layers takes integers"),
        (["--eval_strategy", "steps"], "eval_strategy=steps needs --eval_dataset_name"),
        (["--dataset_test_split", "test"], "is a file and has one split only"),
        (["--max_train_samples", "0"], "max_train_samples must be >= 1"),
        (["--model_init_kwargs", "{dtype: 1}"], "model_init_kwargs must be a JSON object"),
        (["--report_to", "nowhere"], "nowhere is not supported"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be >= 1"),
        (["--max_steps", "0"], "nothing to train"),
        (["--model_name_or_path", "./missing"], "./missing does not exist"),
    ],
)
def test_bad_options_are_one_line(models: Path, tmp_path: Path, run: Run, more: list[str], message: str) -> None:
    assert message in one_line_error(*run(*train_options(models, tmp_path / "run", *more)))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_missing_essentials_are_named(models: Path, run: Run) -> None:
    data = ["--dataset_name", models / "train.jsonl"]
    assert "--dataset_name" in one_line_error(*run("train"))
    assert "--model_name_or_path" in one_line_error(*run("train", *data))
    assert "layers from" in one_line_error(*run("train", *data, "--student_layers", 0))
    assert "--tokenizer_name_or_path" in one_line_error(*run("train", *data, "--student_config", "{}"))
    student = ["--model_name_or_path", models / "student", "--use_cpu"]
    assert "needs a teacher" in one_line_error(*run("train", *data, *student, "--max_completion_length", 8))
    assert "--dataset_name" in one_line_error(*run("evaluate", "--model_name_or_path", models / "student"))
    assert "--model_name_or_path" in one_line_error(*run("rollout", "--prompt", "a"))


def test_different_tokenizers_are_refused_with_the_first_ids(models: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(models / "teacher", tmp_path / "teacher")
    shuffled = [*TINY_VOCABULARY[:5], *TINY_VOCABULARY[6:-1], TINY_VOCABULARY[5], TINY_VOCABULARY[-1]]
    build_tokenizer(shuffled).save_pretrained(tmp_path / "teacher")
    other = ["--teacher_model_name_or_path", tmp_path / "teacher"]
    for options in (
        train_options(models, tmp_path / "run", *other),
        rollout_options(models, "--prompt", "a", *other),
    ):
        assert "different tokenizers" in (error := one_line_error(*run(*options))) and "first 5 (" in error


def test_no_end_of_sequence_anywhere_is_refused(models: Path, tmp_path: Path, run: Run) -> None:
    for name in ("student", "teacher"):
        shutil.copytree(models / name, tmp_path / name)
        for file, keys in (
            ("config.json", ("eos_token_id", "bos_token_id", "pad_token_id")),
            ("generation_config.json", ("eos_token_id", "bos_token_id", "pad_token_id")),
            ("tokenizer_config.json", ("eos_token", "pad_token")),
        ):
            content = json.loads((tmp_path / name / file).read_text())
            (tmp_path / name / file).write_text(json.dumps({**content, **dict.fromkeys(keys)}))
    names = ["--model_name_or_path", tmp_path / "student", "--teacher_model_name_or_path", tmp_path / "teacher"]
    for options in (
        train_options(models, tmp_path / "run", *names),
        rollout_options(models, "--prompt", "a", *names),
    ):
        assert "no end-of-sequence token" in one_line_error(*run(*options))


def test_a_bug_keeps_its_traceback(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rollout, "make_policy", broken)
    with pytest.raises(ZeroDivisionError):
        main([str(option) for option in rollout_options(models, "--prompt", "a")])


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
    console = cli.Console()
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
    console = cli.Console(json=True)
    console.say("a"), console.progress("b"), console.result({})
    folder = RunFolder(str(tmp_path / "run"), "train")
    folder.check(), folder.claim({}), folder.append("metrics.jsonl", [{}])
    assert capsys.readouterr() == ("", "") and not (tmp_path / "run").exists()


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


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
    assert one_line_error(done.returncode, done.stdout, done.stderr).endswith("'student_layers'")


# ---- shipped examples

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("[!c]*.yaml"))


def test_examples_are_shipped() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_shipped_example_is_a_valid_config(path: Path, tmp_path: Path) -> None:
    from switchkd.commands.train_options import read_options
    from switchkd.methods import get_method
    from switchkd.training.config import resolve_fraction, resolve_objective, resolve_policy

    options = train.parser().resolve(["--config", str(path), "--output_dir", str(tmp_path), "--bf16", "false"])
    run_args, config = read_options(options)
    method = get_method(config.method)
    resolve_objective(method, config), resolve_policy(method, config), resolve_fraction(method, config)
    assert (run_args.dataset_name is not None and config.teacher_model_name_or_path) or method.name == "sft"
    assert set(yaml.safe_load(path.read_text())) <= set(vars(options))


def test_a_rank_is_not_printed_as_nats(models: Path, run: Run) -> None:
    options = rollout_options(models, "--prompt", "Hello", "--policy", "skd", "--teacher_top_k", 5)
    out = run(*options)[1]
    assert "mean rank of the drafted tokens" in out and "replaced beyond rank 5" in out and "nats" not in out
    result = json.loads(run(*options, "--json")[1])
    assert result["unit"] == result["rollouts"][0]["unit"] == "rank"
    assert result["divergence_rank"] >= 1 and "divergence_nats" not in result
