"""From two distributions to a token: one position at a time, and a whole draft at once."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from switchkd import sampling
from switchkd.chunks import rows_at_once
from switchkd.policies import Policy, Positions
from switchkd.rollout import Author
from switchkd.sampling import Stream


@dataclass
class Written:
    """What one position of N rows became."""

    tokens: Tensor
    kept: Tensor
    author: Tensor
    divergence: Tensor
    threshold: Tensor
    state: Tensor | None


def write(
    policy: Policy,
    student_log_probs: Tensor,
    teacher_log_probs: Tensor | None,
    drafted: Tensor,
    position: Tensor,
    state: Tensor | None,
    seed: int,
    row_ids: Tensor,
) -> Written:
    """Return the tokens the policy's behaviour distribution writes at one position of N rows.

    Args:
        policy: Who writes.
        student_log_probs: `[N, V]`.
        teacher_log_probs: `[N, V]`, or None for a policy that needs no teacher.
        drafted: The student's draft, int64 `[N]`.
        position: Completion positions, int64 `[N]`.
        state: The policy's state `[N, ...]` or None.
        seed: Seed of the randomness.
        row_ids: int64 `[N]`.
    """
    if teacher_log_probs is None:
        measure = torch.full(drafted.shape, math.nan, device=drafted.device)
    else:
        measure = policy.measure(student_log_probs, teacher_log_probs, drafted)
    noise = None
    if policy.random:
        noise = sampling.uniform(sampling.noise_keys(seed, row_ids, position, Stream.POLICY))
    decision = policy.decide(Positions(measure, position, state, noise))
    tokens, author = drafted.clone(), decision.author.clone()
    kept = torch.ones_like(drafted, dtype=torch.bool)
    by_teacher = (author == Author.TEACHER).nonzero().squeeze(-1)
    if len(by_teacher):
        assert teacher_log_probs is not None  # only a policy that needs the teacher gives it positions
        student_rows = student_log_probs[by_teacher]
        behaviour = policy.behaviour(student_rows, teacher_log_probs[by_teacher])
        residual_keys = sampling.noise_keys(seed, row_ids[by_teacher], position[by_teacher], Stream.RESIDUAL)
        if policy.redraws:
            tokens[by_teacher] = sampling.exponential_race(behaviour, residual_keys)
            kept[by_teacher] = tokens[by_teacher] == drafted[by_teacher]
        else:
            accept_keys = sampling.noise_keys(seed, row_ids[by_teacher], position[by_teacher], Stream.ACCEPT)
            tokens[by_teacher], kept[by_teacher] = sampling.coupled_draw(
                drafted[by_teacher], student_rows, behaviour, accept_keys, residual_keys
            )
        if policy.blends:
            author[by_teacher] = torch.where(kept[by_teacher], int(Author.STUDENT), int(Author.TEACHER)).to(torch.uint8)
    return Written(tokens, kept, author, measure, decision.threshold, decision.state)


class Noise(Protocol):
    """The noise of some cells, one for each row and position: a `NoiseTable`, or what a round makes of its rows."""

    def keys(self, stream: Stream, index: Tensor) -> Tensor:
        """Return `noise_keys` of cells, in the shape of `index`."""
        ...

    def log_accept(self, index: Tensor) -> Tensor:
        """Return ln u of the uniform number that decides whether a draft is kept, float64, shaped as `index`."""
        ...


@dataclass
class Verified:
    """What became of a draft of G tokens in A rows; entries after the first replaced token are meaningless."""

    tokens: Tensor  # [A, G]
    kept: Tensor  # [A], drafted tokens accepted before the first replaced one
    author: Tensor  # [A, G]
    divergence: Tensor  # [A, G]
    threshold: Tensor  # [A, G]
    states: list[Tensor | None]  # the policy's state before position 0, 1, ..., G


def verify(
    policy: Policy,
    drafted: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor | None,
    position: Tensor,
    state: Tensor | None,
    noise: Noise,
    cells: Tensor,
) -> Verified:
    """Return which drafted tokens are accepted and what replaces the first one that is not.

    Args:
        policy: Who writes.
        drafted: The student's draft, int64 `[A, G]`.
        student_rows: Log-probabilities `[A * G, V]`.
        teacher_rows: Log-probabilities `[A * G, V]`; None for a policy that needs no teacher.
        position: Completion position of each drafted token, int64 `[A, G]`.
        state: The policy's state `[A, ...]` or None.
        noise: The rollout's noise.
        cells: The cell of each drafted token in it, int64 `[A, G]`.
    """
    judged, accepted = _judged(policy, drafted, student_rows, teacher_rows, position, state, noise, cells)
    if teacher_rows is None:
        return judged
    length, flat = drafted.shape[1], drafted.flatten()
    tokens, first = drafted.clone(), judged.kept
    # One pass is nearly always enough. But a replacement can be the drafted token itself (drawn anew, or nothing left
    # to draw from): then the draft is accepted there, and the row goes on to its next doubtful token.
    while len(hit := (first < length).nonzero().squeeze(-1)):
        at = hit * length + first[hit]
        replaced = [
            _replacement(
                policy,
                student_rows[part],
                teacher_rows[part],
                flat[part],
                noise.keys(Stream.RESIDUAL, cells.view(-1)[part]),
            )
            for part in at.split(rows_at_once(student_rows))
        ]
        tokens.view(-1)[at] = torch.cat([token for token, _ in replaced])
        is_draft = torch.cat([same for _, same in replaced])
        if not bool(is_draft.any()):
            break
        accepted.view(-1)[at[is_draft]] = True
        first = accepted.cumprod(-1).sum(-1)
    return replace(judged, tokens=tokens, kept=first, author=_authors(policy, judged.author, accepted))


def verify_once(
    policy: Policy,
    drafted: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor | None,
    position: Tensor,
    state: Tensor | None,
    noise: Noise,
    cells: Tensor,
) -> tuple[Verified, Tensor]:
    """Return what `verify` does and how many tokens of each row stand, int64 `[A]`, asking nothing of the device.

    Every shape is known beforehand: each row draws one replacement, needed or not. Where it is the drafted token
    itself the row stops there all the same, and the next round finds the rest of the draft again: noise and decisions
    depend on the prefix alone. Arguments as in `verify`.
    """
    judged, accepted = _judged(policy, drafted, student_rows, teacher_rows, position, state, noise, cells)
    if teacher_rows is None:
        return judged, judged.kept
    (rows, length), first = drafted.shape, judged.kept
    column = first.clamp(max=length - 1).unsqueeze(-1)
    at = torch.arange(rows, device=drafted.device) * length + column.squeeze(-1)
    keys = noise.keys(Stream.RESIDUAL, cells.reshape(-1)[at])
    at_draft = drafted.gather(1, column).squeeze(1)
    drawn = [
        _replacement(policy, student_rows[part], teacher_rows[part], own, key)
        for part, own, key in zip(
            *(values.split(rows_at_once(student_rows)) for values in (at, at_draft, keys)), strict=True
        )
    ]
    is_replaced = first < length
    token = torch.where(is_replaced, torch.cat([token for token, _ in drawn]), at_draft)
    is_draft = ~is_replaced | torch.cat([same for _, same in drawn])
    accepted = accepted.scatter(1, column, is_draft.unsqueeze(1))
    verified = replace(
        judged,
        tokens=drafted.scatter(1, column, token.unsqueeze(1)),
        kept=first + (is_replaced & is_draft),
        author=_authors(policy, judged.author, accepted),
    )
    return verified, (first + 1).clamp(max=length)


def _judged(
    policy: Policy,
    drafted: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor | None,
    position: Tensor,
    state: Tensor | None,
    noise: Noise,
    cells: Tensor,
) -> tuple[Verified, Tensor]:
    """What is known of a draft before anything is replaced, and which tokens are accepted, bool `[A, G]`."""
    rows, length = drafted.shape
    flat = drafted.flatten()
    if teacher_rows is None:
        measure = torch.full((rows, length), math.nan, device=drafted.device)
    else:
        measure = policy.measure(student_rows, teacher_rows, flat).view(rows, length)
    drawn = sampling.uniform(noise.keys(Stream.POLICY, cells)) if policy.random else None
    author, threshold, states = _decided(policy, measure, position, state, drawn)
    if teacher_rows is None:
        # No position is the teacher's: the whole draft is accepted.
        whole = torch.full_like(drafted[:, 0], length)
        return Verified(drafted, whole, author, measure, threshold, states), torch.ones_like(drafted, dtype=torch.bool)
    by_student = author != Author.TEACHER
    if policy.redraws:
        accepted = by_student
    else:
        behaviour = policy.behaviour(student_rows, teacher_rows)
        chosen = flat.unsqueeze(-1)
        accepted = by_student | sampling.accept_at(
            student_rows.gather(-1, chosen).view(rows, length),
            behaviour.gather(-1, chosen).view(rows, length),
            noise.log_accept(cells),
        )
    # How many tokens are accepted before the first that is not.
    first = accepted.cumprod(-1).sum(-1)
    return Verified(drafted, first, author, measure, threshold, states), accepted


def _authors(policy: Policy, author: Tensor, accepted: Tensor) -> Tensor:
    """The authors, uint8 `[A, G]`; where mu mixes the two they follow from what became of the draft."""
    if not policy.blends:
        return author
    return torch.where(accepted, int(Author.STUDENT), int(Author.TEACHER)).to(torch.uint8)


def _decided(
    policy: Policy, measure: Tensor, position: Tensor, state: Tensor | None, drawn: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The author and threshold of every position `[A, G]` and the policy's state before and after each."""
    if not policy.stateful:
        uniform = None if drawn is None else drawn.flatten()
        decision = policy.decide(Positions(measure.flatten(), position.flatten(), None, uniform))
        return decision.author.view(measure.shape), decision.threshold.view(measure.shape), [state]
    decisions, states = [], [state]
    for column in range(measure.shape[1]):
        uniform = None if drawn is None else drawn[:, column]
        decision = policy.decide(Positions(measure[:, column], position[:, column], states[-1], uniform))
        decisions.append(decision)
        states.append(decision.state)
    author = torch.stack([decision.author for decision in decisions], dim=1)
    return author, torch.stack([decision.threshold for decision in decisions], dim=1), states


def _replacement(
    policy: Policy, student_rows: Tensor, teacher_rows: Tensor, drafted: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens `[N]` at positions where the draft was not accepted, and where they are the draft after all."""
    behaviour = policy.behaviour(student_rows, teacher_rows)
    if policy.redraws:
        tokens = sampling.exponential_race(behaviour, keys)
        return tokens, tokens == drafted
    # Where the two agree up to rounding nothing is left to draw from: the draft is kept.
    tokens, empty = sampling.residual_draw(student_rows, behaviour, keys)
    return torch.where(empty, drafted, tokens), empty
