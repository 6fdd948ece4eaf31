"""SWITCH: the teacher writes exactly where the two next-token distributions differ too much."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from switchkd.divergences import LARGEST_JSD, generalized_jsd
from switchkd.errors import UserError, check_choice, check_count, check_range
from switchkd.policies.base import Decision, Positions, ThresholdPolicy, teacher_where
from switchkd.rollout import Author

Schedule = Literal["exponential", "linear", "constant", "increasing"]


Clock = Literal["position", "since_teacher"]


@dataclass(frozen=True)
class SwitchPolicy(ThresholdPolicy):
    """The teacher writes exactly where the Jensen-Shannon divergence exceeds the threshold of the position.

    With tau_0 = `initial_threshold`, r = `final_ratio`, h = `horizon` the threshold at position t is

    - exponential: tau_0 r^(t/h), the paper's tau_0 e^(-lambda t) with lambda = -ln(r)/h;
    - linear: tau_0 (1 - (1 - r) min(t/h, 1));
    - constant: tau_0;
    - increasing: tau_0 r^(1 - min(t/h, 1)), the control that trusts the student late instead of early.

    A threshold of at least ln 2 throughout is the student alone; 0 is the teacher alone.

    Args:
        initial_threshold: tau_0 in nats, in [0, ln 2].
        final_ratio: r in (0, 1].
        horizon: h in tokens, > 0; where r is reached. The paper's reading B is r = 0.1 at the completion limit.
        schedule: One of the four above.

    Raises:
        UserError: An option outside its range.

    Reference:
        Koo et al., "SWITCH: Studying with Teacher", arXiv 2410.19503, section 3. The values of tau_0 and lambda are
        not published; the defaults are chosen here.
    """

    initial_threshold: float = 0.3
    final_ratio: float = 0.1
    horizon: float = 256
    schedule: Schedule = "exponential"
    measured = "jsd_nats"
    #: The largest value that `measure` can take, nats, and how messages name it.
    largest_threshold: ClassVar[tuple[float, str]] = (LARGEST_JSD, "ln 2 nats")

    length_options: ClassVar[tuple[str, ...]] = ("horizon",)

    def __post_init__(self) -> None:
        check_range("initial_threshold", self.initial_threshold, 0.0, *self.largest_threshold)
        if not 0.0 < self.final_ratio <= 1.0:
            raise UserError(f"final_ratio must lie in (0, 1], got {self.final_ratio}")
        if not self.horizon > 0:
            raise UserError(f"horizon must be > 0 tokens, got {self.horizon}")
        check_choice("schedule", self.schedule, get_args(Schedule))

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Return option -> default, those of `PacedSwitchPolicy` included."""
        pacing = PacedSwitchPolicy.options()
        return super().options() | {name: pacing[name] for name in ("minimum_leg", "clock")}

    @classmethod
    def of(cls, *, minimum_leg: int = 1, clock: Clock = "position", **options: Any) -> "ThresholdPolicy":
        """Return the rule with these options, inside a `PacedSwitchPolicy` where they go beyond it."""
        cls.check_kinds({**options, "minimum_leg": minimum_leg})
        rule = cls(**options)
        is_rule = (minimum_leg, clock) == (1, "position")
        return rule if is_rule else PacedSwitchPolicy(rule, minimum_leg, clock)

    def at_threshold(self, initial_threshold: float) -> Self:
        """Return the policy with another threshold at position 0, nats."""
        return replace(self, initial_threshold=initial_threshold)

    def threshold(self, position: Tensor) -> Tensor:
        """Return tau_t in nats, float32, for completion positions (or another clock) counted from 0."""
        progress = position.to(torch.float64) / self.horizon
        if self.schedule == "exponential":
            factor = (math.log(self.final_ratio) * progress).exp()
        elif self.schedule == "linear":
            factor = 1.0 - (1.0 - self.final_ratio) * progress.clamp(max=1.0)
        elif self.schedule == "increasing":
            factor = (math.log(self.final_ratio) * (1.0 - progress.clamp(max=1.0))).exp()
        else:
            factor = torch.ones_like(progress)
        return (self.initial_threshold * factor).to(torch.float32)

    def measure(self, student_log_probs: Tensor, teacher_log_probs: Tensor, drafted: Tensor) -> Tensor:
        return generalized_jsd(student_log_probs, teacher_log_probs).to(torch.float32)

    def decide(self, at: Positions) -> Decision:
        threshold = self.threshold(at.position)
        return Decision(teacher_where(at.measure > threshold), threshold)


@dataclass(frozen=True)
class PacedSwitchPolicy(ThresholdPolicy):
    """SWITCH, or another rule with its schedule, with two options that are not in the paper.

    With `minimum_leg` m a writer keeps at least m consecutive tokens before the other may take over, which prevents
    single teacher tokens at noisy positions. The clock "since_teacher" gives the schedule n instead of the position,
    the tokens the student has written since the teacher last did (since the start before that), so that the threshold
    falls with the student's drift and starts again after each intervention. With m = 1 and the clock "position" it is
    the rule alone.

    Args:
        rule: Measure, schedule and threshold.
        minimum_leg: m in tokens, >= 1.
        clock: "position", or "since_teacher".

    Raises:
        UserError: An option outside its range.
    """

    rule: SwitchPolicy
    minimum_leg: int = 1
    clock: Clock = "position"
    stateful = True

    def __post_init__(self) -> None:
        check_count("minimum_leg", self.minimum_leg, 1)
        check_choice("clock", self.clock, get_args(Clock))

    @property
    def measured(self) -> str | None:
        """What the rule compares."""
        return self.rule.measured

    @property
    def initial_threshold(self) -> float:
        """The rule's threshold at 0, nats."""
        return self.rule.initial_threshold

    @property
    def largest_threshold(self) -> tuple[float, str]:
        """The largest value the rule can measure, nats, and how messages name it."""
        return self.rule.largest_threshold

    def at_threshold(self, initial_threshold: float) -> Self:
        """Return the policy with another threshold at 0, nats."""
        return replace(self, rule=self.rule.at_threshold(initial_threshold))

    def initial_state(self, rows: int, device: torch.device) -> Tensor:
        """Return [tokens since the teacher wrote, the current writer, its consecutive tokens], int64 `[rows, 3]`."""
        return torch.zeros(rows, 3, dtype=torch.int64, device=device)

    def measure(self, student_log_probs: Tensor, teacher_log_probs: Tensor, drafted: Tensor) -> Tensor:
        return self.rule.measure(student_log_probs, teacher_log_probs, drafted)

    def decide(self, at: Positions) -> Decision:
        assert at.state is not None
        since_teacher, writer, leg = at.state.unbind(-1)
        chosen = self.rule.decide(Positions(at.measure, at.position if self.clock == "position" else since_teacher))
        held = (writer != int(Author.NONE)) & (leg < self.minimum_leg)
        author = torch.where(held, writer.to(torch.uint8), chosen.author)
        leg = torch.where(author == writer, leg + 1, 1)
        since_teacher = torch.where(author == Author.TEACHER, 0, since_teacher + 1)
        state = torch.stack([since_teacher, author.to(torch.int64), leg], dim=-1)
        return Decision(author, chosen.threshold, state)
