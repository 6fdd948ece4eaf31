"""Two processes equal one: the same global batch gives the same text, step, logs and evaluation."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import two_processes
from helpers.two_processes import RUNS

TESTS = Path(__file__).parents[1]
NOT_EQUAL = ("time/", "rollout/tokens_per_s", "rollout/teacher_passes")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    script = two_processes.__file__
    # Without torch.distributed.run, whose own imports cost seconds; the environment is what it sets.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    running = [
        subprocess.Popen(
            [sys.executable, script, str(folder), "2"],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        two_processes.main(folder, 1)
        for process in running:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"result-{processes}.pt", weights_only=False) for processes in (1, 2)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_take_the_step_of_one(results, name):
    """Means per process weigh short answers more; DDP averages where a sum over the global count is wanted."""
    alone, shared = (result[name]["parameters"] for result in results)
    assert max(float((alone[key] - shared[key]).abs().max()) for key in alone) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_log_and_evaluate_what_one_does(results, name):
    """Rows that fill up the last evaluation batch count once; rollout values are those of all ranks."""
    alone, shared = (result[name] for result in results)
    for one, two in zip([*alone["log"], alone["eval"]], [*shared["log"], shared["eval"]], strict=True):
        assert one.keys() == two.keys()
        compared = [
            key for key in one if not key.startswith(NOT_EQUAL) and "runtime" not in key and "per_sec" not in key
        ]
        assert {key: two[key] for key in compared} == pytest.approx({key: one[key] for key in compared}, rel=1e-4)


@pytest.mark.slow
def test_a_bad_number_of_one_process_is_a_step_that_both_skip(results):
    """Each would have gone its own way, and the two would have waited for each other for ever."""
    assert results[0]["rows"] == results[1]["rows"] and len(results[0]["rows"]) == 4
    assert [log["skipped_steps"] for log in results[1]["skipped"]["log"]][-1] == 1
