"""The vLLM engine of a training: what it starts with, and what is refused before the first step."""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from switchkd.engine.vllm.engine import Engine, lengths_for
from switchkd.engine.vllm.server import ServedEngine
from switchkd.engine.vllm.shared import SharedEngine, started_everywhere
from switchkd.engine.vllm.weights import plain_name
from switchkd.errors import UserError
from switchkd.methods import get_method
from switchkd.training.config import SwitchConfig


def make_engine(
    student: nn.Module, teacher: nn.Module | None, data: Any, args: SwitchConfig, *, given: Any
) -> Engine | SharedEngine | None:
    """Return the engine of a training, started and tested; None for transformers'.

    Each process has its own, on its own GPU; a server serves all of them.

    Args:
        student: The model that trains.
        teacher: The model that checks.
        data: Prepared training data.
        args: The configuration.
        given: How the teacher was given; its name spares writing it to disk.

    Raises:
        UserError: Something that vLLM cannot do, or an engine that does not start.
    """
    if args.rollout_engine == "transformers":
        return None
    if teacher is None:
        raise UserError(
            f"rollout_engine=vllm needs a teacher, its target model, and method {args.method!r} has none; "
            "use the transformers engine"
        )
    if args.vllm_mode == "server":
        _check_prompts(data)
        url = f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        folder = Path(str(args.output_dir)) / "vllm_student"
        of_server = functools.partial(ServedEngine, student, teacher, url=url, sync_folder=folder)
        if args.world_size == 1:
            return of_server()
        if get_method(args.method).teacher_text:
            raise UserError(
                f"method {args.method!r} with vllm_mode=server takes one process: its text is written before training, "
                "at each process's own pace; write it in a run of one process, and train on that teacher_text_file"
            )
        return SharedEngine(of_server)
    if args.world_size > 1 and args.vllm_tensor_parallel_size > 1:
        raise UserError("vllm_tensor_parallel_size must be 1 where several processes train: each has a vLLM of its own")
    _check_prompts(data)
    text = args.max_prompt_length + args.max_completion_length
    on_gpu = args.device.type == "cuda"
    start = functools.partial(
        Engine,
        student,
        teacher,
        python=args.vllm_python,
        **lengths_for(student, teacher, text, args.draft_length),
        max_num_seqs=args.rollout_batch_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization if on_gpu else None,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        trust_remote_code=args.trust_remote_code,
        teacher_name=None if args.teacher_model_init_kwargs else plain_name(given, args.teacher_model_revision),
        environment=_own_gpu(args) if on_gpu and args.vllm_tensor_parallel_size == 1 else None,
    )
    return start() if args.world_size == 1 else started_everywhere(start)


def _check_prompts(data: Any) -> None:
    if "teacher_prompt_ids" in data.column_names:
        raise UserError(
            "rollout_engine=vllm: the teacher cannot read prompts of its own (column teacher_prompt): vLLM's two "
            "models read one text; use the transformers engine"
        )
    short = next((row for row, ids in enumerate(data["prompt_ids"]) if len(ids) < 2), None)
    if short is not None:
        raise UserError(
            f"rollout_engine=vllm: prompt {short} of the training data has one token, and vLLM needs two: remove it, "
            "or use the transformers engine"
        )


def _own_gpu(args: SwitchConfig) -> dict[str, str]:
    """The variable that shows vLLM the GPU of this process and no other."""
    index = args.device.index if args.device.index is not None else torch.cuda.current_device()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": shown.split(",")[index] if shown else str(index)}
