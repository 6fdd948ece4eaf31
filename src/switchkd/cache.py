"""A key/value cache in which every row stands at its own position, for unmodified Hugging Face models.

The slot of a key *is* its position, so rolling back is "do not advance": stale slots lie behind every later query's
position until they are overwritten. Prompts need no padding, and finished rows can be dropped.
"""

from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache

from switchkd.lean import lean_decoder
from switchkd.models.forward import device_of, output_layer_input
from switchkd.slots import GROWTH, SlotCache

# Models whose shorter forward of `switchkd.lean` gave the logits of their own; `switchkd.readable` finds out.
LEAN: WeakSet[nn.Module] = WeakSet()


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


class RowReader:
    """A model with a `RowCache`: reads tokens for some rows, each at its own position.

    Args:
        model: A causal language model that `readable.unserved_reason` has no objection to.
        rows: How many rows fit.
        max_length: The most tokens a row can hold, drafts included.
        keep_hidden: Keep the states that enter the output layer, in `hidden`.
    """

    def __init__(
        self, model: Any, rows: int, max_length: int, *, keep_hidden: bool = False, lean: bool | None = None
    ) -> None:
        self.model = model
        if lean is None:
            lean = model in LEAN
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._last_position = (limit or 2**62) - 1
        # Drafts may run a little past the end; positions are clamped to the tables.
        self._lean = lean_decoder(model, min(max_length, self._last_position + 1)) if lean else None
        self.device = device_of(model)
        self.cache: RowCache | SlotCache
        if self._lean is not None:
            self._last_position = min(max_length - 1, self._last_position)
            self.cache = self._lean.cache(rows, max_length)
        else:
            self.cache = RowCache(rows, max_length)
        self.passes = 0
        self.hidden: Tensor | None = None
        self._dtype = model.get_input_embeddings().weight.dtype
        self._keep_hidden = keep_hidden

    @property
    def log_dtype(self) -> torch.dtype:
        """What log-probabilities are computed in: at least float32."""
        return torch.promote_types(self._dtype, torch.float32)

    @property
    def lean(self) -> bool:
        """Whether the model is read through its weights rather than through its own forward."""
        return self._lean is not None

    def read(
        self,
        tokens: Tensor,
        start: Sequence[int],
        *,
        first: int = 0,
        positions: Tensor | None = None,
        logits: Literal["all", "last"] = "all",
    ) -> Tensor:
        """Return next-token logits after each token read.

        Args:
            tokens: int64 `[A, n]`, for rows first .. first + A - 1.
            start: The position of each row's first token, `[A]`.
            first: The first row of the cache that reads.
            positions: `start` as a column of int64 `[A, 1]` on the device, where the caller has it.
            logits: For all n tokens or the last one.

        Returns:
            `[A, n, V]` or `[A, 1, V]`.
        """
        count = tokens.shape[1]
        if positions is None:
            positions = torch.tensor(start, device=self.device).unsqueeze(1)
        if count > 1:
            positions = positions + torch.arange(count, device=self.device)
        self.passes += 1
        if self._lean is not None:
            assert isinstance(self.cache, SlotCache)
            result, states = self._lean(
                tokens,
                start,
                positions,
                self.cache,
                first=first,
                last_position=self._last_position,
                last_only=logits == "last",
            )
            if self._keep_hidden:
                self.hidden = states
            return result
        assert isinstance(self.cache, RowCache)
        used = self.cache.begin(first, start, count)
        queries = positions[:1] if self.cache.aligned else positions
        visible = torch.arange(used, device=self.device) <= queries[:, None, :, None]
        # Additive, because eager attention adds what it is given and sdpa takes it as well.
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=self.device).masked_fill_(~visible, -torch.inf)
        # Drafts may run past the end of the context; what is written there is never kept.
        positions = positions.clamp(max=self._last_position)
        with output_layer_input(self.model, enabled=self._keep_hidden) as hidden:
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=0 if logits == "all" else 1,
            )
        if hidden:
            self.hidden = hidden[0]
        return output.logits
