"""What a training says where memory runs out: in which part of the step, and which option lowers that part."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from switchkd.errors import OutOfMemory, during, is_out_of_memory
from switchkd.models.heads import output_head
from switchkd.training.advice import relief_of, sized
from switchkd.training.callback import LoopCallback
from switchkd.training.checkpoints import newest_whole
from switchkd.training.footprint import Adapter
from switchkd.training.memory import Launch

#: Phase -> what it is called in a sentence, and what lowers it where a plan cannot say.
NAMES = {
    "rollout": ("rollout", "--rollout_batch_size, the rows decoded at once"),
    "teacher pass": ("teacher's pass", "--per_device_train_batch_size, with more --gradient_accumulation_steps"),
    "loss": ("loss", "--per_device_train_batch_size, with more --gradient_accumulation_steps"),
    "backward": ("backward pass", "--gradient_checkpointing"),
    "optimizer": ("optimizer's update", "--optim adafactor"),
}

#: Options of a plan that a training does not have -> what does the same there.
IN_TRAINING = {"--sharding fsdp2": "FSDP2 (docs/scale.md)"}


class ExplainingTrainer(Trainer):
    """A Trainer that says in one line where memory ran out; a subclass sets what is annotated here."""

    loop: LoopCallback

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer`.

        Raises:
            OutOfMemory: Says in which part of which step, with the option that lowers it, and where to go on from.
        """
        try:
            return super().train(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            phase = "optimizer" if self.loop.updates else getattr(error, "phase", None)
            raise OutOfMemory(explained(self, phase)) from error

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `transformers.Trainer`; what goes wrong in it, but not in the loss, is the backward pass's."""
        with during("backward"):
            return super().training_step(*args, **kwargs)


def explained(trainer: Any, phase: str | None) -> str:
    """Return the line.

    Args:
        trainer: The trainer.
        phase: One of `NAMES`; None for any other part, such as an evaluation.
    """
    step = trainer.state.global_step + 1
    found, _ = newest_whole(Path(str(trainer.args.output_dir)))
    rest = f"go on with --resume_from_checkpoint true, from {found}" if found else "there is no checkpoint yet"
    if phase is None:
        return (
            f"not enough memory beside the training of step {step}: lower --per_device_eval_batch_size or "
            f"--per_device_train_batch_size; {rest}"
        )
    name, usual = NAMES[phase]
    advice = _planned(trainer, phase) or f"lower it by {usual}"
    return f"not enough memory in the {name} of step {step}: {advice}; {rest}"


def _planned(trainer: Any, phase: str) -> str | None:
    """What a plan of this very run says of the phase, None where no plan can be made, also for want of memory."""
    try:
        run = sized(launch_of(trainer))
        change = relief_of(run, phase)
    except (ValueError, RuntimeError, MemoryError, AttributeError, KeyError):
        return None
    if change is None or phase not in run.memory.phases:
        return None
    before = run.memory.total(phase)
    parts = run.memory.phases[phase]
    largest = max(parts, key=parts.__getitem__)
    return (
        f"it takes about {_shown(before)} ({largest} {_shown(parts[largest])}); with "
        f"{IN_TRAINING.get(change.option, change.option)} about {_shown(change.peak)}"
    )


def launch_of(trainer: Any) -> Launch:
    """Return a running training as `switchkd plan` sees it."""
    args, plan, teacher = trainer.args, trainer.plan, trainer.teacher_model
    student = trainer.accelerator.unwrap_model(trainer.model)
    adapter = None
    peft_configs = getattr(student, "peft_config", None)
    if peft_configs:
        found: Any = next(iter(peft_configs.values()))
        targets = found.target_modules
        adapter = Adapter(
            rank=found.r,
            target_modules=targets if isinstance(targets, str) or targets is None else tuple(sorted(targets)),
            modules_to_save=tuple(found.modules_to_save or ()),
        )
    keeps = bool(plan.teacher_writes and args.reuse_teacher_hidden and teacher is not None and output_head(teacher))
    processes, shards = args.world_size, "zero2" if trainer.zero_stage == 2 else trainer.sharding
    return Launch(
        _text(student),
        None if teacher is None else _text(teacher),
        prompt=args.max_prompt_length,
        completion=args.max_completion_length,
        rows=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        student_dtype=_dtype(student),
        teacher_dtype="float32" if teacher is None else _dtype(teacher),
        bf16=trainer.accelerator.mixed_precision in ("bf16", "fp16") and _dtype(student) == "float32",
        adapter=adapter,
        checkpointing=bool(args.gradient_checkpointing),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        gpus=processes,
        sharding="none" if processes == 1 else {None: "ddp", "fsdp1": "fsdp2"}.get(shards, shards),
        rolls_out=plan.rolls_out,
        teacher_writes=plan.teacher_writes,
        reads_teacher=plan.objective.reads_teacher,
        objective=plan.objective.name,
        keeps_states=keeps,
        states_dtype=args.teacher_hidden_dtype,
        offloads_states=args.offload_teacher_hidden,
        offloads_teacher=args.offload_teacher,
        shards_teacher=args.teacher_sharding != "none",
        static=args.cuda_graphs,
        rollout_rows=trainer.rollout_rows,
        draft=None if args.draft_length == "auto" else int(args.draft_length),
        copy_dtype=_copy_dtype(trainer, student),
        offloads_copy=args.offload_rollout_copy,
        cuda=args.device.type != "cpu",
    )


def _copy_dtype(trainer: Any, student: Any) -> str | None:
    """The precision of the copy that writes rollouts; None where the student writes them itself."""
    writer = trainer.writer
    if not trainer.plan.rolls_out or (writer.copy is None and writer.reason(student) is None):
        return None
    return str(writer.dtype or torch.float32).removeprefix("torch.")


def _text(model: Any) -> str:
    return str(model.config.get_text_config().to_json_string(use_diff=False))


def _dtype(model: nn.Module) -> str:
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4"
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    dtype: torch.dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return str(dtype).removeprefix("torch.")


def _shown(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
