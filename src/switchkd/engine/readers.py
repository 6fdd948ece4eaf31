"""A model and its cache as the decoders read it: row by row at each row's own position, or one column at a time."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from switchkd.engine.caches import RowCache, SlotCache
from switchkd.engine.lean import lean_decoder
from switchkd.models.forward import device_of, output_layer_input, prompt_positions, takes_argument
from switchkd.models.known import known
from switchkd.rollout import Prompts


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
            lean = known(model).lean
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


class TokenReader:
    """A model and its transformers cache, fed one column of tokens at a time; `logits` predict the next column.

    Works for every causal language model of transformers: it uses the public forward with a 2-D attention mask and
    explicit position ids, which count real tokens from 0 whatever padding stands on the left. A model that takes no
    `past_key_values` (state-space models name their state otherwise), or whose cache gives other logits, reads
    everything anew each time.
    """

    def __init__(self, model: Any, prompts: Prompts, *, keep_hidden: bool = False) -> None:
        self.model = model
        self.keep_hidden = keep_hidden
        self.hidden: Tensor | None = None
        self.device = device_of(model)
        self.caches = not known(model).rereads and takes_argument(model, "past_key_values")
        self.ids = prompts.ids.to(self.device)
        self.mask = prompts.mask.to(self.device, torch.int64)
        self.next_position = self.mask.sum(-1, keepdim=True)
        self.cache: Any = None
        self.passes = 0
        self.logits = self._forward(self.ids, prompt_positions(self.mask))

    def append(self, tokens: Tensor) -> None:
        """Read one token per row, int64 `[B]`."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        column = tokens.to(self.device).unsqueeze(1)
        if self.caches:
            self.logits = self._forward(column, self.next_position)
        else:
            self.ids = torch.cat([self.ids, column], dim=1)
            self.logits = self._forward(self.ids, prompt_positions(self.mask))
        self.next_position = self.next_position + 1

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        extra = {"past_key_values": self.cache} if self.caches else {}
        with output_layer_input(self.model, enabled=self.keep_hidden) as hidden:
            output = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                use_cache=self.caches,
                logits_to_keep=1,
                **extra,
            )
        if hidden:
            self.hidden = hidden[0][:, -1]
        if self.caches:
            self.cache = output.past_key_values
        self.passes += 1
        return output.logits[:, -1]
