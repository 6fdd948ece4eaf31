"""Figures: places follow values, text is escaped, and lines stay apart without colours."""

import itertools
import math
import re

import pytest
from helpers.pages import Document

from switchkd.page.figures import MOST_POINTS, SERIES, Interval, Line, intervals, lines, sample, thinned
from switchkd.page.scales import Scale, powers, short, ticks


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 17.0), (1e-6, 3e-6), (40.9, 97.1), (5.0, 5.0), (0, 0)])
def test_ticks_are_round_and_enclose_the_range(low, high):
    found = ticks(low, high)
    assert found[0] <= low and high <= found[-1] and 2 <= len(found) <= 12
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert max(steps) == pytest.approx(min(steps))
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert any(mantissa == pytest.approx(number) for number in (1, 2, 5))


def test_a_scale_keeps_distances_or_factors():
    straight, log = Scale(0, 10, 0, 100), Scale(0.001, 10, 0, 100, log=True)
    assert [straight(value) for value in (0, 5, 10, 99)] == [0, 50, 100, 100]
    assert [log(value) for value in (0, 0.001, 0.1, 10)] == [0, 0, 50, 100]
    assert powers(0.02, 3) == pytest.approx([0.01, 0.1, 1, 10])


def test_numbers_are_short():
    assert [short(value) for value in (-20.0, 0.1, 1200, 1e-4)] == ["\N{MINUS SIGN}20", "0.1", "1,200", "0.0001"]


def test_a_larger_value_stands_higher_and_a_later_one_further_right():
    svg = lines([Line("loss", [(0, 3.0), (5, 1.0), (10, 2.0)])], title="loss", x_label="step", y_label="nats")
    (points,) = [one["points"] for one in Document(svg).of("polyline")]
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 < y2 < y1 and y1 - y2 == pytest.approx(y2 - y0, abs=0.2)


def test_an_interval_reaches_from_its_low_to_its_high_end():
    rows = [Interval("a", 50, 40, 70, said="50"), Interval("b", 60, filled=False, said="60")]
    document = Document(intervals(rows, title="scores", x_label="ROUGE-L"))
    circles = document.of("circle")
    assert [one["class"] for one in circles] == ["mean", "mean open"]
    (whole, *ends) = [one for one in document.of("line") if one["class"] == "reach"]
    assert len(ends) == 2
    left, middle, right = float(whole["x1"]), float(circles[0]["cx"]), float(whole["x2"])
    assert (right - middle) == pytest.approx(2 * (middle - left), abs=0.2)


def test_text_in_a_figure_is_escaped():
    evil = '<script>alert("1")</script>\ud800'
    drawn = [
        lines([Line(evil, [(0, 1.0), (1, 2.0)])], title=evil, x_label=evil, y_label=evil),
        intervals([Interval(evil, 1.0, 0.0, 2.0, said=evil)], title=evil, x_label=evil),
    ]
    for svg in drawn:
        document = Document(svg)
        assert document.of("script") == [] and document.strays == [] and document.open == []
        assert '<script>alert("1")</script>\\ud800' in document.text()
        svg.encode()


def test_series_differ_without_their_colours():
    looks = [re.search(r'class="line s(\d) d(\d)"', sample(number)) for number in range(2 * SERIES)]
    pairs = [(look[1], look[2]) for look in looks]
    assert len(set(pairs)) == 2 * SERIES
    assert len({dash for _, dash in pairs[:4]}) == 4


def test_long_lines_are_thinned_and_keep_their_ends():
    points = [(float(x), 0.0) for x in range(5000)]
    found = thinned(points)
    assert len(found) == MOST_POINTS and found[0] == points[0] and found[-1] == points[-1]
    assert thinned(points[:7]) == points[:7]
