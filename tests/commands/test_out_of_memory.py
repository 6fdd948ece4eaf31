"""Where memory runs out: one line with the part, the option that lowers it and the checkpoint; exit code 71."""

import subprocess
import sys

import pytest
import torch
from helpers.command_line import environment, train_options

from switchkd.errors import is_out_of_memory
from switchkd.training.checkpoints import newest_whole

ON_GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
ON_CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"


def fails_at(call, error):
    """A function that raises at its n-th call, and before does what another does."""

    def planted(function):
        calls = []

        def wrapper(*args, **kwargs):
            calls.append(None)
            if len(calls) >= call:
                raise error
            return function(*args, **kwargs)

        return wrapper

    return planted


def plant(monkeypatch, phase, error):
    """Let a part of the third optimizer step run out of memory."""
    from accelerate import Accelerator

    from switchkd.objective import step
    from switchkd.training import text

    place, name, call = {
        "rollout": (text, "roll_out", 3),
        "teacher's pass": (step, "predict", 6),  # of each step the student's pass, then the teacher's
        "loss": (step, "supervised_loss", 3),
        "backward pass": (Accelerator, "backward", 3),
        "optimizer's update": (torch.optim.AdamW, "step", 3),
    }[phase]
    monkeypatch.setattr(place, name, fails_at(call, error)(getattr(place, name)))


@pytest.mark.parametrize("phase", ["rollout", "teacher's pass", "loss", "backward pass", "optimizer's update"])
def test_memory_that_runs_out_is_one_line_and_the_last_checkpoint_stands(models, tmp_path, run, monkeypatch, phase):
    on_gpu = phase in ("rollout", "optimizer's update")
    error = torch.OutOfMemoryError(ON_GPU) if on_gpu else RuntimeError(ON_CPU)
    method = ["--method", "kd"] if phase == "teacher's pass" else ["--initial_threshold", 0.3]
    call = train_options(models, tmp_path / "run", *method, "--max_steps", 4, "--save_steps", 1)
    with monkeypatch.context() as patch:
        plant(patch, phase, error)
        code, _, err = run(*call)
    lines = [line for line in err.splitlines() if "error" in line]
    assert code == 71 and len(lines) == 1 and "Traceback" not in err, err
    assert f"not enough memory in the {phase} of step 3: " in lines[0]
    assert "it takes about" in lines[0] and "with --" in lines[0], lines[0]
    last = newest_whole(tmp_path / "run")[0]
    assert last.name == "checkpoint-2" and str(last) in lines[0]
    if on_gpu:  # what it says can be done
        assert run(*call, "--resume_from_checkpoint", "true")[0] == 0


def test_memory_that_runs_out_before_a_checkpoint_or_outside_a_step_is_said_so(models, tmp_path, run, monkeypatch):
    from switchkd.training.reference import ReferenceTrainer

    error = RuntimeError(ON_CPU)
    monkeypatch.setattr(ReferenceTrainer, "evaluation_loop", fails_at(1, error)(ReferenceTrainer.evaluation_loop))
    evaluated = ("--eval_strategy", "steps", "--eval_steps", 1, "--eval_dataset_name", models / "train.jsonl")
    code, _, err = run(*train_options(models, tmp_path / "run", "--initial_threshold", 0.3, *evaluated))
    assert code == 71 and "beside the training" in err and "there is no checkpoint yet" in err


def test_a_plan_that_cannot_be_made_leaves_the_usual_advice(models, tmp_path, run, monkeypatch):
    from switchkd.training import out_of_memory

    monkeypatch.setattr(out_of_memory, "sized", fails_at(1, MemoryError())(None))
    plant(monkeypatch, "rollout", RuntimeError(ON_CPU))
    code, _, err = run(*train_options(models, tmp_path / "run", "--initial_threshold", 0.3, "--max_steps", 4))
    assert code == 71 and "lower it by --rollout_batch_size" in err


def test_a_training_is_told_of_options_that_it_has():
    """Several processes under DDP were told to take `--sharding`, an option of `switchkd plan`."""
    from switchkd.commands import train
    from switchkd.training.advice import CHANGES
    from switchkd.training.out_of_memory import IN_TRAINING

    known = train.parser()._known()
    named = [word for option, _ in CHANGES for word in IN_TRAINING.get(option, option).split() if word[:2] == "--"]
    assert len(named) > 10 and [word for word in named if word not in known] == []


def test_other_commands_say_it_too(models, run, monkeypatch):
    from switchkd.commands import rollout

    monkeypatch.setattr(rollout, "run", fails_at(1, torch.OutOfMemoryError(ON_GPU))(None))
    code, out, err = run("rollout", "--prompt", "a")
    assert (code, out) == (71, "") and err.count("\n") == 1 and "not enough memory" in err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_libraries_say_of_memory_is_understood(error, expected):
    assert is_out_of_memory(error) is expected


LIMITED = """
import resource, sys
import switchkd.training.trainer, switchkd.commands.train_run, peft
from switchkd.__main__ import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_memory_that_really_runs_out_is_one_line(models, tmp_path):
    """A student of 65 MB in float32 whose gradients and optimizer states do not fit beside it any more."""
    student = '{"n_embd": 512, "n_layer": 5, "n_head": 8}'
    words = train_options(models, tmp_path / "run", "--initial_threshold", 0.3, "--student_config", student)
    del words[words.index("--model_name_or_path") : words.index("--model_name_or_path") + 2]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "260", *map(str, words)],
        env=environment(MALLOC_ARENA_MAX="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 71, done.stderr
    assert "Traceback" not in done.stderr and "not enough memory" in done.stderr.splitlines()[-1]
