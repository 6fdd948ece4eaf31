"""The options of the policies on the command line; nothing heavy is imported until a policy is made."""

import argparse
from typing import TYPE_CHECKING, Any

from switchkd import plugins
from switchkd.errors import UserError, json_object
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


def add_policy_choice(group: Any, help: str) -> None:
    """Add `--policy` and `--policy_kwargs` to a group of a parser.

    Args:
        group: Of a parser.
        help: The names that can be given.
    """
    group.add_argument("--policy", default="switch", metavar="NAME", help=help)
    group.add_argument(
        "--policy_kwargs", metavar="JSON", help="options of the policy as a JSON object; those below are flags too"
    )


def check_policy_options(options: argparse.Namespace) -> None:
    """Refuse options that the chosen policy does not take.

    Raises:
        UserError: Names the option and a policy it belongs to.
    """
    policy_kwargs(options)
    valid = (*NAMES, *plugins.announced(plugins.POLICIES))
    if not plugins.is_path(options.policy) and options.policy not in valid:
        raise UserError(
            f"policy must be one of {', '.join(valid)}, or a class of your own as module:Class, got {options.policy!r}"
        )
    for name, option in OPTIONS.items():
        if getattr(options, name, None) is not None and options.policy not in option.policies:
            way_out = "" if options.policy in NAMES else "; options of your own policy go into policy_kwargs"
            raise UserError(
                f"{name} does nothing with policy {options.policy!r}; it belongs to {option.policies[0]!r}{way_out}"
            )


def make_policy(options: argparse.Namespace) -> "Policy":
    """Return the chosen policy.

    Raises:
        UserError: There is no such policy, or it refuses an option.
    """
    from switchkd.policies import find_policy
    from switchkd.policies.find import make_policy

    taken = {name: getattr(options, name, None) for name, o in OPTIONS.items() if options.policy in o.policies}
    return make_policy(
        find_policy(options.policy),
        options.policy,
        length_limit=options.max_completion_length,
        options={name: value for name, value in taken.items() if value is not None},
        policy_kwargs=policy_kwargs(options),
    )


def policy_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that `--policy_kwargs` gives.

    Raises:
        UserError: It is no JSON object.
    """
    return {} if options.policy_kwargs is None else json_object("policy_kwargs", options.policy_kwargs)
