"""Block-verified decoding: the student drafts, the teacher checks the whole draft in one pass.

It is the algorithm of `sequential.decode_sequentially`, only faster: decisions depend on the prefix alone, the
randomness on (seed, row id, position) alone, and a draft stands exactly as far as the sequential algorithm would have
written the same tokens.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from switchkd import sampling
from switchkd.engine.draft_length import Clock, DraftLength
from switchkd.engine.readable import last_slot
from switchkd.engine.readers import RowReader, prefill, row_reader
from switchkd.engine.request import Request
from switchkd.engine.verification import Verified, verify
from switchkd.rollout import Author, Rollout
from switchkd.sampling import NoiseTable, Stream

# Noise for a whole draft is made at once up to this many numbers; beyond, step by step, to bound memory.
MOST_NOISE = 1 << 20
# Tokens that a student alone writes before the host looks at them.
ROUND_ALONE = 16
ROUND_ALONE_WITH_END = 4


@dataclass
class _Pool:
    """All rows of a rollout: waiting, active (cache row i holds pool row `active[i]`) and finished ones."""

    prompts: list[list[int]]
    teacher_prompts: list[list[int]] | None
    emitted: list[int]
    last: list[int]  # the last committed token of each row: the next pass reads it first
    hidden: Tensor | None = None  # [B * C, H]
    active: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)


class _Scratch:
    """Memory that every round uses again: at V = 50,257 fresh pages would cost as much as what is written to them."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, device=device)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of that shape; what an earlier one held is lost."""
        size = math.prod(shape)
        if self._memory.numel() < size or self._memory.dtype != dtype:
            self._memory = torch.empty(size, dtype=dtype, device=self._memory.device)
        return self._memory[:size].view(*shape)


@dataclass
class _Draft:
    """What the student wrote in one round."""

    rows: list[int]  # pool rows, A
    tokens: Tensor  # [A, 1 + G]: the last committed token, then the draft
    position: Tensor  # [A, G], completion positions
    cells: Tensor  # [A, G], row * limit + position: cells of the table of noise, and of the finished rollout
    log_probs: Tensor  # [A * G, V]


class BlockDecoder:
    """One rollout by drafting and verifying; `run` writes every row and returns the rollout.

    Args:
        request: What is to be written.
        draft_length: The chooser of draft lengths.
        max_active_rows: How many rows are decoded at once, all if None; the others wait for a free cache row.
    """

    def __init__(self, request: Request, draft_length: DraftLength, max_active_rows: int | None = None) -> None:
        self.request, self.draft_length = request, draft_length
        self.policy, self.warping, self.limit = request.policy, request.warping, request.max_new_tokens
        self.device = request.row_ids.device
        self.eos = frozenset(request.eos)
        self.noise = NoiseTable(request.seed, request.row_ids, self.limit)
        self._steps = torch.arange(self.limit, device=self.device)
        rows = len(request)
        self.width = min(max_active_rows or rows, rows)
        longest = request.prompts.width + self.limit
        self.student = row_reader(request.student, self.width, longest)
        self.teacher: RowReader | None = None
        teacher, teacher_prompts = request.teacher, request.teacher_prompts
        if teacher is not None and teacher_prompts is not None:
            longest_teacher = teacher_prompts.width + self.limit
            self.teacher = row_reader(teacher, self.width, longest_teacher, keep_hidden=request.return_teacher_hidden)
            # A draft may run past the end of its row. A model's own forward can fail beyond its context, or read the
            # other rows differently beyond a window.
            self._student_slots = None if self.student.lean else last_slot(request.student, longest)
            self._teacher_slots = None if self.teacher.lean else last_slot(teacher, longest_teacher)
        self.pool = _Pool(
            prompts=request.prompts.rows(),
            teacher_prompts=None if teacher_prompts is None else teacher_prompts.rows(),
            emitted=[0] * rows,
            last=[0] * rows,
            waiting=list(range(rows)),
        )
        self.state = self.policy.initial_state(self.width, self.device)
        self._student_scratch, self._teacher_scratch = _Scratch(self.device), _Scratch(self.device)
        # What each round wrote, and how many tokens of it were emitted in each of its rows.
        self._notes: list[tuple[Tensor, Verified]] = []
        self._counts: list[int] = []
        self._drafts: list[Tensor] = []  # of each round, if they are to be returned
        self.stats: dict[str, Any] = {
            "drafted": 0,
            "kept": 0,
            "rounds": 0,
            "prefill_s": 0.0,
            "student_s": 0.0,
            "teacher_s": 0.0,
            "verify_s": 0.0,
        }

    def run(self) -> Rollout:
        """Write every row and return the rollout."""
        # Without version counters and views to track every call is cheaper. A model's own forward may keep tensors
        # that training reads later, so it never runs so.
        lean = self.student.lean and (self.teacher is None or self.teacher.lean)
        with torch.inference_mode() if lean else torch.no_grad():
            while self.pool.active or self.pool.waiting:
                self._admit()
                if self.teacher is None:
                    self._student_round()
                else:
                    self._round()
        return self._rollout()

    # ---- rows come and go

    def _admit(self) -> None:
        """Give waiting prompts the free cache rows and read all of each prompt but its last token."""
        pool = self.pool
        free = self.width - len(pool.active)
        if not free or not pool.waiting:
            return
        started = time.perf_counter()
        first, joining = len(pool.active), pool.waiting[:free]
        del pool.waiting[:free]
        prefill(self.student, [pool.prompts[row] for row in joining], first, self.request.pad_token_id)
        if self.teacher is not None and pool.teacher_prompts is not None:
            prefill(self.teacher, [pool.teacher_prompts[row] for row in joining], first, self.request.pad_token_id)
        for row in joining:
            pool.last[row] = pool.prompts[row][-1]
        pool.active += joining
        if self.state is not None:
            fresh = self.policy.initial_state(len(joining), self.device)
            assert fresh is not None
            self.state[first : first + len(joining)] = fresh
        self.stats["prefill_s"] += time.perf_counter() - started

    def _release(self, cache_row: int) -> None:
        """Drop a finished row: the last active row moves to its cache row."""
        pool = self.pool
        last = len(pool.active) - 1
        self.draft_length.forget(pool.active[cache_row])
        if cache_row != last:
            row = pool.active[last]
            self.student.move(last, cache_row, self._start(row, pool.prompts))
            if self.teacher is not None and pool.teacher_prompts is not None:
                self.teacher.move(last, cache_row, self._start(row, pool.teacher_prompts))
            if self.state is not None:
                self.state[cache_row] = self.state[last]
            pool.active[cache_row] = row
        pool.active.pop()

    def _start(self, row: int, prompts: list[list[int]]) -> int:
        """The position of the row's last committed token: the first one its caches do not hold."""
        return len(prompts[row]) + self.pool.emitted[row] - 1

    # ---- one round

    def _draft(self, length: int) -> _Draft:
        """Let the student write `length` tokens in every active row."""
        pool, rows = self.pool, list(self.pool.active)
        start = [self._start(row, pool.prompts) for row in rows]
        emitted, last = [pool.emitted[row] for row in rows], [pool.last[row] for row in rows]
        # One transfer for four columns [A, 1].
        pool_row, done, starts, current = (
            torch.tensor([rows, emitted, start, last], device=self.device).unsqueeze(-1).unbind(0)
        )
        position = done + self._steps[:length]
        cells = self.noise.index(pool_row, position)
        keys = self.noise.keys(Stream.DRAFT, cells)
        size = self.warping.vocabulary_size
        noise: Tensor | None = None
        if keys.numel() * size <= MOST_NOISE:
            noise = sampling.log_exponential(keys.flatten(), size).view(len(rows), length, size)
        log_probs = self._student_scratch.take((len(rows), length, size), self.student.log_dtype)
        read = [current]
        for step in range(length):
            at = starts + step if step else starts
            logits = self.student.read(current, [one + step for one in start], positions=at, logits="last")
            now = self.warping.into(log_probs[:, step], logits[:, -1])
            if noise is None:
                current = sampling.exponential_race(now, keys[:, step]).unsqueeze(1)
            else:
                current = (now - noise[:, step]).argmax(-1, keepdim=True)
            read.append(current)
        self.stats["drafted"] += length * len(rows)
        return _Draft(rows, torch.cat(read, dim=1), position, cells, log_probs.view(-1, size))

    def _round(self) -> None:
        pool = self.pool
        assert self.teacher is not None and pool.teacher_prompts is not None
        rows = list(pool.active)
        longest = max(self.limit - pool.emitted[row] for row in rows)
        for slots, prompts in (
            (self._student_slots, pool.prompts),
            (self._teacher_slots, pool.teacher_prompts),
        ):
            if slots is not None:
                longest = min(longest, slots - max(self._start(row, prompts) for row in rows))
        length = self.draft_length.next(rows, longest)
        clock = Clock(self.device)
        clock.mark()
        draft = self._draft(length)
        clock.mark()
        teacher_start = [self._start(row, pool.teacher_prompts) for row in rows]
        read = draft.tokens[:, :-1]
        fresh = [cache_row for cache_row, row in enumerate(rows) if pool.emitted[row] == 0]
        if fresh:
            # The first token read is the prompt's last, and the teacher's prompt may be another.
            read = read.clone()
            read[fresh, 0] = torch.tensor(
                [pool.teacher_prompts[rows[cache_row]][-1] for cache_row in fresh], device=read.device
            )
        logits = self.teacher.read(read.to(self.teacher.device), teacher_start).to(self.device)
        clock.mark()
        scratch = self._teacher_scratch.take(draft.log_probs.shape, self.teacher.log_dtype)
        verified = self._verify(draft, self.warping.into(scratch, logits.flatten(0, 1)))
        kept, finished = self._commit(draft, verified)
        clock.mark()
        student_s, teacher_s, verify_s = clock.seconds()
        self.draft_length.observe(rows, kept, length, student_s, teacher_s + verify_s)
        self.stats["student_s"] += student_s
        self.stats["teacher_s"] += teacher_s
        self.stats["verify_s"] += verify_s
        for cache_row in reversed(finished):
            self._release(cache_row)

    def _student_round(self) -> None:
        """Let the student alone write several tokens in every row; the host hears of them once."""
        started = time.perf_counter()
        pool = self.pool
        # A row that ends inside the round reads on for nothing: rounds are short where rows can end.
        room = min(self.limit - pool.emitted[row] for row in pool.active)
        length = min(room, ROUND_ALONE if not self.eos else ROUND_ALONE_WITH_END)
        draft = self._draft(length)
        _, finished = self._commit(draft, self._verify(draft, None))
        self.stats["student_s"] += time.perf_counter() - started
        for cache_row in reversed(finished):
            self._release(cache_row)

    def _verify(self, draft: _Draft, teacher_log_probs: Tensor | None) -> Verified:
        return verify(
            self.policy,
            draft.tokens[:, 1:],
            draft.log_probs,
            teacher_log_probs,
            draft.position,
            None if self.state is None else self.state[: len(draft.rows)],
            self.noise,
            draft.cells,
        )

    def _commit(self, draft: _Draft, verified: Verified) -> tuple[list[int], list[int]]:
        """Note what was emitted; one transfer brings back what the host must know.

        Returns:
            How many drafted tokens were accepted in each row, and the cache rows that are finished.
        """
        pool, length = self.pool, draft.position.shape[1]
        counts, kept, finished = [], [], []
        host = torch.cat([verified.tokens, verified.kept.unsqueeze(1)], dim=1).tolist()
        for cache_row, (row, (*tokens, accepted)) in enumerate(zip(draft.rows, host, strict=True)):
            count = min(accepted + 1, length, self.limit - pool.emitted[row])
            end = next((step for step in range(count) if tokens[step] in self.eos), None)
            if end is not None:
                count = end + 1
            pool.emitted[row] += count
            pool.last[row] = tokens[count - 1]
            if end is not None or pool.emitted[row] >= self.limit:
                finished.append(cache_row)
            counts.append(count)
            kept.append(accepted)
            # Of the kept tokens those after the end were never emitted; they say nothing about acceptance.
            self.stats["kept"] += min(accepted, count)
        self.stats["rounds"] += 1
        self._notes.append((draft.cells, replace(verified, states=[])))
        self._counts += counts
        if self.request.return_drafted_ids:
            self._drafts.append(draft.tokens[:, 1:])
        hidden = self.teacher.hidden if self.request.return_teacher_hidden and self.teacher is not None else None
        if hidden is not None:
            if pool.hidden is None:
                pool.hidden = hidden.new_zeros((len(pool.emitted) * self.limit, hidden.shape[-1])).to(self.device)
            emitted = self._steps[:length] < torch.tensor(counts, device=self.device).unsqueeze(1)
            pool.hidden[draft.cells[emitted]] = hidden.to(self.device)[emitted]
        if self.state is not None:
            # The state after `count` emitted tokens, row by row.
            after = torch.stack([state for state in verified.states if state is not None])
            self.state[: len(counts)] = after[counts, torch.arange(len(counts), device=self.device)]
        return kept, finished

    def _rollout(self) -> Rollout:
        """Put together what the rounds noted, all at once: a few calls instead of a few for every round."""
        pool, rows = self.pool, len(self.pool.emitted)
        longest = max(pool.emitted)
        mask = torch.arange(longest, device=self.device) < torch.tensor(pool.emitted, device=self.device).unsqueeze(1)
        lengths = torch.cat([cells.new_full(cells.shape[:1], cells.shape[1]) for cells, _ in self._notes])
        counts = torch.tensor(self._counts, device=self.device)
        step = torch.cat([self._steps[: cells.shape[1]].repeat(len(cells)) for cells, _ in self._notes])
        emitted = step < counts.repeat_interleave(lengths)
        cell = torch.cat([cells.flatten() for cells, _ in self._notes])[emitted]

        def placed(parts: Sequence[Tensor], fill: float, dtype: torch.dtype) -> Tensor:
            values = torch.cat([part.flatten() for part in parts])[emitted]
            filled = torch.full((rows * self.limit,), fill, dtype=dtype, device=self.device)
            filled[cell] = values.to(dtype)
            return filled.view(rows, self.limit)[:, :longest].clone()

        def column(name: str, fill: float, dtype: torch.dtype) -> Tensor:
            return placed([getattr(verified, name) for _, verified in self._notes], fill, dtype)

        return Rollout(
            prompt_ids=self.request.prompts.ids,
            prompt_mask=self.request.prompts.mask,
            completion_ids=column("tokens", self.request.pad_token_id, torch.int64),
            completion_mask=mask,
            author=column("author", int(Author.NONE), torch.uint8),
            divergence=column("divergence", math.nan, torch.float32),
            threshold=column("threshold", math.nan, torch.float32),
            teacher_hidden=None if pool.hidden is None else pool.hidden.view(rows, self.limit, -1)[:, :longest].clone(),
            drafted_ids=placed(self._drafts, self.request.pad_token_id, torch.int64) if self._drafts else None,
            measured=self.policy.measured,
            stats={
                "student_passes": self.student.passes,
                "teacher_passes": self.teacher.passes if self.teacher is not None else 0,
                **self.stats,
            },
        )
