"""`SwitchTrainer`: transformers' Trainer whose training text is written by a policy."""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from switchkd import objective, sampling
from switchkd.batches import check_readable, collate, model_inputs, prompts_of
from switchkd.cache import prompt_positions
from switchkd.config import SwitchConfig, refuse_idle_options, resolve_fraction, resolve_objective, resolve_policy
from switchkd.data import pad_prompts, prepare
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.methods import get_method
from switchkd.models import disable_dropout, load_model, load_tokenizer, with_adapter
from switchkd.rollout import Author, Rollout
from switchkd.vocabulary import check_tokenizers, model_vocabulary_size, require_eos

# Row ids of different optimizer steps and ranks must never meet: each step owns this many.
ROWS_PER_STEP = 1 << 24


#: Means over all tokens, rows or steps and all processes since the last log, each explained in docs/metrics.md.
LOGGED_MEANS = (
    "rollout/teacher_share",
    "rollout/divergence_nats",
    "rollout/threshold_nats",
    "rollout/completion_tokens",
    "rollout/tokens_per_s",
    "time/rollout_s",
    "time/train_s",
)


class SwitchTrainer(Trainer):
    """Trains a student with a teacher in the loop; everything else is `transformers.Trainer`.

    One optimizer step: the prompts of the whole accumulation window are rolled out at once under the method's policy,
    the supervised tokens are counted *afterwards*, over the window and all ranks, and every micro-batch's loss is
    divided by that count.

    Args:
        model: The student: a model, a local folder or a hub id.
        teacher_model: The teacher, likewise; may be None for a method that needs none.
        args: A `SwitchConfig`.
        train_dataset: Rows of `prompt`, `prompt` + `completion`, `messages` or `instruction`/`input`/`output`, or a
            dataset that `switchkd.data.prepare` made.
        eval_dataset: Likewise, with answers.
        processing_class: The student's tokenizer; loaded with the student if None and the student is a name.
        peft_config: A `peft` config: only an adapter of the student is trained.
        callbacks: `transformers.TrainerCallback` objects.
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
        **kwargs: Any,
    ) -> None:
        args = args or SwitchConfig()
        self.method = get_method(args.method)
        self.objective, self.objective_options = resolve_objective(self.method, args)
        self.policy = resolve_policy(self.method, args)
        self.on_policy_fraction = resolve_fraction(self.method, args)
        refuse_idle_options(args, self.policy if self.on_policy_fraction > 0 else None)
        tokenizer = processing_class
        if tokenizer is None:
            if not isinstance(model, str):
                raise UserError("processing_class is needed when the student is given as an object")
            tokenizer = load_tokenizer(model)
        student, teacher = self._load_models(model, teacher_model, tokenizer, args)
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
        self.prepare_reports: dict[str, Any] = {}
        readers = {"student": student, "teacher": teacher}
        if train_dataset is not None:
            train_dataset = self._prepare_data("train", train_dataset, tokenizer, args, readers)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_data(name, data, tokenizer, args, readers, evaluation=True)
                for name, data in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_data("eval", eval_dataset, tokenizer, args, readers, evaluation=True)

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
        self.teacher_model = self._freeze_teacher(teacher) if teacher is not None else None
        self.add_callback(_StepClock(self))
        self._since_log = {name: [0.0, 0.0] for name in LOGGED_MEANS}
        self._unlogged_rollout: Rollout | None = None
        self._training_since = time.perf_counter()
        self._eval_totals = [0.0, 0.0, 0.0]

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective or the rollout reads the teacher."""
        rolls_with_teacher = self.policy is not None and self.policy.needs_teacher and self.on_policy_fraction > 0
        return self.objective != objective.CROSS_ENTROPY or rolls_with_teacher

    # ---- set-up

    def _load_models(
        self, model: nn.Module | str, teacher_model: nn.Module | str | None, tokenizer: Any, args: SwitchConfig
    ) -> tuple[nn.Module, nn.Module | None]:
        if not self.needs_teacher:
            teacher_model = None
        elif teacher_model is None:
            raise UserError(f"method {args.method!r} with {self.objective} needs a teacher; give teacher_model")
        elif teacher_model is model and not isinstance(model, str):
            raise UserError("model and teacher_model are one object, which cannot both learn and stand still; copy it")
        if args.teacher_model_init_kwargs and not isinstance(teacher_model, str):
            why = "no teacher is used" if teacher_model is None else "the teacher is given as an object"
            raise UserError(
                f"teacher_model_init_kwargs={args.teacher_model_init_kwargs} does nothing: {why}; remove it"
            )
        if isinstance(teacher_model, str):
            check_tokenizers(tokenizer, load_tokenizer(teacher_model, role="teacher tokenizer"))
        # Weights that an optimizer updates are float32 unless asked otherwise, whatever the checkpoint holds.
        student: nn.Module = (
            load_model(model, {"dtype": "float32", **_as_dict(args.model_init_kwargs)}, role="student")
            if isinstance(model, str)
            else model
        )
        teacher: nn.Module | None = (
            load_model(teacher_model, _as_dict(args.teacher_model_init_kwargs), role="teacher")
            if isinstance(teacher_model, str)
            else teacher_model
        )
        return student, teacher

    def _prepare_data(
        self,
        name: str,
        data: Dataset,
        tokenizer: Any,
        args: SwitchConfig,
        readers: dict[str, nn.Module | None],
        *,
        evaluation: bool = False,
    ) -> Dataset:
        if "prompt_ids" not in data.column_names:
            data, self.prepare_reports[name] = prepare(
                data,
                tokenizer,
                max_prompt_length=args.max_prompt_length,
                max_completion_length=args.max_completion_length,
            )
        if "teacher_prompt_ids" in data.column_names:
            raise UserError(f"the {name} data have a teacher_prompt, which training does not use; remove the column")
        answers = evaluation or self.on_policy_fraction < 1
        if answers:
            empty = next((row for row, ids in enumerate(data["completion_ids"]) if not ids), None)
            if empty is not None:
                reader = "evaluation" if evaluation else f"method {args.method!r}"
                raise UserError(f"{reader} reads dataset answers, but row {empty} of the {name} data has none")
        rolls_out = not evaluation and self.on_policy_fraction > 0
        check_readable(data, readers, answers=answers, new_tokens=args.max_completion_length if rolls_out else 0)
        return data

    def _refuse_unsupported_launch(self) -> None:
        if self.args.n_gpu > 1:
            raise UserError(
                f"{self.args.n_gpu} GPUs in one process would split every rollout; start with `accelerate launch` or "
                "set CUDA_VISIBLE_DEVICES to one"
            )
        zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        if self.policy is not None and self.on_policy_fraction > 0 and (self.is_fsdp_enabled or zero3):
            raise UserError(
                "rollouts under FSDP or DeepSpeed ZeRO-3 would hang, because ranks finish after different numbers of "
                "passes; use DDP or ZeRO-1/2"
            )

    def _freeze_teacher(self, teacher: nn.Module) -> nn.Module:
        teacher.requires_grad_(False)
        return teacher.to(self.args.device).eval() if not hasattr(teacher, "hf_device_map") else teacher.eval()

    # ---- writing the training text

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return one optimizer step's micro-batches, their text rolled out, and the supervised tokens they hold."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if self._rolls_out_at(self.state.global_step):
            batches = self._roll_out_window(batches)
        count = torch.stack([batch["completion_mask"].sum() for batch in batches]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count.reshape(1)).sum()
        self._training_since = time.perf_counter()
        return batches, count

    def _rolls_out_at(self, step: int) -> bool:
        if self.policy is None or self.on_policy_fraction == 0:
            return False
        # The same answer on every rank and after a resume: a function of the seed and the step only.
        key = sampling.noise_keys(self.args.seed, torch.tensor([step]), torch.tensor([0]), sampling.Stream.POLICY)
        return float(sampling.uniform(key)) < self.on_policy_fraction

    def _roll_out_window(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        assert self.policy is not None
        device = self.args.device
        sizes = [len(batch["input_ids"]) for batch in batches]
        prompts = [prompt for batch in batches for prompt in prompts_of(batch)]
        prompt_ids, prompt_mask = pad_prompts(prompts, self.pad_token_id)
        started = time.perf_counter()
        # Rollouts see the bare model: no gradient synchronisation, and autocast where training has it.
        with self.accelerator.autocast():
            rollout = roll_out(
                self.accelerator.unwrap_model(self.model),
                self.teacher_model,
                prompt_ids.to(device),
                prompt_mask.to(device),
                policy=self.policy,
                max_new_tokens=self.args.max_completion_length,
                seed=self.args.seed,
                temperature=self.args.temperature,
                top_k=self.args.top_k,
                top_p=self.args.top_p,
                draft_length="auto" if self.args.draft_length == "auto" else int(self.args.draft_length),
                eos_token_id=self.eos_token_id,
                pad_token_id=self.pad_token_id,
                row_ids=self._row_ids(sizes),
            )
        self._record_rollout(rollout, time.perf_counter() - started)
        parts = torch.arange(len(rollout), device=device).split(sizes)
        return [
            model_inputs(
                rollout.prompt_ids[rows],
                rollout.prompt_mask[rows],
                rollout.completion_ids[rows],
                rollout.completion_mask[rows],
            )
            for rows in parts
        ]

    def _row_ids(self, sizes: list[int]) -> Tensor:
        """The place of every row in the global batch: one process with big batches and many with small ones agree."""
        world, rank, per_device = self.args.world_size, self.args.process_index, self.args.train_batch_size
        ids = [(batch * world + rank) * per_device + row for batch, size in enumerate(sizes) for row in range(size)]
        return torch.tensor(ids, dtype=torch.int64) + self.state.global_step * ROWS_PER_STEP

    # ---- learning from it

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return this micro-batch's part of the optimizer step's mean loss per supervised token, nats."""
        outputs, losses = self._token_losses(model, inputs)
        loss = objective.reduce_losses(losses, inputs["completion_mask"], num_items_in_batch)
        if num_items_in_batch is not None:
            # DDP averages gradients over ranks; the count is global, so the sum is what is wanted.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _token_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, Tensor]:
        completion_length = inputs["completion_mask"].shape[1]
        forward = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "position_ids": prompt_positions(inputs["attention_mask"]),
            "use_cache": False,
            "logits_to_keep": completion_length + 1,
        }
        outputs = model(**forward)
        teacher_logits = None
        if self.objective != objective.CROSS_ENTROPY:
            assert self.teacher_model is not None
            with torch.no_grad():
                teacher_logits = objective.completion_logits(self.teacher_model(**forward).logits, completion_length)
        losses = objective.token_losses(
            objective.completion_logits(outputs.logits, completion_length),
            objective=self.objective,
            options=self.objective_options,
            teacher_logits=teacher_logits,
            labels=inputs["input_ids"][:, -completion_length:],
            loss_temperature=self.args.loss_temperature,
        )
        return outputs, losses

    # ---- evaluation on reference text

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Add one batch of reference text to the evaluation totals; the loss is weighted by tokens afterwards."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs, losses = self._token_losses(model, inputs)
            mask = inputs["completion_mask"]
            length = mask.shape[1]
            cross_entropy = objective.token_losses(
                objective.completion_logits(outputs.logits, length),
                objective=objective.CROSS_ENTROPY,
                labels=inputs["input_ids"][:, -length:],
            )
            per_row = torch.stack([torch.where(mask, value, 0.0).sum(-1) for value in (losses, cross_entropy, mask)], 1)
        # Rows that fill up the last batch of a distributed run are counted once.
        added = self.accelerator.gather_for_metrics(per_row).sum(0).tolist()
        self._eval_totals = [total + more for total, more in zip(self._eval_totals, added, strict=True)]
        return objective.reduce_losses(losses, mask).detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Return the Trainer's output with the loss averaged over tokens, not over batches."""
        self._eval_totals = [0.0, 0.0, 0.0]
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, cross_entropy, tokens = self._eval_totals
        output.metrics[f"{metric_key_prefix}_loss"] = loss / max(tokens, 1.0)
        output.metrics[f"{metric_key_prefix}_cross_entropy"] = cross_entropy / max(tokens, 1.0)
        return output

    # ---- logging

    def _record_rollout(self, rollout: Rollout, seconds: float) -> None:
        tokens = float(rollout.completion_mask.sum())
        self._unlogged_rollout = rollout
        self._count("rollout/teacher_share", float((rollout.author == Author.TEACHER).sum()), tokens)
        for name, values in (("divergence_nats", rollout.divergence), ("threshold_nats", rollout.threshold)):
            self._count(f"rollout/{name}", float(values.nansum()), float((~values.isnan()).sum()))
        self._count("rollout/completion_tokens", tokens, len(rollout))
        self._count("rollout/tokens_per_s", tokens, seconds)
        self._count("time/rollout_s", seconds, 1)

    def _count(self, name: str, total: float, count: float) -> None:
        self._since_log[name][0] += total
        self._since_log[name][1] += count

    def finish_step(self) -> None:
        """Stop the clock of the training part of an optimizer step."""
        self._count("time/train_s", time.perf_counter() - self._training_since, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of what happened since the last log; see docs/metrics.md."""
        if "loss" in logs:
            sums = list(self._since_log.values())
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(torch.tensor(sums, device=self.args.device), "sum").tolist()
            logs |= {name: total / count for name, (total, count) in zip(LOGGED_MEANS, sums, strict=True) if count}
            self._since_log = {name: [0.0, 0.0] for name in LOGGED_MEANS}
            if self.args.log_completions:
                self._append_completions()
        super().log(logs, start_time)

    def _append_completions(self) -> None:
        if self._unlogged_rollout is None or not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "completions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = self._unlogged_rollout.records(self.processing_class)[: self.args.num_completions_to_log]
        self._unlogged_rollout = None
        with path.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps({"step": self.state.global_step, **record}, ensure_ascii=False) + "\n")


def _as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    assert not isinstance(value, str)  # SwitchConfig has read the JSON
    return value or {}


class _StepClock(TrainerCallback):
    """Tells the trainer that the optimizer has stepped: what follows is logging, evaluation and saving."""

    def __init__(self, trainer: SwitchTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.finish_step()
