"""One writer alone, and other ways to choose who writes: the controls that show what SWITCH's choice is worth.

Each changes only where the teacher writes. Where a rule has no threshold, `from_share` returns the policy with a given
teacher share, so that strategies are compared at equal share.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from switchkd.errors import check_count, check_range, check_share_of_training
from switchkd.policies.base import Decision, Policy, Positions, everywhere, teacher_where, without_threshold
from switchkd.policies.switch import SwitchPolicy
from switchkd.rollout import Author


@dataclass(frozen=True)
class StudentPolicy(Policy):
    """The student writes everything: on-policy distillation (ImitKD, GKD), and the decoder of evaluation."""

    needs_teacher = False

    def decide(self, at: Positions) -> Decision:
        return everywhere(Author.STUDENT, at.measure)


@dataclass(frozen=True)
class TeacherPolicy(Policy):
    """The teacher writes everything, helped by the student's drafts: lossless speculative decoding of the teacher."""

    def decide(self, at: Positions) -> Decision:
        return everywhere(Author.TEACHER, at.measure)


@dataclass(frozen=True)
class RandomPolicy(Policy):
    """The teacher writes each token with a fixed probability, whatever the distributions say.

    Args:
        teacher_probability: That probability, in [0, 1]; 0.53 is the share reported for SWITCH.

    Raises:
        UserError: It is outside its range.
    """

    teacher_probability: float = 0.53
    random = True

    def __post_init__(self) -> None:
        check_range("teacher_probability", self.teacher_probability, 0.0, 1.0)

    @classmethod
    def from_share(cls, teacher_share: float, lengths: Tensor | float) -> Self:
        """Return the policy with that share; the lengths, which other rules need, do not matter here."""
        check_range("teacher_share", teacher_share, 0.0, 1.0)
        return cls(teacher_share)

    def decide(self, at: Positions) -> Decision:
        assert at.uniform is not None  # the engine provides it, because `random` is set
        return without_threshold(teacher_where(at.uniform < self.teacher_probability))


@dataclass(frozen=True)
class TeacherFirstPolicy(Policy):
    """The teacher writes the first k tokens, the student everything after.

    Args:
        teacher_tokens: k >= 0.

    Raises:
        UserError: k is negative.
    """

    teacher_tokens: int = 64

    def __post_init__(self) -> None:
        check_count("teacher_tokens", self.teacher_tokens, 0)

    @classmethod
    def from_share(cls, teacher_share: float, lengths: Tensor | float) -> Self:
        """Return the policy whose teacher writes a share of all tokens.

        Args:
            teacher_share: In [0, 1].
            lengths: How long answers are, tokens: one number, or the lengths of a sample of answers `[N]`.
        """
        return cls(first_tokens_with_share(teacher_share, lengths))

    def decide(self, at: Positions) -> Decision:
        return without_threshold(teacher_where(at.position < self.teacher_tokens))


@dataclass(frozen=True)
class TeacherPrefixPolicy(TeacherFirstPolicy):
    """The teacher writes the first k tokens, the student everything after; k falls to 0 while the student learns.

    At a share p of the training k is `teacher_tokens` max(1 - p / `prefix_decay`, 0), rounded. `from_share` gives the
    share at the start.

    Args:
        teacher_tokens: k at the start, >= 0. Its default, the length limit of completions, is chosen here.
        prefix_decay: Share of the training after which the student writes alone, in (0, 1]. Chosen here, too.

    Raises:
        UserError: An option outside its range.
    """

    teacher_tokens: int = 256
    prefix_decay: float = 1.0
    length_options: ClassVar[tuple[str, ...]] = ("teacher_tokens",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share_of_training("prefix_decay", self.prefix_decay)

    def at_progress(self, progress: float) -> Self:
        """Return the policy with the k of a moment of training."""
        left = max(1.0 - progress / self.prefix_decay, 0.0)
        return replace(self, teacher_tokens=round(self.teacher_tokens * left))


@dataclass(frozen=True)
class StudentFirstPolicy(Policy):
    """The student writes up to one position, the teacher everything from there: a single switch.

    The end of a text is not known while it is written, so "the teacher writes the last k tokens" is this rule with the
    switch k tokens before the length limit.

    Args:
        switch_position: Where the teacher takes over, counted from 0, >= 0.

    Raises:
        UserError: The position is negative.
    """

    switch_position: int = 64

    def __post_init__(self) -> None:
        check_count("switch_position", self.switch_position, 0)

    @classmethod
    def from_share(cls, teacher_share: float, lengths: Tensor | float) -> Self:
        """Return the policy whose teacher writes a share of all tokens; arguments as in `TeacherFirstPolicy`."""
        check_range("teacher_share", teacher_share, 0.0, 1.0)
        return cls(first_tokens_with_share(1.0 - teacher_share, lengths))

    def decide(self, at: Positions) -> Decision:
        return without_threshold(teacher_where(at.position >= self.switch_position))


@dataclass(frozen=True)
class StudentEntropyPolicy(SwitchPolicy):
    """The teacher writes where the student's entropy exceeds the threshold of the position: where it is unsure.

    It asks the student alone; everything but the number compared is `SwitchPolicy`.

    Args:
        initial_threshold: Entropy in nats, >= 0. The default is chosen here; calibrate it to a teacher share.
    """

    initial_threshold: float = 2.0
    measured = "entropy_nats"
    largest_threshold: ClassVar[tuple[float, str]] = (math.inf, "inf nats")

    def measure(self, student_log_probs: Tensor, teacher_log_probs: Tensor, drafted: Tensor) -> Tensor:
        # An id without mass adds 0 ln 0 = 0.
        weighted = torch.where(student_log_probs > -math.inf, student_log_probs.exp() * student_log_probs, 0.0)
        return -weighted.sum(-1).to(torch.float32)


@dataclass(frozen=True)
class StudentConfidencePolicy(SwitchPolicy):
    """The teacher writes where the student's most likely token has too little probability.

    What is compared is -ln of that probability, so that it grows with uncertainty as the other measures do: a threshold
    of ln 2 hands over where no token has half of the mass. Everything else is `SwitchPolicy`.

    Args:
        initial_threshold: -ln(least probability) in nats, >= 0. The default, ln 2, is chosen here; calibrate it.
    """

    initial_threshold: float = math.log(2.0)
    measured = "surprisal_nats"
    largest_threshold: ClassVar[tuple[float, str]] = (math.inf, "inf nats")

    def measure(self, student_log_probs: Tensor, teacher_log_probs: Tensor, drafted: Tensor) -> Tensor:
        return -student_log_probs.amax(-1).to(torch.float32)


def first_tokens_with_share(share: float, lengths: Tensor | float) -> int:
    """Return k such that the first k tokens of all texts are nearest to a share of their tokens.

    Args:
        share: In [0, 1].
        lengths: Tokens of each text `[N]`, or one number for all.

    Raises:
        UserError: The share is outside its range.
    """
    check_range("teacher_share", share, 0.0, 1.0)
    counts = torch.as_tensor(lengths, dtype=torch.float64).reshape(-1)
    candidates = torch.arange(int(counts.max().ceil()) + 1, dtype=torch.float64)
    shares = torch.minimum(candidates.unsqueeze(1), counts).sum(1) / counts.sum()
    return int((shares - share).abs().argmin())
