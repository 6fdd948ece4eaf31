"""What a comparison found: table, sentences, CSV and picture."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from switchkd.cli.display import BLUE, GREY, ORANGE, table
from switchkd.compare.significance import Difference, difference_of_gains, paired_difference, verdict
from switchkd.errors import UserError
from switchkd.evaluation.metrics import bucket_names, length_bucket, mean_and_std

Result = Mapping[str, Any]
#: Buckets of answer length with fewer prompts are not compared: their intervals are too wide to say anything.
FEWEST_PROMPTS = 20


class Comparison:
    """The results of all finished runs, by student and run.

    Args:
        results: The contents of the `result.json` of every finished run.
        rows: `(student, run, seed)` -> the rows that its evaluation scored.
    """

    def __init__(self, results: Sequence[Result], rows: Mapping[tuple[str, str, int], Sequence[Result]]) -> None:
        self.results = list(results)
        self.students = list(dict.fromkeys(result["student"] for result in results))
        self.labels = list(dict.fromkeys(result["run"] for result in results))
        self._scores = {key: _by_prompt(scored) for key, scored in rows.items()}

    def of(self, student: str, label: str) -> list[Result]:
        """Return the results of one run of one student, in the order of the training seeds."""
        chosen = [result for result in self.results if (result["student"], result["run"]) == (student, label)]
        return sorted(chosen, key=lambda result: result["seed"])

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
        pairs = [tuple(self._scores[student, label, seed] for label in (first, second)) for seed in seeds]
        if not pairs:
            return None
        prompts = [index for index in pairs[0][0] if bucket is None or pairs[0][0][index][1] == bucket]
        if len(prompts) < (2 if bucket is None else FEWEST_PROMPTS):
            return None
        return np.array([[one[index][0] - other[index][0] for index in prompts] for one, other in pairs])

    def buckets(self) -> list[str]:
        """Return the lengths of answer that occur, shortest first."""
        found = {name for result in self.results for name in result["evaluate"]["by_length"]}
        return [name for name in bucket_names() if name in found]


def _by_prompt(rows: Sequence[Result]) -> dict[int, tuple[float, str]]:
    """Prompt -> its score, mean over decoding seeds, and the bucket of its answer's length."""
    scores: dict[int, list[float]] = {}
    lengths: dict[int, str] = {}
    for row in rows:
        scores.setdefault(row["index"], []).append(row["rouge_l"])
        lengths[row["index"]] = length_bucket(row["reference_tokens"])
    return {index: (sum(values) / len(values), lengths[index]) for index, values in scores.items()}


def tables(comparison: Comparison) -> str:
    """Return one table per student: means over training seeds, with standard deviations where there are several."""
    parts = []
    for student in comparison.students:
        rows = [
            _table_row(comparison, label, found)
            for label in comparison.labels
            if (found := comparison.of(student, label))
        ]
        headers = ("run", "seeds", "ROUGE-L", "exact", *comparison.buckets(), "teacher's tokens", "passes", "seconds")
        title = f"{student}\n" if student else ""
        parts.append(title + table(rows, headers))
    return "\n\n".join(parts)


def _table_row(comparison: Comparison, label: str, found: Sequence[Result]) -> list[Any]:
    mean, deviation = mean_and_std([result["evaluate"]["rouge_l"] for result in found])
    row: list[Any] = [label, len(found), f"{mean:.1f} +- {deviation:.1f}" if len(found) > 1 else f"{mean:.1f}"]
    row.append(f"{_mean(found, 'evaluate', 'exact_match'):.0f}%")
    for bucket in comparison.buckets():
        row.append(_known_mean([r["evaluate"]["by_length"].get(bucket, {}).get("rouge_l") for r in found], ".1f"))
    row.append(_known_mean([result["train"].get("teacher_share") for result in found], ".0%"))
    passes = [result["train"].get("teacher_passes") for result in found]
    row.append(round(sum(passes) / len(passes)) if all(value is not None for value in passes) else None)
    row.append(f"{_mean(found, 'train', 'seconds'):.0f}")
    return row


def _known_mean(values: Sequence[float | None], style: str) -> str | None:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), style) if known else None


def _mean(found: Sequence[Result], part: str, name: str) -> float:
    return sum(result[part][name] for result in found) / len(found)


def sentences(
    comparison: Comparison, against: Sequence[tuple[str, str]], pairs: Sequence[tuple[str, str]]
) -> list[str]:
    """Return the findings as sentences: every run against its baseline and the given pairs, then lengths and sizes.

    Args:
        comparison: The results.
        against: Every run with its baseline.
        pairs: More pairs of runs.
    """
    lines = []
    compared = [*against, *(pair for pair in pairs if pair not in against)]
    for student in comparison.students:
        lines += [f"{student}:"] if student else []
        for first, second in compared:
            found = comparison.difference(student, first, second)
            if found is not None:
                lines.append("  " + verdict(first, second, found))
    lines += _by_length(comparison, [*pairs] or compared)
    return lines


def _by_length(comparison: Comparison, compared: Sequence[tuple[str, str]]) -> list[str]:
    """Does the difference grow with the length of the answer, and with the student?"""
    buckets = comparison.buckets()
    lines = []
    for first, second in compared:
        rows = []
        for student in comparison.students:
            found = [comparison.difference(student, first, second, bucket) for bucket in (None, *buckets)]
            if found[0] is not None:
                found.append(comparison.growth(student, first, second))
                rows.append([student or "all", *map(_cell, found)])
        rows += _by_size(comparison, first, second)
        if rows:
            headers = ("student", "all answers", *(f"{bucket} tokens" for bucket in buckets), "longest minus shortest")
            lines += [
                "",
                f"{first} minus {second}, points of ROUGE-L (95% interval; * excludes 0):",
            ]
            lines.append(table(rows, headers))
    return lines


def _by_size(comparison: Comparison, first: str, second: str) -> list[list[str]]:
    """How much larger the difference is for the first student than for each other one."""
    rows = []
    for other in comparison.students[1:]:
        smaller = comparison.students[0]
        found = [comparison.between_students(smaller, other, first, second, b) for b in (None, *comparison.buckets())]
        if found[0] is not None:
            rows.append([f"{smaller} minus {other}", *(_cell(difference) for difference in found), "-"])
    return rows


def _is_significant(difference: Difference) -> bool:
    """Whether it is significant; one training seed says nothing about others."""
    return difference.is_clear and difference.seeds > 1


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    star = "*" if _is_significant(difference) else ""
    return f"{difference.mean:+.1f} ({difference.low:+.1f} to {difference.high:+.1f}){star}"


def write_csv(comparisons: Mapping[str, Comparison], path: Path) -> None:
    """Write one line per run and test set.

    Args:
        comparisons: Test set -> its results.
        path: The file.
    """
    lines = [(name, result) for name, comparison in comparisons.items() for result in comparison.results]
    axes = list(dict.fromkeys(axis for _, result in lines for axis in result["cell"]))
    buckets = bucket_names()
    buckets = [name for name in buckets if any(name in comparison.buckets() for comparison in comparisons.values())]
    names = ["student", "run", *axes, "seed", "method", "test_set", "rouge_l", "rouge_l_decoding_std", "exact_match"]
    names += ["completion_tokens", *(f"rouge_l_{bucket.replace(' ', '_')}" for bucket in buckets)]
    names += ["teacher_share", "teacher_passes", "train_seconds", "steps"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for name, result in lines:
            scored, trained = result["evaluate"], result["train"]
            values = [result["student"], result["run"], *(result["cell"].get(axis) for axis in axes), result["seed"]]
            values += [trained["method"], name, scored["rouge_l"], scored["rouge_l_std"], scored["exact_match"]]
            values += [scored["completion_tokens"]]
            values += [scored["by_length"].get(bucket, {}).get("rouge_l") for bucket in buckets]
            values += [
                trained.get("teacher_share"),
                trained.get("teacher_passes"),
                trained["seconds"],
                trained["steps"],
            ]
            writer.writerow(["" if value is None else value for value in values])


def plot(comparison: Comparison, against: Sequence[tuple[str, str]], path: Path) -> None:
    """Draw every run of every student: a dot per training seed, the mean, and its 95% interval against the baseline.

    Raises:
        UserError: The file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window, also on a machine with a display
    from matplotlib import pyplot as plt

    count, height = len(comparison.students), 1.6 + 0.34 * len(comparison.labels)
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            1, count, figsize=(2.2 + 4.6 * count, height), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, student in zip(grid[0], comparison.students, strict=True):
            _draw(axes, comparison, student, dict(against))
        grid[0][0].set_yticks(range(len(comparison.labels)), comparison.labels)
        grid[0][0].invert_yaxis()
        try:
            figure.savefig(path, dpi=110)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the picture {path}: {error}") from error
        finally:
            plt.close(figure)


def _draw(axes: Any, comparison: Comparison, student: str, baseline_of: Mapping[str, str]) -> None:
    for place, label in enumerate(comparison.labels):
        scores = [result["evaluate"]["rouge_l"] for result in comparison.of(student, label)]
        if not scores:
            continue
        mean = sum(scores) / len(scores)
        baseline = baseline_of.get(label)
        found = comparison.difference(student, label, baseline) if baseline is not None else None
        colour = ORANGE if found is not None and _is_significant(found) else BLUE
        if found is not None and found.seeds > 1:
            axes.plot([mean - found.mean + found.low, mean - found.mean + found.high], [place, place], color=colour,
                      linewidth=2.4, solid_capstyle="round", zorder=2)  # fmt: skip
        axes.plot(scores, [place] * len(scores), "o", color=colour, alpha=0.35, markersize=5, zorder=1)
        axes.plot([mean], [place], "D", color=colour, markersize=6, markeredgecolor="white", zorder=3)
    axes.grid(axis="y", color="#EEEEEE")
    axes.set_axisbelow(True)
    axes.set_title(student or "ROUGE-L by run", loc="left")
    axes.set_xlabel("ROUGE-L; orange: differs significantly from its baseline")
    axes.tick_params(axis="y", length=0)
