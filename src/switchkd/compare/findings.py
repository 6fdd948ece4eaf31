"""What a comparison found: scores by run, differences with what is significant, and the sentences that say so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from switchkd.cli.display import table
from switchkd.compare.significance import (
    LEVEL,
    Difference,
    difference_of_gains,
    holm,
    paired_difference,
    verdict,
)
from switchkd.compare.tasks import MEASURES, TEACHER_MEASURES
from switchkd.evaluation.metrics import bucket_names, length_bucket

Result = Mapping[str, Any]
Pair = tuple[str, str]
#: Buckets of answer length with fewer prompts are not compared: their intervals are too wide to say anything.
FEWEST_PROMPTS = 20
#: With fewer training seeds their spread is hardly known.
FEWEST_SEEDS = 3


class Comparison:
    """The results of all finished runs on one test set.

    Args:
        results: The contents of the `result.json` of every finished run, `evaluate` being those of this test set.
        rows: `(student, run, seed)` -> the rows that its evaluation scored.
        measure: What is compared: `rouge_l`, `exact_match` or the name of a scorer.
        axes: Axis of the grid -> its labels, in the order of tables; those that occur are kept.
    """

    def __init__(
        self,
        results: Sequence[Result],
        rows: Mapping[tuple[str, str, int], Sequence[Result]],
        measure: str = "rouge_l",
        axes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.results = list(results)
        self.measure = measure
        self.students = list(dict.fromkeys(result["student"] for result in results))
        self.labels = list(dict.fromkeys(result["run"] for result in results))
        scorers = [name for result in results for name in result["evaluate"].get("by_scorer", {})]
        #: The measure that is compared, then the others.
        self.measures = list(dict.fromkeys([measure, *MEASURES, *scorers]))
        cells = {(axis, label) for result in results for axis, label in result["cell"].items()}
        kept = {axis: [label for label in labels if (axis, label) in cells] for axis, labels in (axes or {}).items()}
        #: Axis of the grid -> its labels that occur.
        self.axes = {axis: labels for axis, labels in kept.items() if labels}
        self._scores = {name: {key: _by_prompt(scored, name) for key, scored in rows.items()} for name in self.measures}

    def of(self, student: str, label: str) -> list[Result]:
        """Return the results of one run of one student, in the order of the training seeds."""
        chosen = [result for result in self.results if (result["student"], result["run"]) == (student, label)]
        return sorted(chosen, key=lambda result: result["seed"])

    def score(self, result: Result, bucket: str | None = None, measure: str | None = None) -> float | None:
        """Return the mean of a run over prompts, in [0, 100]; None where no prompt has an answer of that length.

        Args:
            result: Of this comparison.
            bucket: Answers of this length only.
            measure: Another than the comparison's.
        """
        scores = self._scores[measure or self.measure][result["student"], result["run"], result["seed"]]
        chosen = [value for value, name in scores.values() if bucket in (None, name)]
        return sum(chosen) / len(chosen) if chosen else None

    def difference(self, student: str, first: str, second: str, bucket: str | None = None) -> Difference | None:
        """Return how far one run is ahead of another on the training seeds that both have, or None if there are none.

        Args:
            student: Name of the student.
            first: Name of a run.
            second: Name of another.
            bucket: Answers of this length only; None where fewer than 20 prompts have it.
        """
        gains = self._gains(student, first, second, bucket)
        return None if gains is None else paired_difference(gains, np.zeros_like(gains))

    def between_students(
        self, student: str, other: str, first: str, second: str, bucket: str | None = None
    ) -> Difference | None:
        """Return how much larger the difference of two runs is for one student than for another."""
        gains = [self._gains(name, first, second, bucket) for name in (student, other)]
        if gains[0] is None or gains[1] is None or gains[0].shape != gains[1].shape:
            return None
        return paired_difference(gains[0], gains[1])

    def growth(self, student: str, first: str, second: str) -> Difference | None:
        """Return how much larger the difference is on the longest bucket of answers than on the shortest."""
        by_length = [self._gains(student, first, second, name) for name in self.buckets()]
        known = [gains for gains in by_length if gains is not None]
        return difference_of_gains(known[-1], known[0]) if len(known) > 1 else None

    def _gains(self, student: str, first: str, second: str, bucket: str | None = None) -> np.ndarray | None:
        """First minus second, `[seeds, prompts]`."""
        seeds = sorted(
            {result["seed"] for result in self.of(student, first)}
            & {result["seed"] for result in self.of(student, second)}
        )
        pairs = [tuple(self._scores[self.measure][student, label, seed] for label in (first, second)) for seed in seeds]
        if not pairs:
            return None
        prompts = [index for index in pairs[0][0] if bucket is None or pairs[0][0][index][1] == bucket]
        if len(prompts) < (2 if bucket is None else FEWEST_PROMPTS):
            return None
        return np.array([[one[index][0] - other[index][0] for index in prompts] for one, other in pairs])

    def buckets(self) -> list[str]:
        """Return the lengths of answer that occur, shortest first."""
        scores = self._scores[self.measure].values()
        found = {name for by_prompt in scores for _, name in by_prompt.values()}
        return [name for name in bucket_names() if name in found]


def _by_prompt(rows: Sequence[Result], measure: str) -> dict[int, tuple[float, str]]:
    """Prompt -> its score in [0, 100], mean over decoding seeds, and the bucket of its answer's length."""
    scores: dict[int, list[float]] = {}
    lengths: dict[int, str] = {}
    scale = 100.0 if measure == "exact_match" else 1.0
    for row in rows:
        scores.setdefault(row["index"], []).append(scale * row[measure])
        lengths[row["index"]] = length_bucket(row["reference_tokens"])
    return {index: (sum(values) / len(values), lengths[index]) for index, values in scores.items()}


@dataclass(frozen=True)
class Finding:
    """How far one run is ahead of another on a test set.

    Attributes:
        test_set: Name of the test set.
        student: Name of the student.
        first: Label of a run.
        second: Label of the run that is subtracted.
        difference: First minus second.
        adjusted_p: Its p-value, corrected for the number of all findings of the comparison by Holm's method.
    """

    test_set: str
    student: str
    first: str
    second: str
    difference: Difference
    adjusted_p: float

    @property
    def is_significant(self) -> bool:
        """Whether it is; one training seed says nothing about others."""
        return self.adjusted_p < LEVEL and self.difference.seeds > 1


def find(comparisons: Mapping[str, Comparison], pairs: Sequence[Pair]) -> list[Finding]:
    """Return the differences of all pairs, students and test sets: the family that p-values are corrected for.

    Args:
        comparisons: Test set -> its results.
        pairs: Labels `(first, second)`; a pair of which a run is missing is left out.
    """
    found = [
        (name, student, first, second, difference)
        for name, comparison in comparisons.items()
        for student in comparison.students
        for first, second in dict.fromkeys(pairs)
        if (difference := comparison.difference(student, first, second)) is not None
    ]
    adjusted = holm([difference.p_value for *_, difference in found])
    return [Finding(*one, p_value) for one, p_value in zip(found, adjusted, strict=True)]


def sentences(comparisons: Mapping[str, Comparison], findings: Sequence[Finding], pairs: Sequence[Pair]) -> list[str]:
    """Return the findings in words, then how the differences of some pairs change with length and student.

    Args:
        comparisons: Test set -> its results.
        findings: Of `find`.
        pairs: Compared by length and student.
    """
    lines: list[str] = []
    seeds = min((finding.difference.seeds for finding in findings), default=FEWEST_SEEDS)
    if seeds < FEWEST_SEEDS:
        lines.append(
            f"too few training seeds ({seeds}): how much a repeated training would differ is hardly known; "
            f"give {FEWEST_SEEDS} or more"
        )
    for name, comparison in comparisons.items():
        for student in comparison.students:
            title = ", ".join(part for part in (name if len(comparisons) > 1 else "", student) if part)
            lines += [f"{title}:"] if title else []
            lines += [
                "  "
                + verdict(
                    one.first,
                    one.second,
                    one.difference,
                    one.adjusted_p,
                    unit=unit(comparison.measure),
                    lower_is_better=comparison.measure in TEACHER_MEASURES,
                )
                for one in findings
                if (one.test_set, one.student) == (name, student)
            ]
    if len(findings) > 1:
        lines.append(f"p-values are corrected for all {len(findings)} comparisons (Holm); significant: below {LEVEL}")
    for name, comparison in comparisons.items():
        lines += _by_length(comparison, pairs, f"{name}: " if len(comparisons) > 1 else "")
    return lines


def _by_length(comparison: Comparison, pairs: Sequence[Pair], title: str) -> list[str]:
    """Does the difference grow with the length of the answer, and with the student?"""
    buckets, rows = comparison.buckets(), []
    for first, second in pairs:
        for student in comparison.students:
            found = [comparison.difference(student, first, second, bucket) for bucket in (None, *buckets)]
            if found[0] is not None:
                found.append(comparison.growth(student, first, second))
                rows.append([f"{first} - {second}", student or "all", *map(_cell, found)])
        rows += _by_size(comparison, first, second)
    headers = ("difference", "student", "all answers", *(f"{bucket} tokens" for bucket in buckets))
    about = "95% interval of each alone, not corrected; * excludes 0"
    about = f"{title}{unit(comparison.measure)} of {measure_title(comparison.measure)} ({about})"
    return ["", f"{about}:", table(rows, (*headers, "longest minus shortest"))] if rows else []


def _by_size(comparison: Comparison, first: str, second: str) -> list[list[str]]:
    """How much larger the difference is for the first student than for each other one."""
    rows = []
    for other in comparison.students[1:]:
        smaller = comparison.students[0]
        found = [comparison.between_students(smaller, other, first, second, b) for b in (None, *comparison.buckets())]
        if found[0] is not None:
            cells = map(_cell, found)
            rows.append([f"{first} - {second}", f"{smaller} minus {other}", *cells, "-"])
    return rows


def measure_title(measure: str) -> str:
    """Return what a measure is called in tables and pictures."""
    return (MEASURES | TEACHER_MEASURES).get(measure, measure)


def unit(measure: str) -> str:
    """Return what differences of a measure count in."""
    return "nats" if measure in TEACHER_MEASURES else "points"


def interval(difference: Difference) -> str:
    """Return a difference and its interval as text."""
    mean, low, high = (round(value, 1) + 0.0 for value in (difference.mean, difference.low, difference.high))  # no -0.0
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return interval(difference) + ("*" if difference.is_clear and difference.seeds > 1 else "")
