"""Scores with their intervals, what differs, and the answers behind them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from switchkd.compare.findings import Comparison, Finding, differences_table, measure_title, unit
from switchkd.compare.significance import p_text
from switchkd.compare.tasks import TEACHER_MEASURES
from switchkd.page.document import Answers, Figure, Section, Table
from switchkd.page.figures import Interval, intervals
from switchkd.report.compared import Compared

#: Answers of more runs than this to one prompt are too many to read.
MOST_ANSWERS = 8
#: More differences than this are in the table only.
MOST_DIFFERENCES = 24


def score_section(compared: Compared, of: str = "") -> Section:
    """Return the scores by test set, student and length of the answer."""
    figures = [
        _scores(compared, name, comparison, student)
        for name, comparison in compared.comparisons.items()
        for student in comparison.students
    ]
    return Section(f"Scores{of}", figures, _spread(compared))


def difference_section(compared: Compared, of: str = "") -> Section | None:
    """Return the differences that were asked for, or None where there are none."""
    if not compared.findings:
        return None
    measure = _measure(compared)
    panels: dict[str, list[Interval]] = {}
    for one in compared.findings[:MOST_DIFFERENCES]:
        row = Interval(
            f"{one.first} \N{MINUS SIGN} {one.second}",
            one.difference.mean,
            one.difference.low,
            one.difference.high,
            filled=one.is_significant,
            said=f"{signed(one.difference.mean)}{' *' if one.is_significant else ''}",
        )
        panels.setdefault(_where(compared, one), []).append(row)
    ends = [end for rows in panels.values() for row in rows for end in (row.low, row.high) if end is not None]
    limits = (min(ends), max(ends))
    headers, cells = differences_table(compared.comparisons, compared.findings)
    title = f"Differences of {measure_title(measure)}"
    axis = f"difference [{unit(measure)}]"
    figure = Figure(
        title,
        [
            (where or "95% intervals", intervals(rows, title=title, x_label=axis, zero=True, limits=limits))
            for where, rows in panels.items()
        ],
        headers,
        cells,
        "differences",
        "95% intervals. Filled and with a star: significant after Holm's correction for all of them. Empty: not.",
    )
    blocks: list[Any] = [figure, Table("As a table", headers, cells, "differences", open=False)]
    return Section(f"Differences{of}", blocks, compared.words)


def cards(compared: Compared) -> list[tuple[str, list[str]]]:
    """Return what was compared, what won, by how much, and whether it is real, as questions with answers."""
    parts = [(name, one, student) for name, one in compared.comparisons.items() for student in one.students]
    won, much, real = [], [], []
    for name, comparison, student in parts:
        ranked = _ranked(compared, comparison, student)
        if not ranked:
            continue
        lead = ", ".join(
            part
            for part in (name if len(compared.comparisons) > 1 else "", student if len(comparison.students) > 1 else "")
            if part
        )
        lead = f"{lead}: " if lead else ""
        best = ranked[0]
        found = comparison.mean(student, best)
        value = _value(comparison, student, best)
        ends = "" if found is None else f" (95% interval {found.low:.1f} to {found.high:.1f})"
        won.append(f"{lead}{best}: {measure_title(comparison.measure)} {value:.1f}{ends}")
        for other, role in _rivals(compared, name, student, ranked):
            difference = comparison.difference(student, best, other)
            if difference is None:
                continue
            said = f"{signed(difference.mean)} {unit(comparison.measure)}"
            much.append(f"{lead}{said} against {other}, {role} ({signed(difference.low)} to {signed(difference.high)})")
            real.append(f"{lead}against {other}: {_is_real(compared, name, student, best, other, difference)}")
    return [
        ("What was compared", _what(compared)),
        ("What won", won or ["nothing to rank"]),
        ("By how much", much or ["one run only: nothing to compare it with"]),
        ("Is it real", real or ["unknown: a difference needs two runs"]),
    ]


def answer_section(compared: Compared, of: str = "") -> Section | None:
    """Return answers to the same prompts, run by run: the largest gain and loss, and the longest answer."""
    blocks: list[Answers] = []
    for name, comparison in compared.comparisons.items():
        student = comparison.students[0]
        first = {
            label: comparison.of(student, label)[0] for label in comparison.labels if comparison.of(student, label)
        }
        scored = compared.rows[name]
        rows = {label: _first_answers(scored[student, label, one["seed"]]) for label, one in first.items()}
        ranked = _ranked(compared, comparison, student) or list(rows)
        prompts = set.intersection(*(set(found) for found in rows.values())) if rows else set()
        if not prompts:
            continue
        best = ranked[0]
        rival = next((label for label, _ in _rivals(compared, name, student, ranked)), None)
        labels = [label for label in rows if label in compared.stages] + ranked
        labels = labels if len(labels) <= MOST_ANSWERS else [best, *([rival] if rival else [])]
        for title, index in _chosen(rows, prompts, best, rival):
            where = f"{name}: " if len(compared.comparisons) > 1 else ""
            row = rows[best][index]
            blocks.append(
                Answers(
                    f"{where}{title} (prompt {index})",
                    row["prompt"],
                    row["references"],
                    [
                        (label, rows[label][index]["completion"], f"ROUGE-L {rows[label][index]['rouge_l']:.0f}")
                        for label in labels
                    ],
                )
            )
    if not blocks:
        return None
    said = "Sampled by the students alone; the first training seed and decoding seed of each run."
    return Section(f"Answers{of}", blocks, [said])


def signed(value: float) -> str:
    """Return a number with its sign, one digit behind the point."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")


def _chosen(
    rows: Mapping[str, Mapping[int, Any]], prompts: set[int], best: str, rival: str | None
) -> Iterator[tuple[str, int]]:
    """Prompts worth reading, none of them twice."""
    gain = {index: rows[best][index]["rouge_l"] - (rows[rival][index]["rouge_l"] if rival else 0) for index in prompts}
    order = sorted(prompts, key=lambda index: (gain[index], index))
    against = f"of {best} over {rival}" if rival else f"answer of {best}"
    length = {index: rows[best][index]["completion_tokens"] for index in prompts}
    picks = [
        (f"Largest gain {against}" if rival else f"Best {against}", order[-1]),
        (f"Largest loss {against.replace(' over ', ' against ')}" if rival else f"Worst {against}", order[0]),
        (f"Longest answer of {best}", max(order, key=lambda index: length[index])),
    ]
    seen: set[int] = set()
    for title, index in picks:
        if index not in seen:
            seen.add(index)
            yield title, index


def _first_answers(rows: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        found.setdefault(row["index"], row)
    return found


def _scores(compared: Compared, name: str, comparison: Comparison, student: str) -> Figure:
    labels = [label for label in comparison.labels if comparison.of(student, label)]
    means = {
        (label, bucket): (_value(comparison, student, label, bucket), comparison.mean(student, label, bucket))
        for label in labels
        for bucket in (None, *comparison.buckets())
    }
    known = [value for value, _ in means.values() if value is not None]
    known += [end for _, found in means.values() if found is not None for end in (max(found.low, 0.0), found.high)]
    limits, measure = (min(known), max(known)), measure_title(comparison.measure)
    panels, cells = [], []
    for bucket in (None, *comparison.buckets()):
        rows = []
        for label in labels:
            value, found = means[label, bucket]
            if value is None:
                continue
            # A score is never negative; the lower end for a small one would be.
            ends = (max(found.low, 0.0), found.high) if found is not None else (None, None)
            rows.append(Interval(label, value, ends[0], ends[1], said=f"{value:.1f}"))
            seeds = len(comparison.of(student, label))
            cells.append([label, bucket or "all", value, *ends, seeds, found.prompts if found is not None else None])
        title = "all answers" if bucket is None else f"answers of {bucket} tokens"
        panels.append((title, intervals(rows, title=title, x_label=measure, limits=limits)))
    which = ", ".join(part for part in (name if len(compared.comparisons) > 1 else "", student) if part)
    headers = ["run", "answer tokens", comparison.measure, "low", "high", "training seeds", "prompts"]
    title = f"{measure} by run and length of the answer" + (f": {which}" if which else "")
    return Figure(title, panels, headers, cells, "-".join(["scores", *which.replace(",", "").split()]))


def _spread(compared: Compared) -> list[str]:
    seeds = max(len(one.of(student, label)) for one in compared.comparisons.values() for student in one.students
                for label in one.labels)  # fmt: skip
    return [
        "Means with 95% intervals over training seeds and prompts."
        if seeds > 1
        else "Means with 95% intervals over prompts; one training seed, so how much a repeated training would differ "
        "is not in them."
    ]


def _what(compared: Compared) -> list[str]:
    first = next(iter(compared.comparisons.values()))
    runs = [label for label in first.labels if label not in compared.stages]
    seeds = len({result["seed"] for result in first.results})
    found = [f"{len(runs)} runs: {', '.join(runs[:8])}{', ...' if len(runs) > 8 else ''}"]
    if len(runs) == 1:
        found = [f"one run: {runs[0]}"]
    if len(first.students) > 1:
        found.append(f"{len(first.students)} students: {', '.join(first.students)}")
    prompts = {
        name: len({row["index"] for row in next(iter(scored.values()))}) for name, scored in compared.rows.items()
    }
    sets = ", ".join(f"{name} ({count} prompts)" for name, count in prompts.items())
    found.append(f"{f'{seeds} training seed' + 's' * (seeds != 1) + ', ' if compared.trained else ''}scored on {sets}")
    return found


def _ranked(compared: Compared, comparison: Comparison, student: str) -> list[str]:
    """The competitors, best first."""
    values = {
        label: value
        for label in comparison.labels
        if label not in compared.stages and (value := _value(comparison, student, label)) is not None
    }
    return sorted(values, key=lambda label: values[label], reverse=comparison.measure not in TEACHER_MEASURES)


def _rivals(compared: Compared, name: str, student: str, ranked: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What the best run is measured against: its baseline, in a grid that of its cell, and the next best."""
    best, others = ranked[0], ranked[1:]
    own = [one.second for one in compared.findings if (one.test_set, one.student, one.first) == (name, student, best)]
    baseline = own[0] if own else compared.baseline
    if baseline in others:
        yield str(baseline), "the baseline"
    if others and others[0] != baseline:
        yield others[0], "the next best"


def _is_real(compared: Compared, name: str, student: str, best: str, other: str, difference: Any) -> str:
    seeds = f"same sign in {difference.seeds_ahead} of {difference.seeds} training seeds"
    if difference.seeds == 1:
        beyond = "beyond" if difference.is_clear else "not beyond"
        return f"{beyond} chance over prompts; one training seed, so it may not repeat"
    asked = {(one.test_set, one.student, one.first, one.second): one for one in compared.findings}
    one = asked.get((name, student, best, other)) or asked.get((name, student, other, best))
    if one is not None:
        said = "significant" if one.is_significant else "not significant"
        return f"{said} (adjusted p {p_text(one.adjusted_p)}), {seeds}"
    said = "the interval excludes 0" if difference.is_clear else "no: the interval includes 0"
    return f"{said} (p {p_text(difference.p_value)}, not corrected: this pair was not asked for), {seeds}"


def _value(comparison: Comparison, student: str, label: str, bucket: str | None = None) -> float | None:
    scores = [comparison.score(result, bucket) for result in comparison.of(student, label)]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def _where(compared: Compared, one: Finding) -> str:
    parts = [one.test_set] if len(compared.comparisons) > 1 else []
    parts += [one.student] if len(compared.comparisons[one.test_set].students) > 1 else []
    return ", ".join(parts)


def _measure(compared: Compared) -> str:
    return next(iter(compared.comparisons.values())).measure
