"""Key/value buffers of a decoder taken apart: every row writes and reads at its own position.

As in `switchkd.cache` the slot of a key is its position, so rolling back is not advancing. Here the decoder itself
writes, so that one call stores a layer's keys and values, and what the queries see is sliced once in many passes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Slots are added in steps of so many, so that short completions never pay for the length limit.
GROWTH = 64
# Queries are shown slots in steps of so many: the views of the buffers are then made once in so many passes.
VIEW = 16


class SlotCache:
    """Keys and values of every layer, `[2, rows, heads, slots, head_dim]`, each vector at the slot of its position.

    Args:
        layers: How many layers.
        rows: How many rows fit.
        max_length: The most slots a row can need.
        heads: Key and value heads.
        head_dim: Width of a head.
        like: A tensor of the dtype and device of the buffers.
    """

    def __init__(self, layers: int, rows: int, max_length: int, heads: int, head_dim: int, like: Tensor) -> None:
        self.rows, self.max_length, self.heads, self.head_dim = rows, max_length, heads, head_dim
        self.slots = 0
        # Zeros, not garbage: a masked slot still enters the product with weight 0, and 0 * nan is nan.
        self._buffers = [like.new_zeros(2, rows, heads, 0, head_dim) for _ in range(layers)]
        self._flat: list[Tensor] = []
        self._places = torch.arange(2 * rows * heads, device=like.device).view(2, rows, heads).permute(1, 0, 2)
        self._offsets = self._places
        self._shown = (0, 0, 0)
        self._index = self._places
        self.views: list[tuple[Tensor, Tensor]] = []

    def begin(self, first: int, start: Sequence[int], positions: Tensor) -> int:
        """Announce the next pass: row `first + i` writes from slot `start[i]` on, at `positions` `[A, n]`.

        Returns:
            How many slots the pass's queries are shown; `views` then holds each layer's keys `[A * heads, head_dim,
            slots]` and values `[A * heads, slots, head_dim]`.
        """
        rows, count = positions.shape
        used = max(start) + count
        if used > self.slots:
            self._grow(max(min(-(-used // GROWTH) * GROWTH + GROWTH, self.max_length), used))
        shown = min(-(-used // VIEW) * VIEW, self.slots)
        if self._shown != (first, rows, shown):
            self._shown = (first, rows, shown)
            part = slice(first * self.heads, (first + rows) * self.heads)
            self.views = [
                (keys[part, :shown].transpose(1, 2), values[part, :shown])
                for keys, values in (buffer.flatten(1, 2).unbind(0) for buffer in self._buffers)
            ]
        self._index = (self._offsets[first : first + rows] + positions.unsqueeze(-1)).view(-1)
        return shown

    def write(self, layer: int, vectors: Tensor) -> None:
        """Store what a layer's tokens add, `[A * n, 2 * heads, head_dim]`: the keys, then the values."""
        self._flat[layer].index_copy_(0, self._index, vectors.view(-1, self.head_dim).to(self._flat[layer].dtype))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of one row over another row."""
        for buffer in self._buffers:
            buffer[:, target, :, :length] = buffer[:, source, :, :length]

    def _grow(self, slots: int) -> None:
        for layer, old in enumerate(self._buffers):
            new = old.new_zeros((*old.shape[:3], slots, self.head_dim))
            new[:, :, :, : self.slots] = old
            self._buffers[layer] = new
        self.slots = slots
        self._flat = [buffer.view(-1, self.head_dim) for buffer in self._buffers]
        # Where slot 0 of each row's keys and values lies, [rows, 1, 2 * heads].
        self._offsets = (self._places * slots).reshape(self.rows, 1, -1)
        self._shown = (0, 0, 0)
