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
#: Smaller divergences stand at the lower edge, nats.
LOG_FROM = 1e-4
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
    """Return how the teacher's share, the compared value and its threshold run along the text."""
    measured = [(number, texts, found) for number, texts in enumerate(sources) if (found := _along(late(texts.rows)))]
    if not measured:
        return None
    x_label = "position in the completion [tokens]"
    shares = [Line(texts.label, [(one.position, one.share) for one in found], series=number)
              for number, texts, found in measured]  # fmt: skip
    svg = lines(shares, title="teacher share", x_label=x_label, y_label="share of tokens", y_limits=(0.0, 1.0))
    cells = [[texts.label, one.position, one.tokens, one.share] for _, texts, found in measured for one in found]
    headers = ["rollouts", "position", "tokens", "teacher share"]
    legend = [(number, texts.label) for number, texts, _ in measured]
    figures = [Figure("Teacher share", [("by position", svg)], headers, cells, "share-by-position", legend=legend)]
    figures += _compared(measured, x_label)
    logged = any("step" in row for texts in sources for row in texts.rows[:1])
    said = ["Of trainings: the rollouts logged in their second half."] if logged else []
    return Section("Who writes where", figures, said)


def rollout_section(sources: Sequence[Texts]) -> Section | None:
    """Return rollouts worth reading: most and least by the teacher, the longest, and the same prompt twice.

    That is a prompt early and late in a training, and one that several rollouts which are no training's share, such as
    those of a student before its training and after it.
    """
    views = [*_shared(sources), *(found for texts in sources for found in _chosen(texts))]
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

    picks = [("longest", max(rows, key=lambda row: len(row["tokens"])))]
    if len({share(row) for row in rows}) > 1:
        most, least = max(rows, key=share), min(rows, key=share)
        picks = [("most by the teacher", most), *picks, ("least by the teacher", least)]
    if any(map(_mean_divergence, rows)):
        picks.append(("largest mean divergence", max(rows, key=_mean_divergence)))
    seen: list[Mapping[str, Any]] = []
    for what, row in picks:
        if not any(row is other for other in seen):
            seen.append(row)
            yield _view(texts, row, what, len(seen))
    if pair := _early_and_late(texts.rows):
        for what, row in zip(("the same prompt early", "the same prompt late"), pair, strict=True):
            seen.append(row)
            yield _view(texts, row, what, len(seen))


def _shared(sources: Sequence[Texts]) -> Iterator[RolloutView]:
    """What different rollouts made of the first prompt that they share."""
    firsts = [
        (texts, {row["prompt"]: row for row in reversed(texts.rows) if row["tokens"] and "step" not in row})
        for texts in sources
    ]
    firsts = [(texts, rows) for texts, rows in firsts if rows]
    if len(firsts) < 2:
        return
    first, others = firsts[0][1], [rows for _, rows in firsts[1:]]
    prompt = next((one for one in reversed(first) if all(one in rows for rows in others)), None)
    for texts, rows in firsts if prompt is not None else []:
        yield _view(texts, rows[prompt], "the same prompt", 0)


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


@dataclass(frozen=True)
class _At:
    """Some positions: how many tokens, the teacher's share of them, quantiles of what was compared, the threshold."""

    position: float
    tokens: int
    share: float
    compared: list[float]
    threshold: float | None


def _along(rows: Sequence[Mapping[str, Any]]) -> list[_At]:
    length = max((len(row["tokens"]) for row in rows), default=0)
    width = -(-length // MOST_BINS) or 1
    found = []
    for start in range(0, length, width):
        reached = [row for row in rows if len(row["tokens"]) > start]
        if len(reached) < max(FEWEST_ROWS, len(rows) // 10):
            break
        places = slice(start, start + width)
        authors = [author for row in reached for author in row["author"][places]]
        thresholds = _quantiles(finite(value for row in reached for value in row["threshold"][places]))
        compared = _quantiles(finite(value for row in reached for value in row["divergence"][places]))
        share = authors.count("teacher") / len(authors)
        found.append(_At(start + (width - 1) / 2, len(authors), share, compared, thresholds[2] if thresholds else None))
    return found


def _compared(measured: Sequence[tuple[int, Texts, list[_At]]], x_label: str) -> Iterator[Figure]:
    """A panel for each source that compared something, one figure for each unit."""
    units: dict[str, list[tuple[int, Texts, list[_At]]]] = {}
    for number, texts, found in measured:
        if known := [one for one in found if one.compared]:
            units.setdefault(texts.rows[0].get("unit") or "nats", []).append((number, texts, known))
    for unit, sources in units.items():
        panels, cells = [], []
        for number, texts, found in sources:
            name = (texts.rows[0].get("measured") or "divergence").removesuffix(f"_{unit}").replace("_", " ")
            bands = [[(one.position, one.compared[low], one.compared[-1 - low]) for one in found] for low in (0, 1)]
            drawn = [Line(name, [(one.position, one.compared[2]) for one in found], bands, number)]
            limits = [(one.position, one.threshold) for one in found if one.threshold is not None]
            drawn += [Line("threshold", limits, limit=True)] if limits else []
            svg = lines(drawn, title=texts.label, x_label=x_label, y_label=f"{name} [{unit}], log scale",
                        log_from=1.0 if unit == "rank" else LOG_FROM)  # fmt: skip
            panels.append((texts.label, svg))
            cells += [[texts.label, name, one.position, one.tokens, *one.compared, one.threshold] for one in found]
        headers = ["rollouts", "measure", "position", "tokens", *(f"{q:.0%}" for q in QUANTILES), "threshold"]
        least = "" if unit == "rank" else f" Below {LOG_FROM:g} nats at the lower edge."
        note = f"Line: median. Areas: the middle 50% and 80% of the tokens.{least}"
        yield Figure(f"What was compared, in {unit}", panels, headers, cells, f"compared-by-position-{unit}", note,
                     limit="threshold: above it the teacher writes")  # fmt: skip


def _quantiles(values: Sequence[float]) -> list[float]:
    return [float(value) for value in np.quantile(values, QUANTILES)] if values else []
