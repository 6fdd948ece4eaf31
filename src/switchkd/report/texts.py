"""Texts with the writer of every token: who writes where, and rollouts worth reading."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from switchkd.page.document import Figure, Section
from switchkd.page.figures import Line, lines
from switchkd.page.scales import finite
from switchkd.page.writers import RolloutView, teacher_tokens, view, within

#: Positions are drawn in at most so many groups.
MOST_BINS = 40
#: A position that fewer texts reach is not drawn.
FEWEST_ROWS = 5
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Texts:
    """Rollouts from one place: checked rows, and what they are called."""

    label: str
    rows: Sequence[Mapping[str, Any]]


def late(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rollouts of the second half of a training; all of them where no step is recorded."""
    steps = finite(row.get("step") for row in rows)
    return [row for row in rows if row.get("step", 0) >= max(steps) / 2] if steps else list(rows)


def position_section(sources: Sequence[Texts]) -> Section | None:
    """Return how the compared value, its threshold and the teacher's share run along the text."""
    figures = [figure for number, texts in enumerate(sources) if (figure := _positions(texts, number)) is not None]
    said = "Of trainings: the rollouts logged in their second half." if any(
        "step" in row for texts in sources for row in texts.rows[:1]) else ""  # fmt: skip
    return Section("Who writes where", figures, [said] if said else []) if figures else None


def rollout_section(sources: Sequence[Texts]) -> Section | None:
    """Return rollouts worth reading: most and least by the teacher, the longest, and a prompt early and late."""
    views = [found for texts in sources for found in _chosen(texts)]
    shown, left_out = within(views)
    if not shown:
        return None
    said = [f"{left_out} more are left out to keep the page small."] if left_out else []
    return Section("Rollouts", shown, said, legend=True)


def _chosen(texts: Texts) -> Iterator[RolloutView]:
    rows = [row for row in late(texts.rows) if row["tokens"]]
    if not rows:
        return

    def share(row: Mapping[str, Any]) -> float:
        return teacher_tokens(row) / len(row["author"])

    picks = [
        ("most by the teacher", max(rows, key=share)),
        ("longest", max(rows, key=lambda row: len(row["tokens"]))),
        ("least by the teacher", min(rows, key=share)),
        ("largest divergence", max(rows, key=_mean_divergence)),
    ]
    seen: list[Mapping[str, Any]] = []
    for what, row in picks:
        if not any(row is other for other in seen):
            seen.append(row)
            yield _view(texts, row, what, len(seen))
    if pair := _early_and_late(texts.rows):
        for what, row in zip(("the same prompt early", "the same prompt late"), pair, strict=True):
            seen.append(row)
            yield _view(texts, row, what, len(seen))


def _view(texts: Texts, row: Mapping[str, Any], what: str, number: int) -> RolloutView:
    step = f", step {row['step']}" if "step" in row else ""
    return view(row, f"{texts.label}{step}: {what}", f"rollout-{'-'.join(texts.label.split())}-{number}")


def _mean_divergence(row: Mapping[str, Any]) -> float:
    known = finite(row["divergence"])
    return sum(known) / len(known) if known else 0.0


def _early_and_late(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """The rollouts of one prompt that are the most steps apart, or None where no prompt was logged twice."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if finite([row.get("step")]) and row["tokens"]:
            by_prompt.setdefault(row["prompt"], []).append(row)
    pairs = [
        (min(found, key=lambda row: row["step"]), max(found, key=lambda row: row["step"]))
        for found in by_prompt.values()
    ]
    early, last = max(pairs, key=lambda pair: pair[1]["step"] - pair[0]["step"], default=({}, {}))
    return [early, last] if early and early["step"] < last["step"] else None


def _positions(texts: Texts, number: int) -> Figure | None:
    rows = late(texts.rows)
    length = max((len(row["tokens"]) for row in rows), default=0)
    width = -(-length // MOST_BINS) or 1
    fewest = max(FEWEST_ROWS, len(rows) // 10)
    found = []
    for start in range(0, length, width):
        reached = [row for row in rows if len(row["tokens"]) > start]
        if len(reached) < fewest:
            break
        places = slice(start, start + width)
        authors = [author for row in reached for author in row["author"][places]]
        found.append(
            (
                start + (width - 1) / 2,
                authors.count("teacher") / len(authors),
                _quantiles(finite(value for row in reached for value in row["divergence"][places])),
                _quantiles(finite(value for row in reached for value in row["threshold"][places])),
                len(authors),
            )
        )
    if not found:
        return None
    unit = rows[0].get("unit") or "nats"
    measured = (rows[0].get("measured") or "divergence").removesuffix(f"_{unit}").replace("_", " ")
    measured = measured.upper() if measured in ("jsd", "kl") else measured
    panels = []
    x_label = "position in the completion [tokens]"
    compared = [(x, values) for x, _, values, _, _ in found if values]
    limits = [(x, values[2]) for x, _, _, values, _ in found if values]
    if compared:
        bands = [[(x, values[low], values[-1 - low]) for x, values in compared] for low in (0, 1)]
        drawn = [Line(f"median {measured}", [(x, values[2]) for x, values in compared], bands, number)]
        drawn += [Line("threshold", limits, limit=True)] if limits else []
        panels.append((f"{measured} compared", lines(drawn, title=texts.label, x_label=x_label, y_label=unit)))
    share = [Line("teacher share", [(x, value) for x, value, *_ in found], series=number)]
    panels.append(
        (
            "teacher share",
            lines(share, title=texts.label, x_label=x_label, y_label="share of tokens", y_limits=(0.0, 1.0)),
        )
    )
    headers = ["position", "tokens", "teacher share", *(f"{measured} {round(100 * q)}%" for q in QUANTILES)]
    headers.append(f"median threshold [{unit}]")
    cells = [
        [x, tokens, value, *(values or [None] * len(QUANTILES)), limit[2] if limit else None]
        for x, value, values, limit, tokens in found
    ]
    note = f"{len(rows)} rollouts. Line: median. Areas: the middle 50% and 80% of tokens." if compared else (
        f"{len(rows)} rollouts.")  # fmt: skip
    return Figure(
        texts.label, panels, headers, cells, f"positions-{'-'.join(texts.label.split())}", note,
        limit="threshold" if limits else "",
    )  # fmt: skip


def _quantiles(values: Sequence[float]) -> list[float]:
    return [float(value) for value in np.quantile(values, QUANTILES)] if values else []
