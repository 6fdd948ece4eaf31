"""The files of a comparison: tables as text, Markdown, LaTeX and CSV."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchkd.cli.display import markdown_table, table
from switchkd.compare.findings import (
    Comparison,
    Finding,
    LengthDifference,
    Result,
    differences_table,
    length_tables,
    measure_title,
)
from switchkd.compare.latex import latex_document
from switchkd.evaluation.metrics import bucket_names, mean_and_std

#: Title, headers and rows.
Table = tuple[str, list[str], list[list[Any]]]


def all_tables(
    comparisons: Mapping[str, Comparison], findings: Sequence[Finding], lengths: Sequence[LengthDifference]
) -> list[Table]:
    """Return every table of a comparison: scores by test set and student, the differences, those by length.

    Args:
        comparisons: Test set -> its results.
        findings: Of `switchkd.compare.findings.find`.
        lengths: Of `switchkd.compare.findings.by_length`.
    """
    tables = [(title, *_scores(comparison, student)) for title, comparison, student, _ in _parts(comparisons)]
    if findings:
        measure = measure_title(next(iter(comparisons.values())).measure)
        title = f"Differences of {measure} (95% interval over seeds and prompts; * significant after Holm's correction)"
        tables.append((title, *differences_table(comparisons, findings)))
    return [*tables, *length_tables(comparisons, lengths)]


def as_text(tables: Sequence[Table], words: Sequence[str]) -> str:
    """Return the tables for a terminal, and the sentences below them."""
    parts = [f"{title}\n{table(rows, headers)}" for title, headers, rows in tables]
    return "\n\n".join([*parts, *(["\n".join(words)] if words else [])])


def as_markdown(
    comparisons: Mapping[str, Comparison],
    findings: Sequence[Finding],
    against: Mapping[str, str],
    tables: Sequence[Table],
    words: Sequence[str],
) -> str:
    """Return the tables as Markdown, before them the sentences and one table per plane of a grid's first two axes.

    Args:
        comparisons: Test set -> its results.
        findings: Of `switchkd.compare.findings.find`.
        against: Label of a run -> that of its baseline.
        tables: Of `all_tables`.
        words: The sentences.
    """
    parts = ["\n".join(f"- {line}" for line in words)] if words else []
    for title, comparison, student, name in _parts(comparisons):
        chosen = _with_baseline(findings, name, student, against)
        planes_found = _planes(comparison, student, chosen)
        axes = " and ".join(list(comparison.axes)[:2])
        parts += [f"## {title}, by {axes}; * significantly different from the baseline"] if planes_found else []
        parts += [markdown_table(rows, headers) for headers, rows in planes_found]
    for title, headers, rows in tables:
        parts += [f"## {title}", markdown_table(rows, headers)]
    return "\n\n".join(parts) + "\n"


def write_tables(tables: Sequence[Table], path: Path) -> None:
    """Write the tables as LaTeX, to be included in a document that loads booktabs."""
    path.write_text(latex_document(tables), encoding="utf-8")


def write_runs(comparisons: Mapping[str, Comparison], path: Path) -> None:
    """Write a CSV file with one line per run and test set; the intervals of a run are 95% over prompts."""
    lines = [(name, comparison, result) for name, comparison in comparisons.items() for result in comparison.results]
    axes = _axes(comparisons)
    buckets = [name for name in bucket_names() if any(name in one.buckets() for one in comparisons.values())]
    measures = list(dict.fromkeys(name for comparison in comparisons.values() for name in comparison.measures))
    main = next(iter(comparisons.values())).measure
    names = ["student", "run", *axes, "seed", "method", "test_set"]
    names += [column for one in measures for column in (one, f"{one}_low", f"{one}_high")]
    names.append("rouge_l_decoding_std")
    names += [f"{main}_{bucket.replace(' ', '_')}" for bucket in buckets]
    names += ["completion_tokens", "teacher_share", "teacher_passes", "train_seconds", "steps"]
    rows = []
    for name, comparison, result in lines:
        scored, trained = result["evaluate"], result["train"]
        row = [result["student"], result["run"], *(result["cell"].get(axis) for axis in axes), result["seed"]]
        row += [trained["method"], name]
        for one in measures:
            row.append(comparison.score(result, measure=one) if one in comparison.measures else None)
            row += comparison.ends(result, one) if one in comparison.measures else [None, None]
        row += [scored["rouge_l_std"], *(comparison.score(result, bucket) for bucket in buckets)]
        row += [scored["completion_tokens"], trained.get("teacher_share"), trained.get("teacher_passes")]
        rows.append([*row, trained["seconds"], trained["steps"]])
    _write_csv(path, names, rows)


def write_differences(comparisons: Mapping[str, Comparison], findings: Sequence[Finding], path: Path) -> None:
    """Write a CSV file with one line per comparison of two runs; the axes are those of the first."""
    axes = _axes(comparisons)
    cells = {result["run"]: result["cell"] for comparison in comparisons.values() for result in comparison.results}
    names = ["test_set", "student", "first", "second", *axes, "measure", "difference", "low", "high", "p", "adjusted_p"]
    names += ["significant", "seeds", "prompts", "seeds_ahead"]
    rows = []
    for one in findings:
        found = one.difference
        row = [one.test_set, one.student, one.first, one.second, *(cells[one.first].get(axis) for axis in axes)]
        row += [comparisons[one.test_set].measure, found.mean, found.low, found.high, found.p_value, one.adjusted_p]
        rows.append([*row, one.is_significant, found.seeds, found.prompts, found.seeds_ahead])
    _write_csv(path, names, rows)


def write_lengths(lengths: Sequence[LengthDifference], path: Path) -> None:
    """Write a CSV file with one line per pair, student and length of answer."""
    names = ["test_set", "student", "first", "second", "answers", "difference", "low", "high", "seeds", "prompts"]
    rows = [
        [one.test_set, one.student, one.first, one.second, one.answers, found.mean, found.low, found.high, found.seeds,
         found.prompts]
        for one in lengths
        if (found := one.difference) is not None
    ]  # fmt: skip
    _write_csv(path, names, rows)


def _parts(comparisons: Mapping[str, Comparison]) -> list[tuple[str, Comparison, str, str]]:
    """Title, results, student and test set of each table."""
    found = []
    for name, comparison in comparisons.items():
        title = f"{measure_title(comparison.measure)}: mean +- standard deviation over training seeds"
        for student in comparison.students:
            which = ", ".join(part for part in (name if len(comparisons) > 1 else "", student) if part)
            found.append((f"{which}; {title}" if which else title, comparison, student, name))
    return found


def _with_baseline(
    findings: Sequence[Finding], test_set: str, student: str, against: Mapping[str, str]
) -> dict[str, Finding]:
    """Label of a run -> how it differs from its baseline."""
    return {
        one.first: one
        for one in findings
        if (one.test_set, one.student) == (test_set, student) and against.get(one.first) == one.second
    }


def _scores(comparison: Comparison, student: str) -> tuple[list[str], list[list[Any]]]:
    main, *others = comparison.measures
    headers = ["run", "seeds", measure_title(main), *map(measure_title, others)]
    headers += [*(f"{bucket} tokens" for bucket in comparison.buckets()), "by teacher", "passes", "seconds"]
    rows = []
    for label in comparison.labels:
        found = comparison.of(student, label)
        if not found:
            continue
        row: list[Any] = [label, len(found), _spread(comparison, found)]
        row += [_mean([comparison.score(result, measure=name) for result in found], ".1f") for name in others]
        row += [_mean([comparison.score(result, bucket) for result in found], ".1f") for bucket in comparison.buckets()]
        row.append(_mean([result["train"].get("teacher_share") for result in found], ".0%"))
        passes = [result["train"].get("teacher_passes") for result in found]
        row.append(round(sum(passes) / len(passes)) if all(value is not None for value in passes) else None)
        row.append(_mean([result["train"]["seconds"] for result in found], ".0f"))
        rows.append(row)
    return headers, rows


def _planes(
    comparison: Comparison, student: str, against: Mapping[str, Finding]
) -> list[tuple[list[str], list[list[Any]]]]:
    """Tables of the first two axes, one for each combination of the others; a star marks a significant difference."""
    found = []
    for title, plane in planes(comparison, student):
        lines, columns = list(comparison.axes.values())[:2]
        rows = []
        for line in lines:
            cells: list[Any] = [line]
            for column in columns:
                results = plane.get((line, column))
                if results is None:
                    cells.append(None)
                    continue
                one = against.get(results[0]["run"])
                cells.append(_spread(comparison, results) + (" *" if one is not None and one.is_significant else ""))
            rows.append(cells)
        first = next(iter(comparison.axes))
        found.append(([f"{first} ({title})" if title else first, *columns], rows))
    return found


def planes(comparison: Comparison, student: str) -> list[tuple[str, dict[tuple[str, str], list[Result]]]]:
    """Return a grid as planes of its first two axes: title, and `(row, column)` -> results in the order of the seeds.

    There is a plane for every combination of labels of the other axes, and none where the grid has a single axis.
    """
    axes = list(comparison.axes)
    if len(axes) < 2:
        return []
    found: dict[str, dict[tuple[str, str], list[Result]]] = {}
    for label in comparison.labels:
        results = comparison.of(student, label)
        if not results or not all(axis in results[0]["cell"] for axis in axes[:2]):
            continue
        cell = results[0]["cell"]
        others = ", ".join(f"{axis} {cell[axis]}" for axis in axes[2:] if axis in cell)
        found.setdefault(others, {})[cell[axes[0]], cell[axes[1]]] = results
    return list(found.items())


def _spread(comparison: Comparison, found: Sequence[Result]) -> str:
    mean, deviation = mean_and_std([comparison.score(result) or 0.0 for result in found])
    return f"{mean:.1f} +- {deviation:.1f}" if len(found) > 1 else f"{mean:.1f}"


def _mean(values: Sequence[float | None], style: str) -> str | None:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), style) if known else None


def _axes(comparisons: Mapping[str, Comparison]) -> list[str]:
    return list(dict.fromkeys(axis for comparison in comparisons.values() for axis in comparison.axes))


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(["" if value is None else value for value in row] for row in rows)
