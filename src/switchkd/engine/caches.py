"""Key/value caches in which every row is at a position of its own.

The slot of a key *is* its position, so rolling back is "do not advance": stale slots lie behind every later query's
position until they are overwritten. Prompts need no padding, and finished rows can be dropped. `RowCache` serves
unmodified Hugging Face models; `SlotCache` serves the lean decoder, which writes itself: one call stores a layer's
keys and values, and what the queries see is sliced once in many passes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

# Slots are added in steps of this size, so that short completions never pay for the length limit.
GROWTH = 64


# Queries see slots in steps of this size: the views of the buffers are then made once in that many passes.
VIEW = 16


class RowCache(Cache):
    """Key/value buffers `[rows, heads, slots, head_dim]` for each layer, written row by row.

    Args:
        rows: How many rows fit.
        max_length: The most slots a row can need.
    """

    def __init__(self, rows: int, max_length: int) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self.max_length = max_length
        self.slots = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._first = 0
        self._start: Sequence[int] = ()
        self._count = 0
        self._used = 0
        self.aligned = True
        self._plans: dict[tuple[int, int], Tensor] = {}

    def begin(self, first: int, start: Sequence[int], count: int) -> int:
        """Announce the next pass: row `first + i` writes `count` tokens from slot `start[i]` on.

        Returns:
            How many slots the pass's queries can see.
        """
        self._first, self._start, self._count = first, start, count
        self._used = max(start) + count
        self.aligned = min(start) == max(start)
        self._plans = {}
        if self._used > self.slots:
            self.slots = max(min(-(-self._used // GROWTH) * GROWTH + GROWTH, self.max_length), self._used)
            for buffers in (self._keys, self._values):
                for layer, old in enumerate(buffers):
                    buffers[layer] = self._grown(old)
        return self._used

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values `[A, heads, n, d]` and return all that its queries may see."""
        if layer_idx == len(self._keys):
            for buffers, states in ((self._keys, key_states), (self._values, value_states)):
                shape = (self.rows, states.shape[1], self.slots, states.shape[3])
                # Zeros, not garbage: a masked slot still enters the product with weight 0, and 0 * nan is nan.
                buffers.append(states.new_zeros(shape))
        first, last = self._first, self._first + len(key_states)
        seen = []
        for buffer, states in ((self._keys[layer_idx], key_states), (self._values[layer_idx], value_states)):
            if self.aligned:
                buffer[first:last, :, self._start[0] : self._used] = states
            else:
                buffer.view(-1, buffer.shape[-1]).index_copy_(
                    0, self._plan(buffer), states.reshape(-1, states.shape[-1]).to(buffer.dtype)
                )
            seen.append(buffer[first:last, :, : self._used])
        return seen[0], seen[1]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of one row over another row."""
        for buffer in (*self._keys, *self._values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if not self._keys else self._used - self._count

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._used, 0

    def _plan(self, buffer: Tensor) -> Tensor:
        """Flat `(row, head, slot)` index of every written vector; the same for all layers of one shape."""
        heads, slots = buffer.shape[1], buffer.shape[2]
        if (heads, slots) not in self._plans:
            device = buffer.device
            rows = torch.arange(self._first, self._first + len(self._start), device=device).view(-1, 1, 1)
            slot = torch.tensor(self._start, device=device).view(-1, 1, 1) + torch.arange(self._count, device=device)
            head = torch.arange(heads, device=device).view(1, -1, 1)
            self._plans[(heads, slots)] = ((rows * heads + head) * slots + slot).flatten()
        return self._plans[(heads, slots)]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros((*old.shape[:2], self.slots, old.shape[3]))
        new[:, :, : old.shape[2]] = old
        return new


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
        self.buffers = [like.new_zeros(2, rows, heads, 0, head_dim) for _ in range(layers)]
        self._flat: list[Tensor] = []
        self._vectors = torch.arange(2 * rows * heads, device=like.device).view(2, rows, heads).permute(1, 0, 2)
        self._offsets = self._vectors
        self._shown = (0, 0, 0)
        self._index = self._vectors
        self.views: list[tuple[Tensor, Tensor]] = []

    def begin(self, first: int, start: Sequence[int], positions: Tensor) -> int:
        """Announce the next pass: row `first + i` writes from slot `start[i]` on, at `positions` `[A, n]`.

        Returns:
            How many slots the pass's queries are shown; `views` then holds each layer's keys `[A * heads, head_dim,
            slots]` and values `[A * heads, slots, head_dim]`.
        """
        used = max(start) + positions.shape[1]
        if used > self.slots:
            self._grow(max(min(-(-used // GROWTH) * GROWTH + GROWTH, self.max_length), used))
        shown = min(-(-used // VIEW) * VIEW, self.slots)
        self.show(first, positions, shown)
        return shown

    def show(self, first: int, positions: Tensor, shown: int) -> None:
        """As `begin`, for a given number of slots that are there: no position is asked of the device."""
        rows = len(positions)
        if self._shown != (first, rows, shown):
            self._shown = (first, rows, shown)
            part = slice(first * self.heads, (first + rows) * self.heads)
            self.views = [
                (keys[part, :shown].transpose(1, 2), values[part, :shown])
                for keys, values in (buffer.flatten(1, 2).unbind(0) for buffer in self.buffers)
            ]
        self._index = (self._offsets[first : first + rows] + positions.unsqueeze(-1)).view(-1)

    def reserve(self) -> None:
        """Take all memory now: no buffer moves from here on."""
        if self.slots < self.max_length:
            self._grow(self.max_length)

    def clear(self) -> None:
        """Forget every row; what a broken model left must not meet the next one's weights of 0."""
        for buffer in self.buffers:
            buffer.zero_()

    def write(self, layer: int, vectors: Tensor) -> None:
        """Store what a layer's tokens add, `[A * n, 2 * heads, head_dim]`: the keys, then the values."""
        self._flat[layer].index_copy_(0, self._index, vectors.view(-1, self.head_dim).to(self._flat[layer].dtype))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of one row over another row."""
        for buffer in self.buffers:
            buffer[:, target, :, :length] = buffer[:, source, :, :length]

    def _grow(self, slots: int) -> None:
        for layer, old in enumerate(self.buffers):
            new = old.new_zeros((*old.shape[:3], slots, self.head_dim))
            new[:, :, :, : self.slots] = old
            self.buffers[layer] = new
        self.slots = slots
        self._flat = [buffer.view(-1, self.head_dim) for buffer in self.buffers]
        # Flat index of slot 0 of each row's keys and values, [rows, 1, 2 * heads].
        self._offsets = (self._vectors * slots).reshape(self.rows, 1, -1)
        self._shown = (0, 0, 0)
