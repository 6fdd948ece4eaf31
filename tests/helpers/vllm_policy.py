"""A policy of a user's own, in a file of its own so that a vLLM process can import it."""

import math
from dataclasses import dataclass

import torch

from switchkd.policies import Decision, Policy
from switchkd.policies.base import teacher_where


@dataclass(frozen=True)
class EveryNth(Policy):
    """The teacher writes every so many tokens of a row; a row's state counts them."""

    every: int = 3
    stateful = True

    def initial_state(self, rows, device):
        return torch.zeros(rows, dtype=torch.int64, device=device)

    def decide(self, at):
        author = teacher_where(at.state % self.every == self.every - 1)
        return Decision(author, torch.full_like(at.measure, math.nan), at.state + 1)
