"""Commands whose rollouts vLLM writes, on a stub of it: what they print is what the transformers engine gives."""

import json

import pytest
from helpers import vllm_stub
from helpers.command_line import evaluate_options
from helpers.vllm_stub import StubChild

from switchkd import UserError
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


def test_a_student_alone_rolls_out_with_vllm_what_it_writes_without(run, models, children):
    written = []
    options = ("--policy", "student", "--prompt", "O", "--max_completion_length", 10, "--seed", 3, "--json")
    for engine in ((), ("--rollout_engine", "vllm", "--draft_length", 2)):
        code, out, err = run("rollout", "--model_name_or_path", models / "student", *options, *engine)
        assert code == 0, err
        written.append(json.loads(out)["rollouts"])
    assert [row["completion_ids"] for row in written[0]] == [row["completion_ids"] for row in written[1]]
    # vLLM reads the folder that was named: nothing is written for it.
    assert children[0].options["model"] == str(models / "student") and "speculative_config" not in children[0].options


def test_evaluate_scores_the_answers_of_vllm_as_it_scores_those_of_transformers(run, models, children, tmp_path):
    """One engine writes all test sets, and a stopped evaluation goes on; a finished one starts no engine."""
    answers = []
    (tmp_path / "again.jsonl").write_text((models / "train.jsonl").read_text())
    sets = ("--dataset_name", models / "train.jsonl", tmp_path / "again.jsonl")
    vllm = ("--rollout_engine", "vllm")
    for engine, folder in (((), tmp_path / "plain"), (vllm, tmp_path / "vllm")):
        options = evaluate_options(models, models / "student", folder, *sets, "--max_samples", 3, "--json", *engine)
        code, out, err = run(*options)
        assert code == 0, err
        found = json.loads(out)["datasets"]
        assert found["train"]["decoding"]["decoder"] == ("vllm" if engine else "roll_out")
        rows = [(folder / name / "rows.jsonl").read_text() for name in ("train", "again")]
        answers.append((rows, {name: one["scores"] for name, one in found.items()}))
    assert answers[0] == answers[1]
    assert len(children) == 1 and children[0].closed
    summary = tmp_path / "vllm" / "train" / "summary.json"
    before = json.loads(summary.read_text())
    assert run(*options, "--resume")[0] == 0 and len(children) == 1
    summary.unlink()
    code, _, err = run(*options, "--resume")
    assert code == 0 and len(children) == 2 and children[1].closed, err
    assert json.loads(summary.read_text())["scores"] == before["scores"]
    code, _, err = run(*options, "--resume", "--rollout_engine", "transformers")
    assert code == 2 and "written with rollout_engine='vllm', now it is 'transformers'" in err


def test_an_evaluation_whose_engine_dies_keeps_its_answers_and_goes_on(run, models, children, tmp_path, monkeypatch):
    options = evaluate_options(
        models, models / "student", tmp_path / "run", "--max_samples", 3, "--json", "--rollout_engine", "vllm"
    )
    code, out, _ = run(*options, "--output_dir", tmp_path / "whole")
    assert code == 0
    calls, roll_out = [], StubChild.roll_out

    def dying(self, job, prompts, eos):
        calls.append(job["seed"])
        if len(calls) == 3:  # the self-test, the first seed, and now
            raise UserError("vllm: the engine's process ended by SIGKILL: it said nothing")
        return roll_out(self, job, prompts, eos)

    monkeypatch.setattr(StubChild, "roll_out", dying)
    code, _, err = run(*options)
    assert code == 2 and "ended by SIGKILL" in err and err.strip().count("\n") <= 2
    calls.clear()
    monkeypatch.setattr(StubChild, "roll_out", lambda self, **asked: calls.append(1) or roll_out(self, **asked))
    code, again, err = run(*options, "--resume")
    assert code == 0, err
    assert len(calls) == 2  # the self-test and the second seed
    assert json.loads(again)["scores"] == json.loads(out)["scores"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--no_repeat_ngram_size", 6), "no_repeat_ngram_size=6: only transformers' own generate blocks n-grams"),
        (("--protocol", "ancestors"), "no_repeat_ngram_size=6: only transformers' own generate blocks n-grams"),
        (
            ("--datasets", '{"a": {"dataset_name": "a.jsonl", "rollout_engine": "vllm"}}'),
            "datasets: rollout_engine in 'a' does nothing: it is the same for all test sets",
        ),
    ],
)
def test_evaluations_that_vllm_cannot_write_are_refused_in_one_line(run, models, children, tmp_path, more, message):
    options = ("evaluate", "--model_name_or_path", models / "student", "--rollout_engine", "vllm")
    data = () if "--datasets" in more else ("--dataset_name", models / "train.jsonl")
    code, _, err = run(*options, *data, "--output_dir", tmp_path / "run", *more)
    assert code == 2 and message in err.splitlines()[-1] and not children


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--vllm_python", "python"), "vllm_python=python does nothing: rollout_engine is transformers; remove it"),
        (("--rollout_engine", "vlm"), "rollout_engine must be one of transformers, vllm, got 'vlm'"),
        (("--rollout_engine", "vllm", "--cuda_graphs"), "cuda_graphs does nothing: rollout_engine is vllm; remove it"),
    ],
)
def test_options_of_the_engine_that_cannot_be_are_refused_in_one_line(run, models, children, options, message):
    code, _, err = run("rollout", *pair(models), "--prompt", "Once", *options)
    assert code == 2 and message in err and err.strip().count("\n") == 0


def test_vllm_leaves_room_for_the_models_on_the_same_gpu(run, models, children, monkeypatch):
    """It took its own default, 92% of a GPU on which student and teacher lie already."""
    import torch

    from switchkd.models import forward

    options = (*pair(models), "--prompt", "Once", "--max_completion_length", 4, "--rollout_engine", "vllm")
    with monkeypatch.context() as patch:
        patch.setattr(forward, "device_of", lambda model: torch.device("cuda"))
        for more in ((), ("--vllm_gpu_memory_utilization", 0.5)):
            assert run("rollout", *options, *more)[0] == 0
    assert run("rollout", *options)[0] == 0  # on a CPU vLLM decides
    assert [child.options.get("gpu_memory_utilization") for child in children] == [0.3, 0.5, None]


def test_rollout_hands_vllm_all_prompts_at_once(run, models, children, monkeypatch):
    """One `--batch_size` after the other: the places of texts that had ended stayed empty."""
    asked, real = [], StubChild.roll_out
    monkeypatch.setattr(StubChild, "roll_out", lambda self, *a, **k: asked.append(k or a) or real(self, *a, **k))
    prompts = [word for text in ("Once", "Two of", "And so") for word in ("--prompt", text)]
    options = (*pair(models), *prompts, "--max_completion_length", 6, "--seed", 2)
    written = []
    for more in ((), ("--rollout_engine", "vllm", "--batch_size", 1)):
        code, out, err = run("rollout", *options, *more)
        assert code == 0, err
        written.append([row["completion_ids"] for row in json.loads(out)["rollouts"]])
    assert written[0] == written[1]
    # Beside it there is the test of itself that the engine makes, of two rows.
    assert max(len(one["prompts"]) for one in asked) == 3 and sum(len(one["prompts"]) == 1 for one in asked) == 0
