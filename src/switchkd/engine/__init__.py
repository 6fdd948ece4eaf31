"""Exact and fast rollouts: the student drafts, the teacher checks the whole draft in one pass."""

from switchkd.engine.entry import roll_out

__all__ = ["roll_out"]
