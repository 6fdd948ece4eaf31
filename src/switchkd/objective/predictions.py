"""What two models predict for a completion, and the loss between them: from hidden states where the heads allow it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.models.forward import device_of
from switchkd.models.heads import OutputHead, hidden_states_of, output_head
from switchkd.objective import loss as objectives
from switchkd.objective.chunked import ChunkedLoss, chunked_loss
from switchkd.objective.loss import Objective
from switchkd.objective.policy_gradient import importance_weights, policy_gradient_losses
from switchkd.sampling import restricted


@dataclass(frozen=True)
class Predictions:
    """The states or the logits that predict each completion token.

    Attributes:
        values: States `[B, C, H]` where there is a head to read them, else logits `[B, C, V]`.
        head: The model's output layer, or None.
    """

    values: Tensor
    head: OutputHead | None

    def logits(self) -> Tensor:
        """Return all logits, `[B, C, V]`."""
        if self.head is None:
            return self.values
        # Under autocast a model whose last layer is linear, such as OPT-350M, returns states of another precision.
        weight, states = getattr(self.head.module, "weight", None), self.values
        if isinstance(weight, Tensor) and weight.is_floating_point():
            states = states.to(weight.dtype)
        return self.head.logits(self.head.layer(states))


def predict(
    model: nn.Module, forward: Mapping[str, Any], completion_length: int, *, full_logits: bool = False
) -> Predictions:
    """Run a model over prompt + completion, without its output layer where the loss can do without logits.

    Args:
        model: A causal language model, possibly inside a distributed wrapper.
        forward: Arguments of its forward pass.
        completion_length: C.
        full_logits: Always let the model compute its logits itself: its weights are not in one place.
    """
    head = None if full_logits else output_head(model)
    # A teacher may lie on another device than the student whose batch it reads.
    device = device_of(model)
    forward = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in forward.items()}
    forward["logits_to_keep"] = completion_length + 1
    values = model(**forward).logits if head is None else hidden_states_of(model, **forward)
    return Predictions(objectives.completion_logits(values, completion_length), head)


def supervised_loss(
    student: Predictions,
    teacher: Predictions | None,
    *,
    mask: Tensor,
    objective: Objective,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> ChunkedLoss:
    """Return `reduce_losses(weights * objective(...), mask, denominator)` and the losses of the tokens.

    Arguments as in `chunked_loss`, which computes it unless a model has no head to read its states with.
    """
    if student.head is not None and (teacher is None or teacher.head is not None):
        return chunked_loss(
            student.values,
            student.head,
            mask=mask,
            objective=objective,
            teacher_hidden=None if teacher is None else teacher.values,
            teacher_head=None if teacher is None else teacher.head,
            labels=labels,
            weights=weights,
            denominator=denominator,
        )
    teacher_logits = None if teacher is None else teacher.logits().to(student.values.device)
    losses = objective(student.logits(), teacher_logits, labels)
    weighted = losses if weights is None else losses * weights
    return ChunkedLoss(objectives.reduce_losses(weighted, mask, denominator), losses.detach())


def minillm_loss(
    student: Predictions,
    teacher: Predictions,
    *,
    mask: Tensor,
    labels: Tensor,
    mixture_weight: float,
    clip_range: float,
    denominator: Tensor | float | None = None,
    excluded_ids: tuple[int, ...] = (),
) -> Tensor:
    """Return MiniLLM's loss of text sampled from the blend: single-step term plus policy gradient.

    Its value means little; its gradient is that of `switchkd.objective.policy_gradient` over a count.

    Args:
        student: Predictions for the text.
        teacher: Of the teacher.
        mask: True at tokens of the text, `[B, C]`.
        labels: The tokens, int64 `[B, C]`.
        mixture_weight: The teacher's part of the blend, in [0, 1).
        clip_range: As in PPO; 0: off.
        denominator: How many tokens share one optimizer step; the mask's own count if None.
        excluded_ids: Left out of both models' distributions; no token of the text is one.

    Reference:
        Gu et al., "MiniLLM", arXiv 2306.08543, equation 6.
    """
    student_logits, teacher_logits = student.logits(), teacher.logits().detach()
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student_logits, teacher_logits = (
        restricted(logits, shared, excluded_ids) for logits in (student_logits, teacher_logits)
    )
    of_student, of_teacher = (
        -objectives.token_losses(logits, objective=objectives.CROSS_ENTROPY, labels=labels)
        for logits in (student_logits, teacher_logits)
    )
    weights = importance_weights(of_student, of_teacher, mask, teacher_weight=mixture_weight)
    single_step = objectives.token_losses(student_logits, objective="reverse_kl", teacher_logits=teacher_logits)
    long_term = policy_gradient_losses(
        of_student, of_teacher, mask, teacher_weight=mixture_weight, clip_range=clip_range
    )
    return objectives.reduce_losses(weights * single_step + long_term, mask, denominator)


def weights_by_author(author: Tensor, weights: Mapping[int, float]) -> Tensor | None:
    """Return the loss weight of every token by who wrote it, float32 `[B, C]`; None where all are 1.

    Args:
        author: `Author` values, `[B, C]`.
        weights: Author -> weight; 1 for those left out.
    """
    if all(weight == 1.0 for weight in weights.values()):
        return None
    result = torch.ones(author.shape, device=author.device)
    for who, weight in weights.items():
        result = torch.where(author == who, weight, result)
    return result
