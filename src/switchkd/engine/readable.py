"""What a model can be trusted to read: rows at all, rows with padding, rows each at its own position.

A config is a promise that this package cannot know in full. What a config says is read first; then the model is asked:
a few tokens are read in the ways that rollouts and losses read them, and compared with one plain pass. What was found
is kept for each model.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from switchkd.engine.lean import lean_decoder
from switchkd.engine.readers import ForwardReader, RowReader, TokenReader, row_reader
from switchkd.errors import UserError
from switchkd.models.forward import check_finite, device_of, eval_mode, prompt_positions
from switchkd.models.known import known
from switchkd.rollout import Prompts

SERVED_ATTENTION = ("eager", "sdpa")
# These rotary embeddings change with the longest position seen, so a row's keys would depend on its neighbours.
UNSERVED_ROPE = ("dynamic", "longrope")

# Integers of a config under such names say how far attention reaches; counts of other things are excluded.
WINDOW_NAME = re.compile(r"window|local|att(entio)?n_chunk")
COUNTS_OTHERS = re.compile(r"expert|layer|pattern|freq|theta|base|blocks")
# Under such names too a limit of attention may hide: no reason to fall back, but one to look.
SUSPECT_NAME = re.compile(r"window|local|chunk|span|block")
# Names of layers that see the whole text before them.
FULL_ATTENTION = {"full_attention", "global"}
# A limit of up to this many tokens is passed in a probe, if a rollout passes it; beyond, the config alone decides.
MOST_PROBED = 256
# Tokens of the first probe: too few to cost anything.
FIRST_PROBE = 12

# What a model raises that cannot read what it is given.
REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError)


def require_readable(model: Any, role: str, *, padded: bool = True, length: int = 0) -> None:
    """Refuse a model that would be read wrongly, before any text or loss comes of it.

    A model is probed once, in eval mode, and its weights are looked at before that: nan passes through every check.

    Args:
        model: A language model of transformers; None is not refused.
        role: What the model is for, named in errors.
        padded: Whether rows are padded on the left to the length of the longest.
        length: Up to how many tokens rows are written one at a time.

    Raises:
        UserError: The model is not a decoder-only language model, its weights hold nan or inf, or what it predicts for
            a row depends on how it is read: with a cache, with position ids, or beside longer rows.
    """
    if model is None:
        return
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            f"the {role}, a {type(model).__name__}, is an encoder-decoder; give a decoder-only language model"
        )
    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise UserError(
            f"the {role} has an adapter of type {adapter.peft_type.value}, whose virtual tokens are read at wrong "
            "positions beside padding and again with every new token; use LoRA or another adapter of the weights"
        )
    refusals = known(model).refusals
    if not refusals:
        check_finite(model, role, "load another checkpoint")
    for probe in _probes(model.config.get_text_config(), length):
        if probe not in refusals:
            with eval_mode(model), torch.no_grad():
                refusals[probe] = _ask(model, probe)
    refused, refused_padding = refusals[FIRST_PROBE]
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__
    if refused is not None:
        raise UserError(f"the {role}, a {name}, cannot be used: {refused}")
    if padded and refused_padding is not None:
        raise UserError(
            f"the {role}, a {name}, cannot be used with rows of different lengths: {refused_padding}; "
            "give one row at a time or another model"
        )


def unserved_reason(model: Any, length: int) -> str | None:
    """Return why a model cannot be read row by row up to `length` tokens, or None where it can.

    What its config says is checked first; then its logits on two ragged rows are compared with those of a plain pass,
    first on a few tokens, then past every small limit that its config might name, as far as `length` goes.
    """
    config = model.config.get_text_config()
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in SERVED_ATTENTION:
        return f"its attention implementation is {implementation!r}, served are {' and '.join(SERVED_ATTENTION)}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {*FULL_ATTENTION, "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    for name, window in _used_windows(config):
        if length > window:
            return f"its {re.sub('[._]', ' ', name)} of {window} tokens is shorter than the {length} needed"
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    for one in ropes:
        if one.get("rope_type") in UNSERVED_ROPE:
            return f"its rotary embedding of type {one['rope_type']!r} depends on the longest row"
    return next((wrong for probe in _probes(config, length) if (wrong := _probed(model, probe))), None)


def _probes(config: Any, length: int) -> list[int]:
    """How many tokens to probe for rows of `length`: a few, and enough to pass every small limit that the rows pass."""
    passed = max(
        (limit for limit in _suspects(config) if FIRST_PROBE < limit <= min(MOST_PROBED, length - 1)), default=0
    )
    return [FIRST_PROBE, _past(passed, config)] if passed else [FIRST_PROBE]


def last_slot(model: Any, length: int) -> int:
    """Return how many tokens a row may hold, drafts that are thrown away included, where `length` are served."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    limits = [limit] if isinstance(limit, int) and limit > 0 else []
    return max(min([*limits, *(suspect for suspect in _suspects(config) if suspect >= length)], default=2**62), length)


def _past(limit: int, config: Any) -> int:
    """Enough tokens beyond a limit for it to show: the last queries miss a third of the text."""
    context = getattr(config, "max_position_embeddings", None)
    wanted = limit + limit // 2 + FIRST_PROBE
    return min(wanted, context) if isinstance(context, int) and context > limit else wanted


# ---- what a config says


def _integers(values: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every positive integer of a config with its name, in nested configs, dicts and lists too."""
    if isinstance(values, PreTrainedConfig):
        values = vars(values)
    if isinstance(values, dict):
        for key, value in values.items():
            # A name covers what is nested under it.
            yield from _integers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _integers(value, name)
    elif isinstance(values, int) and not isinstance(values, bool) and values > 0:
        yield name, values


def _used_windows(config: Any) -> list[tuple[str, int]]:
    """The windows a config names, whatever they are called, but for those that it says are not used."""
    layers = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ())
    if layers and layers <= FULL_ATTENTION:
        return []
    windows = [
        (name, value)
        for name, value in _integers(config)
        if WINDOW_NAME.search(name) and not COUNTS_OTHERS.search(name)
    ]
    if not getattr(config, "use_sliding_window", True):
        windows = [(name, value) for name, value in windows if "sliding" not in name]
    return windows


def _suspects(config: Any) -> set[int]:
    """Every number of a config that might limit how far attention reaches."""
    return {value for name, value in _integers(config) if SUSPECT_NAME.search(name)}


# ---- what a model does


def _probed(model: Any, length: int) -> str | None:
    found = known(model).row_faults
    if length not in found:
        rows, room = 2, length + 2
        found[length] = _guarded(lambda: _rows_differ(model, length, ForwardReader(model, rows, room)))
        if length == FIRST_PROBE and found[length] is None and lean_decoder(model, 8) is not None:
            known(model).lean = True
        if known(model).lean:
            wrong = _guarded(lambda: _rows_differ(model, length, row_reader(model, rows, room)))
            known(model).lean = wrong is None
    return found[length]


def _guarded(probe: Callable[[], str | None]) -> str | None:
    try:
        return probe()
    except REFUSALS as error:
        message = " ".join(str(error).split())
        return f"it does not accept what it is given ({type(error).__name__}: {message[:120]})"


def _tokens(model: Any, rows: int, length: int) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(1, rows * length + 1, device=device_of(model)).view(rows, length) * 7) % vocabulary


def _is_half(model: Any) -> bool:
    device = device_of(model).type
    half = model.get_input_embeddings().weight.dtype in (torch.float16, torch.bfloat16)
    # Products of TF32 keep ten bits, as float16 does.
    tf32 = device == "cuda" and torch.backends.cuda.matmul.allow_tf32
    in_8bit = bool(getattr(model, "is_loaded_in_8bit", False))  # inputs of every layer are rounded to 8 bits, too
    return half or tf32 or in_8bit or torch.is_autocast_enabled(device)


def _rows_differ(model: Any, length: int, reader: RowReader) -> str | None:
    """Compare ragged cached passes with one plain pass over two rows of `length` tokens; return what is wrong."""
    tokens = _tokens(model, 2, length)
    plain = model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        position_ids=prompt_positions(torch.ones_like(tokens)),
        use_cache=False,
    ).logits
    ahead = length - 4
    back = max(ahead // 2, 1)
    first = reader.read(tokens[:, :ahead], [0, 0])
    # Rows part: one goes on, the other back to its middle, over slots that hold stale keys.
    ragged = reader.read(torch.stack([tokens[0, ahead : ahead + 2], tokens[1, back : back + 2]]), [ahead, back])
    last = reader.read(
        torch.stack([tokens[0, ahead + 2 : ahead + 3], tokens[1, back + 2 : back + 3]]),
        [ahead + 2, back + 2],
        logits="last",
    )
    got = torch.cat([first.flatten(0, 1), ragged[0], ragged[1], last[:, 0]]).float()
    expected = torch.cat(
        [
            plain[:, :ahead].flatten(0, 1),
            plain[0, ahead : ahead + 2],
            plain[1, back : back + 2],
            torch.stack([plain[0, ahead + 2], plain[1, back + 2]]),
        ]
    ).float()
    # Models may exclude ids with -inf: equal values, infinite or not, differ by nothing.
    largest = float(torch.where(got == expected, 0.0, (got - expected).abs()).max())
    tolerance = (0.1 if _is_half(model) else 1e-3) * float(expected[expected.isfinite()].std() + 1e-6)
    if largest <= tolerance:
        return None
    return f"its cached logits differ from a plain pass over {length} tokens by {largest:.2g}"


def _ask(model: Any, length: int) -> tuple[str | None, str | None]:
    """Why a model cannot be used at all, and why not beside longer rows; None where nothing speaks against it.

    A model whose cache is not to be trusted can be used without it; past the first probe that alone is asked.
    """
    long, short = _tokens(model, 2, length + 1).unsqueeze(1).unbind(0)
    short = short[:, :4]
    padding = long.shape[1] - short.shape[1]

    def plain(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits[0].float()

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        """As losses read rows."""
        positions = prompt_positions(mask)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()

    def write(ids: Tensor, mask: Tensor, steps: int = 3) -> Tensor:
        """As the reference decoder reads rows: a prompt, then a token at a time; `[B, 1 + steps, V]`."""
        reader = TokenReader(model, Prompts(ids[:, :-steps], mask[:, :-steps]))
        logits = [reader.logits]
        for column in range(-steps, 0):
            reader.append(ids[:, column])
            logits.append(reader.logits)
        return torch.stack(logits, dim=1).float()

    def differs(got: Tensor, expected: Tensor, close: float = 1e-3) -> bool:
        same = (got == expected) | ~expected.isfinite()
        # A mean, not the largest: in half precision a good model's experts may change sides at a token.
        error = torch.where(same, 0.0, got - expected).square().mean().sqrt()
        tolerance = (0.3 if _is_half(model) else close) * (expected[expected.isfinite()].std() + 1e-6)
        return not bool(error <= tolerance)

    def alone() -> str | None:
        if not bool((plain(long) < math.inf).all()):  # -inf excludes an id
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            return f"its logits are nan or inf in {dtype}; load it in float32 or bfloat16, or another checkpoint"
        if differs(plain(long[:, :4]), plain(long)[:4]):
            return "it looks ahead: a token changes what is predicted before it"
        if differs(read(long, torch.ones_like(long))[0], plain(long)):
            return "position ids that count from 0 change its logits"
        return None

    def beside(way: Callable[[Tensor, Tensor], Tensor]) -> str | None:
        ids = torch.cat([nn.functional.pad(short, (padding, 0), value=int(long[0, 0])), long])
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        last = way(ids, mask)[:, -4:]
        if differs(last[0], plain(short)[-4:]) or differs(last[1], plain(long)[-4:]):
            return "padding on the left changes its logits"
        return None

    def cached() -> str | None:
        # Errors of a cache add up over a text, and to do without costs no more than time: a closer look.
        wrong = differs(write(long, torch.ones_like(long), steps=8)[0], plain(long)[-9:], close=1e-4)
        return "its logits with a cache differ from a plain pass" if wrong else None

    if length > FIRST_PROBE:
        if _guarded(cached):
            known(model).rereads = True
        return None, None
    refused, refused_padding = _guarded(alone), _guarded(lambda: beside(read))
    if refused is None and (_guarded(cached) or (not refused_padding and _guarded(lambda: beside(write)))):
        known(model).rereads = True
        refused, refused_padding = _guarded(cached), refused_padding or _guarded(lambda: beside(write))
    return refused, refused_padding
