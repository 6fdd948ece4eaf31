"""From two distributions to a token: one position at a time, and a whole draft at once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switchkd import sampling
from switchkd.chunks import rows_at_once
from switchkd.policies import Policy, Positions
from switchkd.rollout import Author
from switchkd.sampling import NoiseTable, Stream


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
    given = (author == Author.TEACHER).nonzero().squeeze(-1)
    if len(given):
        assert teacher_log_probs is not None  # only a policy that needs the teacher gives it positions
        student_rows = student_log_probs[given]
        behaviour = policy.behaviour(student_rows, teacher_log_probs[given])
        residual_keys = sampling.noise_keys(seed, row_ids[given], position[given], Stream.RESIDUAL)
        if policy.redraws:
            tokens[given] = sampling.exponential_race(behaviour, residual_keys)
            kept[given] = tokens[given] == drafted[given]
        else:
            accept_keys = sampling.noise_keys(seed, row_ids[given], position[given], Stream.ACCEPT)
            tokens[given], kept[given] = sampling.coupled_draw(
                drafted[given], student_rows, behaviour, accept_keys, residual_keys
            )
        if policy.blends:
            author[given] = torch.where(kept[given], int(Author.STUDENT), int(Author.TEACHER)).to(torch.uint8)
    return Written(tokens, kept, author, measure, decision.threshold, decision.state)


@dataclass
class Verified:
    """What became of a draft of G tokens in A rows; entries after the first replaced token are meaningless."""

    tokens: Tensor  # [A, G]
    kept: Tensor  # [A], drafted tokens that stood before the first replaced one
    author: Tensor  # [A, G]
    divergence: Tensor  # [A, G]
    threshold: Tensor  # [A, G]
    states: list[Tensor | None]  # the policy's state before position 0, 1, ..., G


def verify(
    policy: Policy,
    drafted: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    position: Tensor,
    state: Tensor | None,
    noise: NoiseTable,
    index: Tensor,
) -> Verified:
    """Return which drafted tokens stand and what replaces the first one that does not.

    Args:
        policy: Who writes.
        drafted: The student's draft, int64 `[A, G]`.
        student_rows: Log-probabilities `[A * G, V]`.
        teacher_rows: Log-probabilities `[A * G, V]`.
        position: Completion position of each drafted token, int64 `[A, G]`.
        state: The policy's state `[A, ...]` or None.
        noise: The rollout's noise.
        index: The place of each drafted token in it, int64 `[A, G]`.
    """
    rows, length = drafted.shape
    flat = drafted.flatten()
    measure = policy.measure(student_rows, teacher_rows, flat).view(rows, length)
    drawn = sampling.uniform(noise.keys(Stream.POLICY, index)) if policy.random else None
    author, threshold, states = _decided(policy, measure, position, state, drawn)

    given = author == Author.TEACHER
    if policy.redraws:
        stands = ~given
    else:
        behaviour = policy.behaviour(student_rows, teacher_rows) if policy.blends else teacher_rows
        behaviour_at = behaviour.gather(-1, flat.unsqueeze(-1))
        stands = _accepted(student_rows, behaviour_at, flat, noise.log_accept(index)) | ~given
    tokens = drafted.clone()
    while True:
        # How many tokens stand before the first that does not.
        first = stands.cumprod(-1).sum(-1)
        hit = (first < length).nonzero().squeeze(-1)
        if not len(hit):
            break
        at = hit * length + first[hit]
        replaced = [
            _replacement(policy, student_rows[part], teacher_rows[part], flat[part], noise, index.view(-1)[part])
            for part in at.split(rows_at_once(student_rows))
        ]
        tokens.view(-1)[at] = torch.cat([token for token, _ in replaced])
        stands_after_all = torch.cat([stood for _, stood in replaced])
        if not bool(stands_after_all.any()):
            break
        stands.view(-1)[at[stands_after_all]] = True
    if policy.blends:
        author = torch.where(stands, int(Author.STUDENT), int(Author.TEACHER)).to(torch.uint8)
    return Verified(tokens=tokens, kept=first, author=author, divergence=measure, threshold=threshold, states=states)


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
    policy: Policy, student_rows: Tensor, teacher_rows: Tensor, drafted: Tensor, noise: NoiseTable, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens `[N]` at positions where the draft was not accepted, and where it stands after all."""
    behaviour = policy.behaviour(student_rows, teacher_rows)
    keys = noise.keys(Stream.RESIDUAL, index)
    if policy.redraws:
        tokens = sampling.exponential_race(behaviour, keys)
        return tokens, tokens == drafted
    # Where the two agree up to rounding nothing is left to draw from: the draft is kept.
    tokens, empty = sampling.residual_draw(student_rows, behaviour, keys)
    return torch.where(empty, drafted, tokens), empty


def _accepted(student_rows: Tensor, behaviour_at: Tensor, flat: Tensor, log_uniform: Tensor) -> Tensor:
    """Whether each draft would be kept: uniform < behaviour(s) / student(s), bool in the shape of `log_uniform`."""
    ratio = behaviour_at - student_rows.gather(-1, flat.unsqueeze(-1))
    return log_uniform < ratio.view(log_uniform.shape).double()
