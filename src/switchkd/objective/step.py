"""The loss of one micro-batch: the method's objective on whatever text it holds, plus what the user added."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.errors import during
from switchkd.models.forward import prompt_positions
from switchkd.models.heads import gather_head, output_head
from switchkd.objective.chunked import ChunkedLoss
from switchkd.objective.loss import CROSS_ENTROPY, Objective
from switchkd.objective.predictions import Predictions, minillm_loss, predict, supervised_loss, weights_by_author

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class StepLoss:
    """What is learned from a micro-batch of `switchkd.data.batches`.

    Attributes:
        objective: What is learned at a token.
        author_weights: `Author` -> weight of the loss of rolled-out tokens, 1 for those left out.
        ce_weight: Adds this times the cross-entropy where the text is the data set's.
        lm_weight: Adds this times the cross-entropy on the plain text that the micro-batch carries.
        minillm: `(mixture_weight, clip_range)` of MiniLLM's policy gradient, which then replaces the objective on
            rolled-out text; None for every other method.
        full_logits: Models compute their logits themselves, because their weights are sharded.
    """

    objective: Objective
    author_weights: Mapping[int, float] = field(default_factory=dict)
    ce_weight: float = 0.0
    lm_weight: float = 0.0
    minillm: tuple[float, float] | None = None
    full_logits: bool = False

    @property
    def reads_teacher(self) -> bool:
        """Whether the objective compares with the teacher."""
        return self.objective.reads_teacher

    def needs_teacher_pass(self, inputs: Inputs) -> bool:
        """Whether the teacher must read the micro-batch: not where its states come with it."""
        return self.reads_teacher and "teacher_hidden" not in inputs

    def predictions(
        self, student: nn.Module, teacher: nn.Module | None, inputs: Inputs
    ) -> tuple[Predictions, Predictions | None]:
        """Return what the student predicts, with its graph, and the teacher, without; None where it is not read."""
        length = inputs["completion_mask"].shape[1]
        predicted = predict(student, _forward(inputs, ""), length, full_logits=self.full_logits)
        if not self.reads_teacher:
            return predicted, None
        assert teacher is not None
        if "teacher_hidden" in inputs:
            gather_head(teacher)
            return predicted, Predictions(inputs["teacher_hidden"], output_head(teacher))
        prefix = "teacher_" if "teacher_input_ids" in inputs else ""
        with torch.no_grad(), during("teacher pass"):
            return predicted, predict(teacher, _forward(inputs, prefix), length, full_logits=self.full_logits)

    def loss(
        self, student: nn.Module, teacher: nn.Module | None, inputs: Inputs, denominator: Tensor | float | None
    ) -> Tensor:
        """Return the sum of the micro-batch's losses over a count, a scalar.

        Args:
            student: The model in training, wrapped as it is trained.
            teacher: May be None where the objective does not compare.
            inputs: Made by `switchkd.data.batches`, `author` only where the text was rolled out; `lm_input_ids` and
                `lm_tokens` may stand beside it.
            denominator: Supervised tokens of the whole optimizer step; the micro-batch's own if None.
        """
        predicted, by_teacher = self.predictions(student, teacher, inputs)
        mask, labels = inputs["completion_mask"], _labels(inputs)
        rolled_out = "author" in inputs
        if self.minillm is not None and rolled_out:
            assert by_teacher is not None
            mixture_weight, clip_range = self.minillm
            total = minillm_loss(
                predicted,
                by_teacher,
                mask=mask,
                labels=labels,
                mixture_weight=mixture_weight,
                clip_range=clip_range,
                denominator=denominator,
                excluded_ids=self.objective.excluded_ids,
            )
        else:
            weights = weights_by_author(inputs["author"], self.author_weights) if rolled_out else None
            total = self.compare(predicted, by_teacher, inputs, denominator, weights).loss
        if self.ce_weight > 0 and not rolled_out:
            total = total + self.ce_weight * self.cross_entropy(predicted, inputs, denominator).loss
        if "lm_input_ids" in inputs:
            total = total + self.lm_weight * self._plain_text(student, inputs)
        return total

    def compare(
        self,
        student: Predictions,
        teacher: Predictions | None,
        inputs: Inputs,
        denominator: Tensor | float | None = None,
        weights: Tensor | None = None,
    ) -> ChunkedLoss:
        """Return the objective on a micro-batch, and the losses of its tokens."""
        return supervised_loss(
            student,
            teacher,
            mask=inputs["completion_mask"],
            objective=self.objective,
            labels=_labels(inputs),
            weights=weights,
            denominator=denominator,
        )

    def cross_entropy(
        self, student: Predictions, inputs: Inputs, denominator: Tensor | float | None = None
    ) -> ChunkedLoss:
        """Return the cross-entropy of the micro-batch's own tokens."""
        mask = inputs["completion_mask"]
        return supervised_loss(
            student,
            None,
            mask=mask,
            objective=Objective(CROSS_ENTROPY),
            labels=_labels(inputs),
            denominator=denominator,
        )

    def _plain_text(self, student: nn.Module, inputs: Inputs) -> Tensor:
        ids = inputs["lm_input_ids"]
        predicted = predict(
            student, {"input_ids": ids, "use_cache": False}, ids.shape[1] - 1, full_logits=self.full_logits
        )
        return supervised_loss(
            predicted,
            None,
            mask=torch.ones_like(ids[:, 1:], dtype=torch.bool),
            objective=Objective(CROSS_ENTROPY),
            labels=ids[:, 1:],
            denominator=inputs["lm_tokens"],
        ).loss


def _labels(inputs: Inputs) -> Tensor:
    return inputs["input_ids"][:, -inputs["completion_mask"].shape[1] :]


def _forward(inputs: Inputs, prefix: str) -> dict[str, Any]:
    mask = inputs[f"{prefix}attention_mask"]
    return {
        "input_ids": inputs[f"{prefix}input_ids"],
        "attention_mask": mask,
        "position_ids": prompt_positions(mask),
        "use_cache": False,
    }
