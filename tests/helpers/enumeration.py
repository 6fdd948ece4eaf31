"""Models whose next-token distribution is a table: every text has a probability that can be written down."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchkd.engine import roll_out
from switchkd.engine.policy_check import CHI_SQUARE_LIMIT, FIRST_TOKEN, NextTokenTable, make_tables

__all__ = ["NextTokenTable", "assert_frequencies_match", "make_tables"]


def assert_frequencies_match(
    policy: Any,
    tables: tuple[Tensor, Tensor],
    behaviour: Callable[[tuple[int, ...]], Tensor],
    draft_length: Any,
    *,
    steps: int = 3,
    rows: int = 12_000,
) -> Any:
    """Chi-square over all size^steps texts against the product of behaviour distributions; returns the rollout.

    Args:
        policy: Under test.
        tables: Of student and teacher.
        behaviour: Text so far, its first token the prompt, to the distribution `[size]` of the next token.
        draft_length: Of the rollout.
        steps: Tokens of each text.
        rows: Texts.
    """
    size = len(tables[0])
    student, teacher = (NextTokenTable(table) for table in tables)
    prompts = torch.full((rows, 1), FIRST_TOKEN)
    rollout = roll_out(student, teacher, prompts, policy=policy, max_new_tokens=steps, draft_length=draft_length)
    expected = torch.ones(size**steps, dtype=torch.float64)
    distributions: dict[tuple[int, ...], Tensor] = {}
    for index, text in enumerate(itertools.product(range(size), repeat=steps)):
        for position, token in enumerate(text):
            prefix = (FIRST_TOKEN, *text[:position])
            if prefix not in distributions:
                distributions[prefix] = behaviour(prefix)
            expected[index] *= distributions[prefix][token]
    assert abs(float(expected.sum()) - 1.0) < 1e-5
    places = torch.tensor([size**power for power in range(steps - 1, -1, -1)])
    observed = torch.bincount((rollout.completion_ids * places).sum(1), minlength=size**steps).double()
    assert bool((observed[expected == 0.0] == 0.0).all())
    possible = expected > 0.0
    wanted = rows * expected[possible]
    statistic = ((observed[possible] - wanted) ** 2 / wanted).sum()
    freedom = int(possible.sum()) - 1
    assert (statistic - freedom) / math.sqrt(2 * freedom) < CHI_SQUARE_LIMIT
    return rollout
