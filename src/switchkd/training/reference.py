"""The part of `SwitchTrainer` that evaluates: losses on reference text, averaged over tokens, and ROUGE-L if asked."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.data.batches import padded_batch
from switchkd.errors import UserError
from switchkd.evaluation import evaluate
from switchkd.objective.step import StepLoss
from switchkd.training.config import SwitchConfig
from switchkd.training.launching import LaunchedTrainer
from switchkd.training.log import ReferenceTotals
from switchkd.training.peers import enter
from switchkd.training.resolve import Plan
from switchkd.training.setup import at_hand, prepare_data
from switchkd.training.sharded_teacher import ShardedTeacher
from switchkd.training.writer import Writer


class ReferenceTrainer(LaunchedTrainer):
    """A Trainer that compares student and teacher on reference text; a subclass sets what is annotated here."""

    args: SwitchConfig
    model: nn.Module
    teacher_model: nn.Module | None
    plan: Plan
    step_loss: StepLoss
    pad_token_id: int
    teacher_passes: int
    writer: Writer

    #: Where `teacher_sharding` spreads the teacher over the processes.
    teacher_shards: ShardedTeacher | None = None

    def _teacher_at_hand(self, used: bool = True) -> contextlib.AbstractContextManager[Any]:
        if self.teacher_shards is not None and used:
            return self.teacher_shards.in_step()
        return at_hand(self.teacher_model, self.args.device, offload=self.args.offload_teacher and used)

    def _wait_for_everyone(self) -> None:
        if self.teacher_shards is not None:
            self.teacher_shards.keep_step()
        self.accelerator.wait_for_everyone()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the metrics of an evaluation set, which may be raw: it is prepared as the one of the training."""
        return super().evaluate(self._prepared(eval_dataset), ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Return the metrics of a data set, raw or prepared; there are no predictions, because no logits are held."""
        return super().predict(self._prepared(test_dataset), ignore_keys, metric_key_prefix)

    def _prepared(self, data: Any) -> Any:
        if data is None or isinstance(data, str):  # the trainer's own set, or one of them by its name
            return data
        readers = {"student": self.accelerator.unwrap_model(self.model), "teacher": self.teacher_model}
        return prepare_data(None, data, self.processing_class, self.args, readers, plan=self.plan)[1]

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Add one batch of reference text to the evaluation totals; the loss is weighted by tokens afterwards."""
        batch = self._prepare_inputs(padded_batch(inputs, self.pad_token_id))
        mask = batch["completion_mask"]
        with torch.no_grad(), self.compute_loss_context_manager(), self._teacher_at_hand() as teacher:
            self.teacher_passes += self.step_loss.needs_teacher_pass(batch)
            by_student, by_teacher = self.step_loss.predictions(model, teacher, batch)
            losses = self.step_loss.compare(by_student, by_teacher, batch)
            reads_teacher = self.step_loss.reads_teacher
            cross_entropy = self.step_loss.cross_entropy(by_student, batch) if reads_teacher else losses
        # Rows that fill up the last batch of a distributed run are counted once.
        per_row = ReferenceTotals.per_row(losses.token_losses, cross_entropy.token_losses, mask)
        self._reference.add(self.accelerator.gather_for_metrics(per_row))
        return losses.loss.detach(), None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Return the Trainer's output with the loss averaged over tokens, not over batches, and ROUGE-L if asked."""
        enter("the evaluation")
        if (self.sharding or self.is_deepspeed_enabled) and not self.accelerator._models:
            raise UserError(
                "evaluation before training is not supported under FSDP and DeepSpeed, which prepare student and "
                "optimizer together: train first, or evaluate in one process"
            )
        self._reference = ReferenceTotals()
        kwargs["metric_key_prefix"] = metric_key_prefix
        output: Any = super().evaluation_loop(dataloader, *args, **kwargs)
        for name, value in self._reference.means().items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        if self.args.eval_rouge_l_samples:
            data = dataloader.dataset
            with self.writer.answering(self.model) as student:
                scores = evaluate(
                    student,
                    self.processing_class,
                    data.select(range(min(self.args.eval_rouge_l_samples, len(data)))),
                    decoding_seeds=(self.args.seed,),
                    max_completion_length=self.args.max_completion_length,
                    batch_size=self.args.per_device_eval_batch_size,
                    progress=False,
                )
            output.metrics[f"{metric_key_prefix}_rouge_l"] = scores.rouge_l
        return output
