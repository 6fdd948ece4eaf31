"""Checkpoints are whole or they do not count, and a resumed run is the run that was not interrupted."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.command_line import environment, one_line_error, train_options
from helpers.tiny import build_gpt2, build_tokenizer
from transformers import AutoModelForCausalLM

from switchkd.errors import UserError
from switchkd.training.checkpoints import MANIFEST, newest_whole, problem_of

STEADY = ("--draft_length", 4, "--initial_threshold", 0.3, "--log_completions", "--save_total_limit", 2)


def options(models, folder, *more):
    words = train_options(models, folder, *STEADY, *more)
    words[words.index("--save_steps") + 1] = 1
    words[words.index("--max_steps") + 1] = 3
    return words


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """A run of three steps whose log is a mean of two steps, with checkpoints 2 and 3."""
    from switchkd.__main__ import main

    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([str(word) for word in options(models, folder, "--logging_steps", 2)]) == 0
    return folder


def cut_to(folder, step):
    """Leave what was there when the process died after the checkpoint of a step: some more rows, no model."""
    for name in ("summary.json", "model.safetensors"):
        (folder / name).unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            for path in checkpoint.iterdir():
                path.unlink()
            checkpoint.rmdir()


def rows(folder, name="metrics.jsonl"):
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.endswith(("_s", "_runtime", "_per_second"))}
        for row in lines
    ]


def copied(finished, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    text = (folder / "config.yaml").read_text().replace(str(finished), str(folder))
    (folder / "config.yaml").write_text(text)
    return folder


def test_a_checkpoint_lists_every_file_of_it(finished):
    folder = finished / "checkpoint-3"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["step"] == 3
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert problem_of(folder) is None
    assert torch.load(folder / "training_args.bin", weights_only=False).save_total_limit == 2
    assert sorted(path.name for path in finished.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no manifest", "damaged manifest", "empty"])
@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "text_source_0.pt", "model.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(finished, models, tmp_path, run, damage, name):
    folder = copied(finished, tmp_path)
    cut_to(folder, 3)
    path = folder / "checkpoint-3" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "changed":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    elif damage == "empty":
        for file in path.parent.iterdir():
            file.unlink()
    else:
        (path.parent / MANIFEST).write_text("{") if damage == "damaged manifest" else (path.parent / MANIFEST).unlink()
    wrong = {"no manifest": "not written to its end", "empty": "not written to its end", "damaged manifest": MANIFEST}
    expected = wrong.get(damage, name)
    whole, passed_over = newest_whole(folder)
    assert whole == folder / "checkpoint-2" and len(passed_over) == 1 and expected in passed_over[0]
    words = options(models, tmp_path / "other", "--logging_steps", 2)
    error = one_line_error(*run(*words, "--resume_from_checkpoint", folder / "checkpoint-3"))
    assert expected in error and f"go on from {folder / 'checkpoint-2'}" in error


def test_the_newest_whole_checkpoint_is_taken_and_the_run_ends_as_the_whole_one(finished, models, tmp_path, run):
    """Its rows used to be means over fewer steps, and completions stood twice."""
    folder = copied(finished, tmp_path)
    cut_to(folder, 3)
    (folder / "checkpoint-3" / "optimizer.pt").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # the power went
    code, _, err = run(*options(models, folder, "--logging_steps", 2), "--resume_from_checkpoint", "true")
    assert code == 0, err
    assert "checkpoint-3 is passed over: optimizer.pt is missing" in err
    assert rows(folder) == rows(finished)
    assert rows(folder, "completions.jsonl") == rows(finished, "completions.jsonl")
    for name in ("model.safetensors", "checkpoint-3/optimizer.pt"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    one, two = (json.loads((path / "summary.json").read_text()) for path in (folder, finished))
    assert one["teacher_passes"] == two["teacher_passes"] and one["loss_last"] == two["loss_last"]


def test_a_finished_run_that_is_resumed_trains_no_further(finished, models, tmp_path, run):
    """It made an eleventh step of ten."""
    folder = copied(finished, tmp_path)
    code, _, err = run(*options(models, folder, "--logging_steps", 2), "--resume_from_checkpoint", "true")
    assert code == 0, err
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_auto_starts_where_there_is_nothing_to_go_on_from(models, tmp_path, run):
    code, _, err = run(*options(models, tmp_path / "run"), "--resume_from_checkpoint", "auto")
    assert code == 0, err
    error = one_line_error(*run(*options(models, tmp_path / "new"), "--resume_from_checkpoint", "true"))
    assert "holds no whole checkpoint" in error


def test_from_python_a_damaged_checkpoint_is_refused_and_the_newest_whole_one_found(make_trainer):
    def trainer():
        given = {
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
            "initial_threshold": 0.3,
            "draft_length": "4",
        }
        return make_trainer(build_gpt2(seed=1), build_gpt2(seed=2), **given)

    first = trainer()
    first.train()
    run = newest_whole(__import__("pathlib").Path(first.args.output_dir))[0].parent
    (run / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-2 cannot be gone on from: scheduler\.pt is missing"):
        trainer().train(resume_from_checkpoint=str(run / "checkpoint-2"))
    again = trainer()
    with pytest.warns(UserWarning, match="checkpoint-2 is passed over"):
        again.train(resume_from_checkpoint=True)
    for one, two in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("damage", ["a line", "a digit", "a missing line"])
def test_a_damaged_log_is_written_again_from_the_checkpoint(finished, models, tmp_path, run, damage):
    """A changed digit of an earlier row stayed."""
    folder = copied(finished, tmp_path)
    cut_to(folder, 2)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    changed = {"a line": "{broken\n", "a digit": lines[0].replace('"step": 2', '"step": 1'), "a missing line": ""}
    (folder / "metrics.jsonl").write_text("".join([changed[damage], *lines[1:]]))
    code, _, err = run(*options(models, folder, "--logging_steps", 2), "--resume_from_checkpoint", "true")
    assert code == 0, err
    assert rows(folder) == rows(finished)


def test_a_damaged_line_of_the_completions_is_named(finished, models, tmp_path, run):
    folder = copied(finished, tmp_path)
    cut_to(folder, 2)
    text = (folder / "completions.jsonl").read_text()
    (folder / "completions.jsonl").write_text("{broken\n" + text)
    error = run(*options(models, folder, "--logging_steps", 2), "--resume_from_checkpoint", "true")[2]
    assert "completions.jsonl, line 1 is damaged; remove that line to go on" in error and "Traceback" not in error


def test_the_same_command_begins_a_run_again_that_was_killed_before_its_first_checkpoint(
    finished, models, tmp_path, run
):
    """It was refused: the folder holds another run."""
    folder = copied(finished, tmp_path)
    cut_to(folder, 0)
    words = [*options(models, folder, "--logging_steps", 2), "--resume_from_checkpoint", "auto"]
    (folder / "config.yaml.part").write_text("# W")
    code, _, err = run(*words)
    assert code == 0, err
    assert rows(folder) == rows(finished)
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    cut_to(folder, 0)
    assert "the saved run has seed=42, this one 43" in run(*words, "--seed", 43)[2]
    assert "holds another run" in run(*words[:-2])[2]
    for path in folder.iterdir():
        if path.is_file() and path.name != "_switchkd.lock":
            path.unlink()
    assert run(*words)[0] == 0  # killed before it wrote anything but its lock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_with_a_checkpoint_and_its_exit_code(models, tmp_path, number):
    """SIGTERM ended it at once, with nothing saved."""
    folder = tmp_path / "run"
    words = options(models, folder, "--logging_steps", 1)
    words[words.index("--max_steps") + 1] = 10_000
    words[words.index("--save_steps") + 1] = 10_000
    process = subprocess.Popen(
        [sys.executable, "-m", "switchkd", *map(str, words)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # Ignored where the tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    limit = time.monotonic() + 60
    while time.monotonic() < limit and not (folder / "metrics.jsonl").exists():
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    last = err.strip().splitlines()[-1]
    found, _ = newest_whole(folder)
    assert found is not None and last.startswith(f"switchkd: stopped by {number.name} at step ")
    assert last.endswith(f"continue with --resume_from_checkpoint true, from {found}")
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("changed", ["data", "teacher"])
def test_other_data_or_another_teacher_were_accepted_in_silence(finished, models, tmp_path, run, changed):
    folder = copied(finished, tmp_path)
    cut_to(folder, 2)
    other = tmp_path / "other"
    if changed == "data":
        text = (models / "train.jsonl").read_text().replace("a", "b", 1)
        (tmp_path / "train.jsonl").write_text(text)
        place = (tmp_path / "train.jsonl", "--dataset_name")
    else:
        model = AutoModelForCausalLM.from_pretrained(models / "teacher")
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.bias[0] += 1.0
        model.save_pretrained(other)
        build_tokenizer().save_pretrained(other)
        place = (other, "--teacher_model_name_or_path")
    # The same path as before, other contents.
    words = options(models, folder, "--logging_steps", 2)
    config = (folder / "config.yaml").read_text().replace(str(words[words.index(place[1]) + 1]), str(place[0]))
    (folder / "config.yaml").write_text(config)
    words[words.index(place[1]) + 1] = place[0]
    code, _, err = run(*words, "--resume_from_checkpoint", "true")
    what = "training data" if changed == "data" else "teacher"
    assert code == 2 and f"the {what} are not those that" in err and "Traceback" not in err
    code, _, err = run(*words, "--resume_from_checkpoint", "true", "--allow_other_inputs")
    assert code == 0, err
    assert "allow_other_inputs: true" in (folder / "config.yaml").read_text()
