"""Laws of the paired bootstrap: right coverage, exact where nothing is random, symmetric, honest about one seed."""

import numpy as np
import pytest

from switchkd.significance import in_words, paired_bootstrap


def simulated(generator, *, shift=0.0, seeds=3, prompts=60, seed_noise=1.0, prompt_noise=10.0):
    """Scores of two methods: prompts differ in difficulty, training seeds in luck."""
    difficulty = generator.normal(50, 20, (1, prompts))
    scores = [
        difficulty + generator.normal(0, seed_noise, (seeds, 1)) + generator.normal(0, prompt_noise, (seeds, prompts))
        for _ in range(2)
    ]
    return scores[0] + shift, scores[1]


@pytest.mark.parametrize(("seed_noise", "seeds", "most"), [(0.0, 3, 0.09), (1.0, 3, 0.22), (1.0, 10, 0.11)])
def test_equal_methods_are_rarely_told_apart(seed_noise, seeds, most):
    """With three seeds and much luck no interval of this kind reaches 95%; it must not be far off either."""
    generator = np.random.default_rng(0)
    wrong = [
        paired_bootstrap(*simulated(generator, seeds=seeds, seed_noise=seed_noise), resamples=1000, seed=run).is_real
        for run in range(300)
    ]
    assert np.mean(wrong) < most


def test_large_differences_are_found():
    generator = np.random.default_rng(1)
    found = [paired_bootstrap(*simulated(generator, shift=6.0), resamples=1000).is_real for _ in range(50)]
    assert np.mean(found) > 0.9


def test_a_constant_shift_is_exact():
    second = np.random.default_rng(0).normal(50, 20, (3, 40))
    found = paired_bootstrap(second + 2.5, second)
    assert (found.mean, found.low, found.high) == pytest.approx((2.5, 2.5, 2.5))
    assert found.against == 0.0 and found.seeds_ahead == 3 and found.is_real


def test_swapping_the_methods_turns_the_answer_round():
    first, second = simulated(np.random.default_rng(2), shift=1.0)
    one, other = paired_bootstrap(first, second), paired_bootstrap(second, first)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert one.against == pytest.approx(other.against)


def test_methods_on_other_prompts_or_seeds_are_refused():
    with pytest.raises(ValueError, match="two equal"):
        paired_bootstrap(np.zeros((2, 3)), np.zeros((2, 4)))


def test_luck_of_training_seeds_widens_the_interval():
    generator = np.random.default_rng(3)
    narrow = paired_bootstrap(*simulated(generator, shift=3.0, seed_noise=0.0))
    wide = paired_bootstrap(*simulated(generator, shift=3.0, seed_noise=10.0))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_words_say_what_the_numbers_say():
    second = np.random.default_rng(0).normal(50, 20, (3, 40))
    real = in_words("switch", "sft", paired_bootstrap(second + 2.5, second))
    assert real.startswith("switch is ahead of sft by 2.5 points (95% interval +2.5 to +2.5), in 3 of 3 training seeds")
    assert "more than chance" in real
    turned = in_words("sft", "switch", paired_bootstrap(second, second + 2.5))
    assert turned == real
    noise = np.random.default_rng(1).normal(0, 5, second.shape)
    assert "switch and sft cannot be told apart" in in_words("switch", "sft", paired_bootstrap(second + noise, second))
    single = in_words("switch", "sft", paired_bootstrap(second[:1] + 2.5, second[:1]))
    assert "with one training seed nobody knows" in single and "more than chance" not in single
    assert not paired_bootstrap(second[:1] + 2.5, second[:1]).is_real
