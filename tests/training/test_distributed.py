"""Two processes equal one: the same global batch gives the same text, step, logs and evaluation, sharded or not.

Float32 on CPUs over gloo; weights of order 0.3 agree to 1e-6, under FSDP2 after four steps to 1e-5.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import two_processes
from helpers.two_processes import RUNS, SHARDED
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
NOT_EQUAL = ("time/", "rollout/tokens_per_s", "rollout/teacher_passes")

pytestmark = pytest.mark.slow


def started(script: str, *arguments: object, **environment: str) -> list[subprocess.Popen]:
    """Start a script as two processes, without torch.distributed.run, whose own imports cost seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    both["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            env={**both, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]


def both_end(running: list[subprocess.Popen]) -> None:
    try:
        for process in running:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module", autouse=True)
def needs_gloo():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    running = started(two_processes.__file__, folder, 2)
    two_processes.main(folder, 1)
    both_end(running)
    return [torch.load(folder / f"result-{processes}-False.pt", weights_only=False) for processes in (1, 2)]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("sharded")
    running = started(two_processes.__file__, folder, 2, "fsdp2")
    two_processes.main(folder, 1, runs=SHARDED)
    both_end(running)
    places = (folder / "result-1-False.pt", folder / "result-2-True.pt")
    return [torch.load(place, weights_only=False) for place in places]


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def assert_logs_equal(alone: dict, shared: dict, rel: float) -> None:
    for one, two in zip([*alone["log"], alone["eval"]], [*shared["log"], shared["eval"]], strict=True):
        assert one.keys() == two.keys()
        compared = [
            key for key in one if not key.startswith(NOT_EQUAL) and "runtime" not in key and "per_sec" not in key
        ]
        compared = [key for key in compared if key != "eval_model_preparation_time"]
        assert {key: two[key] for key in compared} == pytest.approx({key: one[key] for key in compared}, rel=rel)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "uneven"])
def test_two_processes_take_the_step_of_one(results, name):
    """Means per process weigh short answers more; DDP averages where a sum over the global count is wanted."""
    alone, shared = (result[name]["parameters"] for result in results)
    assert largest_difference(alone, shared) < 1e-6


@pytest.mark.parametrize("name", [name for name in RUNS if name != "uneven"])
def test_two_processes_log_and_evaluate_what_one_does(results, name):
    """Rows that fill up the last evaluation batch count once; rollout values are those of all ranks."""
    alone, shared = (result[name] for result in results)
    assert_logs_equal(alone, shared, rel=1e-4)
    assert alone["rows"] == shared["rows"]
    assert "DDP" in shared["launched"] and shared["sharded"] == []


def test_a_bad_number_of_one_process_is_a_step_that_both_skip(results):
    """Each would have gone its own way, and the two would have waited for each other for ever."""
    assert results[0]["rows"] == results[1]["rows"] and len(results[0]["rows"]) == 4
    assert [log["skipped_steps"] for log in results[1]["skipped"]["log"]][-1] == 1


# ---- the student sharded by FSDP2


@pytest.mark.parametrize("name", list(SHARDED))
def test_parameters_are_sharded_before_anything_is_claimed(sharded, name):
    """Under use_cpu an FSDP config became plain DDP in silence."""
    result = sharded[1][name]
    assert len(result["sharded"]) == len(result["parameters"]) and "FSDP2" in result["launched"]


@pytest.mark.parametrize("name", [name for name in SHARDED if name not in ("kd", "uneven")])
def test_sharded_rollouts_are_those_of_one_process_row_by_row(sharded, name):
    """Ragged lengths included: processes that finish at different times do not wait for each other."""
    alone, shared = (result[name]["rows"] for result in sharded)
    assert alone == shared
    assert len({len(row) for row in alone.values()}) > 1 or name == "minillm"


@pytest.mark.parametrize("name", [name for name in SHARDED if name != "uneven"])
def test_sharded_weights_are_those_of_one_process_after_four_steps(sharded, name):
    alone, shared = (result[name]["parameters"] for result in sharded)
    assert largest_difference(alone, shared) < 1e-5


@pytest.mark.parametrize("name", [name for name in SHARDED if name != "uneven"])
def test_sharded_training_logs_and_evaluates_what_one_process_does(sharded, name):
    alone, shared = (result[name] for result in sharded)
    assert_logs_equal(alone, shared, rel=1e-4)


def test_a_last_batch_that_is_not_full_is_that_of_unsharded_processes(results, sharded):
    unsharded, shared = results[1]["uneven"], sharded[1]["uneven"]
    assert unsharded["rows"] == shared["rows"]
    assert largest_difference(unsharded["parameters"], shared["parameters"]) < 1e-5
    assert_logs_equal(unsharded, shared, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in SHARDED if name != "kd"])
def test_a_rollout_gathers_nothing_and_asks_the_sharded_student_nothing(sharded, name):
    """A gather per token, or a pass that all processes must join, would hang on ragged lengths."""
    assert sharded[1][name]["passes"] == 0 and sharded[1][name]["gathered"] == 0


@pytest.mark.parametrize("name", list(SHARDED))
def test_the_chunked_loss_and_the_kept_states_serve_a_sharded_student(sharded, name):
    assert not sharded[1][name]["full_logits"]
    assert sharded[1][name]["keeps_states"] == sharded[0][name]["keeps_states"]


def test_copy_holds_every_weight_of_now(sharded):
    """Only the root unit summoned: the layers' weights would stay those of the first step."""
    found = sharded[1]["copied"]
    for moment in ("now", "moved"):
        held, student = found[moment]
        assert largest_difference(held, {name: student[name] for name in held}) == 0.0
    assert largest_difference(found["now"][0], found["moved"][0]) > 0.1
    assert found["grads"] == []


def test_sharded_training_goes_on_after_an_error_in_a_rollout(sharded):
    assert sharded[1]["copied"]["steps"] == 2


def test_sharded_resume_is_bit_equal(sharded):
    found = sharded[1]["resumed"]
    assert largest_difference(found["straight"], found["resumed"]) == 0.0


@pytest.mark.parametrize("name", ["gpt2", "llama", "lora"])
def test_sharded_student_is_saved_whole_and_without_the_copy(sharded, name):
    folder = Path(sharded[1][name]["folder"])
    saved = load_file(folder / ("adapter_model.safetensors" if name == "lora" else "model.safetensors"))
    plain = {key.replace(".default", ""): value for key, value in sharded[1][name]["parameters"].items()}
    assert {key for key in plain if name != "lora" or "lora_" in key} - saved.keys() <= {"lm_head.weight"}
    assert all(torch.equal(value, plain[key]) for key, value in saved.items() if key in plain)


def test_top_tokens_of_a_sharded_student_are_logged(sharded):
    """Only the first process logs them: asking the sharded student there would hang."""
    alone, shared = (result["gpt2"]["logged"] for result in sharded)
    assert [row["completion_ids"] for row in alone][:2] == [row["completion_ids"] for row in shared][:2]
    assert all("top_tokens" in row for row in shared)
