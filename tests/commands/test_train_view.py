"""What `switchkd train` shows while it trains, and what it says at its end: completions, the best step, the push."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import Run, one_line_error, train_options
from transformers import AutoModelForCausalLM

from switchkd.cli.run_folder import read_config
from switchkd.commands import train_options as train_options_module
from switchkd.models import hub
from switchkd.training.trainer import SwitchTrainer


def logged(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# ---- completions


def test_a_terminal_gets_the_sampled_completions_at_every_log(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a pipe that is to be treated as a terminal
    monkeypatch.setenv("COLUMNS", "90")
    options = train_options(models, tmp_path / "run", "--log_completions", "--num_completions_to_log", 2)
    code, _, err = run(*options, "--initial_threshold", 0.4)
    assert code == 0
    plain = re.sub(r"\x1b\[[\d;]*m", "", err)
    rows = logged(tmp_path / "run", "completions.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    for step in (1, 2):
        table = plain.split(f"step {step}: completions")[1].split("╰")[0]
        assert all(row["prompt"].split("\n")[0][:8] in table for row in rows if row["step"] == step)
        assert len(re.findall(r"\d+%", table)) == 2
    # The run of the teacher that a row has is marked.
    assert any("teacher" in row["author"] for row in rows) and "\x1b[1;4;" in err
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}


def test_a_pipe_gets_plain_lines_only(models: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run(*train_options(models, tmp_path / "run", "--log_completions", "--initial_threshold", 0.3))
    assert code == 0 and len(logged(tmp_path / "run", "completions.jsonl")) == 8
    assert not re.search("[\x1b─│╭]", out + err) and "completions\n" not in err
    assert [line.split(":")[0] for line in err.splitlines()] == ["step 1/2", "step 2/2"]


def test_steps_without_a_rollout_show_none_again(make_trainer: Any) -> None:
    from helpers.tiny import build_gpt2

    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), log_completions=True, max_steps=1, logging_steps=1)
    trainer.train()
    assert len(trainer.logged_completions) > 0
    trainer.log({"loss": 1.0})
    assert trainer.logged_completions == []


# ---- the best step


def test_the_best_step_is_said_and_its_scores_are_those_of_the_summary(models: Path, tmp_path: Path, run: Run) -> None:
    """The summary had the last evaluation's loss, of weights that were thrown away."""
    # A learning rate that ruins the student: the first evaluation is the best.
    options = train_options(
        models, tmp_path / "run", "--eval_dataset_name", models / "train.jsonl", "--learning_rate", 0.3
    )
    every_step = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--lr_scheduler_type", "constant"]
    code, out, err = run(*options, *every_step, "--max_steps", 3, "--load_best_model_at_end")
    assert code == 0, err
    evaluated = {row["step"]: row["eval_loss"] for row in logged(tmp_path / "run") if "eval_loss" in row}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert best < 3 and evaluated[best] < evaluated[3]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best"] == {"step": best, "metric": "eval_loss", "value": pytest.approx(evaluated[best])}
    assert summary["eval_loss"] == pytest.approx(evaluated[best])
    assert f"best: step {best}, eval_loss {evaluated[best]:.4g}; loaded and saved" in out
    assert re.search(rf"start +end +best: step {best}\n", out)
    saved, checkpoint = (
        AutoModelForCausalLM.from_pretrained(path)
        for path in (tmp_path / "run", tmp_path / "run" / f"checkpoint-{best}")
    )
    assert all(torch.equal(*pair) for pair in zip(saved.parameters(), checkpoint.parameters(), strict=True))


def test_without_load_best_model_at_end_no_step_is_called_the_best(models: Path, tmp_path: Path, run: Run) -> None:
    options = train_options(models, tmp_path / "run", "--eval_dataset_name", models / "train.jsonl", "--json")
    code, out, err = run(*options, "--eval_strategy", "steps", "--eval_steps", 1)
    assert code == 0 and "best" not in json.loads(out) and "best:" not in err


# ---- the hub, and a machine without a GPU


def unreachable() -> str:
    return "no route"


def test_a_model_that_cannot_be_pushed_is_saved(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer created the repository first: a traceback of 40 lines, and no training."""
    monkeypatch.setattr(hub, "problem", unreachable)
    folder = tmp_path / "mine"
    code, out, err = run(*train_options(models, folder, "--push_to_hub", "--json"))
    assert code == 2
    assert json.loads(out)["steps"] == 2 and (folder / "model.safetensors").is_file()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    assert [line for line in err.splitlines() if line.startswith("switchkd: error:")] == [
        f"switchkd: error: the model is saved in {folder}, but pushing it failed (no route); push it with: "
        f"hf upload mine {folder}"
    ]
    assert err.count("switchkd: warning: push_to_hub: the hub cannot be reached (no route)") == 1
    config = read_config(folder)
    assert config is not None and config["push_to_hub"] is True


def test_a_push_that_fails_at_the_end_loses_nothing(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: SwitchTrainer) -> None:
        assert (tmp_path / "run" / "summary.json").is_file()
        raise ConnectionError("gone\nsince noon")

    monkeypatch.setattr(SwitchTrainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr(SwitchTrainer, "push_to_hub", refuse)
    monkeypatch.setattr(hub, "problem", lambda: None)
    more = ["--push_to_hub", "--hub_token", "hf_x", "--hub_model_id", "me/it", "--hub_strategy", "end"]
    code, out, err = run(*train_options(models, tmp_path / "run", *more))
    assert code == 2 and "2 steps in" in out
    assert "but pushing it failed (gone since noon); push it with: hf upload me/it" in err.splitlines()[-1]
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_push_without_a_token_is_refused_before_the_training(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "problem", lambda: None)
    monkeypatch.setattr("switchkd.commands.pushing.get_token", lambda: None)
    error = one_line_error(*run(*train_options(models, tmp_path / "run", "--push_to_hub")))
    assert "hf auth login" in error and "--hub_token" in error


def test_bf16_without_a_gpu_is_one_line_and_a_model(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused: "Your setup doesn't support bf16/gpu"."""
    monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr("switchkd.models.loading.default_device", lambda: torch.device("cpu"))
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the Trainer would use it")
    options = train_options(models, tmp_path / "run", "--bf16", "--initial_threshold", 0.3)
    options.remove("--use_cpu")
    code, _, err = run(*options)
    assert code == 0 and (tmp_path / "run" / "model.safetensors").is_file()
    assert err.count("warning") == 1 and "no GPU for bf16 here: this run computes in float32 on the CPU" in err
    config = read_config(tmp_path / "run")
    assert config is not None and config["bf16"] is False
    # Who asks for the CPU gets bfloat16 on it.
    parser = train_options_module.parser()
    asked = parser.resolve([str(option) for option in train_options(models, tmp_path / "b", "--bf16")[1:]])
    assert train_options_module.read_options(asked)[1].bf16
