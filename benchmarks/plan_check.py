"""Memory that `switchkd plan` predicts against what real training steps take, in one table.

    python benchmarks/plan_check.py                          # every shape, about 4 minutes on one core
    python benchmarks/plan_check.py --shapes gpt2 lora

Every shape trains `--steps` optimizer steps on random weights and random prompts, in a process of its own, under
PyTorch's profiler, which notes every allocation of every tensor: weights, caches, temporaries of kernels. Shapes of two
processes train in both, and the first is measured. Highest totals are compared phase by phase with the prediction,
which sees the configurations only. The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.utils import logging

from switchkd import SwitchConfig, SwitchTrainer
from switchkd.cli.display import markdown_table
from switchkd.training.footprint import Adapter, footprint_of
from switchkd.training.memory import Launch, step_memory

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 384, "n_layer": 4, "n_head": 6}
GPT2_TEACHER = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 6, "n_head": 12}
LLAMA = {
    "model_type": "llama", "vocab_size": 50257, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_TEACHER = {**LLAMA, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True}
NARROW = {"vocab_size": 2000}

#: Two processes.
TWO = {"rows": 4, "prompt": 32, "completion": 96, "gpus": 2, "sharding": "fsdp2"}

#: Name -> student, teacher, options of the run.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gpt2": (GPT2, GPT2_TEACHER, {"rows": 4, "prompt": 32, "completion": 32}),
    "gpt2, batch 16": (GPT2, GPT2_TEACHER, {"rows": 16, "prompt": 32, "completion": 32}),
    "gpt2, accumulation 4": (GPT2, GPT2_TEACHER, {"rows": 4, "accumulation": 4, "prompt": 32, "completion": 32}),
    "llama": (LLAMA, LLAMA_TEACHER, {"rows": 4, "prompt": 32, "completion": 96}),
    "llama, lora": (
        LLAMA,
        LLAMA_TEACHER,
        {"rows": 4, "prompt": 32, "completion": 96, "adapter": Adapter(16), "copy_dtype": "float32"},
    ),
    "llama, long": (LLAMA | NARROW, LLAMA_TEACHER | NARROW, {"rows": 4, "prompt": 64, "completion": 448}),
    "llama, long, checkpointing": (
        LLAMA | NARROW,
        LLAMA_TEACHER | NARROW,
        {"rows": 4, "prompt": 64, "completion": 448, "checkpointing": True},
    ),
    "qwen3, teacher bf16": (
        QWEN,
        LLAMA_TEACHER | {"model_type": "qwen3", "head_dim": 64},
        {"rows": 4, "prompt": 32, "completion": 64, "teacher_dtype": "bfloat16"},
    ),
    "gpt2, dataset answers": (
        GPT2,
        GPT2_TEACHER,
        {"rows": 8, "prompt": 64, "completion": 64, "rolls_out": False, "objective": "forward_kl"},
    ),
    "gpt2, ddp x 2": (GPT2, GPT2_TEACHER, {**TWO, "sharding": "ddp"}),
    "gpt2, fsdp2 x 2": (GPT2, GPT2_TEACHER, {**TWO, "copy_dtype": "float32"}),
    "llama, fsdp2 x 2": (LLAMA, LLAMA_TEACHER, {**TWO, "copy_dtype": "float32"}),
    "llama, fsdp2 x 2, dataset answers": (
        LLAMA,
        LLAMA_TEACHER,
        {**TWO, "rolls_out": False, "objective": "forward_kl"},
    ),
    "llama, teacher shared by 2": (LLAMA, LLAMA_TEACHER, {**TWO, "sharding": "ddp", "shards_teacher": True}),
}


def predicted(launch: Launch) -> dict[str, float]:
    """Return the highest memory of every phase, bytes, by the same code as `switchkd plan`."""
    sizes = {"rows": launch.rows, "length": launch.length, "predicted": launch.completion}
    student = footprint_of(
        launch.student, **sizes, dtype=launch.student_dtype, trains=True, adapter=launch.adapter,
        checkpointing=launch.checkpointing,
    )  # fmt: skip
    teacher = footprint_of(str(launch.teacher), **sizes, dtype=launch.teacher_dtype)
    memory = step_memory(launch, student, teacher)
    return {phase: memory.total(phase) for phase in memory.phases} | {"peak": memory.peak}


def launch_of(name: str) -> Launch:
    """Return the run of a shape, on the CPU of this machine."""
    student, teacher, options = SHAPES[name]
    texts = [AutoConfig.for_model(**values).to_json_string(use_diff=False) for values in (dict(student), dict(teacher))]
    given = {"teacher_dtype": "float32", "cuda": False, "draft": 4, **options}
    return Launch(texts[0], texts[1], **given)


class Marks(TrainerCallback):
    """Marks the optimizer's phase in the profile; the others are marked around the trainer's own methods."""

    def __init__(self) -> None:
        self.open: Any = None

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.open = record_function("phase:optimizer")
        self.open.__enter__()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.open.__exit__(None, None, None)


def marked(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """Return the function, whose time the profile then shows as a phase."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"phase:{phase}"):
            return function(*args, **kwargs)

    return wrapper


def train(launch: Launch, name: str, steps: int) -> dict[str, float]:
    """Train some steps under the profiler and return the highest memory of every phase, bytes."""
    student_values, teacher_values, _ = SHAPES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>")),
        eos_token="<eos>",
        pad_token="<pad>",
    )
    generator = random.Random(0)
    lengths = [launch.prompt, launch.prompt - 1]  # ragged, so that there is padding
    rows = [
        {
            "prompt_ids": [generator.randrange(2, 2000) for _ in range(lengths[row % 2])],
            "completion_ids": [generator.randrange(2, 2000) for _ in range(launch.completion)],
        }
        for row in range(launch.rows * launch.accumulation * steps * launch.gpus)
    ]
    peft_config = None
    if launch.adapter is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(r=launch.adapter.rank, task_type="CAUSAL_LM")
    method = {"method": "switch", "initial_threshold": 1e-3, "draft_length": str(launch.draft)}
    torch.manual_seed(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        student = AutoModelForCausalLM.from_config(AutoConfig.for_model(**student_values))
        teacher = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**teacher_values), dtype=getattr(torch, launch.teacher_dtype)
        )
        config = SwitchConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=launch.rows,
            gradient_accumulation_steps=launch.accumulation,
            max_prompt_length=launch.prompt,
            max_completion_length=launch.completion,
            gradient_checkpointing=launch.checkpointing,
            learning_rate=1e-5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            fsdp=launch.sharding == "fsdp2",
            ddp_find_unused_parameters=False if launch.sharding == "ddp" else None,
            teacher_sharding="fsdp2" if launch.shards_teacher else "none",
            **(method if launch.rolls_out else {"method": "kd"}),
        )
        marks = Marks()
        trainer = SwitchTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[marks],
        )
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer._roll_out_window = marked(trainer._roll_out_window, "rollout")  # type: ignore[method-assign]
        trainer.compute_loss = marked(trainer.compute_loss, "loss")  # type: ignore[method-assign]
        trainer.accelerator.backward = marked(trainer.accelerator.backward, "backward")
        trainer.train()
        del student, teacher
    return peaks(profiler)


def peaks(profiler: Any) -> dict[str, float]:
    """Return the highest total of all allocations within each phase, and at all; bytes."""
    allocations, phases = [], []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        kind, fields = event.typed
        if "Allocation" in str(kind):
            allocations.append((event.start_time_ns, fields.alloc_size))
        elif event.name.startswith("phase:"):
            phases.append((event.start_time_ns, event.end_time_ns, event.name.removeprefix("phase:")))
        waiting += event.children
    allocations.sort()
    phases.sort()
    total, found, place = 0, {"peak": 0.0}, 0
    for when, size in allocations:
        while place < len(phases) and phases[place][1] < when:
            place += 1
        total += size
        if place < len(phases) and phases[place][0] <= when:
            found[phases[place][2]] = max(found.get(phases[place][2], 0.0), float(total))
            found["peak"] = max(found["peak"], float(total))
    return found


def check(name: str, steps: int) -> dict[str, Any]:
    """Return the prediction and the measurement of a shape."""
    launch = launch_of(name)
    return {"predicted": predicted(launch), "measured": train(launch, name, steps)}


def first_of(words: list[str], processes: int, name: str) -> str:
    """Return what the first of some processes prints that train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    running = []
    for rank in map(str, range(processes)):
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment = {**os.environ, **shared, **of_rank, "OMP_NUM_THREADS": "1"} if processes > 1 else None
        with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody reads would fill up
            running.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=said, text=True))
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{name}: failed; run it with --child to see why")
    return printed[0]


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the table: measured and predicted peaks, and the quotient of both in every phase."""
    rows = []
    for name, found in results.items():
        measured, guess = found["measured"], found["predicted"]
        quotients = {phase: guess[phase] / measured[phase] for phase in measured if phase in guess}
        rows.append(
            [name, f"{measured['peak'] / 1e6:,.0f}", f"{guess['peak'] / 1e6:,.0f}"]
            + [f"{quotients[phase]:.2f}" if phase in quotients else "-" for phase in COLUMNS]
        )
    return markdown_table(rows, ["shape", "measured [MB]", "predicted [MB]", *(f"{name}, ratio" for name in COLUMNS)])


COLUMNS = ("peak", "rollout", "loss", "backward", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    if options.child:
        print(json.dumps(check(options.shapes[0], options.steps)))
        return
    results = {}
    for name in options.shapes:
        words = [sys.executable, __file__, "--child", "--steps", str(options.steps), "--shapes", name]
        results[name] = json.loads(first_of(words, launch_of(name).gpus, name).strip().splitlines()[-1])
        print(f"{name}: done", file=sys.stderr, flush=True)
    print(table(results))
    errors = [abs(one["predicted"]["peak"] / one["measured"]["peak"] - 1.0) for one in results.values()]
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    print(
        json.dumps(
            {
                "benchmark": "plan_check",
                "largest_error": max(errors),
                "median_error": statistics.median(errors),
                "results": results,
                "versions": versions,
                "cpus": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
