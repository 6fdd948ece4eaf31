"""Policies by name: those of this package, those that installed packages announce, and those of a file or module."""

import inspect
from collections.abc import Mapping
from typing import Any

from switchkd import plugins
from switchkd.errors import UserError, nearest_name
from switchkd.policies.base import Policy
from switchkd.policies.registry import POLICIES


def find_policy(name: str) -> type[Policy]:
    """Return the class of a policy.

    Args:
        name: One of `POLICIES`, one that an installed package announces under `switchkd.policies`, or
            `path/to/file.py:Class` or `module:Class`.

    Raises:
        UserError: There is no such policy, or it is no subclass of `Policy`.
    """
    found = POLICIES.get(name) or plugins.load_named("policy", plugins.POLICIES, name)
    if found is None:
        valid = [*POLICIES, *plugins.announced(plugins.POLICIES)]
        raise UserError(
            f"unknown policy {name!r}; the nearest is {nearest_name(name, valid)!r}; valid: {', '.join(valid)}, or a "
            "class of your own as module:Class"
        )
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise UserError(f"policy {name}: expected a subclass of switchkd.Policy, got {found!r}")
    return found


def make_policy(
    policy: type[Policy],
    name: str,
    *,
    length_limit: int,
    options: Mapping[str, Any],
    policy_kwargs: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> Policy:
    """Return a policy with its options.

    Args:
        policy: Its class.
        name: How the user calls it, for messages.
        length_limit: Of completions, tokens; `length_options` follow it.
        options: Options that have a field or flag of their own.
        policy_kwargs: All other options.
        defaults: Values that hold where neither says anything.

    Raises:
        UserError: An option that the policy does not have, that is given twice, or a value that it refuses.
    """
    known = policy.options()
    anything = any(option.kind is option.VAR_KEYWORD for option in inspect.signature(policy).parameters.values())
    for option in policy_kwargs:
        if option in options:
            raise UserError(f"policy_kwargs: {option} is given as an option of its own too; remove one")
        if option not in known and not anything:
            if not known:
                raise UserError(f"policy_kwargs: policy {name!r} takes no options, got {option!r}")
            raise UserError(
                f"policy_kwargs: policy {name!r} has no option {option!r}; the nearest is "
                f"{nearest_name(option, known)!r}"
            )
    follows = {option: length_limit for option in policy.length_options if option in known}
    try:
        return policy.of(**{**follows, **(defaults or {}), **options, **policy_kwargs})
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # a class of the user's own checks its options in its own way
        raise UserError(f"policy {name!r} refuses its options: {error}") from error
