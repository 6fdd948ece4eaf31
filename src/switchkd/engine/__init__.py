"""Exact and fast rollouts: the student drafts, the teacher checks the whole draft in one pass."""

from switchkd.engine.entry import roll_out
from switchkd.engine.policy_check import check_policy

__all__ = ["check_policy", "roll_out"]
