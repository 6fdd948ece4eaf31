"""`SwitchTrainer`: transformers' Trainer whose training text is written by a policy."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from switchkd.batches import collate, regrouped, rollout_batches
from switchkd.config import SwitchConfig, refuse_idle_options, resolve_policy, rolls_out
from switchkd.errors import UserError
from switchkd.evaluation import evaluate
from switchkd.heads import output_head
from switchkd.methods import get_method
from switchkd.models import disable_dropout, load_tokenizer, with_adapter
from switchkd.preparation import (
    load_models,
    make_plain_text,
    make_step_loss,
    make_text_source,
    prepare_data,
    sampling_options,
)
from switchkd.readable import require_readable
from switchkd.rollout import Author, Rollout
from switchkd.teacher_text import with_teacher_text
from switchkd.training_log import Listener, RunningMeans, append_completions
from switchkd.vocabulary import model_vocabulary_size, require_eos

# Row ids of different optimizer steps and ranks must never meet: each step owns this many.
ROWS_PER_STEP = 1 << 24


class SwitchTrainer(Trainer):
    """Trains a student with a teacher in the loop; everything else is `transformers.Trainer`.

    One optimizer step: the prompts of the whole accumulation window are rolled out at once under the method's policy,
    the supervised tokens are counted *afterwards*, over the window and all ranks, and every micro-batch's loss is
    divided by that count. The teacher's states of the rollout serve the loss: it is not asked twice.

    Args:
        model: The student: a model, a local folder or a hub id.
        teacher_model: The teacher, likewise; may be None for a method that needs none, and for `ssd`, which then
            copies the student.
        args: A `SwitchConfig`.
        train_dataset: Rows of `prompt`, `prompt` + `completion`, `messages` or `instruction`/`input`/`output`, with
            `teacher_prompt` where the teacher sees another prompt; or a dataset that `switchkd.data.prepare` made.
        eval_dataset: Likewise, with answers.
        processing_class: The student's tokenizer; loaded with the student if None and the student is a name.
        peft_config: A `peft` config: only an adapter of the student is trained.
        callbacks: `transformers.TrainerCallback` objects.
        lm_dataset: Rows with a column `text`, for `lm_weight`.
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
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        lm_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or SwitchConfig()
        self.method = get_method(args.method)
        self.policy = resolve_policy(self.method, args)
        refuse_idle_options(self.method, args)
        self.text = make_text_source(self.method, args)
        self.step_loss = make_step_loss(self.method, args)
        self.may_roll_out = rolls_out(self.method, args)
        tokenizer = processing_class
        if tokenizer is None:
            if not isinstance(model, str):
                raise UserError("processing_class is needed when the student is given as an object")
            tokenizer = load_tokenizer(model)
        student, teacher = load_models(
            model, teacher_model, tokenizer, args, method=self.method, needs_teacher=self.needs_teacher
        )
        if args.disable_dropout:
            disable_dropout(student)
        if peft_config is not None:
            student = with_adapter(student, peft_config)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.eos_token_id = require_eos(tokenizer, student, teacher)
        # Any id both models read will do, because masks say what is padding. A tokenizer's own padding token can be
        # newer than the models and stand outside their embeddings.
        readable = min(model_vocabulary_size(reader) for reader in (student, teacher) if reader is not None)
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None and pad < readable else 0
        readers = {"student": student, "teacher": teacher}
        train_dataset, eval_dataset, self.prepare_reports = prepare_data(
            train_dataset, eval_dataset, tokenizer, args, readers, method=self.method
        )
        self.plain_text = make_plain_text(lm_dataset, tokenizer, args)
        if self.text.adaptive is not None:
            if eval_dataset is None or isinstance(eval_dataset, dict) or args.eval_strategy == "no":
                raise UserError(
                    f"method {self.method.name!r} watches the evaluation loss: give one evaluation data set and "
                    "eval_strategy steps or epoch"
                )
            args.eval_on_start = True

        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=partial(collate, pad_token_id=self.pad_token_id),
            callbacks=callbacks,
            **kwargs,
        )
        self._refuse_unsupported_launch()
        self.teacher_model = None if teacher is None else self._frozen(teacher)
        if self._is_sharded:
            self.step_loss = replace(self.step_loss, full_logits=True)
        else:
            with self._teacher_at_hand() as teacher:
                for role, reader in (("student", self.model), ("teacher", teacher)):
                    require_readable(reader, role)  # micro-batches are padded on the left
            output_head(self.model)  # measured here, so that a warning comes before the first step
        self.add_callback(Listener(self))
        self.teacher_passes = 0
        self._means = RunningMeans()
        self._unlogged_rollout: Rollout | None = None
        self._training_since = time.perf_counter()
        self._eval_totals = [0.0, 0.0, 0.0]

    @property
    def on_policy_fraction(self) -> float:
        """The share of steps on rolled-out text that holds now, in [0, 1]."""
        return self.text.on_policy_fraction

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective or the rollout reads the teacher."""
        writes = self.may_roll_out or self.method.teacher_text
        return self.step_loss.reads_teacher or (writes and self.policy is not None and self.policy.needs_teacher)

    @property
    def _is_sharded(self) -> bool:
        zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return bool(self.is_fsdp_enabled or zero3)

    # ---- set-up

    def _refuse_unsupported_launch(self) -> None:
        if self.args.n_gpu > 1:
            raise UserError(
                f"{self.args.n_gpu} GPUs in one process would split every rollout; start with `accelerate launch` or "
                "set CUDA_VISIBLE_DEVICES to one"
            )
        if (self.may_roll_out or self.method.teacher_text) and self._is_sharded:
            raise UserError(
                "rollouts under FSDP or DeepSpeed ZeRO-3 would hang, because ranks finish after different numbers of "
                "passes; use DDP or ZeRO-1/2"
            )

    def _frozen(self, teacher: nn.Module) -> nn.Module:
        teacher.requires_grad_(False)
        if hasattr(teacher, "hf_device_map"):
            return teacher.eval()
        return teacher.to("cpu" if self.args.offload_teacher else self.args.device).eval()

    @contextlib.contextmanager
    def _teacher_at_hand(self, asked: bool = True) -> Iterator[Any]:
        """The teacher on the training device, and back in main memory afterwards where that was asked for."""
        if self.teacher_model is None or not self.args.offload_teacher or not asked:
            yield self.teacher_model
            return
        try:
            yield self.teacher_model.to(self.args.device)
        finally:
            self.teacher_model.to("cpu")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer` does; what a method needs beforehand is made first."""
        if self.method.teacher_text:
            self._write_teacher_text()
        if self.args.target_teacher_share is not None and self.args.initial_threshold is None:
            self._calibrate()
        return super().train(*args, **kwargs)

    def _sampling(self) -> dict[str, Any]:
        return {**sampling_options(self.args), "eos_token_id": self.eos_token_id}

    def _write_teacher_text(self) -> None:
        path = Path(self.args.teacher_text_file or Path(self.args.output_dir) / "teacher_text.jsonl")
        data: Any = vars(self)["train_dataset"]
        assert self.policy is not None
        with self._teacher_at_hand() as teacher, self.accelerator.main_process_first():
            self.train_dataset = with_teacher_text(
                data,
                self.accelerator.unwrap_model(self.model),
                teacher,
                path,
                policy=self.policy,
                tokenizer=self.processing_class,
                pad_token_id=self.pad_token_id,
                **self._sampling(),
            )

    def _calibrate(self) -> None:
        """Begin at the threshold that gives the wanted share before the first step."""
        with self._teacher_at_hand() as teacher, self.accelerator.autocast():
            student = self.accelerator.unwrap_model(self.model)
            self.text.calibrate_on(
                student, teacher, self.train_dataset, pad_token_id=self.pad_token_id, **self._sampling()
            )

    # ---- writing the training text

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return one optimizer step's micro-batches, their text rolled out, and the supervised tokens they hold."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        source = self.text.of_step(self.state.global_step, self._progress)
        sizes = [len(batch["input_ids"]) for batch in batches]
        if source == "dataset":
            batches = regrouped(batches, self.pad_token_id)
        elif source == "replay":
            rank, step = self.args.process_index, self.state.global_step
            batches = rollout_batches(self.text.stored(sum(sizes), step, rank, self.pad_token_id), sizes)
        else:
            batches = self._roll_out_window(batches, sizes)
        if self.plain_text is not None:
            self._add_plain_text(batches)
        count = torch.stack([batch["completion_mask"].sum() for batch in batches]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count.reshape(1)).sum()
        self._training_since = time.perf_counter()
        return batches, count

    def _roll_out_window(self, batches: list[dict[str, Tensor]], sizes: list[int]) -> list[dict[str, Tensor]]:
        args = self.args
        started = time.perf_counter()
        # Rollouts see the bare model: no gradient synchronisation, and autocast where training has it.
        with self._teacher_at_hand() as teacher, self.accelerator.autocast():
            rollout, policy, taught = self.text.write(
                self.accelerator.unwrap_model(self.model),
                teacher,
                batches,
                progress=self._progress,
                pad_token_id=self.pad_token_id,
                row_ids=self._row_ids(sizes),
                return_teacher_hidden=self._keeps_teacher_hidden(),
                **self._sampling(),
            )
        self._means.add_rollout(rollout, policy, time.perf_counter() - started)
        self.teacher_passes += rollout.stats["teacher_passes"]
        self._unlogged_rollout = rollout
        self._observe_share(rollout)
        if rollout.teacher_hidden is not None:
            dtype = args.teacher_hidden_dtype and getattr(torch, args.teacher_hidden_dtype)
            place = "cpu" if args.offload_teacher_hidden else None
            rollout.teacher_hidden = rollout.teacher_hidden.to(device=place, dtype=dtype)
        batches = rollout_batches(rollout, sizes, taught)
        rollout.teacher_hidden = None  # the micro-batches have it; what is kept for the log must not hold it
        return batches

    def _keeps_teacher_hidden(self) -> bool:
        """Whether the loss can read the states that the rollout's teacher passes made."""
        if not self.args.reuse_teacher_hidden or not self.step_loss.reads_teacher:
            return False
        asked = self.policy is not None and self.policy.needs_teacher
        return asked and output_head(self.teacher_model) is not None

    def _observe_share(self, rollout: Rollout) -> None:
        if self.text.controller is None:
            return
        written = torch.stack([(rollout.author == Author.TEACHER).sum(), rollout.completion_mask.sum()]).double()
        if self.args.world_size > 1:
            written = self.accelerator.reduce(written, "sum")
        self.text.observe_share(float(written[0] / written[1]))

    def _row_ids(self, sizes: list[int]) -> Tensor:
        """The place of every row in the global batch: one process with big batches and many with small ones agree."""
        world, rank, per_device = self.args.world_size, self.args.process_index, self.args.train_batch_size
        ids = [(batch * world + rank) * per_device + row for batch, size in enumerate(sizes) for row in range(size)]
        return torch.tensor(ids, dtype=torch.int64) + self.state.global_step * ROWS_PER_STEP

    def _add_plain_text(self, batches: list[dict[str, Tensor]]) -> None:
        assert self.plain_text is not None
        world, rank, rows = self.args.world_size, self.args.process_index, self.args.train_batch_size
        first = self.state.global_step * self.args.gradient_accumulation_steps * world
        for place, batch in enumerate(batches):
            ids = self.plain_text.rows((first + place * world + rank) * rows, rows, self.args.seed)
            # Every block is full: the tokens of the whole step are known without asking the other ranks.
            tokens = rows * (ids.shape[1] - 1) * len(batches) * world
            batch |= {"lm_input_ids": ids, "lm_tokens": torch.tensor(tokens)}

    # ---- learning from it

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return this micro-batch's part of the optimizer step's mean loss per supervised token, nats."""
        with self._teacher_at_hand(self.step_loss.reads_teacher) as teacher:
            self.teacher_passes += self.step_loss.needs_teacher_pass(inputs)
            loss = self.step_loss.loss(model, teacher, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            # DDP averages gradients over ranks; the count is global, so the sum is what is wanted.
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    # ---- evaluation on reference text

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Add one batch of reference text to the evaluation totals; the loss is weighted by tokens afterwards."""
        inputs = self._prepare_inputs(inputs)
        mask = inputs["completion_mask"]
        with torch.no_grad(), self.compute_loss_context_manager(), self._teacher_at_hand() as teacher:
            self.teacher_passes += self.step_loss.needs_teacher_pass(inputs)
            student, taught = self.step_loss.predictions(model, teacher, inputs)
            losses = self.step_loss.compare(student, taught, inputs)
            reads_teacher = self.step_loss.reads_teacher
            cross_entropy = self.step_loss.cross_entropy(student, inputs) if reads_teacher else losses
            values = (losses.token_losses, cross_entropy.token_losses, mask)
            per_row = torch.stack([torch.where(mask, value, 0.0).sum(-1) for value in values], 1)
        # Rows that fill up the last batch of a distributed run are counted once.
        added = self.accelerator.gather_for_metrics(per_row).sum(0).tolist()
        self._eval_totals = [total + more for total, more in zip(self._eval_totals, added, strict=True)]
        return losses.loss.detach(), None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Return the Trainer's output with the loss averaged over tokens, not over batches, and ROUGE-L if asked."""
        self._eval_totals = [0.0, 0.0, 0.0]
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, cross_entropy, tokens = self._eval_totals
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(tokens, 1.0)
        output.metrics[f"{metric_key_prefix}_cross_entropy"] = cross_entropy / max(tokens, 1.0)
        if self.args.eval_rouge_l_samples:
            data = dataloader.dataset
            scores = evaluate(
                self.accelerator.unwrap_model(self.model),
                self.processing_class,
                data.select(range(min(self.args.eval_rouge_l_samples, len(data)))),
                seeds=(self.args.seed,),
                max_new_tokens=self.args.max_completion_length,
                batch_size=self.args.per_device_eval_batch_size,
                progress=False,
            )
            output.metrics[f"{metric_key_prefix}_rouge_l"] = scores.rouge_l
        return output

    # ---- checkpoints and logging

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"text_source_{self.args.process_index}.pt"

    def save_text_source(self, folder: str) -> None:
        """Write what decides about later steps' text into a checkpoint."""
        torch.save(self.text.state_dict(), self._state_file(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = self._state_file(resume_from_checkpoint)
        if path.exists():
            self.text.load_state_dict(torch.load(path, weights_only=True))

    def finish_step(self) -> None:
        """Stop the clock of the training part of an optimizer step."""
        self._means.add("time/train_s", time.perf_counter() - self._training_since, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of what happened since the last log; see docs/metrics.md."""
        if "loss" in logs:
            logs |= self._means.take(self._reduced if self.args.world_size > 1 else None)
            if self.text.controller is not None:
                logs["rollout/initial_threshold_nats"] = self.text.controller.threshold
            if self.text.adaptive is not None:
                logs["rollout/on_policy_fraction"] = self.text.on_policy_fraction
            if self.text.store is not None:
                logs["rollout/stored_rows"] = len(self.text.store)
            if self.args.log_completions:
                self._append_completions()
        super().log(logs, start_time)

    def _reduced(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums.float().to(self.args.device), "sum").cpu()

    def _append_completions(self) -> None:
        if self._unlogged_rollout is None or not self.is_world_process_zero():
            return
        records = self._unlogged_rollout.records(self.processing_class)[: self.args.num_completions_to_log]
        self._unlogged_rollout = None
        append_completions(Path(self.args.output_dir), self.state.global_step, records)
