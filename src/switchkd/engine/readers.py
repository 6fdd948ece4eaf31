"""A model and its cache as the decoders read it: row by row at each row's own position, or one column at a time."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from switchkd.engine.caches import RowCache
from switchkd.engine.lean import LeanDecoder, lean_decoder
from switchkd.models.forward import device_of, output_layer_input, prompt_positions, takes_argument
from switchkd.models.known import known
from switchkd.rollout import Prompts


class RowReader(Protocol):
    """A model and its cache of rows: reads tokens for some of the rows, each at its own position.

    Attributes:
        lean: Whether the model is read through its weights rather than through its own forward.
        device: The model's.
        log_dtype: What log-probabilities are computed in: at least float32.
        passes: Forward passes so far.
        hidden: The states that entered the output layer in the last pass, `[A, n, H]`; None unless they are kept.
    """

    lean: bool
    device: torch.device
    log_dtype: torch.dtype
    passes: int
    hidden: Tensor | None

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
        ...

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row of the cache over another row."""
        ...


def row_reader(model: Any, rows: int, max_length: int, *, keep_hidden: bool = False) -> RowReader:
    """Return the fastest reader of a model that `readable.unserved_reason` has no objection to.

    Args:
        model: A causal language model.
        rows: How many rows fit.
        max_length: The most tokens a row can hold, drafts included.
        keep_hidden: Keep the states that enter the output layer, in `hidden`.
    """
    lean = LeanReader.of(model, rows, max_length, keep_hidden=keep_hidden) if known(model).lean else None
    return lean or ForwardReader(model, rows, max_length, keep_hidden=keep_hidden)


def prefill(reader: RowReader, prompts: list[list[int]], first: int, pad: int) -> int:
    """Read all of each prompt but its last token into cache rows first, first + 1, ...; return how many passes."""
    longest = max(len(prompt) for prompt in prompts) - 1
    if longest == 0:
        return 0
    # Padding on the right is harmless: its slots lie beyond the row's position until they are overwritten.
    padded = [prompt[:-1] + [pad] * (longest - len(prompt) + 1) for prompt in prompts]
    tokens = torch.tensor(padded, dtype=torch.int64, device=reader.device)
    reader.read(tokens, [0] * len(prompts), first=first, logits="last")
    return 1


class ForwardReader:
    """Reads through the model's own forward, with a `RowCache`; arguments as in `row_reader`."""

    lean = False

    def __init__(self, model: Any, rows: int, max_length: int, *, keep_hidden: bool = False) -> None:
        self.device, self.log_dtype = device_of(model), _log_dtype(model)
        self.passes = 0
        self.hidden: Tensor | None = None
        self._model, self._cache = model, RowCache(rows, max_length)
        self._last_position = _last_position(model)
        self._dtype = model.get_input_embeddings().weight.dtype
        self._keep_hidden = keep_hidden

    def read(
        self,
        tokens: Tensor,
        start: Sequence[int],
        *,
        first: int = 0,
        positions: Tensor | None = None,
        logits: Literal["all", "last"] = "all",
    ) -> Tensor:
        """As `RowReader.read`."""
        count = tokens.shape[1]
        positions = _positions(start, positions, count, self.device)
        self.passes += 1
        used = self._cache.begin(first, start, count)
        queries = positions[:1] if self._cache.aligned else positions
        visible = torch.arange(used, device=self.device) <= queries[:, None, :, None]
        # Additive, because eager attention adds what it is given and sdpa takes it as well.
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=self.device).masked_fill_(~visible, -torch.inf)
        # Drafts may run past the end of the context; what is written there is never kept.
        positions = positions.clamp(max=self._last_position)
        with output_layer_input(self._model, enabled=self._keep_hidden) as hidden:
            output = self._model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if logits == "all" else 1,
            )
        if hidden:
            self.hidden = hidden[0]
        return output.logits

    def move(self, source: int, target: int, length: int) -> None:
        """As `RowReader.move`."""
        self._cache.move(source, target, length)


class LeanReader:
    """Reads through a `LeanDecoder`, with a `SlotCache`.

    Args:
        model: The model that was taken apart.
        decoder: It, for positions up to `max_length` and the end of the model's tables.
        rows: How many rows fit.
        max_length: The most tokens a row can hold, drafts included.
        keep_hidden: Keep the states that enter the output layer, in `hidden`.
    """

    lean = True

    def __init__(
        self, model: Any, decoder: LeanDecoder, rows: int, max_length: int, *, keep_hidden: bool = False
    ) -> None:
        self.device, self.log_dtype = device_of(model), _log_dtype(model)
        self.passes = 0
        self.hidden: Tensor | None = None
        self._decoder, self._cache = decoder, decoder.cache(rows, max_length)
        # Drafts may run a little past the end; positions are clamped to the tables.
        self._last_position = min(max_length - 1, _last_position(model))
        self._keep_hidden = keep_hidden

    @classmethod
    def of(
        cls, model: Any, rows: int, max_length: int, *, keep_hidden: bool = False, live: bool = False
    ) -> "LeanReader | None":
        """Return the reader of a model of a known family, None for other models.

        Args:
            model: A causal language model.
            rows: How many rows fit.
            max_length: The most tokens a row can hold, drafts included.
            keep_hidden: Keep the states that enter the output layer, in `hidden`.
            live: Take all memory now and read the weights where they are: no address changes as long as it lives.
        """
        decoder = lean_decoder(model, min(max_length, _last_position(model) + 1), live=live)
        if decoder is None:
            return None
        reader = cls(model, decoder, rows, max_length, keep_hidden=keep_hidden)
        if live:
            decoder.reserve(max_length)
            reader._cache.reserve()
        return reader

    def read(
        self,
        tokens: Tensor,
        start: Sequence[int],
        *,
        first: int = 0,
        positions: Tensor | None = None,
        logits: Literal["all", "last"] = "all",
    ) -> Tensor:
        """As `RowReader.read`."""
        self.passes += 1
        result, states = self._decoder(
            tokens,
            start,
            _positions(start, positions, tokens.shape[1], self.device),
            self._cache,
            first=first,
            last_position=self._last_position,
            last_only=logits == "last",
        )
        if self._keep_hidden:
            self.hidden = states
        return result

    def read_at(self, tokens: Tensor, positions: Tensor, shown: int, *, last_only: bool) -> tuple[Tensor, Tensor]:
        """Return logits `[A, n or 1, V]` and states `[A, n or 1, H]` of a pass that asks nothing of the host.

        Args:
            tokens: int64 `[A, n]`, for the first A rows.
            positions: Of every token, int64 `[A, n]`, inside the cache.
            shown: How many slots of the cache queries see: more than every position that matters.
            last_only: Whether only the last token's logits are wanted.
        """
        self._cache.show(0, positions, shown)
        inside = positions.clamp(max=self._last_position)
        return self._decoder.forward(tokens, positions, inside, self._cache, shown, last_only=last_only)

    def clear(self) -> None:
        """Forget every row."""
        self._cache.clear()

    def tensors(self) -> list[Tensor]:
        """Return what a pass reads besides weights."""
        return self._cache.buffers + self._decoder.tables()

    def move(self, source: int, target: int, length: int) -> None:
        """As `RowReader.move`."""
        self._cache.move(source, target, length)


def _positions(start: Sequence[int], column: Tensor | None, count: int, device: torch.device) -> Tensor:
    """The position of every token, int64 `[A, n]`, or `[A, 1]` for a single one."""
    if column is None:
        column = torch.tensor(start, device=device).unsqueeze(1)
    return column if count == 1 else column + torch.arange(count, device=device)


def _last_position(model: Any) -> int:
    """The last position of the model's tables; far beyond every text where it has none."""
    return (getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**62) - 1


def _log_dtype(model: Any) -> torch.dtype:
    return torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)


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
