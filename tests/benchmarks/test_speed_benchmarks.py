"""The scripts that claim speed run, end in one line of JSON and compare what they say; here on tiny pairs."""

import json
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch
from helpers.pairs import make_pair
from helpers.tiny import build_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny_pair(**_):
    student, teacher = make_pair()
    return student, teacher, torch.randint(1, 96, (16, 4), generator=torch.Generator().manual_seed(0))


def last_line(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_rollout_benchmark_measures_every_peer(monkeypatch, capsys):
    """Both scripts called `calibrate` by an old name of an option, and no test noticed."""
    script = import_module("rollout")
    monkeypatch.setattr(script, "gpt2_pair", tiny_pair)
    words = "rollout.py --pairs gpt2 --batches 2 --shares 0.5 --new_tokens 8 --repeats 1 --threads 1 --device cpu"
    monkeypatch.setattr(sys, "argv", words.split())
    script.main()
    result = last_line(capsys)
    assert result["benchmark"] == "rollout"
    assert all(value > 0 for line in result["lines"] for name, value in line.items() if name.startswith("speedup"))
    assert {line.get("policy") for line in result["lines"]} >= {"student", "teacher", None}


def test_step_benchmark_runs_without_trl_where_it_is_not_asked_for(monkeypatch, capsys):
    script = import_module("step")
    monkeypatch.setattr(script, "gpt2_pair", tiny_pair)
    monkeypatch.setattr(script.AutoTokenizer, "from_pretrained", lambda *_: build_tokenizer())
    words = "step.py --pair gpt2 --batch 2 --completion 8 --rounds 1 --warmup 0 --steps 1 --threads 1"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--contenders", "student", "switch_53"])
    script.main()
    result = last_line(capsys)
    assert result["results"].keys() == {"student", "switch_53"}
    assert all(one["seconds"] > 0 for one in result["results"].values())
    assert result["versions"]["torch"] == metadata.version("torch")
