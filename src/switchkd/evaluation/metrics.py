"""Scores of generated text: ROUGE-L, exact match, buckets of reference length, mean and deviation over seeds."""

import math
from collections.abc import Sequence
from functools import cache

from rouge_score import rouge_scorer

# Upper edges, in tokens and inclusive, of every length bucket but the last.
LENGTH_EDGES = (10, 40, 100)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Return the ROUGE-L F-measure of a text against its best reference, times 100.

    F = 2 P R / (P + R), where P and R are the length of the longest common subsequence of words over the length of
    the prediction and of the reference. Words are Porter-stemmed. The tokenizer of `rouge-score` lower-cases and
    drops everything but ASCII letters and digits: punctuation never counts, and text in another script scores 0.

    Args:
        prediction: The generated text.
        references: One or more accepted answers.

    Returns:
        Score in [0, 100]; 0 where the prediction or every reference has no word.

    Raises:
        ValueError: There is no reference.

    Reference:
        Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004; package `rouge-score`.
    """
    if not references:
        raise ValueError("rouge_l needs at least one reference")
    scorer = _scorer()
    return 100.0 * max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Return whether a text equals one of its references once runs of white space are one blank and ends are cut."""
    text = " ".join(prediction.split())
    return any(text == " ".join(reference.split()) for reference in references)


def length_bucket(reference_tokens: int) -> str:
    """Return the name of the bucket that a reference of this length, in tokens, falls into.

    The name states its edges, both inclusive: "0-10", "11-40", "41-100" or "over 100".
    """
    lower = 0
    for edge in LENGTH_EDGES:
        if reference_tokens <= edge:
            return f"{lower}-{edge}"
        lower = edge + 1
    return f"over {LENGTH_EDGES[-1]}"


def bucket_names() -> list[str]:
    """Return the names of all length buckets, shortest references first."""
    return [length_bucket(tokens) for tokens in (*LENGTH_EDGES, LENGTH_EDGES[-1] + 1)]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (divisor n - 1) of one score per seed.

    Args:
        values: At least one number.

    Returns:
        Mean and deviation, in the unit of the values; the deviation of a single value is given as 0.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("mean_and_std needs at least one value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


@cache
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
