"""What tests of the command line share: how a command is called, options of short runs, one line of error."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., tuple[int, str, str]]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


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


def rollout_options(models: Path, *more: Any) -> list[Any]:
    return [
        *("rollout", "--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher"),
        *("--max_completion_length", 12, *more),
    ]


def evaluate_options(models: Path, model: Path, output_dir: Path, *more: Any) -> list[Any]:
    return [
        *("evaluate", "--model_name_or_path", model, "--dataset_name", models / "train.jsonl"),
        *("--output_dir", output_dir, "--max_completion_length", 8, "--decoding_seeds", "10,20", *more),
    ]
