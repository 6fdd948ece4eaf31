"""The scripts that kill, damage and watch long runs work, and their short form finds nothing."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.slow
def test_a_few_faults_lose_nothing(capsys):
    """Kills and damage at random; the long form is benchmarks/chaos.py by itself."""
    import_module("chaos").main(["--cases", "2", "--minutes", "2", "--seed", "3", "--only", "train"])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["equal"] + result["refused"] == 2 and sum(result["faults"].values()) >= 2
    assert result["lost"] == result["tracebacks"] == result["silent_differences"] == []


def test_chaos_sees_a_difference_a_missing_file_and_a_damaged_one(tmp_path):
    chaos = import_module("chaos")
    one, two = ({"a": torch.ones(2), "rows": [{"loss": 1.0}]} for _ in range(2))
    assert chaos.difference(one, two) is None
    assert chaos.difference(one, {**two, "a": torch.tensor([1.0, 1.0 + 1e-7])}) == "a"
    assert chaos.difference(one, {**two, "rows": [{"loss": 1.5}]}) == "rows"
    assert chaos.difference(one, {"a": one["a"]}).startswith("files")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "time/train_s": 3.0}\n')
    (tmp_path / "answers.jsonl").write_text("{}\n")
    assert chaos.state(tmp_path) == {"metrics.jsonl": [{"step": 1, "loss": 2.0}]}
    for _ in range(30):
        done = chaos.damage(tmp_path, __import__("random").Random(_))
        assert done is None or done.split()[0] in ("cut", "flip", "remove")


def test_long_run_measures_memory_time_and_files(tmp_path, capsys, monkeypatch):
    tokenizer = build_tokenizer()
    for name, model in {"student_warm_start": build_gpt2(seed=1), "teacher": build_gpt2(seed=2, n_layer=3)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RAGGED_ROWS))
    threads = torch.get_num_threads()
    words = ["--demo_dir", str(tmp_path), "--steps", "40", "--batch_size", "4", "--max_completion_length", "6"]
    result = import_module("long_run").main(words)
    torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == result
    assert result["checkpoints_at_most"] == 2 and result["steps"] == 40 and result["skipped_steps"] == 0
    assert not {"checkpoints", "files"} & set(result["failed"])
