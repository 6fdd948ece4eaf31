"""`SwitchTrainer`: transformers' Trainer whose training text is written by a policy."""

import contextlib
import itertools
import logging
import pickle
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from switchkd.data.batches import Rows, dataset_batches, rollout_batches
from switchkd.engine.readable import require_readable
from switchkd.errors import UserError, during
from switchkd.evaluation.top_tokens import top_tokens
from switchkd.models.forward import disable_dropout
from switchkd.models.heads import output_head
from switchkd.models.loading import is_quantized, with_adapter
from switchkd.models.vocabulary import readable_pad_id, require_eos
from switchkd.policies import Policy
from switchkd.rollout import Prompts, Rollout
from switchkd.training.calibration import Calibration
from switchkd.training.callback import LoopCallback
from switchkd.training.card import Origin
from switchkd.training.config import SwitchConfig
from switchkd.training.guards import refuse_arguments, refuse_launch, require_evaluation, warn_of_precision
from switchkd.training.log import RunningMeans, TextWatch, append_rows
from switchkd.training.out_of_memory import ExplainingTrainer
from switchkd.training.peers import enter, together
from switchkd.training.reference import ReferenceTrainer
from switchkd.training.resolve import resolve
from switchkd.training.saving import SavingTrainer
from switchkd.training.setup import (
    find_tokenizer,
    frozen,
    load_models,
    make_plain_text,
    make_share_watch,
    make_step_loss,
    make_text_source,
    prepare_data,
    rollout_rows,
    sampling_options,
)
from switchkd.training.sharded_teacher import ShardedTeacher
from switchkd.training.skipping import SkippingTrainer, StepGuard
from switchkd.training.teacher_text import with_teacher_text
from switchkd.training.text import row_ids
from switchkd.training.vllm_engine import make_engine
from switchkd.training.writer import Writer

logger = logging.getLogger(__name__)


class SwitchTrainer(ReferenceTrainer, SkippingTrainer, SavingTrainer, ExplainingTrainer):
    """Trains a student with a teacher in the loop; everything else is `transformers.Trainer`.

    One optimizer step: the prompts of the whole accumulation window are rolled out at once under the method's policy,
    the supervised tokens are counted *afterwards*, over the window and all ranks, and every micro-batch's loss is
    divided by that count. The teacher's states of the rollout serve the loss: it is not asked twice.

    Args:
        model: The student: a model, a local folder or a hub id.
        teacher_model: The teacher, in the same ways; None for a method that needs none, and for `ssd`, which then
            copies the student.
        args: A `SwitchConfig`.
        train_dataset: Rows of `prompt`, `prompt` + `completion`, `messages` or `instruction`/`input`/`output`, with
            `teacher_prompt` where the teacher sees another prompt; or a dataset that `switchkd.data.prepare` made. A
            `datasets.Dataset`, a list of dicts, a data frame, a `switchkd.Mixture` of several, or with `max_steps` a
            stream. docs/data.md shows every shape.
        eval_dataset: Likewise, with answers.
        processing_class: The student's tokenizer; if None that of the folder or hub id that the student names.
        peft_config: A `peft` config: only an adapter of the student is trained.
        callbacks: `transformers.TrainerCallback` objects.
        lm_dataset: Rows with a column `text`, for `lm_weight`.
        policy: Who writes the rolled-out text, instead of the method's own policy.
        quantization_config: Of transformers, for a student that is given by its name; with `peft_config`.
        kwargs: Passed on to `transformers.Trainer`, e.g. `optimizers`.

    Raises:
        UserError: Models, data or options that do not fit together.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | str,
        teacher_model: nn.Module | str | None = None,
        args: SwitchConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        lm_dataset: Dataset | None = None,
        policy: Policy | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = SwitchConfig() if args is None else args
        refuse_arguments(args, kwargs)
        if teacher_model is None:
            teacher_model = args.teacher_model_name_or_path
        self.plan = resolve(args, policy)
        self.origin = Origin.of(model, teacher_model, train_dataset)
        self.text = make_text_source(self.plan, args)
        tokenizer = find_tokenizer(model, processing_class, args)
        student, teacher, excluded_ids = load_models(
            model, teacher_model, tokenizer, args, plan=self.plan, quantization_config=quantization_config
        )
        if is_quantized(student) and peft_config is None:
            raise UserError(
                "the student is in 4 or 8 bits, of which only an adapter can train: give peft_config (use_peft)"
            )
        self.step_loss = make_step_loss(self.plan, args, excluded_ids)
        self.source_use_cache = getattr(student.config, "use_cache", None)
        if args.disable_dropout:
            disable_dropout(student)
        if peft_config is not None:
            student = with_adapter(student, peft_config, gradient_checkpointing=bool(args.gradient_checkpointing))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # the caller's tokenizer too: it is saved with the student
        self.eos_token_id = require_eos(tokenizer, student, teacher)
        self.pad_token_id = readable_pad_id(tokenizer.pad_token_id, self.eos_token_id, student, teacher)
        readers = {"student": student, "teacher": teacher}
        train_dataset, eval_dataset, self.prepare_reports = prepare_data(
            train_dataset, eval_dataset, tokenizer, args, readers, plan=self.plan
        )
        self.plain_text = make_plain_text(lm_dataset, tokenizer, args)
        if self.text.adaptive is not None:
            require_evaluation(self.plan.method.name, eval_dataset, args.eval_strategy)
            args.eval_on_start = True  # the first loss is what later ones are compared with

        if len(set(getattr(teacher, "hf_device_map", {}).values())) > 1:
            args._n_gpu = 1  # the other GPUs are the teacher's; transformers does so for a student that is spread
        collator: Any = Rows  # the Trainer's annotation knows dicts of tensors only
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=collator,
            callbacks=callbacks,
            **kwargs,
        )
        warn_of_precision(args)
        refuse_launch(gpus=args.n_gpu, writes_text=self.plan.writes_text, flat=self.has_flat_parameters)
        logger.info(f"training runs in {self.launched_as()}")
        shared = args.teacher_sharding == "fsdp2"  # its shares go to the device, never the whole
        if teacher is not None:
            teacher = frozen(teacher, args.device, offload=args.offload_teacher or shared)
        self.teacher_model, self.teacher_shards = teacher, ShardedTeacher(teacher, args.device) if shared else None
        with self._teacher_at_hand() as teacher:
            for role, reader in (("student", self.model), ("teacher", teacher)):
                require_readable(reader, role)  # micro-batches are padded on the left
        head = output_head(self.model)  # measured here, so that a warning comes before the first step
        # FSDP1 and ZeRO-3 let go of the head after its pass; FSDP2 gathers each part of an adapter on it.
        if self.sharding in ("fsdp1", "zero3") or (self.sharding and head is not None and not head.is_plain):
            self.step_loss = replace(self.step_loss, full_logits=True)
        self.writer = Writer(
            self.accelerator,
            copies=args.rollout_copy,
            dtype=args.rollout_dtype,
            offload=args.offload_rollout_copy,
            sharded=self.sharding is not None,
        )
        self.rollout_rows = rollout_rows(student, teacher, args) if self.plan.rolls_out else None
        with self._teacher_at_hand(args.rollout_engine == "vllm") as teacher:
            self.text.engine = make_engine(student, teacher, self.train_dataset, args, given=teacher_model)
        self.calibration: Calibration | None = None
        self.loop = LoopCallback(self)
        self.add_callback(self.loop)
        self._guard, self.skipped_steps = StepGuard(), 0
        self.teacher_passes = 0
        self._means = RunningMeans(None if self.plan.policy is None else self.plan.policy.measured)
        self._share_watch = make_share_watch(self.plan)
        self._text_watch = TextWatch(self.eos_token_id, args.max_completion_length)
        self._unlogged_rollout: tuple[Rollout, list[list[int]] | None] | None = None
        self.logged_completions: list[dict[str, Any]] = []  # those of the last log, see log_completions
        self._training_since = time.perf_counter()

    # ---- set-up

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train as `transformers.Trainer` does; what a method needs beforehand is made first.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest one in `output_dir` that is whole; newer ones
                that are not are named in a warning.
            trial: As `transformers.Trainer` takes it.
            ignore_keys_for_eval: Likewise.

        Raises:
            UserError: The checkpoint is missing or damaged: the file is named.
        """
        with together():
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: Any) -> Any:
        if self.plan.method.teacher_text:
            self._write_teacher_text()
        checkpoint = self.checkpoint_of(resume_from_checkpoint)
        if checkpoint is None:  # a checkpoint holds the threshold that was reached
            self.find_threshold()
        self._checked_at = self._counted = self._first_attempt = None
        try:
            result = super().train(checkpoint, trial, ignore_keys_for_eval)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"resume_from_checkpoint: a file of {checkpoint} holds more than tensors and numbers and was not "
                "read, since it could run code; go on from another checkpoint"
            ) from error
        self.require_updates()
        if self._checked_at != self.state.global_step:  # a checkpoint of the last step was read already
            self._check_weights()
        return result

    def _sampling(self) -> dict[str, Any]:
        options = sampling_options(self.args, self.step_loss.objective.excluded_ids)
        return {**options, "eos_token_id": self.eos_token_id, "pad_token_id": self.pad_token_id}

    def _write_teacher_text(self) -> None:
        path = Path(self.args.teacher_text_file or Path(str(self.args.output_dir)) / "teacher_text.jsonl")
        data: Any = vars(self)["train_dataset"]  # prepared here; the Trainer's annotation allows other kinds too
        assert self.plan.policy is not None
        enter("the writing of the teacher's text")
        with self._teacher_at_hand() as teacher, self.writer.of(self.model) as student:
            self.train_dataset = with_teacher_text(
                data,
                student,
                teacher,
                path,
                policy=self.plan.policy,
                tokenizer=self.processing_class,
                part=(self.args.process_index, self.args.world_size),
                wait=self._wait_for_everyone,
                writer=None if self.text.engine is None else self.text.engine.write,
                **self._sampling(),
            )
        if self.text.engine is not None:
            self.text.engine.close()  # training rolls nothing out

    def find_threshold(self) -> None:
        """Search for the threshold that gives the wanted teacher share, where one is wanted; `train` does it first."""
        if not self.plan.finds_threshold or self.calibration is not None:
            return
        with self._teacher_at_hand() as teacher, self.writer.of(self.model) as student:
            self.calibration = self.text.calibrate_on(student, teacher, self.train_dataset, **self._sampling())
        logger.info(self.calibration.note)
        if not self.calibration.reached:
            warnings.warn(f"{self.calibration.note}; training begins there", stacklevel=2)

    # ---- writing the training text

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    @property
    def _place(self) -> tuple[int, int, int, int]:
        """Optimizer step, rank, number of ranks and rows of a micro-batch."""
        args = self.args
        return self.state.global_step, args.process_index, args.world_size, self._train_batch_size

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return one optimizer step's micro-batches, their text rolled out, and the supervised tokens they hold."""
        window: list[Rows] = list(itertools.islice(epoch_iterator, num_batches))
        if not window:
            return window, None
        source = self.text.of_step(self.state.global_step, self._progress)
        if source == "dataset":
            batches = dataset_batches(window, self.pad_token_id)
        elif source == "replay":
            rank, step = self.args.process_index, self.state.global_step
            sizes = [len(rows) for rows in window]
            batches = rollout_batches(self.text.stored(sum(sizes), step, rank, self.pad_token_id), sizes)
        else:
            batches = self._roll_out_window(window)
        if self.plain_text is not None:
            whole = self.args.gradient_accumulation_steps
            self.plain_text.add_to(batches, *self._place, window=whole, seed=self.args.seed)
        count = torch.stack([batch["completion_mask"].sum() for batch in batches]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count.reshape(1)).sum()
        self._training_since, self._guard.batches = time.perf_counter(), batches
        enter(f"the training of step {self.state.global_step + 1}")
        return batches, count

    def _roll_out_window(self, window: list[Rows]) -> list[dict[str, Tensor]]:
        args = self.args
        enter(f"the rollout of step {self.state.global_step + 1}")
        rows, sizes = Rows(list(itertools.chain.from_iterable(window))), [len(rows) for rows in window]
        assert self.rollout_rows is not None
        # Less of everything where auto_find_batch_size has found that the memory holds less.
        at_once = max(self.rollout_rows * self._train_batch_size // args.train_batch_size, 1)
        started = time.perf_counter()
        # Rollouts see the bare model or a copy: no gradient synchronisation, and autocast where training has it.
        with during("rollout"), self._teacher_at_hand() as teacher, self.writer.of(self.model) as student:
            rollout = self.text.write(
                student,
                teacher,
                rows,
                progress=self._progress,
                row_ids=row_ids(sizes, *self._place),
                return_teacher_hidden=self._keeps_teacher_hidden(),
                return_drafted_ids=args.log_completions,
                max_active_rows=at_once,
                **self._sampling(),
            )
        self._means.add_rollout(rollout, time.perf_counter() - started)
        self.teacher_passes += rollout.stats["teacher_passes"]
        limit = self.text.length_limit_at(self._progress, args.max_completion_length)
        for warning in (self._share_watch and self._share_watch.add(rollout), self._text_watch.add(rollout, limit)):
            if warning:
                warnings.warn(warning, stacklevel=2)
        self.text.observe_share(rollout, self._gathered if args.world_size > 1 else None)
        if rollout.teacher_hidden is not None:
            dtype = getattr(torch, args.teacher_hidden_dtype) if args.teacher_hidden_dtype else None
            place = "cpu" if args.offload_teacher_hidden else None
            rollout.teacher_hidden = rollout.teacher_hidden.to(device=place, dtype=dtype)
        others, device = rows.teacher_prompts(), rollout.completion_ids.device
        self._unlogged_rollout = rollout, others
        teacher_prompts = None if others is None else Prompts.of(others, self.pad_token_id).to(device)
        batches = rollout_batches(rollout, sizes, teacher_prompts)
        rollout.teacher_hidden = None  # the micro-batches have it; what is kept for the log must not hold it
        return batches

    def _keeps_teacher_hidden(self) -> bool:
        """Whether the loss can read the states that the rollout's teacher passes made."""
        if not self.args.reuse_teacher_hidden or not self.step_loss.reads_teacher or self.text.engine is not None:
            return False
        return self.plan.teacher_writes and output_head(self.teacher_model) is not None

    # ---- learning from it

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return this micro-batch's part of the optimizer step's mean loss per supervised token, nats."""
        with during("loss"), self._teacher_at_hand(self.step_loss.reads_teacher) as teacher:
            self.teacher_passes += self.step_loss.needs_teacher_pass(inputs)
            loss = self.step_loss.loss(model, teacher, inputs, num_items_in_batch)
        if model.training:
            self._guard.add(loss)
        if num_items_in_batch is not None:
            # DDP averages gradients over ranks; the count is global, so the sum is what is wanted.
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    # ---- logging

    def finish_step(self) -> None:
        """Stop the clock of the training part of an optimizer step."""
        self._means.add("time/train_s", time.perf_counter() - self._training_since, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of what happened since the last log; see docs/metrics.md."""
        if "loss" in logs:
            logs |= {"skipped_steps": self.skipped_steps, **self._means.take(self._reduce)}
            if self.text.controller is not None:
                logs["rollout/initial_threshold_nats"] = self.text.controller.threshold
            if self.text.adaptive is not None:
                logs["rollout/on_policy_fraction"] = self.text.on_policy_fraction
            if self.text.store is not None:
                logs["rollout/stored_rows"] = len(self.text.store)
            if self.args.log_completions:
                self._append_completions()
        if "train_loss" in logs:  # of all steps, those before a resume included
            logs["skipped_steps"] = self.skipped_steps
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self.skipped_steps, 1)
        super().log(logs, start_time)

    def _append_completions(self) -> None:
        self.logged_completions = []
        if self._unlogged_rollout is None:
            return
        rollout, teacher_prompts = self._unlogged_rollout
        rollout = rollout.first(self.args.num_completions_to_log)
        self._unlogged_rollout = None
        # All processes ask for the models, which may be sharded; the first one reads with them.
        with (
            self.writer.of(self.model) if self.args.log_top_tokens else contextlib.nullcontext() as student,
            self._teacher_at_hand(self.args.log_top_tokens > 0) as teacher,
        ):
            if not self.is_world_process_zero():
                return
            self.logged_completions = rollout.to_dicts(self.processing_class, self.eos_token_id)
            if student is not None:
                # What both find likeliest now: the student has learned from the rollout since it wrote it.
                count, tokenizer = self.args.log_top_tokens, self.processing_class
                names = ("temperature", "top_k", "top_p", "excluded_ids")
                options = {name: value for name, value in self._sampling().items() if name in names}
                tokens = top_tokens(
                    student, teacher, rollout, tokenizer, count=count, teacher_prompts=teacher_prompts, **options
                )
                for row, likeliest in zip(self.logged_completions, tokens, strict=True):
                    row["top_tokens"] = likeliest
        rows = [{"step": self.state.global_step, **row} for row in self.logged_completions]
        append_rows(Path(str(self.args.output_dir)) / "completions.jsonl", rows)
