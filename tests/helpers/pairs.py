"""Pairs of tiny models, prompts for them, and what "the same rollout" means."""

import copy
from typing import Any

import torch

from helpers.tiny import BUILDERS, EOS_ID, build_qwen3


def make_pair(family: str = "gpt2", seed: int = 0, noise: float = 0.15, dtype: Any = torch.float32, **over: Any) -> Any:
    """A student and its teacher: the student is a perturbed copy, related as real pairs are."""
    teacher = {**BUILDERS, "qwen3": build_qwen3}[family](seed=seed, **over)
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def make_prompts(rows: int, seed: int = 0, longest: int = 9, vocabulary: int = 98, shortest: int = 1) -> Any:
    """Ragged, left-padded prompts of random ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=generator)
    lengths[0] = shortest
    width = int(lengths.max())
    ids = torch.randint(1, vocabulary - 1, (rows, width), generator=generator)
    mask = torch.arange(width) >= width - lengths.unsqueeze(1)
    return ids.masked_fill(~mask, EOS_ID if vocabulary > EOS_ID else 0), mask


def assert_same(first: Any, second: Any, *, tolerance: float = 1e-4) -> None:
    """Equal tokens and authors; divergences and thresholds equal up to rounding."""
    assert torch.equal(first.completion_mask, second.completion_mask)
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(first.author, second.author)
    for name in ("divergence", "threshold"):
        assert torch.allclose(getattr(first, name), getattr(second, name), atol=tolerance, rtol=0, equal_nan=True)
