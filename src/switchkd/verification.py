"""From two distributions to a token: one position at a time, and a whole draft at once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switchkd import sampling
from switchkd.policies import Policy
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
    decision, state = policy.decide(measure, position, state, noise)
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
    return Written(tokens, kept, author, measure, decision.threshold, state)


@dataclass
class Verified:
    """What became of a draft of G tokens in A rows; entries from `count` on are meaningless."""

    tokens: Tensor  # [A, G]
    kept: Tensor  # [A], drafted tokens that stood before the first replaced one
    count: Tensor  # [A], emitted tokens: kept + 1 where one was replaced
    author: Tensor  # [A, G]
    divergence: Tensor  # [A, G]
    threshold: Tensor  # [A, G]
    states: list[Tensor | None]  # the policy's state before position 0, 1, ..., G


def verify(
    policy: Policy,
    drafted: Tensor,
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    position: Tensor,
    state: Tensor | None,
    seed: int,
    row_ids: Tensor,
) -> Verified:
    """Return which drafted tokens stand and what replaces the first one that does not.

    Args:
        policy: Who writes.
        drafted: The student's draft, int64 `[A, G]`.
        student_log_probs: `[A, G, V]`.
        teacher_log_probs: `[A, G, V]`.
        position: Completion position of each drafted token, int64 `[A, G]`.
        state: The policy's state `[A, ...]` or None.
        seed: Seed of the randomness.
        row_ids: int64 `[A]`.
    """
    rows, length = drafted.shape
    measure = policy.measure(student_log_probs.flatten(0, 1), teacher_log_probs.flatten(0, 1), drafted.flatten()).view(
        rows, length
    )
    noise = None
    if policy.random:
        every_row = row_ids.unsqueeze(1).expand(-1, length)
        noise = sampling.uniform(sampling.noise_keys(seed, every_row, position, Stream.POLICY))
    states: list[Tensor | None] = [state]
    if policy.stateful:
        decisions = []
        for column in range(length):
            drawn = None if noise is None else noise[:, column]
            decision, state = policy.decide(measure[:, column], position[:, column], state, drawn)
            decisions.append(decision)
            states.append(state)
        author = torch.stack([decision.author for decision in decisions], dim=1)
        threshold = torch.stack([decision.threshold for decision in decisions], dim=1)
    else:
        drawn = None if noise is None else noise.flatten()
        decision, _ = policy.decide(measure.flatten(), position.flatten(), None, drawn)
        author, threshold = decision.author.view(rows, length), decision.threshold.view(rows, length)

    tokens = drafted.clone()
    keys_of = (seed, row_ids.unsqueeze(1).expand(-1, length), position)
    given = (author == Author.TEACHER).flatten().nonzero().squeeze(-1)
    stands = torch.ones(rows * length, dtype=torch.bool, device=drafted.device)
    if len(given) and policy.redraws:
        stands[given] = False
    elif len(given):
        student_given = student_log_probs.flatten(0, 1)[given] if policy.blends else None
        stands[given] = _accepted(policy, given, drafted, student_log_probs, teacher_log_probs, student_given, keys_of)
    stands = stands.view(rows, length)
    while True:
        replaced = ~stands
        first = torch.where(replaced.any(-1), replaced.to(torch.uint8).argmax(-1), length)
        hit = (first < length).nonzero().squeeze(-1)
        if not len(hit):
            break
        at = first[hit]
        student_rows, teacher_rows = student_log_probs[hit, at], teacher_log_probs[hit, at]
        behaviour = policy.behaviour(student_rows, teacher_rows)
        keys = sampling.noise_keys(seed, row_ids[hit], position[hit, at], Stream.RESIDUAL)
        if policy.redraws:
            replacement = sampling.exponential_race(behaviour, keys)
            stands_after_all = replacement == drafted[hit, at]
        else:
            # Where the two agree to rounding nothing is left to draw from: the draft stands and the walk goes on.
            replacement, stands_after_all = sampling.residual_draw(student_rows, behaviour, keys)
        tokens[hit, at] = torch.where(stands_after_all, drafted[hit, at], replacement)
        if not bool(stands_after_all.any()):
            break
        stands[hit[stands_after_all], at[stands_after_all]] = True
    if policy.blends:
        author = torch.where(stands, int(Author.STUDENT), int(Author.TEACHER)).to(torch.uint8)
    return Verified(
        tokens=tokens,
        kept=first,
        count=(first + 1).clamp(max=length),
        author=author,
        divergence=measure,
        threshold=threshold,
        states=states,
    )


def _accepted(
    policy: Policy,
    given: Tensor,
    drafted: Tensor,
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    student_given: Tensor | None,
    keys_of: tuple[int, Tensor, Tensor],
) -> Tensor:
    """Whether each draft given away by the policy is kept: uniform < behaviour(s) / student(s)."""
    seed, row_ids, position = keys_of
    size = student_log_probs.shape[-1]
    flat = given * size + drafted.flatten()[given]
    student_at = student_log_probs.reshape(-1)[flat]
    if student_given is None:
        behaviour_at = teacher_log_probs.reshape(-1)[flat]
    else:
        behaviour = policy.behaviour(student_given, teacher_log_probs.flatten(0, 1)[given])
        behaviour_at = behaviour.gather(-1, drafted.flatten()[given].unsqueeze(-1)).squeeze(-1)
    keys = sampling.noise_keys(seed, row_ids.flatten()[given], position.flatten()[given], Stream.ACCEPT)
    return sampling.accept_at(student_at, behaviour_at, keys)
