"""What is learned from a completion: the only shift, the only mask and the only reduction of the package."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from switchkd.divergences import DIVERGENCES
from switchkd.errors import UserError, check_loss_temperature
from switchkd.objective_names import CROSS_ENTROPY, check_objective_name
from switchkd.sampling import restricted


def completion_logits(logits: Tensor, completion_length: int) -> Tensor:
    """Return the logits that predict each completion token: the shift.

    Args:
        logits: `[B, L, V]` for the last L positions of prompt + completion, L >= C + 1.
        completion_length: C.

    Returns:
        `[B, C, V]`; entry t was computed from the prefix that ends just before completion token t.
    """
    return logits[:, -completion_length - 1 : -1]


def token_losses(
    student_logits: Tensor,
    *,
    objective: str,
    options: Mapping[str, Any] | None = None,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    loss_temperature: float = 1.0,
    excluded_ids: tuple[int, ...] = (),
) -> Tensor:
    """Return the loss of every token, nats, at least float32.

    Args:
        student_logits: `[..., V]`.
        objective: `cross_entropy` or a name in `switchkd.divergences.DIVERGENCES`.
        options: Keyword options of that divergence.
        teacher_logits: `[..., V']`; both sides are cut to the shared ids and renormalised. No gradient reaches it.
        labels: int64 `[...]`, for the cross-entropy.
        loss_temperature: Divides both models' logits before a divergence compares them, > 0. The cross-entropy stays
            at 1, and no factor of its square is applied.
        excluded_ids: Ids that a divergence leaves out on both sides, which are renormalised, as
            `switchkd.models.vocabulary.check_tokenizers` returns them.

    Returns:
        `[...]`.
    """
    if objective == CROSS_ENTROPY:
        if labels is None:
            raise ValueError("cross_entropy needs labels")
        losses = torch.nn.functional.cross_entropy(
            at_least_float32(student_logits).flatten(0, -2), labels.flatten(), reduction="none"
        )
        return losses.view(labels.shape)
    if teacher_logits is None:
        raise ValueError(f"{objective} needs teacher_logits")
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student_log_probs, teacher_log_probs = (
        (at_least_float32(restricted(logits, shared, excluded_ids)) / loss_temperature).log_softmax(-1)
        for logits in (student_logits, teacher_logits.detach())
    )
    return DIVERGENCES[objective](student_log_probs, teacher_log_probs, **(options or {}))


@dataclass(frozen=True)
class Objective:
    """What is learned at a token: a divergence with its options, or the cross-entropy; it checks itself.

    Attributes:
        name: `cross_entropy` or a name in `switchkd.divergences.DIVERGENCES`.
        options: Keyword options of that divergence.
        temperature: Divides both models' logits before a divergence compares them, > 0; 1 for the cross-entropy.
        excluded_ids: Ids that a divergence leaves out on both sides, see `token_losses`.

    Raises:
        UserError: An unknown name, or an option or temperature that is out of range or would do nothing.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    excluded_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_objective(self.name, self.options)
        check_loss_temperature(self.temperature)
        if not self.reads_teacher and self.temperature != 1.0:
            raise UserError(f"loss_temperature={self.temperature} does nothing with cross_entropy; remove it")

    @classmethod
    def of(cls, objective: "Objective | str") -> "Objective":
        """Return an objective given as itself or by its name."""
        return cls(objective) if isinstance(objective, str) else objective

    @property
    def reads_teacher(self) -> bool:
        """Whether the student is compared with the teacher."""
        return self.name != CROSS_ENTROPY

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss of every token, nats, `[...]`; arguments as in `token_losses`."""
        return token_losses(
            student_logits,
            objective=self.name,
            options=self.options,
            teacher_logits=teacher_logits,
            labels=labels,
            loss_temperature=self.temperature,
            excluded_ids=self.excluded_ids,
        )


def reduce_losses(losses: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Return the sum of the supervised losses over a count: the mask and the reduction.

    Args:
        losses: `[B, C]`.
        mask: True at supervised tokens, `[B, C]`.
        denominator: How many tokens share one optimizer step: over the whole accumulation window and all ranks. The
            mask's own count if None.

    Returns:
        A scalar; 0, with a gradient, where nothing is supervised.
    """
    if denominator is None:
        denominator = mask.sum()
    # Masking by selection: a nan or inf at an unsupervised position must not survive as 0 * nan.
    return per_token(torch.where(mask, losses, 0.0).sum(), denominator)


def per_token(total: Tensor, count: Tensor | float) -> Tensor:
    """Return a sum of losses over a count of tokens, 0 where the count is 0."""
    return total / torch.clamp(torch.as_tensor(count, device=total.device), min=1)


def check_objective(objective: str, options: Mapping[str, Any]) -> None:
    """Refuse an unknown objective and options it does not take.

    Raises:
        UserError: Names the valid choices.
    """
    check_objective_name(objective)
    accepted = objective_options(objective)
    for name, value in options.items():
        if name not in accepted:
            raise UserError(
                f"{name}={value} does nothing with {objective}"
                + (f", which takes {', '.join(accepted)}" if accepted else "; remove it or choose another divergence")
            )
    if options:
        uniform = torch.zeros(1, 2).log_softmax(-1)
        try:
            DIVERGENCES[objective](uniform, uniform, **options)
        except ValueError as error:
            raise UserError(str(error)) from None


def objective_options(objective: str) -> list[str]:
    """Return the names of the options an objective takes."""
    if objective == CROSS_ENTROPY:
        return []
    parameters = inspect.signature(DIVERGENCES[objective]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def at_least_float32(logits: Tensor) -> Tensor:
    """Return values in float32, or in float64 where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
