"""Block-verified decoding: the student drafts, the teacher checks the whole draft in one pass.

It is the algorithm of `sequential.decode_sequentially`, only faster: decisions depend on the prefix alone, the
randomness on (seed, row id, position) alone, and a draft stands exactly as far as the sequential algorithm would have
written the same tokens.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from switchkd import sampling
from switchkd.cache import RowReader
from switchkd.drafting import DraftLength
from switchkd.policies import Policy
from switchkd.rollout import Rollout
from switchkd.sampling import Stream
from switchkd.verification import Verified, verify


@dataclass
class _Pool:
    """All rows of a rollout: waiting, active (cache row i holds pool row `active[i]`) and finished ones."""

    prompts: list[list[int]]
    teacher_prompts: list[list[int]] | None
    row_ids: Tensor
    ids: Tensor  # [B, C]
    author: Tensor
    divergence: Tensor
    threshold: Tensor
    emitted: list[int]
    last: list[int]  # the last committed token of each row: the next pass reads it first
    hidden: Tensor | None = None
    active: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)


class BlockDecoder:
    """One rollout by drafting and verifying; `run` writes every row and returns the record.

    Args:
        student: Model that drafts.
        teacher: Model that checks, or None for a policy that needs no teacher.
        prompts: Left-padded `(ids, mask)` `[B, P]` for the student.
        teacher_prompts: Likewise for the teacher.
        policy: Who writes.
        warping: Logits `[..., V']` to log-probabilities `[..., V]`.
        max_new_tokens: Length limit of a completion.
        seed: Seed of the counter-based randomness.
        row_ids: int64 `[B]`.
        eos: End-of-sequence ids.
        pad_token_id: Fills completions after their end.
        draft_length: The chooser of draft lengths.
        max_active_rows: How many rows are decoded at once; the others wait for a free place.
        return_teacher_hidden: Keep the teacher's state of every emitted token.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        prompts: tuple[Tensor, Tensor],
        teacher_prompts: tuple[Tensor, Tensor] | None,
        policy: Policy,
        warping: Callable[[Tensor], Tensor],
        max_new_tokens: int,
        seed: int,
        row_ids: Tensor,
        eos: list[int],
        pad_token_id: int,
        draft_length: DraftLength,
        max_active_rows: int | None = None,
        return_teacher_hidden: bool = False,
    ) -> None:
        self.policy, self.warping, self.seed = policy, warping, seed
        self.limit, self.pad, self.draft_length = max_new_tokens, pad_token_id, draft_length
        self.prompts = prompts
        self.device = row_ids.device
        self.eos = torch.tensor(eos, dtype=torch.int64, device=self.device)
        rows = len(row_ids)
        width = min(max_active_rows or rows, rows)
        longest = prompts[0].shape[1] + max_new_tokens
        self.student = RowReader(student, width, longest)
        self.teacher: RowReader | None = None
        if teacher is not None and teacher_prompts is not None:
            self.teacher = RowReader(
                teacher, width, teacher_prompts[0].shape[1] + max_new_tokens, keep_hidden=return_teacher_hidden
            )
        shape = (rows, max_new_tokens)
        self.pool = _Pool(
            prompts=_unpadded(*prompts),
            teacher_prompts=_unpadded(*teacher_prompts) if self.teacher and teacher_prompts else None,
            row_ids=row_ids,
            ids=torch.full(shape, pad_token_id, dtype=torch.int64, device=self.device),
            author=torch.zeros(shape, dtype=torch.uint8, device=self.device),
            divergence=torch.full(shape, math.nan, device=self.device),
            threshold=torch.full(shape, math.nan, device=self.device),
            emitted=[0] * rows,
            last=[0] * rows,
            waiting=list(range(rows)),
        )
        self.width = width
        self.state = policy.initial_state(width, self.device)
        self.keep_hidden = return_teacher_hidden
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
        while self.pool.active or self.pool.waiting:
            self._admit()
            if self.teacher is None:
                self._student_round()
            else:
                self._round()
        return self._record()

    # ---- rows come and go

    def _admit(self) -> None:
        """Give waiting prompts the free places and read all of each prompt but its last token."""
        pool = self.pool
        free = self.width - len(pool.active)
        if not free or not pool.waiting:
            return
        started = time.perf_counter()
        first, joining = len(pool.active), pool.waiting[:free]
        del pool.waiting[:free]
        _prefill(self.student, [pool.prompts[row] for row in joining], first, self.pad)
        if self.teacher is not None and pool.teacher_prompts is not None:
            _prefill(self.teacher, [pool.teacher_prompts[row] for row in joining], first, self.pad)
        for row in joining:
            pool.last[row] = pool.prompts[row][-1]
        pool.active += joining
        if self.state is not None:
            fresh = self.policy.initial_state(len(joining), self.device)
            assert fresh is not None
            self.state[first : first + len(joining)] = fresh
        self.stats["prefill_s"] += time.perf_counter() - started

    def _release(self, place: int) -> None:
        """Drop a finished row: the last active row takes its place."""
        pool = self.pool
        last = len(pool.active) - 1
        self.draft_length.forget(pool.active[place])
        if place != last:
            row = pool.active[last]
            self.student.cache.move(last, place, self._start(row, pool.prompts))
            if self.teacher is not None and pool.teacher_prompts is not None:
                self.teacher.cache.move(last, place, self._start(row, pool.teacher_prompts))
            if self.state is not None:
                self.state[place] = self.state[last]
            pool.active[place] = row
        pool.active.pop()

    def _start(self, row: int, prompts: list[list[int]]) -> int:
        """The position of the row's last committed token: the first one its caches do not hold."""
        return len(prompts[row]) + self.pool.emitted[row] - 1

    # ---- one round

    def _draft(self, rows: list[int], index: Tensor, length: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The last committed token and the draft `[A, 1 + G]`, its positions `[A, G]`, the log-probs of each step.

        `rows` are the active pool rows, `index` the same on the device.
        """
        pool = self.pool
        start = [self._start(row, pool.prompts) for row in rows]
        emitted = torch.tensor([pool.emitted[row] for row in rows], device=self.device).unsqueeze(1)
        position = emitted + torch.arange(length, device=self.device)
        row_ids = pool.row_ids[index]
        keys = sampling.noise_keys(self.seed, row_ids.unsqueeze(1).expand(-1, length), position, Stream.DRAFT)
        starts = torch.tensor(start, device=self.device).unsqueeze(1)
        current = torch.tensor([pool.last[row] for row in rows], device=self.device).unsqueeze(1)
        read, log_probs = [current], []
        for step in range(length):
            logits = self.student.read(current, [one + step for one in start], positions=starts + step, logits="last")
            log_probs.append(self.warping(logits[:, -1]))
            current = sampling.exponential_race(log_probs[-1], keys[:, step]).unsqueeze(1)
            read.append(current)
        self.stats["drafted"] += length * len(rows)
        return torch.cat(read, dim=1), position, log_probs

    def _round(self) -> None:
        pool = self.pool
        assert self.teacher is not None and pool.teacher_prompts is not None
        rows = list(pool.active)
        longest = max(self.limit - pool.emitted[row] for row in rows)
        length = self.draft_length.next(rows, longest)
        started = time.perf_counter()
        index = torch.tensor(rows, device=self.device)
        tokens, position, student_log_probs = self._draft(rows, index, length)
        drafted_at = time.perf_counter()
        teacher_start = [self._start(row, pool.teacher_prompts) for row in rows]
        read = tokens[:, :-1]
        fresh = [place for place, row in enumerate(rows) if pool.emitted[row] == 0]
        if fresh:
            # The first token read is the prompt's last, and the teacher's prompt may be another.
            read = read.clone()
            read[fresh, 0] = torch.tensor(
                [pool.teacher_prompts[rows[place]][-1] for place in fresh], device=read.device
            )
        logits = self.teacher.read(read.to(self.teacher.device), teacher_start).to(self.device)
        taught_at = time.perf_counter()
        verified = verify(
            self.policy,
            tokens[:, 1:],
            torch.stack(student_log_probs, dim=1),
            self.warping(logits),
            position,
            None if self.state is None else self.state[: len(rows)],
            self.seed,
            pool.row_ids[index],
        )
        count, kept, last = self._commit(index, verified, position)
        finished = time.perf_counter()
        self.draft_length.observe(rows, kept, length, drafted_at - started, finished - drafted_at)
        self.stats["student_s"] += drafted_at - started
        self.stats["teacher_s"] += taught_at - drafted_at
        self.stats["verify_s"] += finished - taught_at
        self._advance(rows, count, last)

    def _student_round(self) -> None:
        """One token of the student alone in every row."""
        started = time.perf_counter()
        rows = list(self.pool.active)
        index = torch.tensor(rows, device=self.device)
        tokens, position, _ = self._draft(rows, index, 1)
        nothing = torch.full(position.shape, math.nan, device=self.device)
        decision, _ = self.policy.decide(nothing[:, 0], position[:, 0], None)
        one = torch.ones(len(rows), dtype=torch.int64, device=self.device)
        verified = Verified(
            tokens=tokens[:, 1:],
            kept=one,
            count=one,
            author=decision.author.unsqueeze(1),
            divergence=nothing,
            threshold=decision.threshold.unsqueeze(1),
            states=[],
        )
        count, _, last = self._commit(index, verified, position)
        self.stats["student_s"] += time.perf_counter() - started
        self._advance(rows, count, last)

    def _commit(
        self, index: Tensor, verified: Verified, position: Tensor
    ) -> tuple[list[int], list[int], list[tuple[int, bool]]]:
        """Write what was emitted into the record; one transfer brings back what the host must know."""
        pool, length = self.pool, position.shape[1]
        places = torch.arange(length, device=self.device)
        count = torch.minimum(verified.count, self.limit - position[:, 0])
        ends = torch.isin(verified.tokens, self.eos) & (places < count.unsqueeze(1))
        ended = ends.any(-1)
        count = torch.where(ended, ends.to(torch.uint8).argmax(-1) + 1, count)
        emitted = places < count.unsqueeze(1)
        at = (index.unsqueeze(1).expand(-1, length)[emitted], position[emitted])
        pool.ids[at] = verified.tokens[emitted]
        pool.author[at] = verified.author[emitted]
        pool.divergence[at] = verified.divergence[emitted]
        pool.threshold[at] = verified.threshold[emitted]
        if self.keep_hidden and self.teacher is not None and self.teacher.hidden is not None:
            hidden = self.teacher.hidden
            if pool.hidden is None:
                pool.hidden = hidden.new_zeros((*pool.ids.shape, hidden.shape[-1])).to(self.device)
            pool.hidden[at] = hidden.to(self.device)[emitted]
        if self.state is not None:
            # The state after `count` emitted tokens, row by row.
            after = torch.stack([state for state in verified.states if state is not None])
            self.state[: len(index)] = after[count, torch.arange(len(index), device=self.device)]
        last = verified.tokens.gather(1, count.unsqueeze(1) - 1).squeeze(1)
        counts, kept, tokens, done = torch.stack([count, verified.kept, last, ended.to(torch.int64)]).tolist()
        # Of the kept tokens those after the end were never emitted; they say nothing about acceptance.
        self.stats["kept"] += sum(min(pair) for pair in zip(kept, counts, strict=True))
        self.stats["rounds"] += 1
        return counts, kept, list(zip(tokens, (bool(value) for value in done), strict=True))

    def _advance(self, rows: list[int], count: list[int], last: list[tuple[int, bool]]) -> None:
        pool = self.pool
        finished = []
        for place, row in enumerate(rows):
            pool.emitted[row] += count[place]
            pool.last[row], ended = last[place]
            if ended or pool.emitted[row] >= self.limit:
                finished.append(place)
        for place in reversed(finished):
            self._release(place)

    def _record(self) -> Rollout:
        pool = self.pool
        longest = max(pool.emitted)
        mask = torch.arange(longest, device=self.device) < torch.tensor(pool.emitted, device=self.device).unsqueeze(1)
        return Rollout(
            prompt_ids=self.prompts[0],
            prompt_mask=self.prompts[1],
            completion_ids=pool.ids[:, :longest].clone(),
            completion_mask=mask,
            author=pool.author[:, :longest].clone(),
            divergence=pool.divergence[:, :longest].clone(),
            threshold=pool.threshold[:, :longest].clone(),
            teacher_hidden=None if pool.hidden is None else pool.hidden[:, :longest].clone(),
            stats={
                "student_passes": self.student.passes,
                "teacher_passes": self.teacher.passes if self.teacher is not None else 0,
                **self.stats,
            },
        )


def _prefill(reader: RowReader, prompts: list[list[int]], first: int, pad: int) -> None:
    """Read all of each prompt but its last token into cache rows first, first + 1, ..."""
    longest = max(len(prompt) for prompt in prompts) - 1
    if longest == 0:
        return
    # Padding on the right is harmless: its slots lie beyond the row's position until they are overwritten.
    padded = [prompt[:-1] + [pad] * (longest - len(prompt) + 1) for prompt in prompts]
    tokens = torch.tensor(padded, dtype=torch.int64, device=reader.device)
    reader.read(tokens, [0] * len(prompts), first=first, logits="last")


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
