"""The options of the rollout policies on the command line; nothing heavy is imported until a policy is made."""

import argparse
from typing import TYPE_CHECKING, Any

from switchkd.errors import UserError

if TYPE_CHECKING:
    from switchkd.policies import Policy

# name -> (type, placeholder, help)
FLAGS: dict[str, tuple[Any, str, str]] = {
    "initial_threshold": (float, "NATS", "at position 0, nats; switch: in [0, ln 2] (default: 0.3)"),
    "final_ratio": (float, "R", "last over first threshold (default: 0.1)"),
    "horizon": (float, "N", "where that ratio is reached, tokens (default: max_new_tokens)"),
    "schedule": (str, "NAME", "exponential (default), linear, constant or increasing"),
    "minimum_leg": (int, "N", "nobody takes the pen back before N tokens (default: 1)"),
    "clock": (str, "NAME", "what the schedule counts: position (default) or since_teacher"),
    "mixture_weight": (float, "W", "blend: the teacher's weight, in [0, 1] (default: 0.2)"),
    "teacher_top_k": (int, "K", "skd: drafts outside the teacher's first K are replaced (default: 25)"),
    "divergence_multiple": (float, "X", "adaswitch: switch where KL exceeds X times its moving mean (default: 3)"),
    "divergence_window": (int, "N", "adaswitch: tokens of that mean (default: 8)"),
    "trigger_threshold": (float, "NATS", "relay: divergence that starts a leg (default: 0.3)"),
    "leg_length": (int, "N", "relay: tokens of a leg (default: 8)"),
    "leg_budget": (int, "N", "relay: legs of a text at most (default: 4)"),
    "kl_budget": (float, "NATS", "trb: KL(blend, student) allowed (default: 0.1)"),
    "teacher_share": (float, "P", "random: share of positions the teacher writes, in [0, 1] (default: 0.53)"),
    "teacher_tokens": (int, "N", "teacher_first: tokens the teacher writes (default: 64)"),
    "switch_position": (int, "N", "student_first: where the teacher takes over, from 0 (default: 64)"),
}
_SCHEDULED = ("initial_threshold", "final_ratio", "horizon", "schedule", "minimum_leg", "clock")
# What each policy takes; options left out keep the policy's own default.
POLICIES: dict[str, tuple[str, ...]] = {
    "switch": _SCHEDULED,
    "student": (),
    "teacher": (),
    "blend": ("mixture_weight",),
    "skd": ("teacher_top_k",),
    "adaswitch": ("divergence_multiple", "divergence_window"),
    "relay": ("trigger_threshold", "leg_length", "leg_budget"),
    "trb": ("kl_budget",),
    "random": ("teacher_share",),
    "teacher_first": ("teacher_tokens",),
    "student_first": ("switch_position",),
    "student_entropy": _SCHEDULED,
    "student_confidence": _SCHEDULED,
}


def add_policy_options(group: Any, policies: tuple[str, ...] = tuple(POLICIES)) -> None:
    """Add every option that one of the policies takes to a group of a parser."""
    for name, (kind, placeholder, help) in FLAGS.items():
        if any(name in POLICIES[policy] for policy in policies):
            group.add_argument(f"--{name}", type=kind, metavar=placeholder, help=help)


def check_policy_options(options: argparse.Namespace) -> None:
    """Refuse options that the chosen policy does not take.

    Raises:
        UserError: Names the option and a policy it belongs to.
    """
    for name in FLAGS:
        if getattr(options, name) is not None and name not in POLICIES[options.policy]:
            owner = next(policy for policy, names in POLICIES.items() if name in names)
            raise UserError(f"{name} does nothing with policy {options.policy!r}; it belongs to {owner!r}")


def make_policy(options: argparse.Namespace) -> "Policy":
    """Return the chosen policy."""
    from switchkd.methods import get_method
    from switchkd.policies import BlendPolicy, StudentPolicy, TeacherPolicy

    given = {name: value for name in POLICIES[options.policy] if (value := getattr(options, name)) is not None}
    if "horizon" in POLICIES[options.policy]:
        given.setdefault("horizon", options.max_new_tokens)
    own: dict[str, Any] = {"student": StudentPolicy, "teacher": TeacherPolicy, "blend": BlendPolicy}
    policy = own[options.policy](**given) if options.policy in own else get_method(options.policy).make_policy(**given)
    assert policy is not None
    return policy
