"""Drafting and verifying with static shapes: what `block` does, ready for CUDA graphs and with no host in a round.

A round is three functions (`rounds`): the student's whole draft, the teacher's check, the decisions. On CUDA each is
one graph, captured when a combination of sizes comes first and replayed from then on; on CPU they are called as they
are. The host decides between rounds: which rows sit where, how long the next draft is, how much of the caches it reads.
It learns what happened from one small copy a round.

What graphs need to stay where it is (caches, results in progress) is a `Session`, kept for the pair of models, so that
the next rollout captures nothing.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from switchkd import sampling
from switchkd.engine.draft_length import Clock, DraftLength
from switchkd.engine.lean import lean_decoder
from switchkd.engine.readers import prefill
from switchkd.engine.request import Request
from switchkd.engine.rounds import STREAMS, Sizes
from switchkd.engine.session import Session
from switchkd.fusing import fusing
from switchkd.models.forward import device_of
from switchkd.models.known import known
from switchkd.rollout import Author, Rollout

# Lengths of drafts that "auto" chooses from: each is captured on its own.
LENGTHS = (1, 2, 3, 4, 6, 8)
# Tokens that a student alone writes before the host looks at them.
ROUND_ALONE, ROUND_ALONE_WITH_END = 16, 4
# Queries see at least so many slots of a cache, then twice as many, and so on.
LEAST_SLOTS = 64
# Waiting prompts are read together once this share of the places is free.
ADMITTED_SHARE = 1 / 8


def unserved_static(request: Request) -> str | None:
    """Return why the static decoder cannot write a rollout whose models are read row by row, or None where it can."""
    for role, model, _ in request.readers():
        if not known(model).lean or lean_decoder(model, 8, live=True) is None:
            return f"the {role}, a {type(model).__name__}, is read through its own forward"
        if device_of(model) != request.row_ids.device:
            return f"the {role} lies on {device_of(model)}, the student on {request.row_ids.device}"
    return None


class StaticDecoder:
    """One rollout by drafting and verifying with static shapes; `run` writes every row and returns the rollout.

    Args:
        request: What is to be written; `unserved_static` has no objection.
        draft_length: The chooser of draft lengths.
        max_active_rows: How many rows are decoded at once, all if None; the others wait for a free place.
    """

    def __init__(self, request: Request, draft_length: DraftLength, max_active_rows: int | None = None) -> None:
        self.request, self.draft_length, self.limit = request, draft_length, request.max_new_tokens
        self.device, self.rows = request.row_ids.device, len(request)
        self.width = min(max_active_rows or self.rows, self.rows)
        self.prompts = request.prompts.rows()
        self.teacher_prompts = self.prompts if request.teacher_prompts is None else request.teacher_prompts.rows()
        self.emitted = [0] * self.rows
        self.active: list[int] = []  # place i holds row active[i]
        self.waiting = list(range(self.rows))
        if request.teacher is None:
            self.longest = ROUND_ALONE_WITH_END if request.eos else ROUND_ALONE
        else:
            self.longest = draft_length.fixed or LENGTHS[-1]
        self.session = Session.of(request, self._sizes())
        self.places = self.session.places
        # What noise knows of every row, a column for each stream.
        self._keys = torch.stack(
            [sampling.row_keys(request.seed, request.row_ids, stream) for stream in STREAMS], dim=-1
        )
        shape = (self.rows, self.limit)
        self.columns: dict[str, Tensor] = {
            "tokens": torch.full(shape, request.pad_token_id, dtype=torch.int64, device=self.device),
            "author": torch.full(shape, int(Author.NONE), dtype=torch.uint8, device=self.device),
            "divergence": torch.full(shape, math.nan, device=self.device),
            "threshold": torch.full(shape, math.nan, device=self.device),
        }
        if request.return_drafted_ids:
            self.columns["drafted"] = self.columns["tokens"].clone()
        if self.places.hidden is not None:
            self.columns["hidden"] = self.places.hidden.new_zeros(*shape, self.session.sizes.hidden)
        counted = dict.fromkeys(("student_passes", "teacher_passes", "drafted", "kept", "rounds"), 0)
        timed = dict.fromkeys(("prefill_s", "student_s", "teacher_s", "verify_s"), 0.0)
        self.stats: dict[str, Any] = {**counted, **timed, "captured": 0}

    def _sizes(self) -> Sizes:
        request, longest = self.request, self.longest
        teacher: Any = request.teacher

        def slots(prompts: list[list[int]]) -> int:
            # A draft may run past the end of its row, at most by its own length.
            return _bucket(max(map(len, prompts)) + self.limit + longest, LEAST_SLOTS)

        states = request.return_teacher_hidden and teacher is not None
        return Sizes(
            rows=_bucket(self.width, 1),
            slots=slots(self.prompts),
            teacher_slots=0 if teacher is None else slots(self.teacher_prompts),
            width=_bucket(self.limit, LEAST_SLOTS),
            length=longest,
            vocabulary=request.warping.vocabulary_size,
            ends=len(request.eos),
            hidden=teacher.get_output_embeddings().weight.shape[-1] if states else 0,
            teacher=teacher is not None,
        )

    def run(self) -> Rollout:
        """Write every row and return the rollout."""
        captured = len(self.session.captures)
        with fusing(self.device.type == "cuda"):
            while self.active or self.waiting:
                self._admit()
                self._round()
        self.stats["captured"] = len(self.session.captures) - captured
        return self._rollout()

    # ---- rows come and go

    def _admit(self) -> None:
        """Give waiting prompts the free places and read all of each prompt but its last token."""
        first = len(self.active)
        free = min(self.width - first, len(self.waiting))
        if not free or (self.active and free < min(len(self.waiting), self.width * ADMITTED_SHARE)):
            return
        started = time.perf_counter()
        joining, places = self.waiting[:free], self.places
        del self.waiting[:free]
        pad, at = self.request.pad_token_id, slice(first, first + free)
        prompts, teacher_prompts = ([every[row] for row in joining] for every in (self.prompts, self.teacher_prompts))
        self.stats["student_passes"] += prefill(self.session.student, prompts, first, pad)
        if self.session.teacher is not None:
            self.stats["teacher_passes"] += prefill(self.session.teacher, teacher_prompts, first, pad)
        for column, values in (
            (places.student_start, [len(prompt) - 1 for prompt in prompts]),
            (places.last, [prompt[-1] for prompt in prompts]),
            (places.teacher_start, [len(prompt) - 1 for prompt in teacher_prompts]),
            (places.teacher_last, [prompt[-1] for prompt in teacher_prompts]),
        ):
            column[at] = torch.tensor(values, device=self.device)
        places.keys[at] = self._keys[torch.tensor(joining, device=self.device)]
        places.emitted[at] = 0
        places.active[at] = True
        if places.state is not None:
            fresh = self.request.policy.initial_state(free, self.device)
            assert fresh is not None
            places.state[at] = fresh
        self.active += joining
        self.stats["prefill_s"] += time.perf_counter() - started

    def _release(self, ended: list[int]) -> None:
        """Take the texts of ended rows; the last active rows move to their places."""
        places, at = self.places, torch.tensor(ended, device=self.device)
        rows = torch.tensor([self.active[place] for place in ended], device=self.device)
        for name, column in self.columns.items():
            column[rows] = getattr(places, name)[at, : self.limit].to(column.dtype)
        for place in reversed(ended):
            self.draft_length.forget(self.active[place])
            last = len(self.active) - 1
            if place != last:
                row = self.active[last]
                self.session.student.move(last, place, len(self.prompts[row]) + self.emitted[row] - 1)
                if self.session.teacher is not None:
                    self.session.teacher.move(last, place, len(self.teacher_prompts[row]) + self.emitted[row] - 1)
                for tensor in (*places.described(), *places.moved()):
                    tensor[place] = tensor[last]
                self.active[place] = row
            places.active[last] = False
            self.active.pop()

    # ---- one round

    def _length(self) -> int:
        """How many tokens the next draft has: of the lengths that are captured, the longest not above the wanted."""
        if self.session.teacher is None or self.draft_length.fixed is not None:
            return self.longest
        wanted = self.draft_length.next(self.active, self.longest)
        return max(length for length in LENGTHS if length <= wanted)

    def _shown(self, prompts: list[list[int]], length: int, slots: int) -> int:
        """How many slots of a cache the next pass is shown: every active row's text and draft."""
        longest = max(len(prompts[row]) + self.emitted[row] for row in self.active)
        return min(_bucket(longest - 1 + length, LEAST_SLOTS), slots)

    def _round(self) -> None:
        session, sizes, count = self.session, self.session.sizes, len(self.active)
        rows, length = min(_bucket(count, 1), sizes.rows), self._length()
        shown = self._shown(self.prompts, length, sizes.slots)
        teacher_shown = 0
        if session.teacher is not None:
            teacher_shown = self._shown(self.teacher_prompts, length, sizes.teacher_slots)
        draft, check, settle = session.functions(rows, length, shown, teacher_shown)
        clock = Clock(self.device)
        clock.mark()
        draft()
        clock.mark()
        if check is not None:
            check()
        clock.mark()
        settle()
        session.report[:rows].copy_(self.places.report[:rows], non_blocking=True)
        clock.mark()
        student_s, teacher_s, verify_s = clock.seconds()  # on CUDA this waits for the report
        happened, ended = session.report[:count].tolist(), []
        for place, (emitted, kept, goes_on) in enumerate(happened):
            self.emitted[self.active[place]] += emitted
            # Of the kept tokens those after the end were never emitted; they say nothing about acceptance.
            self.stats["kept"] += min(kept, emitted)
            if not goes_on:
                ended.append(place)
        if check is not None:
            accepted = [kept for _, kept, _ in happened]
            self.draft_length.observe(self.active, accepted, length, student_s, teacher_s + verify_s)
            self.stats["teacher_passes"] += 1
        self.stats["student_passes"] += length
        self.stats["drafted"] += length * count
        self.stats["rounds"] += 1
        for name, seconds in (("student_s", student_s), ("teacher_s", teacher_s), ("verify_s", verify_s)):
            self.stats[name] += seconds
        if ended:
            self._release(ended)

    def _rollout(self) -> Rollout:
        longest = max(self.emitted)
        emitted = torch.tensor(self.emitted, device=self.device).unsqueeze(1)
        mask = torch.arange(longest, device=self.device) < emitted

        def column(name: str, fill: float) -> Tensor:
            values = self.columns[name][:, :longest]
            return values.masked_fill(~mask.view(*mask.shape, *[1] * (values.dim() - 2)), fill)

        return Rollout(
            prompt_ids=self.request.prompts.ids,
            prompt_mask=self.request.prompts.mask,
            completion_ids=column("tokens", self.request.pad_token_id),
            completion_mask=mask,
            author=column("author", int(Author.NONE)),
            divergence=column("divergence", math.nan),
            threshold=column("threshold", math.nan),
            teacher_hidden=column("hidden", 0.0) if "hidden" in self.columns else None,
            drafted_ids=column("drafted", self.request.pad_token_id) if "drafted" in self.columns else None,
            measured=self.request.policy.measured,
            stats=self.stats,
        )


def _bucket(count: int, least: int) -> int:
    """The smallest power of two that is not below a count and a least value."""
    return 1 << (max(count, least) - 1).bit_length()
