"""Scores of generated text: ROUGE-L, exact match, buckets of reference length, mean and deviation over seeds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from rouge_score import rouge_scorer
from scipy import stats

# Upper edges, in tokens and inclusive, of every length bucket but the last.
LENGTH_EDGES = (10, 40, 100)
# The same in words, as MiniLLM groups responses.
WORD_EDGES = (5, 10)
#: First position, counted from 0, of every range of positions.
POSITION_STARTS = (0, *LENGTH_EDGES)


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


def unseen_by_rouge(references: Sequence[Sequence[str]]) -> int:
    """Return how many examples ROUGE-L scores 0 whatever the answer is: no reference has a letter a-z or a digit."""
    return sum(not any(re.search("[a-z0-9]", text.lower()) for text in accepted) for accepted in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Return whether a text equals one of its references once runs of white space are one blank and ends are cut."""
    text = " ".join(prediction.split())
    return any(text == " ".join(reference.split()) for reference in references)


def length_bucket(reference_tokens: int) -> str:
    """Return the name of the bucket that a reference of this length, in tokens, falls into.

    The name states its edges, both inclusive: "0-10", "11-40", "41-100" or "over 100".
    """
    return _bucket(reference_tokens, LENGTH_EDGES)


def word_bucket(reference_words: int) -> str:
    """Return the name of the bucket that a reference of this length, in words, falls into.

    "0-5", "6-10" or "over 10", both edges inclusive.

    Reference:
        Gu et al., arXiv 2306.08543, section 3: the ranges of response lengths.
    """
    return _bucket(reference_words, WORD_EDGES)


def _bucket(length: int, edges: tuple[int, ...]) -> str:
    lower = 0
    for edge in edges:
        if length <= edge:
            return f"{lower}-{edge}"
        lower = edge + 1
    return f"over {edges[-1]}"


def bucket_names() -> list[str]:
    """Return the names of all length buckets, shortest references first."""
    return [length_bucket(tokens) for tokens in (*LENGTH_EDGES, LENGTH_EDGES[-1] + 1)]


def word_bucket_names() -> list[str]:
    """Return the names of all buckets by words, shortest references first."""
    return [word_bucket(words) for words in (*WORD_EDGES, WORD_EDGES[-1] + 1)]


def position_names() -> list[str]:
    """Return the names of the ranges of positions: "0-9", "10-39", "40-99" and "from 100"."""
    ends = [f"{start}-{end - 1}" for start, end in zip(POSITION_STARTS, LENGTH_EDGES, strict=False)]
    return [*ends, f"from {POSITION_STARTS[-1]}"]


@dataclass(frozen=True)
class Mean:
    """A mean and the ends of its 95% interval, None where there is one sampled unit."""

    value: float
    interval: tuple[float, float] | None


def mean_with_interval(
    totals: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray | None = None
) -> Mean:
    """Return sum(totals) / sum(counts) and its 95% interval over the units that were sampled, such as prompts.

    The tokens of a prompt are not independent, prompts are: with r the ratio, the standard error is that of the mean of
    (total_i - r count_i) over the mean count (the ratio estimator), and the interval takes Student's quantile with one
    degree of freedom less than units.

    Args:
        totals: One sum per unit, `[n]`, n >= 1.
        counts: How much each unit holds, `[n]`, such as its tokens; 1 each if None.

    Reference:
        Cochran, "Sampling Techniques", 1977, section 6.3.
    """
    totals = np.asarray(totals, dtype=np.float64)
    counts = np.ones_like(totals) if counts is None else np.asarray(counts, dtype=np.float64)
    units, mean = len(totals), float(totals.sum() / counts.sum())
    if units < 2:
        return Mean(mean, None)
    residuals = totals - mean * counts
    error = math.sqrt(float((residuals**2).sum()) * units / (units - 1)) / float(counts.sum())
    reach = float(stats.t.ppf(0.975, units - 1)) * error
    return Mean(mean, (mean - reach, mean + reach))


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] with the ends of its 95% interval, and of how many."""

    value: float
    interval: tuple[float, float]
    count: int


def share_of(hits: int, count: int) -> Share | None:
    """Return the share of independent units that are hits, with Wilson's interval; None without a unit.

    Reference:
        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    return None if count == 0 else wilson(hits, count)


def wilson(points: float, count: int) -> Share:
    """Return the mean of values in [0, 1] with Wilson's interval, which is too wide where not all of them are 0 or 1.

    Args:
        points: Their sum.
        count: Their number, at least 1.
    """
    share, square = points / count, float(stats.norm.ppf(0.975)) ** 2 / count
    middle, reach = share + square / 2, math.sqrt(square * share * (1 - share) + square**2 / 4)
    return Share(share, (max((middle - reach) / (1 + square), 0.0), min((middle + reach) / (1 + square), 1.0)), count)


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int) -> float:
    """Return distinct-n of some texts: different n-grams of token ids over all n-grams, in [0, 1].

    It falls with the amount of text: compare texts for the same prompts.

    Args:
        texts: Token ids, the end of sequence not included.
        n: At least 1.

    Returns:
        0 where no text has n tokens.

    Reference:
        Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", arXiv 1510.03055.
    """
    grams = [tuple(ids[start : start + n]) for ids in texts for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Return the share of a text's n-grams that occurred earlier in it, in [0, 1); near 1 for a loop.

    Args:
        ids: Token ids, the end of sequence not included.
        n: At least 1.

    Returns:
        0 for a text without two n-grams.

    Reference:
        Welleck et al., "Neural Text Generation with Unlikelihood Training", arXiv 1908.04319 (seq-rep-4).
    """
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


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
