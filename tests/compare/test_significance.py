"""Laws of the paired bootstrap: it finds what is there, claims nothing where nothing is, and says what it ignores."""

import math

import numpy as np
import pytest
from numpy.random import default_rng
from scipy.integrate import trapezoid

from switchkd.compare.significance import Difference, difference_of_gains, holm, paired_difference, t_quantile, verdict

# Deviations of training seeds, prompts and single scores: seeds alone, all three, prompts alone.
NOISES = [(1.0, 0.0, 0.01), (1.0, 3.0, 5.0), (0.3, 5.0, 10.0), (0.0, 10.0, 1.0)]


def simulated(rng: np.random.Generator, seeds: int, prompts: int, noise: tuple[float, float, float]) -> np.ndarray:
    """Differences [S, N] of two methods that are equally good."""
    by_seed, by_prompt, single = noise
    return (
        by_seed * rng.normal(size=(seeds, 1))
        + by_prompt * rng.normal(size=(1, prompts))
        + single * rng.normal(size=(seeds, prompts))
    )


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seeds", [3, 5])
def test_without_a_difference_the_interval_covers_zero_about_95_percent_of_the_time(seeds, noise):
    rng, cases = default_rng(0), 250
    covered = 0
    for case in range(cases):
        scores = simulated(rng, seeds, 60, noise)
        found = paired_difference(scores, np.zeros_like(scores), resamples=2000, random_seed=case)
        covered += found.low <= 0 <= found.high
    # The standard error of a share of 0.95 over 250 cases is 0.014. Noise of single scores is counted with the seeds
    # and with the prompts, so the interval may be wider than needed; it must not be narrower.
    assert covered / cases >= 0.91
    assert covered / cases < 1.0


def test_a_shift_without_noise_is_found_exactly():
    rng = default_rng(1)
    second = rng.uniform(0, 100, size=(3, 50))
    found = paired_difference(second + 1.5, second)
    assert (found.mean, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert (found.seeds_ahead, found.is_clear) == (3, True) and found.p_value < 1e-9


def test_equal_scores_differ_by_nothing():
    scores = default_rng(2).uniform(0, 100, size=(3, 50))
    found = paired_difference(scores, scores)
    assert (found.mean, found.low, found.high, found.p_value) == (0, 0, 0, 1.0)
    assert not found.is_clear


def test_swapping_the_methods_mirrors_everything():
    rng = default_rng(3)
    first, second = rng.normal(1, 5, size=(3, 80)), rng.normal(0, 5, size=(3, 80))
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert (other.mean, other.low, other.high) == pytest.approx((-one.mean, -one.high, -one.low))
    assert (other.p_value, other.seeds_ahead) == (one.p_value, one.seeds_ahead)


def test_pairing_removes_what_both_methods_share():
    rng = default_rng(4)
    hard = rng.uniform(0, 100, size=(1, 200)) * np.ones((3, 1))
    first = hard + 1 + rng.normal(0, 0.5, size=(3, 200))
    assert paired_difference(first, hard).is_clear
    mixed = rng.permuted(hard, axis=1)
    assert not paired_difference(first, mixed).is_clear


def test_more_seeds_narrow_the_interval_when_seeds_are_what_varies():
    rng = default_rng(5)
    widths = []
    for seeds in (2, 3, 5, 10):
        found = [paired_difference(simulated(rng, seeds, 60, NOISES[0]), np.zeros((seeds, 60))) for _ in range(20)]
        widths.append(np.mean([one.high - one.low for one in found]))
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 3 * widths[-1]


@pytest.mark.parametrize("noise", NOISES)
def test_without_a_difference_p_values_are_small_as_seldom_as_they_say(noise):
    rng = default_rng(9)
    found = [paired_difference(simulated(rng, 3, 60, noise), np.zeros((3, 60)), resamples=1) for _ in range(2000)]
    p_values = np.array([one.p_value for one in found])
    for level in (0.05, 0.01):
        # Two standard errors above; below it may lie, as noise of single scores counts twice.
        assert (p_values < level).mean() <= level + 2 * np.sqrt(level / len(found)) + 0.01
    assert (p_values < 0.5).mean() > 0.2


def test_the_p_value_is_small_where_the_interval_excludes_zero():
    rng = default_rng(10)
    agree = []
    for case in range(200):
        scores = simulated(rng, 3, 60, NOISES[case % len(NOISES)]) + rng.uniform(0, 2)
        found = paired_difference(scores, np.zeros_like(scores))
        agree.append(found.is_clear == (found.p_value < 0.05))
    assert np.mean(agree) > 0.9


def test_holm_is_the_stepwise_rule_of_its_paper():
    """At every level: walk up the sorted values and stop at the first that exceeds level / (number left)."""
    rng = default_rng(11)
    for size in (1, 2, 3, 10):
        for _ in range(20):
            p_values = list(rng.uniform(size=size) ** 3)
            adjusted = holm(p_values)
            for level in (0.01, 0.05, 0.3, 0.9):
                rejected: set[int] = set()
                for rank, index in enumerate(np.argsort(p_values)):
                    if p_values[index] >= level / (size - rank):
                        break
                    rejected.add(int(index))
                assert rejected == {index for index, value in enumerate(adjusted) if value < level}
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.7, 0.6]) == [1.0, 1.0]


def test_twenty_equal_methods_are_seldom_told_apart():
    """Without the correction about two in three such comparisons would call some difference significant."""
    rng, raw, corrected = default_rng(12), [], []
    for _ in range(200):
        scores = [simulated(rng, 3, 60, NOISES[1]) for _ in range(20)]
        p_values = [paired_difference(one, np.zeros_like(one), resamples=1).p_value for one in scores]
        raw.append(min(p_values) < 0.05)
        corrected.append(min(holm(p_values)) < 0.05)
    assert np.mean(raw) > 0.3
    assert np.mean(corrected) <= 0.09


def test_the_order_of_seeds_and_prompts_does_not_matter():
    rng = default_rng(6)
    scores = simulated(rng, 3, 90, NOISES[1]) + 2
    moved = scores[[2, 0, 1]][:, rng.permutation(90)]
    one, other = (paired_difference(values, np.zeros_like(values), resamples=20_000) for values in (scores, moved))
    assert one.mean == pytest.approx(other.mean)
    # What is left is the draw of 20,000 resamples.
    assert one.low == pytest.approx(other.low, abs=0.3)
    assert one.high == pytest.approx(other.high, abs=0.3)


def test_one_training_seed_is_compared_over_prompts_and_said_to_be_one():
    rng = default_rng(7)
    second = rng.uniform(0, 100, size=(1, 200))
    found = paired_difference(second + 2 + rng.normal(0, 3, size=(1, 200)), second)
    assert found.seeds == 1 and found.is_clear
    # The only source of chance left is the prompts': the normal interval of their mean.
    assert found.high - found.low == pytest.approx(2 * 1.97 * 3 / np.sqrt(200), rel=0.2)
    text = verdict("switch", "sft", found, 0.01)
    assert (
        "one training seed only" in text and "unknown" in text and "over prompts)" in text and "significant" not in text
    )


def test_gains_that_grow_are_told_from_gains_that_do_not():
    rng = default_rng(8)
    long, short = rng.normal(5, 3, size=(3, 80)), rng.normal(1, 3, size=(3, 70))
    found = difference_of_gains(long, short)
    assert found.mean == pytest.approx(long.mean() - short.mean()) and found.low > 0
    assert not difference_of_gains(short + 0.01, short.copy()).is_clear


def difference(mean: float, low: float, high: float, seeds: int = 3) -> Difference:
    return Difference(mean, low, high, p_value=0.01, seeds=seeds, prompts=240, seeds_ahead=seeds)


@pytest.mark.parametrize(
    ("found", "adjusted_p", "text"),
    [
        (
            difference(1.9, 0.4, 3.1),
            0.012,
            "switch is ahead of sft by 1.9 points: significant (95% interval 0.4 to 3.1 over seeds and prompts; "
            "adjusted p 0.012)",
        ),
        (
            difference(1.9, 0.4, 3.1),
            0.051,
            "switch against sft: no significant difference: +1.9 points (95% interval +0.4 to +3.1",
        ),
        (
            difference(-1.9, -3.1, -0.4),
            0.0001,
            "switch is behind sft by 1.9 points: significant (95% interval 0.4 to 3.1",
        ),
        (
            difference(0.9, -0.4, 2.1),
            0.3,
            "switch against sft: no significant difference: +0.9 points (95% interval -0.4 to +2.1",
        ),
    ],
)
def test_the_verdict_says_which_is_ahead_or_that_there_is_no_significant_difference(found, adjusted_p, text):
    assert verdict("switch", "sft", found, adjusted_p).startswith(text)
    assert "same sign in 3 of 3 seeds" in verdict("switch", "sft", found, adjusted_p)


@pytest.mark.parametrize("shapes", [((3, 5), (3, 4)), ((0, 5), (0, 5)), ((3, 1), (3, 1)), ((5,), (5,))])
def test_scores_that_are_not_paired_by_seed_and_prompt_are_refused(shapes):
    with pytest.raises(ValueError, match="scores must be"):
        paired_difference(*(np.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("degrees", [1.0, 1.3, 1.5, 2.0, 3.5, 12.0])
def test_intervals_of_few_seeds_were_up_to_a_fifth_too_wide(degrees):
    """Student's density between -t and t integrates to 95%, also between whole degrees of freedom."""
    angle = np.linspace(0.0, np.arctan(t_quantile(degrees) / np.sqrt(degrees)), 20_001)
    inside = 2.0 * trapezoid(np.cos(angle) ** (degrees - 1.0), angle)
    norm = np.sqrt(np.pi) * math.gamma(degrees / 2.0) / math.gamma((degrees + 1.0) / 2.0)
    assert inside / norm == pytest.approx(0.95, abs=1e-5)
    assert t_quantile(math.inf) == pytest.approx(1.959964)


def test_of_a_divergence_the_lower_one_is_ahead():
    difference = paired_difference(np.full((3, 50), 2.0), np.full((3, 50), 5.0))
    assert "one is behind other by 3.0 points" in verdict("one", "other", difference, 0.001)
    assert "one is ahead of other by 3.0 nats" in verdict(
        "one", "other", difference, 0.001, unit="nats", lower_is_better=True
    )
