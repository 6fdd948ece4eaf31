"""The scripts that claim speed run, end in one line of JSON and compare what they say; here on tiny pairs."""

import json
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch
from helpers.pairs import make_pair
from helpers.tiny import build_tokenizer

from switchkd.divergences import generalized_jsd

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


def test_rollout_benchmark_compares_static_shapes_on_a_pair_made_in_place(monkeypatch, capsys):
    script = import_module("rollout")
    monkeypatch.setattr(import_module("static_rollout"), "threshold_for", lambda *_: 0.1)
    words = "rollout.py --pairs qwen3 --sizes tiny --batches 2 --shares 0.5 --new_tokens 8 --repeats 1 --threads 1"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--device", "cpu", "--fixed", "2"])
    script.main()
    cell, student = last_line(capsys)["lines"]
    assert cell["tokens_per_s"].keys() == {"plain", "one_graph", "block", "static", "refilled", "static_2"}
    assert cell["share_of_noise_jsd_and_draws"] > 0.0 and 0.0 < cell["teacher_share"] < 1.0
    assert 0.0 < student["share_of_bound"] < 1.0


def test_the_pair_of_qwen3_shapes_agrees_and_differs_as_real_pairs_do():
    """Neither certain nor flat, and divergences on both sides of a threshold; whatever the sizes."""
    student, teacher, prompts = import_module("pairs").qwen3_pair("tiny", dtype=torch.float32)
    with torch.no_grad():
        rows = [model(prompts[:16]).logits.log_softmax(-1).flatten(0, 1) for model in (student, teacher)]
    for own in rows:
        entropy = -(own.exp() * own).sum(-1).mean()
        assert 1.0 < float(entropy) < 4.5
    jsd = generalized_jsd(*rows)
    assert 0.01 < float(jsd.quantile(0.1)) < float(jsd.quantile(0.9)) < 0.6
