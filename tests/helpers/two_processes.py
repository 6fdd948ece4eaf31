"""Trains a few tiny runs under whatever launch it was started with; rank 0 writes what came out to a file.

Not a test: `test_distributed.py` starts it once alone, once as two processes, and once as two with FSDP2.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from helpers.tiny import BUILDERS, EOS_ID, RAGGED_ROWS, build_trainer
from switchkd.models.copy import whole
from switchkd.training import text
from switchkd.training.skipping import SKIPPED_FILE

MIDDLE = {"initial_threshold": 0.42, "schedule": "constant", "draft_length": "3"}
#: A last batch that is not full: accelerate fills it up, so that several processes equal each other, but not one.
UNEVEN = {**MIDDLE, "max_steps": -1, "num_train_epochs": 2, "rows": 7, "family": "llama"}
#: name -> options; 7 evaluation rows, so that the last batch of two processes is filled up.
RUNS: dict[str, dict[str, Any]] = {
    "kd": {"method": "kd"},
    "switch": MIDDLE,
    "share_held": {**MIDDLE, "target_teacher_share": 0.3},
    "accumulated": {**MIDDLE, "gradient_accumulation_steps": 2},
    "uneven": UNEVEN,
    "skipped": {"method": "kd"},
}
#: The same with the student sharded: families with a tied head and without, adapters, a last batch that is not full.
SHARDED: dict[str, dict[str, Any]] = {
    "gpt2": {**MIDDLE, "max_steps": 4, "log_completions": True, "log_top_tokens": 1},
    "llama": {**MIDDLE, "max_steps": 4, "family": "llama", "eval_rouge_l_samples": 2},
    "accumulated": {**MIDDLE, "max_steps": 4, "family": "opt", "gradient_accumulation_steps": 2},
    "lora": {**MIDDLE, "max_steps": 4, "family": "llama", "lora": True},
    "uneven": UNEVEN,
    "kd": {"method": "kd", "max_steps": 4, "family": "llama"},
    "minillm": {"method": "minillm", "max_steps": 2, "family": "llama"},
}


class Witness:
    """Sees what every rollout wrote, and what it cost: passes of the student and gathered tensors while it wrote."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.passes = self.gathered = 0

    @contextlib.contextmanager
    def watching(self, trainer: Any):
        """Watch the rollouts of a trainer."""
        from torch.distributed.tensor import DTensor

        roll_out, full_tensor = text.roll_out, DTensor.full_tensor

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.gathered += 1
            return full_tensor(*args, **kwargs)

        def watched(student: Any, teacher: Any, prompts: Any, **options: Any) -> Any:
            writes_itself = student is trainer.model
            hook = trainer.model.register_forward_pre_hook(lambda *args: setattr(self, "passes", self.passes + 1))
            DTensor.full_tensor = counted
            try:
                result = roll_out(student, teacher, prompts, **options)
            finally:
                hook.remove()
                DTensor.full_tensor = full_tensor
            if writes_itself:
                self.passes = 0
            for row, ids, mask in zip(
                options["row_ids"].tolist(), result.completion_ids, result.completion_mask, strict=True
            ):
                self.rows[row] = ids[mask].tolist()
            return result

        text.roll_out = watched
        try:
            yield self
        finally:
            text.roll_out = roll_out


def trained(
    folder: Path,
    processes: int,
    *,
    sharded: bool,
    family: str = "gpt2",
    rows: int = 8,
    lora: bool = False,
    **options: Any,
) -> Any:
    """A trainer on a global batch of 4, however many processes share it."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it for good
    teacher = BUILDERS[family](seed=1)
    teacher.generation_config.eos_token_id = [EOS_ID, *range(40, 55)]
    torch.manual_seed(0)
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(
            r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
    arguments = {
        "train_dataset": Dataset.from_list(RAGGED_ROWS[:rows]),
        "eval_dataset": Dataset.from_list(RAGGED_ROWS[:7]),
        "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 4 // processes,
        "max_steps": 2,
        "learning_rate": 0.1,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    if sharded:
        arguments["fsdp"] = True
    elif processes > 1:
        arguments["ddp_find_unused_parameters"] = False
    return build_trainer(folder, BUILDERS[family](), teacher, **(arguments | options))


def spoil(trainer: Any) -> None:
    """Make the loss of every micro-batch nan that holds a row of "Q?"; one process of two has it."""
    loss, ids = trainer.step_loss.loss, trainer.processing_class("Q?")["input_ids"]

    def spoiled(model: Any, teacher: Any, inputs: Any, *args: Any) -> Any:
        rows = [
            row[read.bool()].tolist() for row, read in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        bad = any(row[: len(ids)] == ids for row in rows)
        return loss(model, teacher, inputs, *args) * (float("nan") if bad else 1.0)

    object.__setattr__(trainer.step_loss, "loss", spoiled)


def outcome(trainer: Any, witness: Witness) -> dict[str, Any]:
    """What a finished run is compared by; all processes must ask."""
    weights = {}
    for name, parameter in trainer.model.named_parameters():
        with whole(parameter) as value:
            weights[name] = value.detach().clone()
    rows = [witness.rows]
    if trainer.args.world_size > 1:
        rows = [{} for _ in range(trainer.args.world_size)]
        torch.distributed.all_gather_object(rows, witness.rows)
    return {
        "parameters": weights,
        "sharded": [name for name, value in trainer.model.named_parameters() if hasattr(value, "full_tensor")],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "rows": {key: row for part in rows for key, row in part.items()},
        "passes": witness.passes,
        "gathered": witness.gathered,
        "full_logits": trainer.step_loss.full_logits,
        "keeps_states": bool(trainer.plan.policy) and trainer._keeps_teacher_hidden(),
        "launched": trainer.launched_as(),
        "logged": trainer.logged_completions,
    }


def main(folder: Path, processes: int, *, sharded: bool = False, runs: dict[str, dict[str, Any]] = RUNS) -> None:
    """Run everything and write it down."""
    results = {}
    for name, options in runs.items():
        place = folder / f"{name}-{processes}-{sharded}"
        trainer = trained(place, processes, sharded=sharded, **options)
        assert trainer.args.world_size == processes
        if name == "skipped":
            spoil(trainer)
        with Witness().watching(trainer) as witness:
            trainer.train()
        if trainer.is_world_process_zero() and (skipped := place / SKIPPED_FILE).is_file():
            lines = [json.loads(line) for line in skipped.read_text().splitlines()]
            results["rows"] = sorted((row["step"], row["prompt"]) for row in lines)
        metrics = trainer.evaluate()
        trainer.save_model()
        results[name] = {**outcome(trainer, witness), "eval": metrics, "folder": str(place)}
    if sharded:
        results["resumed"] = resumed(folder, processes)
        results["copied"] = copied(folder, processes)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if processes == 1 or trainer.is_world_process_zero():
        torch.save(results, folder / f"result-{processes}-{sharded}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


def resumed(folder: Path, processes: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after 4 steps, and after 2 and a resume for 2 more, with an optimizer that remembers."""
    found = {}
    for name, resume in (("straight", None), ("resumed", str(folder / "straight" / "checkpoint-2"))):
        options = {**MIDDLE, "family": "llama", "optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 4}
        options |= {"save_strategy": "steps", "save_steps": 2}
        trainer = trained(folder / name, processes, sharded=True, **options)
        trainer.train(resume_from_checkpoint=resume)
        found[name] = outcome(trainer, Witness())["parameters"]
    return found


def copied(folder: Path, processes: int) -> dict[str, Any]:
    """What the copy holds after training: all weights of now, and again after they moved."""
    trainer = trained(folder / "copied", processes, sharded=True, **MIDDLE, family="llama")
    failed = []
    write = trainer.text.write

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(True)
            raise RuntimeError("out of luck")
        return write(*args, **kwargs)

    trainer.text.write = fails_once
    with contextlib.suppress(RuntimeError):
        trainer.train()
    trainer.train()  # training goes on after an error in a rollout
    found: dict[str, Any] = {"steps": trainer.state.global_step}
    for moment in ("now", "moved"):
        if moment == "moved":
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(1.5)
        with trainer.writer.of(trainer.model) as writer:
            held = {name: value.clone() for name, value in writer.named_parameters()}
        found[moment] = held, outcome(trainer, Witness())["parameters"]
    found["grads"] = [name for name, value in trainer.writer.copy.model.named_parameters() if value.grad is not None]
    return found


if __name__ == "__main__":
    is_sharded = len(sys.argv) > 3
    main(Path(sys.argv[1]), int(sys.argv[2]), sharded=is_sharded, runs=SHARDED if is_sharded else RUNS)
    # Threads of gloo that still run when the interpreter ends abort the process now and then.
    os._exit(0)
