"""Laws of the scores."""

import pytest

from switchkd.evaluation.metrics import LENGTH_EDGES, bucket_names, exact_match, length_bucket, mean_and_std, rouge_l

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
