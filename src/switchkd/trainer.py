"""`SwitchTrainer`: transformers' Trainer whose training text is written by a policy."""

import json
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from switchkd import objective, sampling
from switchkd.config import SwitchConfig, resolve_fraction, resolve_objective, resolve_policy
from switchkd.data import pad_prompts, prepare
from switchkd.engine import context_length, prompt_positions, roll_out
from switchkd.errors import UserError
from switchkd.methods import get_method
from switchkd.models import disable_dropout, load_model, load_tokenizer
from switchkd.rollout import Rollout
from switchkd.vocabulary import check_tokenizers, require_eos

# Row ids of different optimizer steps and ranks must never meet: each step owns this many.
ROWS_PER_STEP = 1 << 24


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

        tokenizer = processing_class
        if tokenizer is None:
            if not isinstance(model, str):
                raise UserError("processing_class is needed when the student is given as an object")
            tokenizer = load_tokenizer(model)
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
        if teacher is None and self.needs_teacher:
            raise UserError(f"method {args.method!r} with {self.objective} needs a teacher; give teacher_model")
        if args.disable_dropout:
            disable_dropout(student)
        if peft_config is not None:
            student = _with_adapter(student, peft_config)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.eos_token_id = require_eos(tokenizer, student, teacher)
        self.prepare_reports: dict[str, Any] = {}
        train_dataset = self._prepare_data("train", train_dataset, tokenizer, args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_data(name, data, tokenizer, args) for name, data in eval_dataset.items()
            }
        else:
            eval_dataset = self._prepare_data("eval", eval_dataset, tokenizer, args)
        eval_sets = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        self._check_context(
            {"student": student, "teacher": teacher}, [train_dataset, *eval_sets], args.max_completion_length
        )

        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=self._collate,
            callbacks=callbacks,
            **kwargs,
        )
        self._refuse_unsupported_launch()
        self.teacher_model = self._freeze_teacher(teacher) if teacher is not None and self.needs_teacher else None
        self._pending: dict[str, list[float]] = defaultdict(list)
        self._last_rollout: Rollout | None = None
        self._window_started: float | None = None
        self._eval_totals: dict[str, Tensor] = {}

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective or the rollout reads the teacher."""
        rolls_with_teacher = self.policy is not None and self.policy.needs_teacher and self.on_policy_fraction > 0
        return self.objective != objective.CROSS_ENTROPY or rolls_with_teacher

    # ---- set-up

    def _prepare_data(self, name: str, data: Dataset | None, tokenizer: Any, args: SwitchConfig) -> Dataset | None:
        if data is None:
            return None
        if "prompt_ids" not in data.column_names:
            data, self.prepare_reports[name] = prepare(
                data,
                tokenizer,
                max_prompt_length=args.max_prompt_length,
                max_completion_length=args.max_completion_length,
            )
        needs_answers = name != "train" or self.on_policy_fraction < 1
        if needs_answers:
            empty = next((row for row, ids in enumerate(data["completion_ids"]) if not ids), None)
            if empty is not None:
                reader = f"method {args.method!r}" if name == "train" else "evaluation"
                raise UserError(f"{reader} reads dataset answers, but row {empty} of the {name} data has none")
        return data

    def _check_context(self, roles: dict[str, nn.Module | None], datasets: list[Dataset | None], new: int) -> None:
        longest = max((len(ids) for data in datasets if data is not None for ids in data["prompt_ids"]), default=0)
        for role, model in roles.items():
            limit = context_length(model) if model is not None else None
            if limit is not None and longest + new > limit:
                raise UserError(
                    f"longest prompt {longest} + max_completion_length {new} exceed the {role}'s context of {limit} "
                    "tokens; lower max_completion_length or max_prompt_length"
                )

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

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One micro-batch as the dataset has it: prompts padded on the left, answers on the right."""
        pad = self.processing_class.pad_token_id
        prompt_ids, prompt_mask = pad_prompts([row["prompt_ids"] for row in rows], pad)
        completions = [torch.tensor(row["completion_ids"], dtype=torch.int64) for row in rows]
        completion_ids = nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(completion) for completion in completions])
        completion_mask = torch.arange(completion_ids.shape[1]) < lengths.unsqueeze(1)
        return model_inputs(prompt_ids, prompt_mask, completion_ids, completion_mask)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return one optimizer step's micro-batches, their text rolled out, and the supervised tokens they hold."""
        self._finish_window()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if self._rolls_out_at(self.state.global_step):
            batches = self._roll_out_window(batches)
        count = torch.stack([batch["completion_mask"].sum() for batch in batches]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count.reshape(1)).sum()
        self._window_started = time.perf_counter()
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
        prompts = [ids[mask].tolist() for batch in batches for ids, mask in zip(*_prompts_of(batch), strict=True)]
        pad = self.processing_class.pad_token_id
        prompt_ids, prompt_mask = pad_prompts(prompts, pad)
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
                pad_token_id=pad,
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
        for name, value in (("loss", losses), ("cross_entropy", cross_entropy)):
            self._add_eval_total(name, torch.where(mask, value, 0.0).double().sum())
        self._add_eval_total("tokens", mask.sum().double())
        return objective.reduce_losses(losses, mask).detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Return the Trainer's output with the loss averaged over tokens, not over batches."""
        self._eval_totals = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        totals = {name: float(self.accelerator.reduce(value)) for name, value in self._eval_totals.items()}
        tokens = max(totals.pop("tokens", 0.0), 1.0)
        for name, total in totals.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = total / tokens
        return output

    def _add_eval_total(self, name: str, value: Tensor) -> None:
        self._eval_totals[name] = self._eval_totals.get(name, torch.zeros_like(value)) + value

    # ---- logging

    def _record_rollout(self, rollout: Rollout, seconds: float) -> None:
        tokens = int(rollout.completion_mask.sum())
        self._last_rollout = rollout
        self._pending["rollout/teacher_share"].append(rollout.teacher_share)
        for name, values in (("divergence_nats", rollout.divergence), ("threshold_nats", rollout.threshold)):
            if not bool(values.isnan().all()):
                self._pending[f"rollout/{name}"].append(float(values.nanmean()))
        self._pending["rollout/completion_tokens"].append(tokens / len(rollout))
        self._pending["rollout/tokens_per_s"].append(tokens / max(seconds, 1e-9))
        self._pending["time/rollout_s"].append(seconds)

    def _finish_window(self) -> None:
        if self._window_started is not None:
            self._pending["time/train_s"].append(time.perf_counter() - self._window_started)
            self._window_started = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of what happened since the last log; see docs/metrics.md."""
        if "loss" in logs:
            self._finish_window()
            logs.update({name: sum(values) / len(values) for name, values in self._pending.items() if values})
            self._pending.clear()
            if self.args.log_completions:
                self._append_completions()
        super().log(logs, start_time)

    def _append_completions(self) -> None:
        if self._last_rollout is None or not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "completions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = self._last_rollout.records(self.processing_class)[: self.args.num_completions_to_log]
        with path.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps({"step": self.state.global_step, **record}, ensure_ascii=False) + "\n")


def model_inputs(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> dict[str, Tensor]:
    """Return prompt and completion side by side, without columns in which no row has a token.

    Args:
        prompt_ids: `[B, P]`, left-padded.
        prompt_mask: `[B, P]`.
        completion_ids: `[B, C]`, right-padded.
        completion_mask: `[B, C]`.

    Returns:
        `input_ids` and `attention_mask` `[B, P' + C']` and `completion_mask` `[B, C']`, C' >= 1.
    """
    prompt_length = max(int(prompt_mask.sum(-1).max()), 1)
    completion_length = max(int(completion_mask.sum(-1).max()) if completion_mask.numel() else 0, 1)
    if completion_ids.shape[1] == 0:
        # Prompt-only rows still need one column; it is masked out and replaced by the rollout.
        completion_ids = prompt_ids[:, -1:]
        completion_mask = torch.zeros_like(completion_ids, dtype=torch.bool)
    ids = torch.cat([prompt_ids[:, -prompt_length:], completion_ids[:, :completion_length]], dim=1)
    mask = torch.cat([prompt_mask[:, -prompt_length:], completion_mask[:, :completion_length]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": mask.to(torch.int64),
        "completion_mask": completion_mask[:, :completion_length],
    }


def _prompts_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    prompt_length = batch["input_ids"].shape[1] - batch["completion_mask"].shape[1]
    return batch["input_ids"][:, :prompt_length], batch["attention_mask"][:, :prompt_length].bool()


def _with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    try:
        from peft import get_peft_model
    except ImportError:
        raise UserError("peft_config needs the peft package: pip install 'switchkd[peft]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return get_peft_model(model, peft_config)


def _as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(value, str):
        raise UserError(f"model_init_kwargs must be a JSON object, got {value!r}")
    return value or {}
