"""The names of what can be learned and the options each takes; torch-free, for `--help` and early checks.

A test holds the table to the functions themselves.
"""

from switchkd.errors import UserError

CROSS_ENTROPY = "cross_entropy"

#: Name -> its keyword options: the divergences of `switchkd.divergences.DIVERGENCES` and the cross-entropy.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    CROSS_ENTROPY: (),
    "forward_kl": (),
    "reverse_kl": (),
    "generalized_jsd": ("teacher_weight",),
    "skewed_forward_kl": ("skew",),
    "skewed_reverse_kl": ("skew",),
    "total_variation": (),
    "adaptive_kl": ("head_mass",),
}


def check_objective_name(objective: str) -> None:
    """Refuse an unknown objective.

    Raises:
        UserError: Names the valid choices.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"unknown divergence {objective!r}; choose one of {', '.join(OBJECTIVES)}")
