"""The methods as values: exact name -> who writes the training text, how often, and what is learned from it."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from switchkd.errors import UserError
from switchkd.objective import CROSS_ENTROPY
from switchkd.policies import Policy, StudentPolicy, SwitchPolicy


@dataclass(frozen=True)
class Method:
    """One way to train a student.

    Attributes:
        name: The exact name used on the command line and in configs.
        summary: One line: who writes, what is learned.
        objective: `cross_entropy` or the name of a divergence.
        objective_options: Keyword options of that divergence.
        policy: Makes the rollout policy; None where the text is the dataset's.
        policy_options: Names of the config fields passed to `policy`.
        on_policy_fraction: Share of optimizer steps whose text is rolled out, in [0, 1]; the others use the dataset.
        source: Paper.
    """

    name: str
    summary: str
    objective: str
    source: str
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    policy: Callable[..., Policy] | None = None
    policy_options: tuple[str, ...] = ()
    on_policy_fraction: float = 0.0


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="sft",
            summary="dataset answers, cross-entropy; no teacher",
            objective=CROSS_ENTROPY,
            source="supervised fine-tuning",
        ),
        Method(
            name="kd",
            summary="dataset answers, forward KL to the teacher",
            objective="forward_kl",
            source="Hinton et al., arXiv 1503.02531",
        ),
        Method(
            name="gkd",
            summary="student-written text in half of the steps, dataset answers in the others; JSD",
            objective="generalized_jsd",
            objective_options={"teacher_weight": 0.5},
            policy=StudentPolicy,
            on_policy_fraction=0.5,
            source="Agarwal et al., arXiv 2306.13649",
        ),
        Method(
            name="switch",
            summary="the student writes, the teacher takes over where the two differ too much; reverse KL",
            objective="reverse_kl",
            policy=SwitchPolicy,
            policy_options=("initial_threshold", "final_ratio", "horizon", "schedule"),
            on_policy_fraction=1.0,
            source="Koo et al., arXiv 2410.19503",
        ),
    )
}


def get_method(name: str) -> Method:
    """Return the method of that exact name.

    Raises:
        UserError: No such method; the nearest name is given.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown method {name!r}; {hint}valid: {', '.join(METHODS)}")
