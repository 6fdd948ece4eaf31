"""Figures as inline SVG: colours come from the page's style sheet, so that they follow its light and dark themes.

Every function returns markup with all its text escaped. A series has a colour and a dash pattern or a mark of its own:
no figure needs its colours to be read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from switchkd.cli.rollouts import printable
from switchkd.page.scales import Scale, finite, powers, short, ticks

#: Colours of series in the style sheet; more series begin again with another dash pattern.
SERIES = 6
WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 18, 10, 36
#: Rows of `intervals`: high enough for a mark beside its label, or below a label of more characters than this.
_ROW, _TALL_ROW, _SHORT_LABEL = 26, 42, 18
#: A figure of a screen's width shows no more points than this.
MOST_POINTS = 160

Point = tuple[float, float]
Band = tuple[float, float, float]


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        label: Its name.
        points: `(x, y)`, x increasing.
        bands: Areas `(x, low, high)` around it, the widest first.
        series: Its colour and dash pattern, from 0.
        limit: Whether it is a limit, drawn as a thin dashed line in the colour of text.
    """

    label: str
    points: Sequence[Point]
    bands: Sequence[Sequence[Band]] = ()
    series: int = 0
    limit: bool = False


@dataclass(frozen=True)
class Interval:
    """One row of a panel of means.

    Attributes:
        label: Its name.
        value: The mean.
        low: Lower end of its interval; None without one.
        high: Upper end.
        filled: Whether its mark is filled, for what is significant.
        said: What stands at the end of the label.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    filled: bool = True
    said: str = ""


def lines(
    drawn: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_limits: tuple[float, float] | None = None,
    log_from: float | None = None,
) -> Markup:
    """Return a panel of lines over a common x.

    Args:
        drawn: At least one line with a point.
        title: What screen readers are told.
        x_label: With its unit.
        y_label: With its unit.
        y_limits: Range of y; that of the data if None, from 0 where they are near it.
        log_from: Makes y logarithmic from this value on; smaller ones stand there.
    """
    xs = finite(x for line in drawn for x, _ in line.points)
    ys = finite(y for line in drawn for _, y in line.points)
    ys += finite(end for line in drawn for band in line.bands for _, *ends in band for end in ends)
    low, high = y_limits if y_limits is not None else (min(ys), max(ys))
    if y_limits is None and 0 <= low <= 0.5 * high:
        low = 0.0
    x_ticks = ticks(min(xs), max(xs), 4)
    y_ticks = ticks(low, high, 4) if log_from is None else powers(log_from, max(high, log_from))
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (x_ticks[0], x_ticks[-1])
    across = Scale(x_low, x_high, _LEFT, WIDTH - _RIGHT)
    up = Scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP, log=log_from is not None)
    parts = [*_grid(across, up, [tick for tick in x_ticks if x_low <= tick <= x_high], y_ticks)]
    for line in drawn:
        kind = "limit" if line.limit else _series(line.series)
        for depth, band in enumerate(line.bands):
            shown = thinned(band)
            there = " ".join(f"{across(x)},{up(high)}" for x, _, high in shown)
            back = " ".join(f"{across(x)},{up(low)}" for x, low, _ in reversed(shown))
            parts.append(Markup('<polygon class="band b{} {}" points="{} {}"/>').format(depth, kind, there, back))
        shown = thinned(line.points)
        name = _words(line.label)
        if len(shown) == 1:
            parts.append(
                Markup('<circle class="dot {}" cx="{}" cy="{}" r="3.5"><title>{}</title></circle>').format(
                    kind, across(shown[0][0]), up(shown[0][1]), name
                )
            )
            continue
        places = " ".join(f"{across(x)},{up(y)}" for x, y in shown)
        parts.append(Markup('<polyline class="line {}" points="{}"><title>{}</title></polyline>').format(
            kind, places, name))  # fmt: skip
    parts += _axis_labels(x_label, y_label, HEIGHT)
    return _svg(parts, WIDTH, HEIGHT, f"{title}: {y_label} against {x_label}; " + ", ".join(_ends(drawn)))


def intervals(
    rows: Sequence[Interval],
    *,
    title: str,
    x_label: str,
    zero: bool = False,
    limits: tuple[float, float] | None = None,
) -> Markup:
    """Return a panel of means, one below the other with its label, each with its interval.

    Args:
        rows: At least one.
        title: What screen readers are told.
        x_label: With its unit.
        zero: Whether the axis holds 0, with a line there.
        limits: Range that the axis must hold, so that panels can be compared.
    """
    values = finite(value for row in rows for value in (row.value, row.low, row.high))
    values += [0.0] if zero else []
    values += limits or ()
    beside = max(len(row.label) for row in rows) <= _SHORT_LABEL
    left = 14 + (7 * max(len(row.label) for row in rows) if beside else 0)
    tall = _ROW if beside else _TALL_ROW
    marks = ticks(min(values), max(values), 4 if not beside else 3)
    height = _TOP + tall * len(rows) + _BOTTOM
    across = Scale(marks[0], marks[-1], left, WIDTH - 14 - 7 * max(len(row.said) for row in rows))
    bottom = height - _BOTTOM
    parts: list[Markup] = []
    for mark in marks:
        kind = "zero" if zero and mark == 0 else "grid"
        parts.append(_segment(kind, across(mark), _TOP, across(mark), bottom))
        parts.append(_text(short(mark), across(mark), bottom + 14, "tick middle"))
    for place, row in enumerate(rows):
        y = _TOP + tall * (place + 1) - 12
        parts.append(_text(row.label, 2, y + 4 if beside else y - 13, "label"))
        parts.append(_text(row.said, WIDTH - 2, y + 4, "label end strong"))
        if row.low is not None and row.high is not None:
            ends = across(row.low), across(row.high)
            parts.append(_segment("reach", ends[0], y, ends[1], y))
            parts += [_segment("reach", end, y - 4, end, y + 4) for end in ends]
        kind = "mean" if row.filled else "mean open"
        parts.append(Markup('<circle class="{}" cx="{}" cy="{}" r="4.5"/>').format(kind, across(row.value), y))
    parts += _axis_labels(x_label, "", height)
    spoken = ", ".join(f"{row.label} {row.said}" for row in rows)
    return _svg(parts, WIDTH, height, f"{title}: {spoken}")


def sample(series: int, limit: bool = False) -> Markup:
    """Return a short piece of a series' line, for a legend."""
    kind = "limit" if limit else _series(series)
    return Markup(
        '<svg class="sample" viewBox="0 0 34 10" width="34" height="10" aria-hidden="true">'
        '<polyline class="line {}" points="1,5 33,5"/></svg>'
    ).format(kind)


def thinned(points: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Return at most `MOST_POINTS` of the points, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return list(points)
    step = (len(points) - 1) / (MOST_POINTS - 1)
    return [points[round(index * step)] for index in range(MOST_POINTS)]


def _series(number: int) -> str:
    return f"s{number % SERIES} d{number % 4 if number < SERIES else (number + number // SERIES) % 4}"


def _ends(drawn: Sequence[Line]) -> Iterable[str]:
    for line in drawn:
        if line.points:
            yield f"{line.label} from {short(line.points[0][1])} to {short(line.points[-1][1])}"


def _grid(across: Scale, up: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Iterable[Markup]:
    for tick in y_ticks:
        yield _segment("grid", across.start, up(tick), across.end, up(tick))
        yield _text(short(tick), across.start - 6, up(tick) + 4, "tick end")
    for tick in x_ticks:
        yield _segment("mark", across(tick), up.start, across(tick), up.start + 4)
        yield _text(short(tick), across(tick), up.start + 16, "tick middle")


def _axis_labels(x_label: str, y_label: str, height: int) -> Iterable[Markup]:
    yield _text(x_label, WIDTH / 2, height - 5, "tick middle")
    if y_label:
        middle = _TOP + (height - _TOP - _BOTTOM) / 2
        yield Markup('<text class="tick middle" transform="translate(10 {}) rotate(-90)">{}</text>').format(
            middle, _words(y_label)
        )


def _segment(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, x1, y1, x2, y2)


def _text(text: str, x: float, y: float, kind: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, x, y, _words(text)) if text else Markup()


def _words(text: str) -> Markup:
    return escape(printable(text))


def _svg(parts: Iterable[Markup], width: int, height: int, spoken: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, _words(spoken), Markup().join(parts)
    )
