"""How much of a vocabulary-sized tensor is worked on at a time."""

from torch import Tensor

# Numbers worked on at a time on CPU where there are temporaries: larger ones leave the cache, and allocating memory for
# them costs more than the arithmetic.
_AT_ONCE = 1 << 18


def rows_at_once(like: Tensor) -> int:
    """Return how many rows of `[N, V]` are best worked on at a time, >= 1."""
    if like.device.type != "cpu":
        return max(len(like), 1)
    return max(_AT_ONCE // max(like.shape[-1], 1), 1)
