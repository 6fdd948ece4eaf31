"""One round as three functions of static shape, for `capture`: draft, check, settle.

They do what a round of `block.BlockDecoder` does, with tensors for every list of the host. Rows lie at places; all
functions work on the first R of them, ended ones included, whose results go nowhere. Nothing is asked of the device,
nothing is made anew but what is gone after the function, and what a round leaves is in tensors of `Places`.

Legend: R places, G drafted tokens, V vocabulary, H the teacher's states, W most completion tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from switchkd import sampling
from switchkd.engine.readers import LeanReader
from switchkd.engine.verification import verify_once
from switchkd.policies import Policy
from switchkd.sampling import Stream, Warping

# What the engine draws at one position, in the columns of `Places.keys`.
STREAMS = (Stream.DRAFT, Stream.ACCEPT, Stream.RESIDUAL, Stream.POLICY)


@dataclass(frozen=True)
class Sizes:
    """Every size that tensors are made for.

    Attributes:
        rows: Places.
        slots: Of the student's cache.
        teacher_slots: Of the teacher's.
        width: The most tokens of a completion.
        length: The longest draft.
        vocabulary: V.
        ends: How many ids end a text.
        hidden: Width of the teacher's states; 0 where they are not kept.
        teacher: Whether there is one.
    """

    rows: int
    slots: int
    teacher_slots: int
    width: int
    length: int
    vocabulary: int
    ends: int
    hidden: int
    teacher: bool

    _GROWING = ("rows", "slots", "teacher_slots", "width", "length")

    def hold(self, other: "Sizes") -> bool:
        """Whether tensors of these sizes serve where the other ones are needed."""
        return self.joined(other) == self

    def joined(self, other: "Sizes") -> "Sizes":
        """Return the other sizes, as large as these where more does no harm."""
        larger = {name: max(getattr(self, name), getattr(other, name)) for name in self._GROWING}
        return Sizes(**{**vars(other), **larger})


class Places:
    """The tensors of a rollout in progress, which stay where they are.

    Args:
        sizes: How large.
        log_dtype: Of log-probabilities.
        hidden_dtype: Of the teacher's states.
        device: Where.
    """

    def __init__(self, sizes: Sizes, log_dtype: torch.dtype, hidden_dtype: torch.dtype, device: torch.device) -> None:
        rows, width = sizes.rows, sizes.width

        def column(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        def memory(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self.sizes = sizes
        # What the host writes when a row comes: where its first token is read, its noise, its teacher's last token.
        self.student_start, self.teacher_start = column(), column()
        self.teacher_last, self.keys = column(), column(len(STREAMS))
        # What rounds change.
        self.active, self.emitted, self.last = column(dtype=torch.bool), column(), column()
        self.state: Tensor | None = None
        # Of the whole rollout.
        self.limit = torch.zeros((), dtype=torch.int64, device=device)
        self.ends = torch.zeros(sizes.ends, dtype=torch.int64, device=device)
        self.steps = torch.arange(max(sizes.length, width) + 1, device=device)
        # What is written; what is not emitted goes to the last column.
        self.tokens, self.drafted = column(width + 1), column(width + 1)
        self.author = column(width + 1, dtype=torch.uint8)
        self.divergence, self.threshold = (column(width + 1, dtype=torch.float32) for _ in range(2))
        self.hidden = column(width + 1, sizes.hidden, dtype=hidden_dtype) if sizes.hidden else None
        # Of one round.
        scored = sizes.length if sizes.teacher else 1
        self._read = memory(rows * (sizes.length + 1), torch.int64)
        self._student_rows = memory(rows * scored * sizes.vocabulary, log_dtype)
        self._teacher_rows = memory(rows * scored * sizes.vocabulary, log_dtype) if sizes.teacher else None
        self._states = memory(rows * sizes.length * sizes.hidden, hidden_dtype) if sizes.hidden else None
        #: Of each place: tokens emitted in the round, drafted tokens accepted, whether the row goes on.
        self.report = column(3)

    def read(self, rows: int, length: int) -> Tensor:
        """The last committed token and the draft, int64 `[R, 1 + G]`."""
        return self._read[: rows * (length + 1)].view(rows, length + 1)

    def student_rows(self, rows: int, length: int) -> Tensor:
        """The student's log-probabilities at the draft, `[R, G, V]`."""
        size = self.sizes.vocabulary
        return self._student_rows[: rows * length * size].view(rows, length, size)

    def teacher_rows(self, rows: int, length: int) -> Tensor:
        """The teacher's, `[R, G, V]`."""
        assert self._teacher_rows is not None
        size = self.sizes.vocabulary
        return self._teacher_rows[: rows * length * size].view(rows, length, size)

    def states(self, rows: int, length: int) -> Tensor | None:
        """The teacher's states that predict the draft, `[R, G, H]`, if they are kept."""
        if self._states is None:
            return None
        return self._states[: rows * length * self.sizes.hidden].view(rows, length, self.sizes.hidden)

    def changed(self) -> list[Tensor]:
        """What `settle` changes further at each call."""
        return [*self.moved(), self.report]

    def moved(self) -> list[Tensor]:
        """What rounds leave at a place."""
        written = (self.tokens, self.drafted, self.author, self.divergence, self.threshold)
        kept = (self.active, self.emitted, self.last, *written, self.state, self.hidden)
        return [tensor for tensor in kept if tensor is not None]

    def described(self) -> list[Tensor]:
        """What the host writes at a place."""
        return [self.student_start, self.teacher_start, self.teacher_last, self.keys]

    def all(self) -> list[Tensor]:
        """Every tensor but the policy's state, whose shape is the policy's."""
        return [value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "state"]


class RoundNoise:
    """The noise of a round: cells are counted over its places and positions.

    Args:
        row_keys: `sampling.row_keys` of the places, a column for each of `STREAMS`, int64 `[R, S]`.
        position: Completion positions, int64 `[R, G]`.
    """

    def __init__(self, row_keys: Tensor, position: Tensor) -> None:
        self._row_keys, self._position = row_keys, position

    def keys(self, stream: Stream, index: Tensor) -> Tensor:
        """Return `noise_keys` of cells, in the shape of `index`."""
        own = self._row_keys[:, STREAMS.index(stream)].unsqueeze(1)
        return sampling.position_keys(own, self._position).view(-1)[index]

    def log_accept(self, index: Tensor) -> Tensor:
        """Return ln u of the uniform number that decides whether a draft is kept, float64, shaped as `index`."""
        return sampling.uniform(self.keys(Stream.ACCEPT, index)).log()


def draft(places: Places, reader: LeanReader, warping: Warping, rows: int, length: int, shown: int) -> None:
    """Let the student write `length` tokens at the first `rows` places, reading `shown` slots of its cache."""
    read, scored = places.read(rows, length), places.sizes.teacher
    log_probs = places.student_rows(rows, length if scored else 1)
    emitted = places.emitted[:rows].unsqueeze(1)
    start = places.student_start[:rows].unsqueeze(1) + emitted
    own = places.keys[:rows, STREAMS.index(Stream.DRAFT)].unsqueeze(1)
    keys = sampling.position_keys(own, emitted + places.steps[:length])
    read[:, 0] = places.last[:rows]
    for step in range(length):
        logits, _ = reader.read_at(read[:, step : step + 1], start + step, shown, last_only=True)
        # Without a teacher nobody reads them later.
        now = warping.into(log_probs[:, step if scored else 0], logits[:, -1])
        read[:, step + 1] = sampling.exponential_race(now, keys[:, step])


def check(places: Places, reader: LeanReader, warping: Warping, rows: int, length: int, shown: int) -> None:
    """Let the teacher score the draft at the first `rows` places in one pass, reading `shown` slots of its cache."""
    emitted = places.emitted[:rows]
    # The first token read is the prompt's last, and the teacher's prompt may be another.
    first = torch.where(emitted == 0, places.teacher_last[:rows], places.last[:rows]).unsqueeze(1)
    tokens = torch.cat([first, places.read(rows, length)[:, 1:-1]], dim=1)
    start = (places.teacher_start[:rows] + emitted).unsqueeze(1)
    logits, states = reader.read_at(tokens, start + places.steps[:length], shown, last_only=False)
    warping.into(places.teacher_rows(rows, length).flatten(0, 1), logits.flatten(0, 1))
    kept = places.states(rows, length)
    if kept is not None:
        kept.copy_(states)


def settle(places: Places, policy: Policy, rows: int, length: int) -> None:
    """Decide what stands of the draft, write it down and move on: `Places.report` says what happened."""
    steps = places.steps[:length]
    active, emitted, drafted = places.active[:rows], places.emitted[:rows], places.read(rows, length)[:, 1:]
    position = emitted.unsqueeze(1) + steps
    has_teacher = places.sizes.teacher
    verified, count = verify_once(
        policy,
        drafted,
        places.student_rows(rows, length if has_teacher else 1).flatten(0, 1),
        places.teacher_rows(rows, length).flatten(0, 1) if has_teacher else None,
        position,
        None if places.state is None else places.state[:rows],
        RoundNoise(places.keys[:rows], position),
        torch.arange(rows * length, device=drafted.device).view(rows, length),
    )
    count = torch.minimum(count, places.limit - emitted)
    is_end = (verified.tokens.unsqueeze(-1) == places.ends).any(-1) & (steps < count.unsqueeze(1))
    # Tokens before the first that ends the text; an end that is emitted is the last token.
    before_end = (~is_end).cumprod(-1).sum(-1)
    count = torch.minimum(count, before_end + 1)
    has_ended = before_end < count
    count = torch.where(active, count, 0)
    stands = steps < count.unsqueeze(1)
    column = torch.where(stands, position, places.sizes.width)
    for written, value in (
        (places.tokens, verified.tokens),
        (places.drafted, drafted),
        (places.author, verified.author),
        (places.divergence, verified.divergence),
        (places.threshold, verified.threshold),
    ):
        written[:rows].scatter_(1, column, value.to(written.dtype))
    states = places.states(rows, length)
    if places.hidden is not None and states is not None:
        place = torch.arange(rows, device=column.device).unsqueeze(1).expand(-1, length)
        places.hidden.index_put_((place, column), states)
    if places.state is not None:
        after = torch.stack([state for state in verified.states if state is not None])
        places.state[:rows] = after[count, torch.arange(rows, device=count.device)]
    newest = verified.tokens.gather(1, (count - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    places.last[:rows] = torch.where(count > 0, newest, places.last[:rows])
    emitted += count
    active &= ~has_ended & (emitted < places.limit)
    places.report[:rows] = torch.stack([count, verified.kept, active.to(torch.int64)], dim=1)
