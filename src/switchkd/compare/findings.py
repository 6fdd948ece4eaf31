"""What a comparison found: scores by run, differences with what is significant, and the sentences that say so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from switchkd.compare.significance import (
    LEVEL,
    Difference,
    difference_of_gains,
    holm,
    p_text,
    paired_difference,
    verdict,
)
from switchkd.compare.tasks import MEASURES, TEACHER_MEASURES
from switchkd.evaluation.metrics import bucket_names, length_bucket, mean_with_interval

Result = Mapping[str, Any]
Pair = tuple[str, str]
#: Buckets of answer length with fewer prompts are not compared: their intervals are too wide to say anything.
FEWEST_PROMPTS = 20
#: With fewer training seeds their spread is hardly known.
FEWEST_SEEDS = 3
#: More differences than this are in the table only.
MOST_SENTENCES = 4


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

    def ends(self, result: Result, measure: str) -> list[float | None]:
        """Return the ends of the 95% interval of a run's mean over prompts; None twice where it has one prompt."""
        scores = self._scores[measure][result["student"], result["run"], result["seed"]]
        return list(mean_with_interval(np.array([value for value, _ in scores.values()])).interval or (None, None))

    def mean(self, student: str, label: str, bucket: str | None = None) -> Difference | None:
        """Return a run's mean score with its 95% interval, as its difference from 0; None where there is none.

        Args:
            student: Name of the student.
            label: Name of the run.
            bucket: Answers of this length only.
        """
        by_seed = [self._scores[self.measure][student, label, one["seed"]] for one in self.of(student, label)]
        scores = [[value for value, name in one.values() if bucket in (None, name)] for one in by_seed]
        if not scores or len(scores[0]) < 2 or len({len(one) for one in scores}) > 1:
            return None
        return paired_difference(np.array(scores), np.zeros((len(scores), len(scores[0]))))

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


def differences_table(
    comparisons: Mapping[str, Comparison], findings: Sequence[Finding]
) -> tuple[list[str], list[list[Any]]]:
    """Return headers and rows of a table with one row per finding: difference, 95% interval, p and what it says.

    Args:
        comparisons: Test set -> its results.
        findings: Of `find`.
    """
    comparison = next(iter(comparisons.values()))
    with_set, with_student = len(comparisons) > 1, len({one.student for one in findings}) > 1
    lead = [*(["test set"] if with_set else []), *(["student"] if with_student else [])]
    headers = [*lead, "run", "against", f"difference [{unit(comparison.measure)}]", "95% interval", "adjusted p"]
    rows: list[list[Any]] = []
    for one in findings:
        row: list[Any] = [*([one.test_set] if with_set else []), *([one.student] if with_student else [])]
        mean, ends = interval(one.difference).split(" ", 1)
        row += [one.first, one.second, mean, ends.strip("()"), p_text(one.adjusted_p)]
        rows.append([*row, f"{one.difference.seeds_ahead} of {one.difference.seeds}", _says(one, comparison.measure)])
    return [*headers, "seeds that agree", "finding"], rows


def _says(one: Finding, measure: str) -> str:
    if one.difference.seeds == 1:
        return "one seed only"
    if not one.is_significant:
        return "not significant"
    return "ahead *" if (one.difference.mean > 0) != (measure in TEACHER_MEASURES) else "behind *"


def sentences(comparisons: Mapping[str, Comparison], findings: Sequence[Finding], pairs: Sequence[Pair]) -> list[str]:
    """Return what matters most of the findings in a few sentences; the table has the rest.

    Args:
        comparisons: Test set -> its results.
        findings: Of `find`.
        pairs: Of whom the sentences speak, the significant and the largest first; without them of all that are
            significant.
    """
    seeds = min((finding.difference.seeds for finding in findings), default=FEWEST_SEEDS)
    lines = too_few_seeds(seeds)
    asked = [one for one in findings if (one.first, one.second) in set(pairs)]
    if not pairs:
        asked = [one for one in findings if one.is_significant or len(findings) == 1]
    ordered = sorted(asked, key=lambda one: (not one.is_significant, -abs(one.difference.mean)))
    for one in ordered[:MOST_SENTENCES]:
        measure = comparisons[one.test_set].measure
        where = ", ".join(part for part in (one.test_set if len(comparisons) > 1 else "", one.student) if part)
        said = verdict(
            one.first,
            one.second,
            one.difference,
            one.adjusted_p,
            unit=unit(measure),
            lower_is_better=measure in TEACHER_MEASURES,
        )
        lines.append(f"{where}: {said}" if where else said)
    if len(findings) > 1:
        found = sum(one.is_significant for one in findings)
        lines.append(
            f"{found} of {len(findings)} differences are significant; p-values are corrected for all {len(findings)} "
            f"(Holm), significant is below {LEVEL}"
        )
    return lines


def too_few_seeds(seeds: int) -> list[str]:
    """Return the sentence that says so; none where they are enough."""
    if seeds >= FEWEST_SEEDS:
        return []
    return [
        f"too few training seeds ({seeds}): how much a repeated training would differ is hardly known; give "
        f"{FEWEST_SEEDS} or more"
    ]


@dataclass(frozen=True)
class LengthDifference:
    """A difference of two runs on the answers of one length.

    Attributes:
        test_set: Name of the test set.
        student: Name of the student; or "one minus other": how much larger the difference is for the first.
        first: Label of a run.
        second: Label of the run that is subtracted.
        answers: `ALL_ANSWERS`, a length of answer, or `GROWTH`.
        difference: First minus second; None where too few prompts have such an answer.
    """

    test_set: str
    student: str
    first: str
    second: str
    answers: str
    difference: Difference | None


ALL_ANSWERS, GROWTH = "all answers", "longest minus shortest"


def by_length(comparisons: Mapping[str, Comparison], pairs: Sequence[Pair]) -> list[LengthDifference]:
    """Return how the differences of some pairs change with the length of the answer and with the student.

    Args:
        comparisons: Test set -> its results.
        pairs: Labels `(first, second)`; a pair of which a run is missing is left out.
    """
    found = []
    for name, comparison in comparisons.items():
        lengths = [None, *comparison.buckets()]
        for first, second in pairs:
            lines: dict[str, dict[str, Difference | None]] = {}
            for student in comparison.students:
                by_bucket = {
                    bucket or ALL_ANSWERS: comparison.difference(student, first, second, bucket) for bucket in lengths
                }
                lines[student] = {**by_bucket, GROWTH: comparison.growth(student, first, second)}
            for other in comparison.students[1:]:
                smaller = comparison.students[0]
                lines[f"{smaller} minus {other}"] = {
                    bucket or ALL_ANSWERS: comparison.between_students(smaller, other, first, second, bucket)
                    for bucket in lengths
                }
            found += [
                LengthDifference(name, student, first, second, answers, difference)
                for student, line in lines.items()
                if line[ALL_ANSWERS] is not None
                for answers, difference in line.items()
            ]
    return found


def length_tables(
    comparisons: Mapping[str, Comparison], found: Sequence[LengthDifference]
) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Return title, headers and rows of a table per test set, with a star where an interval excludes 0.

    Args:
        comparisons: Test set -> its results.
        found: Of `by_length`.
    """
    tables = []
    for name, comparison in comparisons.items():
        lines: dict[tuple[str, str, str], dict[str, str]] = {}
        for one in found:
            if one.test_set == name:
                lines.setdefault((one.first, one.second, one.student), {})[one.answers] = _cell(one.difference)
        if not lines:
            continue
        title = f"{name}: " if len(comparisons) > 1 else ""
        title += f"{unit(comparison.measure)} of {measure_title(comparison.measure)} by length of the answer"
        title += " (95% interval of each alone, not corrected; * excludes 0)"
        columns = [ALL_ANSWERS, *comparison.buckets(), GROWTH]
        with_student = any(student for *_, student in lines)
        headers = ["difference", *(["student"] if with_student else [])]
        headers += [column if column in (ALL_ANSWERS, GROWTH) else f"{column} tokens" for column in columns]
        rows = [
            [f"{first} - {second}", *([student] if with_student else []), *(cells.get(name, "-") for name in columns)]
            for (first, second, student), cells in lines.items()
        ]
        tables.append((title, headers, rows))
    return tables


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
