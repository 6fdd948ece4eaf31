"""Is a difference between two methods real? A paired bootstrap over training seeds and prompts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """How far one method is ahead of another.

    Attributes:
        mean: First minus second, in the unit of the scores.
        low: Lower end of the interval.
        high: Upper end of the interval.
        against: Share of the resamples in which the other one is ahead, in [0, 1].
        seeds: Training seeds that were compared.
        seeds_ahead: In how many of them the first is ahead.
        prompts: Prompts that were compared.
        confidence: Of the interval.
    """

    mean: float
    low: float
    high: float
    against: float
    seeds: int
    seeds_ahead: int
    prompts: int
    confidence: float

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves out zero; False with one training seed, which says nothing about others."""
        return self.seeds > 1 and (self.low > 0.0 or self.high < 0.0)


def paired_bootstrap(
    first: Scores, second: Scores, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Return the mean difference with a percentile interval from resampled training seeds and prompts.

    Both methods answered the same prompts, and runs of one training seed share their warm start: differences are taken
    within a seed and a prompt, then seeds and prompts are drawn with replacement, independently of each other. A
    bootstrap over S seeds sees only (S - 1)/S of their variance, which with three of them is a third too little; the
    seeds' deviations from their mean are widened by sqrt(S / (S - 1)) to make up for it.

    Args:
        first: Score of every prompt, mean over decoding seeds, `[training seeds, prompts]`.
        second: Likewise, the same seeds and prompts in the same order.
        resamples: How often to draw.
        confidence: Of the interval, in (0, 1).
        seed: Seed of the draws.

    Raises:
        ValueError: Shapes differ or are empty.

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; Koehn, "Statistical Significance Tests for
        Machine Translation Evaluation", EMNLP 2004.
    """
    if first.shape != second.shape or first.ndim != 2 or 0 in first.shape:
        raise ValueError(f"scores must be two equal [seeds, prompts] arrays, got {first.shape} and {second.shape}")
    difference = first - second
    seeds, prompts = difference.shape
    by_seed = difference.mean(1)
    widened = difference
    if seeds > 1:
        widened = difference + (by_seed - by_seed.mean())[:, None] * (np.sqrt(seeds / (seeds - 1)) - 1.0)
    generator = np.random.default_rng(seed)
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    drawn_prompts = generator.multinomial(prompts, np.full(prompts, 1 / prompts), resamples) / prompts
    means = ((drawn_seeds @ widened) * drawn_prompts).sum(1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    mean = float(difference.mean())
    return Difference(
        mean=mean,
        low=float(low),
        high=float(high),
        against=float((means < 0.0).mean() if mean >= 0.0 else (means > 0.0).mean()),
        seeds=seeds,
        seeds_ahead=int((by_seed > 0.0).sum()),
        prompts=prompts,
        confidence=confidence,
    )


def in_words(first: str, second: str, found: Difference) -> str:
    """Return one sentence that says who is ahead, by how much, and whether that is more than chance explains.

    Args:
        first: Name of the first method.
        second: Name of the second method.
        found: First minus second.
    """
    ahead, behind, sign = (first, second, 1.0) if found.mean >= 0.0 else (second, first, -1.0)
    ends = sorted((sign * found.low, sign * found.high))
    by = f"by {abs(found.mean):.1f} points ({found.confidence:.0%} interval {ends[0]:+.1f} to {ends[1]:+.1f})"
    if found.seeds == 1:
        return (
            f"{ahead} is ahead of {behind} {by} on these {found.prompts} prompts; with one training seed nobody knows "
            "what another one would give"
        )
    count = found.seeds_ahead if sign > 0 else found.seeds - found.seeds_ahead
    where = f"in {count} of {found.seeds} training seeds"
    if found.is_real:
        return f"{ahead} is ahead of {behind} {by}, {where}: more than chance between seeds and prompts explains"
    return f"{first} and {second} cannot be told apart: {ahead} is ahead {by}, {where}"
