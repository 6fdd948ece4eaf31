"""The options of the policies on the command line; nothing heavy is imported until a policy is made."""

import argparse
from typing import TYPE_CHECKING, Any

from switchkd.errors import UserError
from switchkd.policy_options import POLICY_OPTIONS, TRAINING_ONLY

if TYPE_CHECKING:
    from switchkd.policies import Policy

#: Names of the policies on the command line.
NAMES = (
    "switch",
    "student",
    "teacher",
    *dict.fromkeys(name for option in POLICY_OPTIONS.values() for name in option.policies if name != "switch"),
)
OPTIONS = {name: option for name, option in POLICY_OPTIONS.items() if name not in TRAINING_ONLY}


def add_policy_options(group: Any, policies: tuple[str, ...] = NAMES) -> None:
    """Add every option that one of the policies takes to a group of a parser."""
    for name, option in OPTIONS.items():
        if set(option.policies) & set(policies):
            help = option.help_text("max_completion_length")
            group.add_argument(f"--{name}", type=option.kind, metavar=option.metavar, help=help)


def check_policy_options(options: argparse.Namespace) -> None:
    """Refuse options that the chosen policy does not take.

    Raises:
        UserError: Names the option and a policy it belongs to.
    """
    for name, option in OPTIONS.items():
        if getattr(options, name, None) is not None and options.policy not in option.policies:
            raise UserError(f"{name} does nothing with policy {options.policy!r}; it belongs to {option.policies[0]!r}")


def make_policy(options: argparse.Namespace) -> "Policy":
    """Return the chosen policy."""
    from switchkd.policies import POLICIES

    taken = {name: getattr(options, name) for name, o in OPTIONS.items() if options.policy in o.policies}
    given = {name: value for name, value in taken.items() if value is not None}
    policy = POLICIES[options.policy]
    return policy.of(**dict.fromkeys(policy.length_options, options.max_completion_length) | given)
