"""Laws of the scores."""

import numpy as np
import pytest
from scipy import stats

from switchkd.evaluation.metrics import (
    LENGTH_EDGES,
    POSITION_STARTS,
    bucket_names,
    distinct_ngrams,
    exact_match,
    length_bucket,
    mean_and_std,
    mean_with_interval,
    position_names,
    repetition,
    rouge_l,
)

TEXTS = ["the cat sat on the mat", "a dog", "Watergate began in 1972, and ended a presidency."]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_scores_100_against_itself(text):
    assert rouge_l(text, [text]) == pytest.approx(100.0)


@pytest.mark.parametrize("first", TEXTS)
@pytest.mark.parametrize("second", TEXTS)
def test_f_measure_is_symmetric_and_within_bounds(first, second):
    assert rouge_l(first, [second]) == pytest.approx(rouge_l(second, [first]))
    assert 0.0 <= rouge_l(first, [second]) <= 100.0


def test_known_value_by_hand():
    # LCS "police the gunman" = 3 words, 4 predicted words and 4 reference words: P = R = 3/4.
    assert rouge_l("police killed the gunman", ["police shot the gunman"]) == pytest.approx(75.0)


def test_word_order_counts():
    assert rouge_l("one two three", ["three two one"]) == pytest.approx(100 / 3)


def test_the_best_reference_counts_whatever_its_place():
    references = ["nothing alike", "police shot the gunman", "police"]
    alone = max(rouge_l("police killed the gunman", [reference]) for reference in references)
    assert rouge_l("police killed the gunman", references) == alone
    assert rouge_l("police killed the gunman", references[::-1]) == alone


def test_words_are_stemmed_and_case_and_punctuation_are_dropped():
    assert rouge_l("Running dogs!", ["run, dog"]) == pytest.approx(100.0)


def test_other_scripts_score_zero_as_the_docstring_says():
    assert rouge_l("привет", ["привет"]) == 0.0


def test_empty_prediction_scores_zero_and_no_reference_is_refused():
    assert rouge_l("", ["a word"]) == 0.0
    with pytest.raises(ValueError, match="at least one reference"):
        rouge_l("a word", [])


def test_exact_match_ignores_white_space_only():
    assert exact_match(" a  b\n", ["c", "a b"])
    assert not exact_match("A b", ["a b"])
    assert not exact_match("a b", [])


def test_every_length_falls_into_one_named_bucket_and_edges_are_inclusive():
    assert bucket_names() == ["0-10", "11-40", "41-100", "over 100"]
    for edge, name, above in zip(LENGTH_EDGES, bucket_names(), bucket_names()[1:], strict=False):
        assert length_bucket(edge) == name
        assert length_bucket(edge + 1) == above
    assert length_bucket(0) == "0-10"
    assert length_bucket(10**6) == "over 100"


def test_standard_deviation_has_divisor_n_minus_one_and_is_zero_for_one_seed():
    assert mean_and_std([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_std([7.0]) == (7.0, 0.0)
    mean, std = mean_and_std([2.0, 4.0, 9.0])
    assert mean_and_std([12.0, 14.0, 19.0]) == (pytest.approx(mean + 10), pytest.approx(std))
    with pytest.raises(ValueError, match="at least one value"):
        mean_and_std([])


# ------------------------------------------------------------------------------------------ intervals, diversity


def test_the_interval_of_a_plain_mean_is_students():
    values = [3.0, 5.0, 4.0, 8.0, 1.0]
    mean = mean_with_interval(values)
    expected = stats.t.interval(0.95, 4, loc=4.2, scale=stats.sem(values))
    assert mean.value == pytest.approx(4.2) and mean.interval == pytest.approx(expected)
    assert mean_with_interval([3.0]).interval is None


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says():
    """Tokens of one prompt share its difficulty; counting tokens as independent would cover a third of the time."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(600):
        counts = draw.integers(5, 100, 60)
        totals = counts * (1.0 + 0.5 * draw.standard_normal(60))
        low, high = mean_with_interval(totals, counts).interval
        covered += low < 1.0 < high
    assert 0.92 < covered / 600 < 0.975


def test_a_loop_repeats_and_is_not_distinct():
    fresh, loop = list(range(40)), [1, 2, 3, 4] * 10
    assert repetition(fresh) == 0.0 and repetition(loop) == pytest.approx(1 - 4 / 37)
    assert repetition([1, 2]) == 0.0
    assert [distinct_ngrams([fresh], n) for n in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert distinct_ngrams([loop], 1) == 4 / 40 and distinct_ngrams([loop], 2) == 4 / 39
    assert distinct_ngrams([fresh, fresh], 2) == 0.5  # the same answer to every prompt is not diverse either
    assert distinct_ngrams([[1], []], 2) == 0.0


def test_every_position_falls_into_the_range_that_is_named_after_it():
    assert position_names() == ["0-9", "10-39", "40-99", "from 100"]
    assert POSITION_STARTS == (0, 10, 40, 100)
