"""Draws from next-token distributions: warping, counter-based randomness, Gumbel-max and the coupled draw.

Randomness is a function of (seed, row id, position, stream, token id) and of nothing else. The same row therefore gets
the same noise alone or in a batch, on any device, for any draft length.
"""

import functools
import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from switchkd.chunks import rows_at_once
from switchkd.fusing import fusible

_MASK_64 = (1 << 64) - 1
_GOLDEN_64 = 0x9E3779B97F4A7C15
_MIX_64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# Shift and factor of each round of the 32-bit finaliser.
_ROUNDS_32 = ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 0))
_GOLDEN_32 = 0x9E3779B1 - (1 << 32)


class Stream(IntEnum):
    """Independent noise for each decision taken at one position; SOURCE is drawn once per optimizer step instead."""

    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    POLICY = 4
    SOURCE = 5


def warp(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return the log-probabilities that are sampled from, and therefore also compared.

    Args:
        logits: `[..., V]`, any float dtype.
        temperature: > 0; 0 is greedy: all mass on the most likely id.
        top_k: Keep the k most likely ids (ties kept); 0 keeps all.
        top_p: Keep the smallest set of most likely ids whose mass reaches `top_p`, in (0, 1]; 1 keeps all.

    Returns:
        `[..., V]`, at least float32, normalised; excluded ids are -inf.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if temperature == 0.0:
        greedy = torch.full_like(logits, -math.inf)
        return greedy.scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    if temperature != 1.0:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1.0:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        # An id stays if the mass before it is still short of top_p: the most likely id always stays.
        dropped = (ordered.cumsum(-1) - ordered) >= top_p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), -math.inf)
    return logits.log_softmax(-1)


def restricted(logits: Tensor, size: int, excluded_ids: tuple[int, ...] = ()) -> Tensor:
    """Return logits `[..., V]` cut to the first `size` ids, -inf at the excluded ones: a softmax then renormalises.

    Args:
        logits: `[..., >= size]`; the result is a view of it where nothing is excluded.
        size: Leading ids kept, V.
        excluded_ids: Ids that must be neither written nor compared; those beyond `size` are cut anyway.
    """
    logits = logits[..., :size]
    if not excluded_ids:
        return logits
    return logits.index_fill(-1, _index_below(size, excluded_ids, logits.device), -math.inf)


@functools.lru_cache(maxsize=8)
def _index_below(size: int, ids: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([index for index in ids if index < size], dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Warping:
    """How logits become the distribution that is sampled and compared."""

    temperature: float
    top_k: int
    top_p: float
    vocabulary_size: int
    excluded_ids: tuple[int, ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities `[..., V]`, V being the shared vocabulary."""
        logits = restricted(logits, self.vocabulary_size, self.excluded_ids)
        return warp(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def constants(self, device: torch.device) -> list[Tensor]:
        """Return the tensors that draws of this vocabulary read again and again: whoever captures a draw holds them."""
        ids = [_index_below(self.vocabulary_size, self.excluded_ids, device)] if self.excluded_ids else []
        return [_hashed_ids(self.vocabulary_size, device), *ids]

    def into(self, out: Tensor, logits: Tensor) -> Tensor:
        """Write the log-probabilities of logits `[N, >= V]` into a tensor `[N, V]` and return it."""
        some = rows_at_once(logits)
        for target, part in zip(out.split(some), logits.split(some), strict=True):
            target.copy_(self(part))
        return out


def noise_keys(seed: int, row_ids: Tensor, positions: Tensor, stream: Stream) -> Tensor:
    """Return one 64-bit key for each (seed, row id, position, stream).

    Args:
        seed: Any integer.
        row_ids: int64 `[N]`, the identity of each row across batches.
        positions: int64 `[N]`, completion positions counted from 0.
        stream: Which decision the noise is for.

    Returns:
        int64 `[N]`, well mixed.
    """
    return position_keys(row_keys(seed, row_ids, stream), positions)


def row_keys(seed: int, row_ids: Tensor, stream: Stream) -> Tensor:
    """Return what `noise_keys` knows of a row before it knows a position, int64 in the shape of `row_ids`."""
    start = _splitmix_python(seed * 16 + int(stream))
    return _splitmix(row_ids.to(torch.int64) ^ _signed(start))


def position_keys(keys: Tensor, positions: Tensor) -> Tensor:
    """Return `noise_keys` from the rows' part of it; both int64, of shapes that fit each other."""
    return _splitmix(keys ^ _splitmix(positions.to(torch.int64) + _signed(_GOLDEN_64)))


def uniform(keys: Tensor) -> Tensor:
    """Return one number in (0, 1) for each key, float64 `[N]`."""
    return ((keys >> 11 & ((1 << 53) - 1)).to(torch.float64) + 0.5) * 2.0**-53


@fusible
def exponential_race(log_probs: Tensor, keys: Tensor) -> Tensor:
    """Return a draw from each distribution by Gumbel-max with hashed noise.

    The id with the largest ln p_v - ln E_v wins, where E_v is a standard exponential made from (key, v); this is the
    Gumbel-max trick. A relative error of 1e-6 in p changes the winner only where two ids tie that closely.

    Args:
        log_probs: `[N, V]`, need not be normalised; -inf is never drawn unless all are.
        keys: int64 `[N]` of `noise_keys`.

    Returns:
        int64 `[N]`.
    """
    noise = log_exponential(keys, log_probs.shape[-1])
    return torch.sub(log_probs, noise, out=noise if log_probs.dtype == noise.dtype else None).argmax(-1)


def log_exponential(keys: Tensor, size: int) -> Tensor:
    """Return ln E for standard exponentials E, float32 `[N, size]`, a function of (key, id) only.

    In-place throughout: at V = 50,257 fresh temporaries would cost more than the arithmetic.
    """
    if torch.compiler.is_compiling():
        return _log_exponential_in_one(keys, size)
    noise = torch.empty(len(keys), size, dtype=torch.float32, device=keys.device)
    hashed = noise.view(torch.int32)
    low, high = keys.to(torch.int32).unsqueeze(1), (keys >> 32).to(torch.int32).unsqueeze(1)
    torch.bitwise_xor(_hashed_ids(size, keys.device), low, out=hashed)
    scratch = torch.empty_like(hashed)
    _mix_32(hashed, scratch)
    hashed.add_(high)
    _mix_32(hashed, scratch)
    # Unsigned 32 bits as a fraction u in (0, 1): E = -ln(1 - u) resolves the small E that win races down to 2^-33.
    noise.copy_(hashed.view(torch.uint32))
    noise.add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return noise.neg_().log1p_().neg_().log_()


def _log_exponential_in_one(keys: Tensor, size: int) -> Tensor:
    """`log_exponential` to the last bit, as one expression that a compiler makes one kernel of."""

    def mixed(value: Tensor) -> Tensor:
        for shift, multiplier in _ROUNDS_32:
            value = value ^ ((value >> shift) & ((1 << (32 - shift)) - 1))
            value = value * multiplier if multiplier else value
        return value

    low, high = keys.to(torch.int32).unsqueeze(1), (keys >> 32).to(torch.int32).unsqueeze(1)
    ids = torch.arange(size, dtype=torch.int32, device=keys.device) * _GOLDEN_32
    hashed = mixed(mixed(ids.unsqueeze(0) ^ low) + high)
    fraction = ((hashed.to(torch.int64) & ((1 << 32) - 1)).to(torch.float32) + 0.5) * 2.0**-32
    return (-torch.log1p(-fraction.clamp(max=1.0 - 2.0**-24))).log()


@functools.lru_cache(maxsize=8)
def _hashed_ids(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(size, dtype=torch.int32, device=device).mul_(_GOLDEN_32).unsqueeze(0)


class NoiseTable:
    """The noise of every row and position of a rollout: keys are hashed once for all of them, not once a round.

    Args:
        seed: Any integer.
        row_ids: int64 `[B]`.
        positions: How many completion positions C a row has.
    """

    def __init__(self, seed: int, row_ids: Tensor, positions: int) -> None:
        self._seed, self.positions = seed, positions
        self._row_ids = row_ids.unsqueeze(1)
        self._all_positions = torch.arange(positions, device=row_ids.device).unsqueeze(0)
        self._keys: dict[Stream, Tensor] = {}
        self._log_uniform: Tensor | None = None

    def index(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the cells of rows (0 .. B-1) and positions in the table, int64.

        Drafts may run past the last position; they get its noise and are never kept.
        """
        return rows * self.positions + positions.clamp(max=self.positions - 1)

    def keys(self, stream: Stream, index: Tensor) -> Tensor:
        """Return `noise_keys` of cells of the table, in the shape of `index`."""
        if stream not in self._keys:
            self._keys[stream] = noise_keys(self._seed, self._row_ids, self._all_positions, stream).view(-1)
        return self._keys[stream][index]

    def log_accept(self, index: Tensor) -> Tensor:
        """Return ln u of the uniform number that decides whether a draft is kept, float64, shaped as `index`."""
        if self._log_uniform is None:
            self._log_uniform = uniform(noise_keys(self._seed, self._row_ids, self._all_positions, Stream.ACCEPT)).log()
        return self._log_uniform.view(-1)[index]


def generator(seed: int, *counters: int) -> torch.Generator:
    """Return torch's sequential generator for a draw of a whole array, by a seed and at most two counters."""
    for multiplier, counter in zip((1_000_003, 4099), counters, strict=False):
        seed = seed * multiplier + counter
    return torch.Generator().manual_seed(seed)


def coupled_draw(
    drafted: Tensor,
    student_log_probs: Tensor,
    behaviour_log_probs: Tensor,
    accept_keys: Tensor,
    residual_keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return tokens distributed as `behaviour`, equal to the drafted token as often as can be.

    The drafted token s is kept with probability min(1, behaviour(s) / student(s)); otherwise the token is drawn from
    the normalised positive part of behaviour - student. If s was drawn from `student` the result is distributed
    exactly as `behaviour`. Where the two agree to rounding the positive part can be empty: the draft is kept.

    Args:
        drafted: int64 `[N]`, drawn from `student_log_probs`.
        student_log_probs: `[N, V]`.
        behaviour_log_probs: `[N, V]`.
        accept_keys: int64 `[N]`, keys of `Stream.ACCEPT`.
        residual_keys: int64 `[N]`, keys of `Stream.RESIDUAL`.

    Returns:
        The tokens, int64 `[N]`, and whether the draft was kept, bool `[N]`.

    Reference:
        Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192, appendix A.1.
    """
    kept = accept(drafted, student_log_probs, behaviour_log_probs, accept_keys)
    tokens = drafted.clone()
    redrawn = (~kept).nonzero().squeeze(-1)
    if len(redrawn):
        replacement, empty = residual_draw(
            student_log_probs[redrawn], behaviour_log_probs[redrawn], residual_keys[redrawn]
        )
        tokens[redrawn] = torch.where(empty, drafted[redrawn], replacement)
        kept[redrawn] = empty
    return tokens, kept


def accept(drafted: Tensor, student_log_probs: Tensor, behaviour_log_probs: Tensor, accept_keys: Tensor) -> Tensor:
    """Return whether each drafted token is kept: uniform < behaviour(s) / student(s), bool `[N]`."""
    index = drafted.unsqueeze(-1)
    return accept_at(
        student_log_probs.gather(-1, index).squeeze(-1),
        behaviour_log_probs.gather(-1, index).squeeze(-1),
        uniform(accept_keys).log(),
    )


def accept_at(student_log_prob: Tensor, behaviour_log_prob: Tensor, log_uniform: Tensor) -> Tensor:
    """Return `accept` from the log-probabilities of the drafted tokens and ln uniform, float64, all of one shape."""
    return log_uniform < (behaviour_log_prob - student_log_prob).double()


def residual_draw(
    student_log_probs: Tensor, behaviour_log_probs: Tensor, residual_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a draw from the positive part of behaviour - student, int64 `[N]`, and where that part is empty."""
    residual = (behaviour_log_probs.exp() - student_log_probs.exp()).clamp_min_(0.0)
    return exponential_race(residual.log_(), residual_keys), ~(residual > -math.inf).any(-1)


def _mix_32(value: Tensor, scratch: Tensor) -> None:
    """A 32-bit finaliser, in place: (xorshift, multiply) twice and a last xorshift."""
    for shift, multiplier in _ROUNDS_32:
        # The shift of a signed integer repeats the sign bit; the mask makes it the unsigned shift.
        torch.bitwise_right_shift(value, shift, out=scratch)
        value.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))
        if multiplier:
            value.mul_(multiplier)


def _splitmix(value: Tensor) -> Tensor:
    """The 64-bit finaliser of splitmix64 on int64 tensors, whose products wrap."""
    value = (value ^ (value >> 30 & ((1 << 34) - 1))) * _signed(_MIX_64[0])
    value = (value ^ (value >> 27 & ((1 << 37) - 1))) * _signed(_MIX_64[1])
    return value ^ (value >> 31 & ((1 << 33) - 1))


def _splitmix_python(value: int) -> int:
    value = (value + _GOLDEN_64) & _MASK_64
    value = ((value ^ (value >> 30)) * _MIX_64[0]) & _MASK_64
    value = ((value ^ (value >> 27)) * _MIX_64[1]) & _MASK_64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    value &= _MASK_64
    return value - (1 << 64) if value >= 1 << 63 else value
