"""The pictures of a comparison: scores beside differences to the baseline, and a map of two axes of a grid."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchkd.cli.display import BLUE, GREY, ORANGE
from switchkd.compare.findings import Comparison, Finding, Result, interval, measure_title, unit
from switchkd.compare.report import planes
from switchkd.compare.tasks import TEACHER_MEASURES
from switchkd.errors import UserError

#: Longer labels of runs are broken into lines, characters.
LABEL_WIDTH = 36
_STYLE = {
    "text.parse_math": False,
    "figure.dpi": 120,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
}


def forest(comparison: Comparison, findings: Sequence[Finding], against: Mapping[str, str], path: Path) -> None:
    """Draw for each student every run's scores, and beside them its difference to the baseline with its interval.

    Runs with the same baseline stand together. Numbers stand beside both; a significant difference has a filled mark
    and a star, any other an empty mark. All students have one scale of differences.

    Args:
        comparison: The results on one test set.
        findings: Of this test set, see `switchkd.compare.findings.find`.
        against: Label of a run -> that of its baseline.
        path: PNG file.

    Raises:
        UserError: The file cannot be written.
    """
    groups: dict[str, list[str]] = {}
    baselines = set(against.values())
    for label in comparison.labels:
        groups.setdefault(label if label in baselines else against.get(label, ""), []).append(label)
    labels = [label for group in groups.values() for label in group]
    ends = [0]
    for group in groups.values():
        ends.append(ends[-1] + len(group))
    by_student = {
        student: {one.first: one for one in findings if one.student == student and against.get(one.first) == one.second}
        for student in comparison.students
    }
    wrapped = [textwrap.fill(label, LABEL_WIDTH) for label in labels]
    lines = max(label.count("\n") + 1 for label in wrapped)
    columns = 2 if any(by_student.values()) else 1
    widths = [2.6, 3.6][:columns] * len(by_student)
    plt = _pyplot()
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(
            1,
            len(widths),
            # Labels, axes, the numbers beside them; titles and axis labels, rows.
            figsize=(
                0.5 + 0.075 * max(len(line) for label in wrapped for line in label.split("\n")) + 1.35 * sum(widths),
                1.5 + (0.1 + 0.18 * lines) * len(labels),
            ),
            sharey=True,
            squeeze=False,
            width_ratios=widths,
            layout="constrained",
        )
        for index, (student, chosen) in enumerate(by_student.items()):
            panels = grid[0][columns * index : columns * (index + 1)]
            _draw_scores(panels[0], comparison, student, labels)
            panels[0].set_title(student, loc="left", fontweight="bold")
            if columns == 2:
                _draw_differences(panels[1], chosen, labels, against, comparison.measure)
            for axes in panels:
                axes.hlines([end - 0.5 for end in ends[1:-1]], 0, 1, transform=axes.get_yaxis_transform(),
                            color=GREY, linewidth=0.6)  # fmt: skip
        if columns == 2:
            drawn = grid[0][1::2]
            limits = [axes.get_xlim() for axes in drawn]
            for axes in drawn:
                axes.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
        grid[0][0].set_yticks(range(len(labels)), wrapped)
        grid[0][0].set_ylim(len(labels) - 0.4, -0.6)
        _save(plt, figure, path)


def _draw_scores(axes: Any, comparison: Comparison, student: str, labels: Sequence[str]) -> None:
    for place, label in enumerate(labels):
        scores = [comparison.score(result) or 0.0 for result in comparison.of(student, label)]
        if scores:
            axes.plot(scores, [place] * len(scores), "o", color=BLUE, alpha=0.4, markersize=4, markeredgewidth=0)
            axes.plot([sum(scores) / len(scores)], [place], "|", color="black", markersize=9, markeredgewidth=1.6)
            _beside(axes, place, f"{sum(scores) / len(scores):.1f}")
    axes.set_xlabel(
        f"{measure_title(comparison.measure)} [{unit(comparison.measure)}]\n(dot: training seed, bar and number: mean)"
    )
    _rows(axes, len(labels))


def _draw_differences(
    axes: Any, findings: Mapping[str, Finding], labels: Sequence[str], against: Mapping[str, str], measure: str
) -> None:
    axes.axvline(0.0, color="black", linewidth=1)
    for place, label in enumerate(labels):
        one = findings.get(label)
        if one is None:
            if label in against.values():
                _beside(axes, place, "baseline")
            continue
        clear = one.is_significant
        colour = ORANGE if clear else BLUE
        axes.plot([one.difference.low, one.difference.high], [place, place], color=colour, linewidth=2)
        axes.plot([one.difference.mean], [place], "D", markersize=5.5, markeredgecolor=colour, markeredgewidth=1.4,
                  color=colour if clear else "white")  # fmt: skip
        _beside(axes, place, interval(one.difference) + (" *" if clear else ""))
    baselines = set(against.values())
    other = next(iter(baselines)) if len(baselines) == 1 else "baseline"
    better = "left" if measure in TEACHER_MEASURES else "right"
    axes.set_xlabel(
        f"{measure_title(measure)} minus {textwrap.shorten(other, 30, placeholder=' ...')} [{unit(measure)}], "
        f"95% interval\n(better to the {better}; filled and *: significant, Holm)"
    )
    _rows(axes, len(labels))


def _beside(axes: Any, place: int, text: str) -> None:
    axes.annotate(text, (1.02, place), xycoords=axes.get_yaxis_transform(), va="center", fontsize=8.5)


def _rows(axes: Any, count: int) -> None:
    for place in range(0, count, 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def heat_map(comparison: Comparison, findings: Sequence[Finding], against: Mapping[str, str], path: Path) -> bool:
    """Draw the first two axes of a grid as a map, one for each student and combination of the other axes.

    Every cell has its mean score as a number and as a colour, and below it the difference to its baseline with a star
    where that is significant.

    Args:
        comparison: The results on one test set.
        findings: Of this test set.
        against: Label of a run -> that of its baseline.
        path: PNG file.

    Returns:
        Whether there was something to draw: two axes or more.

    Raises:
        UserError: The file cannot be written.
    """
    panels = [(student, *plane) for student in comparison.students for plane in planes(comparison, student)]
    if not panels:
        return False
    rows, columns = list(comparison.axes.values())[:2]
    means = [_mean(comparison, results) for *_, plane in panels for results in plane.values()]
    low, high = min(means), max(max(means), min(means) + 1e-9)
    across = max(sum(student == other for other, *_ in panels) for student in comparison.students)
    down = -(-len(panels) // across)
    plt = _pyplot()
    from matplotlib.colors import Normalize

    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(
            down,
            across,
            figsize=(
                1.6 + 0.08 * max(map(len, rows)) + across * (0.6 + 1.0 * len(columns)),
                1.1 + down * (0.9 + 0.07 * max(map(len, columns)) + 0.5 * len(rows)),
            ),
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="constrained",
        )
        lower_is_better = comparison.measure in TEACHER_MEASURES
        shades = plt.get_cmap("cividis_r" if lower_is_better else "cividis"), Normalize(low, high)  # bright is good
        for axes, (student, title, plane) in zip(grid.flat, panels, strict=False):
            chosen = {
                one.first: one for one in findings if one.student == student and against.get(one.first) == one.second
            }
            _draw_plane(axes, comparison, plane, (rows, columns), chosen, shades)
            axes.set_title(", ".join(part for part in (student, title) if part), loc="left", fontweight="bold")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        names = list(comparison.axes)
        figure.supxlabel(f"{names[1]}\n(below: minus baseline; * significant, Holm)", fontsize=10)
        figure.supylabel(names[0], fontsize=10)
        bar = figure.colorbar(plt.cm.ScalarMappable(shades[1], shades[0]), ax=grid, shrink=0.8, pad=0.02)
        note = "\n(lower is better)" if lower_is_better else ""
        bar.set_label(f"{measure_title(comparison.measure)} [{unit(comparison.measure)}]{note}")
        bar.outline.set_visible(False)
        _save(plt, figure, path)
    return True


def _draw_plane(
    axes: Any,
    comparison: Comparison,
    plane: Mapping[tuple[str, str], Sequence[Result]],
    labels: tuple[Sequence[str], Sequence[str]],
    against: Mapping[str, Finding],
    shades: tuple[Any, Any],
) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = labels
    colours, scale = shades
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            results = plane.get((row, column))
            if results is None:
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#F4F4F4", edgecolor="white"))
                axes.text(x, y, "-", ha="center", va="center", color=GREY)
                continue
            mean = _mean(comparison, results)
            shade = colours(scale(mean))
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor="white", linewidth=1.5))
            # Black or white, whichever contrasts: Rec. 709 luma of the shade.
            light = 0.2126 * shade[0] + 0.7152 * shade[1] + 0.0722 * shade[2] > 0.5
            colour = "black" if light else "white"
            one = against.get(results[0]["run"])
            axes.text(x, y - (0.14 if one is not None else 0), f"{mean:.1f}", ha="center", va="center", color=colour)
            if one is not None:
                below = f"{one.difference.mean:+.1f}" + (" *" if one.is_significant else "")
                axes.text(x, y + 0.24, below, ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(
        range(len(columns)),
        columns,
        rotation=30 if max(map(len, columns)) > 9 else 0,
        ha="right" if max(map(len, columns)) > 9 else "center",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _mean(comparison: Comparison, results: Sequence[Result]) -> float:
    return sum(comparison.score(result) or 0.0 for result in results) / len(results)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no window, also on a machine with a display
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {path}: {error}") from error
    finally:
        plt.close(figure)
