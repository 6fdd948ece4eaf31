"""The options of the policies in one table: type, help, default and the policies that take them; torch-free.

Flags, fields of `SwitchConfig` and the texts of `--help` are made from it, and a test holds it to the policies' own
dataclasses: a new option is one field there and one line here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: The share that the teacher gets where neither a threshold nor a share is given: half of the tokens, as good as any
#: in docs/evidence.md and near the 53% of the paper. A threshold in nats means something else for every pair.
DEFAULT_TEACHER_SHARE = 0.5

SCHEDULED = ("switch", "student_entropy", "student_confidence")


@dataclass(frozen=True)
class PolicyOption:
    """One option of one or more policies.

    Attributes:
        kind: int, float or str.
        metavar: Placeholder of the flag.
        help: What it is, in its unit and range; no full stop.
        default: Policy -> value where nothing is given. None: the length limit of completions.
    """

    kind: type
    metavar: str
    help: str
    default: Mapping[str, Any]

    @property
    def policies(self) -> tuple[str, ...]:
        """The policies that take it."""
        return tuple(self.default)

    def help_text(self, length_limit: str) -> str:
        """Return the help with its policies and defaults.

        Args:
            length_limit: How the length limit of completions is called there.
        """
        groups: dict[str, list[str]] = {}
        for policy, value in self.default.items():
            shown = length_limit if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            groups.setdefault(shown, []).append(policy)
        if len(groups) == 1:
            return f"{', '.join(self.policies)}: {self.help} (default: {next(iter(groups))})"
        defaults = ", ".join(f"{value} for {' and '.join(names)}" for value, names in groups.items())
        return f"{', '.join(self.policies)}: {self.help} (default: {defaults})"


def _scheduled(value: Any) -> dict[str, Any]:
    return dict.fromkeys(SCHEDULED, value)


POLICY_OPTIONS: dict[str, PolicyOption] = {
    "initial_threshold": PolicyOption(
        float,
        "NATS",
        "threshold at position 0, nats; for switch in [0, ln 2]",
        {"switch": 0.3, "student_entropy": 2.0, "student_confidence": math.log(2.0)},
    ),
    "final_ratio": PolicyOption(
        float, "R", "threshold at the horizon over the initial one, in (0, 1]", _scheduled(0.1)
    ),
    "horizon": PolicyOption(float, "N", "position where final_ratio is reached, tokens", _scheduled(None)),
    "schedule": PolicyOption(str, "NAME", "exponential, linear, constant or increasing", _scheduled("exponential")),
    "minimum_leg": PolicyOption(
        int, "N", "minimum number of consecutive tokens a writer keeps before the other may take over", _scheduled(1)
    ),
    "clock": PolicyOption(str, "NAME", "what the schedule counts: position or since_teacher", _scheduled("position")),
    "mixture_weight": PolicyOption(float, "W", "weight of the teacher in the blend, in [0, 1]", {"blend": 0.2}),
    "teacher_top_k": PolicyOption(
        int, "K", "a drafted token outside the teacher's K most likely is replaced", {"skd": 25}
    ),
    "divergence_multiple": PolicyOption(
        float, "X", "the teacher takes over where KL exceeds X times its moving mean", {"adaswitch": 3.0}
    ),
    "divergence_window": PolicyOption(int, "N", "window of the moving mean, tokens", {"adaswitch": 8}),
    "trigger_threshold": PolicyOption(float, "NATS", "JSD that starts a teacher leg, nats", {"relay": 0.3}),
    "leg_length": PolicyOption(int, "N", "tokens of a leg", {"relay": 8}),
    "leg_budget": PolicyOption(int, "N", "maximum number of teacher legs per completion", {"relay": 4}),
    "kl_budget": PolicyOption(float, "NATS", "KL(blend, student) allowed at the start, nats", {"trb": 0.1}),
    "kl_budget_warmup": PolicyOption(
        float, "P", "share of the training over which kl_budget falls to 0, in (0, 1]", {"trb": 0.5}
    ),
    "teacher_probability": PolicyOption(
        float, "P", "probability that the teacher writes a position, in [0, 1]", {"random": 0.53}
    ),
    "teacher_tokens": PolicyOption(
        int,
        "N",
        "number of first tokens the teacher writes; for teacher_prefix at the start of training",
        {"teacher_first": 64, "teacher_prefix": None},
    ),
    "prefix_decay": PolicyOption(
        float, "P", "share of the training over which teacher_tokens falls to 0, in (0, 1]", {"teacher_prefix": 1.0}
    ),
    "switch_position": PolicyOption(
        int, "N", "position where the teacher takes over, counted from 0", {"student_first": 64}
    ),
}
#: Names on the command line of the rollout; what is annealed over a training has no meaning in one rollout.
TRAINING_ONLY = ("kl_budget_warmup", "prefix_decay")
