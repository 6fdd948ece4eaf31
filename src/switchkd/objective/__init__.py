"""What is learned from a completion: the only shift, mask and reduction, from logits or without holding them."""

from switchkd.objective.loss import (
    CROSS_ENTROPY,
    Objective,
    check_objective,
    completion_logits,
    objective_options,
    reduce_losses,
    token_losses,
)

__all__ = [
    "CROSS_ENTROPY",
    "Objective",
    "check_objective",
    "completion_logits",
    "objective_options",
    "reduce_losses",
    "token_losses",
]
