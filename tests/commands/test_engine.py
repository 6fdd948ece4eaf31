"""Commands whose rollouts vLLM writes, on a stub of it: what they print is what the transformers engine gives."""

import json

import pytest
from helpers import vllm_stub
from helpers.vllm_stub import StubChild

from switchkd.engine.vllm import engine as engine_module


@pytest.fixture
def children(monkeypatch):
    """Every stub process that was started."""
    started = []
    vllm_stub.install(monkeypatch)
    monkeypatch.setattr(engine_module, "Child", lambda *given: started.append(StubChild(*given)) or started[-1])
    return started


def pair(models):
    return ("--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher", "--json")


def test_rollout_and_calibrate_write_with_vllm_what_they_write_without(run, models, children):
    written = []
    options = ("--prompt", "Once", "--prompt", "Two of", "--max_completion_length", 10, "--initial_threshold", 0.05)
    for engine in ((), ("--rollout_engine", "vllm", "--draft_length", 2)):
        code, out, err = run("rollout", *pair(models), *options, *engine)
        assert code == 0, err
        written.append(json.loads(out)["rollouts"])
    assert [row["completion_ids"] for row in written[0]] == [row["completion_ids"] for row in written[1]]
    assert [row["author"] for row in written[0]] == [row["author"] for row in written[1]]
    assert children[0].closed and children[0].options["speculative_config"]["num_speculative_tokens"] == 2
    found = []
    options = ("--dataset_name", models / "train.jsonl", "--max_samples", 8, "--max_completion_length", 6)
    options += ("--columns", "prompt=completion,completion=prompt", "--max_rounds", 2)
    for engine in ((), ("--rollout_engine", "vllm")):
        code, out, err = run("calibrate", *pair(models), *options, *engine)
        if engine:  # one of these prompts has one token
            assert code == 2 and "has one token; vLLM samples a token after the prefill" in err
            assert children[1].closed
        found.append(code)
    assert found == [0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--vllm_python", "python"), "vllm_python=python does nothing: rollout_engine is transformers; remove it"),
        (("--rollout_engine", "vlm"), "rollout_engine must be one of transformers, vllm, got 'vlm'"),
        (("--rollout_engine", "vllm", "--policy", "student"), "needs a policy that asks the teacher"),
        (("--rollout_engine", "vllm", "--cuda_graphs"), "cuda_graphs does nothing: rollout_engine is vllm; remove it"),
    ],
)
def test_options_of_the_engine_that_cannot_be_are_refused_in_one_line(run, models, children, options, message):
    code, _, err = run("rollout", *pair(models), "--prompt", "Once", *options)
    assert code == 2 and message in err and err.strip().count("\n") == 0
