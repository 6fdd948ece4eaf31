"""Trains a few tiny runs under whatever launch it was started with; rank 0 writes what came out to a file.

Not a test: `test_distributed.py` starts it alone, as two processes, and as two with each kind of sharding.
"""

import contextlib
import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from helpers.tiny import BUILDERS, EOS_ID, RAGGED_ROWS, build_trainer
from switchkd.models.copy import whole
from switchkd.policies import TeacherPolicy
from switchkd.training import launching, text
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
    "large steps": {**MIDDLE, "max_steps": 4, "family": "llama", "lora": True, "lora_alpha": 32, "double": True},
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
#: The kinds of sharding that are compared on fewer runs: FSDP1, and DeepSpeed where it is installed.
BRIEFLY: dict[str, dict[str, Any]] = {name: SHARDED[name] for name in ("gpt2", "lora", "accumulated")}
#: The teacher spread over the processes, under DDP: kept states, states asked for again, tokens logged by one process.
TEACHER_RUNS: dict[str, dict[str, Any]] = {
    "teacher kept": SHARDED["gpt2"],
    "teacher asked again": {**SHARDED["llama"], "reuse_teacher_hidden": False},
    "teacher of minillm": SHARDED["minillm"],
}


def zero(stage: int) -> dict[str, Any]:
    """A configuration of DeepSpeed that spreads small weights too."""
    of_weights = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    left = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": {"stage": stage, **of_weights}, **dict.fromkeys(left, "auto")}


#: Kind of launch -> the runs that are made under it, and options of the trainer.
KINDS: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "ddp": (RUNS, {"ddp_find_unused_parameters": False}),
    "fsdp2": (SHARDED, {"fsdp": True}),
    "fsdp1": (BRIEFLY, {"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": "false"}}),
    "zero2": (BRIEFLY, {"deepspeed": zero(2)}),
    "zero3": (BRIEFLY, {"deepspeed": zero(3)}),
    "teacher": (TEACHER_RUNS, {"teacher_sharding": "fsdp2", "ddp_find_unused_parameters": False}),
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
    kind: str = "alone",
    family: str = "gpt2",
    rows: int = 8,
    lora: bool = False,
    lora_alpha: int = 4,
    double: bool = False,
    **options: Any,
) -> Any:
    """A trainer on a global batch of 4, however many processes share it; in float64 with `double`."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it for good
    student, teacher = BUILDERS[family](), BUILDERS[family](seed=1)
    teacher.generation_config.eos_token_id = [EOS_ID, *range(40, 55)]
    torch.manual_seed(0)
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(
            r=4, lora_alpha=lora_alpha, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
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
    if kind != "alone":
        arguments |= copy.deepcopy(KINDS[kind][1])  # transformers changes them
    trainer = build_trainer(folder, student, teacher, **(arguments | options))
    if double:
        trainer.model.double(), teacher.double()
    return trainer


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
    rows = [witness.rows]
    if trainer.args.world_size > 1:
        rows = [{} for _ in range(trainer.args.world_size)]
        torch.distributed.all_gather_object(rows, witness.rows)
    return {
        "parameters": weights_of(trainer.model),
        "sharded": [name for name, value in trainer.model.named_parameters() if is_part(value)],
        "teacher": [is_part(value) for value in trainer.teacher_model.parameters()],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "rows": {key: row for part in rows for key, row in part.items()},
        "passes": witness.passes,
        "gathered": witness.gathered,
        "full_logits": trainer.step_loss.full_logits,
        "keeps_states": bool(trainer.plan.policy) and trainer._keeps_teacher_hidden(),
        "launched": trainer.launched_as(),
        "logged": trainer.logged_completions,
    }


def is_part(parameter: Any) -> bool:
    """Whether a process has only a part of a parameter: of FSDP2, ZeRO-3 or FSDP1."""
    if hasattr(parameter, "ds_tensor"):
        return bool(parameter.ds_tensor.numel() < parameter.ds_numel)
    return hasattr(parameter, "full_tensor") or getattr(parameter, "_fsdp_flattened", False)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a model, however it is sharded."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    weights = {}
    of_fsdp1 = isinstance(model, FullyShardedDataParallel)
    with model.summon_full_params(model, writeback=False) if of_fsdp1 else contextlib.nullcontext():
        for name, parameter in model.named_parameters():
            with whole(parameter) as value:
                weights[name.replace("_fsdp_wrapped_module.", "")] = value.detach().clone()
    return weights


def main(folder: Path, processes: int, *, kind: str = "alone", runs: dict[str, dict[str, Any]] | None = None) -> None:
    """Run everything and write it down."""
    if kind == "fsdp1":  # trained but never saved
        launching.refuse_unsaved = lambda plugin: None
    results = {}
    for name, options in (KINDS[kind][0] if runs is None else runs).items():
        place = folder / f"{name}-{kind}"
        trainer = trained(place, processes, kind=kind, **options)
        assert trainer.args.world_size == processes
        if name == "skipped":
            spoil(trainer)
        with Witness().watching(trainer) as witness:
            trainer.train()
        if trainer.is_world_process_zero() and (skipped := place / SKIPPED_FILE).is_file():
            lines = [json.loads(line) for line in skipped.read_text().splitlines()]
            results["rows"] = sorted((row["step"], row["prompt"]) for row in lines)
        metrics = trainer.evaluate()
        if kind != "fsdp1":
            trainer.save_model()
        results[name] = {**outcome(trainer, witness), "eval": metrics, "folder": str(place)}
    if kind in ("fsdp2", "zero2", "zero3"):
        results["resumed"] = resumed(folder, processes, kind)
    if kind in ("fsdp1", "fsdp2", "zero3"):
        results["copied"] = copied(folder, processes, kind)
    if "teacher kept" in results:
        results["at once"] = ends_at_once(trainer)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if processes == 1 or trainer.is_world_process_zero():
        torch.save(results, folder / f"result-{kind}.pt")


def ends_at_once(trainer: Any) -> list[list[list[int]]]:
    """What each process writes under one teacher, of which all but the first one end with their first token."""
    ends = None if trainer.is_world_process_zero() else list(range(98))
    student = BUILDERS["llama"](seed=2)
    with trainer._teacher_at_hand() as teacher:
        rollout = text.roll_out(
            student, teacher, [[5, 6, 7], [8]], policy=TeacherPolicy(), max_new_tokens=20, eos_token_id=ends
        )
    found: list[Any] = [rollout.completions()] * trainer.args.world_size
    if trainer.args.world_size > 1:
        torch.distributed.all_gather_object(found, rollout.completions())
    return found


def resumed(folder: Path, processes: int, kind: str) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after 4 steps, and after 2 and a resume for 2 more, with an optimizer that remembers."""
    found = {}
    for name, resume in (("straight", None), ("resumed", str(folder / "straight" / "checkpoint-2"))):
        options = {**MIDDLE, "family": "llama", "optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 4}
        options |= {"save_strategy": "steps", "save_steps": 2}
        trainer = trained(folder / name, processes, kind=kind, **options)
        trainer.train(resume_from_checkpoint=resume)
        found[name] = outcome(trainer, Witness())["parameters"]
    return found


def copied(folder: Path, processes: int, kind: str) -> dict[str, Any]:
    """What the copy holds after training: all weights of now, and again after they moved."""
    trainer = trained(folder / "copied", processes, kind=kind, **MIDDLE, family="llama")
    failed = []
    write = trainer.text.write

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(True)
            raise RuntimeError("out of luck")
        return write(*args, **kwargs)

    if not kind.startswith("zero"):  # transformers trains once with an engine of DeepSpeed
        trainer.text.write = fails_once
        with contextlib.suppress(RuntimeError):
            trainer.train()
    trainer.train()  # training goes on after an error in a rollout
    found: dict[str, Any] = {"steps": trainer.state.global_step}
    for moment in ("now", "moved"):
        if moment == "moved":
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    getattr(parameter, "ds_tensor", parameter).mul_(1.5)
        with trainer.writer.of(trainer.model) as writer:
            held = {name: value.clone() for name, value in writer.named_parameters()}
        found[moment] = held, outcome(trainer, Witness())["parameters"]
    found["grads"] = [name for name, value in trainer.writer.copy.model.named_parameters() if value.grad is not None]
    return found


if __name__ == "__main__":
    for each in sys.argv[3:]:
        main(Path(sys.argv[1]), int(sys.argv[2]), kind=each)
    torch.distributed.destroy_process_group()
    # Threads of gloo that still run when the interpreter ends abort the process now and then.
    os._exit(0)
