"""Is a difference between two methods significant? A bootstrap over prompts and seeds, Holm's correction, words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

#: Adjusted p-values below this are called significant.
LEVEL = 0.05
_CHUNK = 256  # resamples drawn at once: [256, prompts] places are kept


@dataclass(frozen=True)
class Difference:
    """A difference of mean scores and its 95% interval.

    Attributes:
        mean: First minus second, in the unit of the scores.
        low: Lower end of the 95% interval.
        high: Upper end.
        p_value: Two-sided, of no difference: Student's t test of the mean over its standard error, with the variance
            and the degrees of freedom that the interval has. The resamples themselves are too few for small values.
        seeds: Number of training seeds.
        prompts: Number of prompts.
        seeds_ahead: Number of training seeds at which the difference has the sign of `mean`.
    """

    mean: float
    low: float
    high: float
    p_value: float
    seeds: int
    prompts: int
    seeds_ahead: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: np.ndarray, second: np.ndarray, *, resamples: int = 4000, random_seed: int = 0
) -> Difference:
    """Return the mean difference of two methods with its 95% interval, by a two-level paired bootstrap.

    Training seeds and prompts are drawn with replacement, the same ones for both methods, and the difference is
    computed again. With d [S, N] the paired differences, d.. their mean, d_s. the mean of a seed and d_.n that of a
    prompt, one resample that draws seed s k_s times and prompt n m_n times is

        d.. + t * (sqrt(S / (S - 1)) * sum_s (k_s / S) (d_s. - d..) + sqrt(N / (N - 1)) * sum_n (m_n / N) (d_.n - d..))

    The roots undo that a resample of few values varies too little, and t, Student's quantile over the normal one,
    that the variance of few values is itself uncertain: without them nominal 95% intervals over three seeds cover
    the true difference in 75% of cases. The degrees of freedom of t are Satterthwaite's, between S - 1 where the
    seeds vary most and N - 1 where the prompts do.

    Args:
        first: Scores [S, N] of one method: S training seeds, N prompts, each a mean over decoding seeds.
        second: Scores [S, N] of the other at the same seeds and prompts.
        resamples: Number of resamples.
        random_seed: Seed of the draws.

    Raises:
        ValueError: Shapes differ, there is no seed, or fewer than two prompts.

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; Koehn, "Statistical significance tests for
        machine translation evaluation", 2004 (paired over texts); Satterthwaite, 1946.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"scores must be paired [seeds, prompts], got shapes {first.shape} and {second.shape}")
    return _bootstrap([first - second], resamples, random_seed)


def difference_of_gains(
    gains: np.ndarray, other_gains: np.ndarray, *, resamples: int = 4000, random_seed: int = 0
) -> Difference:
    """Return how much larger one group of prompts' mean gain is than another's, at the same training seeds.

    Args:
        gains: Paired differences [S, N] between two methods on one group of prompts, for example long answers.
        other_gains: The same [S, M] on another group.
        resamples: As in `paired_difference`; prompts are drawn within their group.
        random_seed: Seed of the draws.

    Raises:
        ValueError: As in `paired_difference`.
    """
    parts = [np.asarray(gains, dtype=np.float64), -np.asarray(other_gains, dtype=np.float64)]
    return _bootstrap(parts, resamples, random_seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the order given.

    With m values and p_(1) <= ... <= p_(m), the adjusted p_(i) is the largest (m - j + 1) p_(j) over j <= i, at most
    1. Calling those below 0.05 significant makes one or more false claims in at most 5% of cases, whatever the values
    depend on.

    Reference:
        Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(
    first: str,
    second: str,
    difference: Difference,
    adjusted_p: float,
    *,
    unit: str = "points",
    lower_is_better: bool = False,
) -> str:
    """Return in words whether one method is ahead of another.

    Args:
        first: Name of the method that was subtracted from.
        second: Name of the other.
        difference: Of `paired_difference`.
        adjusted_p: Its p-value after the correction for the number of comparisons, see `holm`.
        unit: Of the difference.
        lower_is_better: Whether the method with the lower value is ahead.
    """
    size = abs(difference.mean)
    low, high = (difference.low, difference.high) if difference.mean >= 0 else (-difference.high, -difference.low)
    if difference.seeds == 1:
        return (
            f"{first} against {second}: {difference.mean:+.1f} {unit} (95% interval {difference.low:+.1f} to "
            f"{difference.high:+.1f} over prompts); one training seed only, so the variation between seeds is unknown"
        )
    ahead = f"same sign in {difference.seeds_ahead} of {difference.seeds} seeds"
    if adjusted_p < LEVEL:
        order = "ahead of" if (difference.mean > 0) != lower_is_better else "behind"
        return (
            f"{first} is {order} {second} by {size:.1f} {unit}: significant (95% interval {low:.1f} to {high:.1f} "
            f"over seeds and prompts; adjusted p {p_text(adjusted_p)}); {ahead}"
        )
    return (
        f"{first} against {second}: no significant difference: {difference.mean:+.1f} {unit} (95% interval "
        f"{difference.low:+.1f} to {difference.high:+.1f} over seeds and prompts; adjusted p {p_text(adjusted_p)}); "
        f"{ahead}"
    )


def p_text(p_value: float) -> str:
    """Return a p-value as text, three digits behind the point."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def t_quantile(degrees: float) -> float:
    """Return the two-sided 95% quantile of Student's t for one or more degrees of freedom, inf for the normal one."""
    return float(stats.t.ppf(0.975, max(degrees, 1.0)))


def _bootstrap(parts: Sequence[np.ndarray], resamples: int, random_seed: int) -> Difference:
    """Bootstrap the sum of the parts' means; prompts are drawn within each part, seeds for all parts at once."""
    seeds = parts[0].shape[0]
    for part in parts:
        if part.ndim != 2 or part.shape[0] != seeds or seeds < 1 or part.shape[1] < 2:
            raise ValueError(
                f"scores must be [seeds, prompts] with the same seeds and two or more prompts, got shape {part.shape}"
            )
    mean = float(sum(part.mean() for part in parts))
    by_seed = sum(part.mean(1) for part in parts) - mean
    by_prompt = [part.mean(0) - part.mean() for part in parts]
    # Each source of variation: deviations from the mean, already scaled so that resampling varies enough.
    sources = [deviations * math.sqrt(_grown(deviations)) for deviations in (by_seed, *by_prompt)]
    variances = [float((values**2).sum() / len(values) ** 2) for values in sources]
    total = sum(variances)
    spent = sum(
        variance**2 / (len(values) - 1) for variance, values in zip(variances, sources, strict=True) if len(values) > 1
    )
    degrees = total**2 / spent if spent > 0 else math.inf
    widening = t_quantile(degrees) / t_quantile(math.inf)
    generator = np.random.default_rng(random_seed)
    drawn = np.full(resamples, mean)
    for values in sources:
        for start in range(0, resamples, _CHUNK):
            rows = slice(start, min(start + _CHUNK, resamples))
            chosen = generator.integers(len(values), size=(rows.stop - rows.start, len(values)))
            drawn[rows] += widening * values[chosen].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Difference(
        mean=mean,
        low=float(low),
        high=float(high),
        p_value=_p_value(mean, total, degrees),
        seeds=seeds,
        prompts=sum(part.shape[1] for part in parts),
        seeds_ahead=int(((by_seed + mean) * mean > 0).sum()),
    )


def _p_value(mean: float, variance: float, degrees: float) -> float:
    if mean == 0 or variance == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / math.sqrt(variance), max(degrees, 1.0)))


def _grown(values: np.ndarray) -> float:
    return len(values) / (len(values) - 1) if len(values) > 1 else 1.0
