"""Policies: who writes the next token. They see two distributions and a position, never a model.

A policy is a behaviour distribution mu(student, teacher, position, state). The engine asks in three steps, so that
the vocabulary work is done once for a whole draft and the rest is arithmetic on `[N]` numbers:

1. `measure`: the numbers the decision rests on, from the distributions (stateless).
2. `decide`: the author and the threshold of each position, from `Positions`: the numbers, where they are, a state.
3. `behaviour`: mu at the positions given to the teacher; the student's own distribution holds elsewhere.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.rollout import Author


@dataclass
class Positions:
    """What a policy decides on at N positions, one in each of N rows or all of them independent.

    Attributes:
        measure: What `Policy.measure` returned, float32 `[N]`.
        position: Completion position of each token, counted from 0, int64 `[N]`.
        state: The policy's state before them, `[N, ...]`; None for a stateless policy.
        uniform: Noise in (0, 1) of each row and position, float64 `[N]`; None unless the policy sets `random`.
    """

    measure: Tensor
    position: Tensor
    state: Tensor | None = None
    uniform: Tensor | None = None


@dataclass
class Decision:
    """What a policy decided at N positions.

    Attributes:
        author: `Author` values, uint8 `[N]`.
        threshold: What was compared with the measure, in its unit, float32 `[N]`; nan where there is none.
        state: The policy's state after them, `[N, ...]`; None for a stateless policy.
    """

    author: Tensor
    threshold: Tensor
    state: Tensor | None = None


class Policy:
    """Base of all policies; the defaults are those of a stateless choice between student and teacher."""

    #: Whether the teacher's distribution is needed at all.
    needs_teacher: bool = True
    #: Whether `decide` reads and returns a state; positions are then walked one by one.
    stateful: bool = False
    #: Whether no writer is chosen because mu mixes the two. The token's author is then the student where the draft
    #: was kept and the teacher where it was replaced.
    blends: bool = False
    #: Whether `decide` looked at the drafted token itself. A position given to the teacher is then drawn anew from
    #: the behaviour; coupling it to a draft that was singled out would bias it.
    redraws: bool = False
    #: Whether `decide` reads `uniform`.
    random: bool = False
    #: Options that follow the length limit of completions where nothing else is said, tokens.
    length_options: ClassVar[tuple[str, ...]] = ()

    @property
    def measured(self) -> str | None:
        """What `measure` returns, a name that ends in its unit (`jsd_nats`); None for a policy that compares nothing.

        Logs show it under this name. `switchkd.rollout.MEASURED` lists those of this package.
        """
        return None

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Return option -> default."""
        named = inspect.signature(cls).parameters.values()
        return {
            option.name: option.default
            for option in named
            if option.kind not in (option.VAR_POSITIONAL, option.VAR_KEYWORD)
        }

    @classmethod
    def of(cls, **options: Any) -> "Policy":
        """Return the policy with these options.

        Raises:
            UserError: A value outside its range, or something else than a number where one is needed.
        """
        cls.check_kinds(options)
        return cls(**options)

    @classmethod
    def check_kinds(cls, options: Mapping[str, Any]) -> None:
        """Refuse something else than a number for an option whose default is one.

        Raises:
            UserError: Names the option.
        """
        defaults = cls.options()
        for name, value in options.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if isinstance(defaults.get(name), int | float) and not (is_number and value == value):
                raise UserError(f"{name} must be a number, got {value!r}")

    def at_progress(self, progress: float) -> Self:
        """Return the policy at a moment of training; the policy itself where nothing is annealed.

        Args:
            progress: Share of the training that is done, in [0, 1]. Call it on the policy that training began with.
        """
        return self

    def initial_state(self, rows: int, device: torch.device) -> Tensor | None:
        """Return the state of fresh rows, `[rows, ...]`, or None for a stateless policy."""
        return None

    def measure(self, student_log_probs: Tensor, teacher_log_probs: Tensor, drafted: Tensor) -> Tensor:
        """Return what the decision rests on.

        Args:
            student_log_probs: `[N, V]`, warped as sampled.
            teacher_log_probs: `[N, V]`, warped as sampled.
            drafted: The student's draft, int64 `[N]`; a policy that reads it sets `redraws`.

        Returns:
            float32 `[N]`, nats where it is a divergence; nan where the policy compares nothing. It is recorded in
            `Rollout.divergence`.
        """
        return torch.full(student_log_probs.shape[:-1], math.nan, device=student_log_probs.device)

    def decide(self, at: Positions) -> Decision:
        """Return who writes at N positions."""
        raise TypeError(f"{type(self).__name__} does not define decide()")

    def behaviour(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """Return ln mu `[n, V]` at positions given to the teacher; the teacher's own distribution by default."""
        return teacher_log_probs


class ThresholdPolicy(Policy):
    """A policy whose threshold can be calibrated and controlled: the larger it is, the less the teacher writes."""

    @property
    def initial_threshold(self) -> float:
        """The threshold at position 0, in the unit of what is measured."""
        raise TypeError(f"{type(self).__name__} does not define initial_threshold")

    @property
    def largest_threshold(self) -> tuple[float, str]:
        """The largest value that `measure` can return, and how messages name it."""
        return math.inf, "infinity"

    def at_threshold(self, initial_threshold: float) -> Self:
        """Return the policy with another threshold at position 0."""
        raise TypeError(f"{type(self).__name__} does not define at_threshold()")


def everywhere(author: Author, like: Tensor) -> Decision:
    """Return a decision for one author at every position, without a threshold."""
    return without_threshold(torch.full_like(like, int(author), dtype=torch.uint8))


def without_threshold(author: Tensor) -> Decision:
    """Return a decision that rests on no comparison, from the authors, uint8 `[N]`."""
    return Decision(author, torch.full_like(author, math.nan, dtype=torch.float32))


def teacher_where(mask: Tensor) -> Tensor:
    """Return the authors, uint8 `[N]`: the teacher where the mask is True, else the student."""
    return torch.where(mask, int(Author.TEACHER), int(Author.STUDENT)).to(torch.uint8)
