"""The options that say which engine writes a command's rollouts, and starting it."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from switchkd.cli.options import is_terminal
from switchkd.errors import UserError, check_choice, check_count, check_range

if TYPE_CHECKING:
    from switchkd.rollout import Rollout


# Batches that vLLM is handed in one call: it gives the places of ended texts to waiting prompts.
BATCHES_PER_CALL = 16


def add_engine_options(group: Any) -> None:
    """Add the options of the engine to a group of a parser; they are called as those of training."""
    group.add_argument(
        "--rollout_engine", default="transformers", metavar="NAME", help="transformers, or vllm (docs/vllm.md)"
    )
    group.add_argument("--vllm_python", metavar="PATH", help="Python of an environment with vLLM (default: this one)")
    group.add_argument(
        "--vllm_gpu_memory_utilization",
        type=float,
        metavar="X",
        help="share of a GPU's memory that vLLM takes (default: 0.3, because the models lie there too)",
    )
    group.add_argument(
        "--vllm_tensor_parallel_size", type=int, default=1, metavar="N", help="GPUs that vLLM splits each layer over"
    )


def check_engine_options(options: argparse.Namespace) -> None:
    """Refuse values out of range, and options of vLLM where it does not write.

    Raises:
        UserError: Names the option.
    """
    check_choice("rollout_engine", options.rollout_engine, ("transformers", "vllm"))
    check_count("vllm_tensor_parallel_size", options.vllm_tensor_parallel_size, 1)
    if options.vllm_gpu_memory_utilization is not None:
        check_range("vllm_gpu_memory_utilization", options.vllm_gpu_memory_utilization, 0.0, 1.0)
    if options.rollout_engine == "vllm":
        if getattr(options, "cuda_graphs", False):
            raise UserError("cuda_graphs does nothing: rollout_engine is vllm; remove it")
        return
    for name, idle in (("python", None), ("gpu_memory_utilization", None), ("tensor_parallel_size", 1)):
        if (value := getattr(options, f"vllm_{name}")) != idle:
            raise UserError(f"vllm_{name}={value} does nothing: rollout_engine is transformers; remove it")


def rows_per_call(options: argparse.Namespace) -> int:
    """Return how many rows the writer is handed at once: vLLM batches by itself, and never lets a place stay empty."""
    return int(options.batch_size) * (BATCHES_PER_CALL if options.rollout_engine == "vllm" else 1)


@contextlib.contextmanager
def writer(
    options: argparse.Namespace, student: Any, teacher: Any, text: int, *, draft_length: str = "auto"
) -> Iterator[Callable[..., "Rollout"]]:
    """Give what writes, called as `roll_out` is; a vLLM engine ends afterwards.

    Args:
        options: Of a command with `add_engine_options`, pair and sampling options.
        student: Its student.
        teacher: Its teacher; None where the student writes alone.
        text: Most tokens of a prompt and its completion.
        draft_length: "auto" or a number.
    """
    from switchkd.engine import roll_out

    if options.rollout_engine == "transformers":
        yield roll_out
        return
    from switchkd.engine.vllm.engine import Engine, lengths_for
    from switchkd.engine.vllm.weights import plain_name
    from switchkd.models.forward import device_of
    from switchkd.training.options import DistillationOptions

    share = options.vllm_gpu_memory_utilization
    if share is None and device_of(student).type != "cpu":
        share = DistillationOptions.vllm_gpu_memory_utilization  # both models lie there too
    if is_terminal(sys.stderr):
        print("starting vLLM, which takes half a minute", file=sys.stderr)
    with Engine(
        student,
        teacher,
        python=options.vllm_python,
        **lengths_for(student, teacher, text, draft_length),
        max_num_seqs=options.batch_size,
        gpu_memory_utilization=share,
        tensor_parallel_size=options.vllm_tensor_parallel_size,
        trust_remote_code=options.trust_remote_code,
        student_name=plain_name(options.model_name_or_path, options.model_revision),
        teacher_name=None
        if teacher is None
        else plain_name(options.teacher_model_name_or_path, options.teacher_model_revision),
    ) as engine:
        yield engine.write
