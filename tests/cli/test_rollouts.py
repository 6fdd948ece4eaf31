"""Who wrote what: brackets in plain text; on a terminal marks that everybody can see, and that fit its width."""

import io
import re
from typing import Any

import pytest
from rich.color import Color, ColorSystem
from rich.console import Console as RichConsole
from rich.style import Style

from switchkd.cli.console import rendered, terminal
from switchkd.cli.rollouts import (
    BLANK,
    LINE_BREAK,
    TEACHER_STYLE,
    completions_table,
    header,
    legend,
    marked,
    rollout_block,
    rollout_text,
    tokens_block,
    tokens_text,
)

RECORD: dict[str, Any] = {
    "prompt": "Q: ",
    "tokens": ["one", " two", " three", " four"],
    "author": ["student", "teacher", "teacher", "student"],
    "finish_reason": "length",
}
UNDERLINE, ANY_COLOUR = re.compile(r"\x1b\[(?:\d+;)*4[;m]"), re.compile(r"\x1b\[(?:\d+;)*(?:[349]|10)\d[;m]")


def screen(width: int = 80, **options: Any) -> RichConsole:
    return RichConsole(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=width, **options)


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


# ---- plain text


def test_without_marks_the_teachers_runs_stand_in_brackets() -> None:
    assert rollout_text(RECORD) == "Q: one[ two three] four"


def test_newlines_show_as_newlines() -> None:
    record = {"prompt": "a\nb", "tokens": ["c\n", "\nd"], "author": ["teacher", "teacher"]}
    assert rollout_text(record) == "a\nb[c\n\nd]"


def test_a_model_cannot_steer_the_terminal() -> None:
    record = {**RECORD, "prompt": "p", "tokens": ["\x1b[2J", "\r", "\x07\t"], "author": ["student"] * 3}
    assert rollout_text(record) == "p\\x1b[2J\\r\\x07\t"
    shown = rendered(screen(), rollout_block(record, 1, 1))
    assert "\\x1b[2J" in shown and "\x1b[2J" not in shown and "\r" not in shown


def test_text_in_any_script_stays_as_it_is() -> None:
    record = {"prompt": "é", "tokens": ["日本", "🙂"], "author": ["teacher", "student"]}
    assert rollout_text(record) == "é[日本]🙂"


def test_markup_of_rich_in_a_text_is_text() -> None:
    record = {**RECORD, "prompt": "[bold]p[/bold]", "tokens": ["[red]", ":smile:"], "author": ["student", "teacher"]}
    shown = without_styles(rendered(screen(), rollout_block(record, 1, 1)))
    assert "[bold]p[/bold]" in shown and "[red]:smile:" in shown


# ---- marks


def luminance(color: Color) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [value / 255 for value in color.get_truecolor()]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("system", [ColorSystem.TRUECOLOR, ColorSystem.EIGHT_BIT])
def test_the_teachers_tokens_can_be_read_on_light_and_on_dark_terminals(system: ColorSystem) -> None:
    """They were orange on whatever the terminal had: 2.6:1 on white. Now they bring their own ground."""
    style = Style.parse(TEACHER_STYLE)
    assert style.color is not None and style.bgcolor is not None and style.underline
    text, ground = sorted(luminance(color.downgrade(system)) for color in (style.color, style.bgcolor))
    assert (ground + 0.05) / (text + 0.05) >= 4.5


def test_nothing_but_the_teachers_mark_has_a_colour_of_its_own() -> None:
    """Other text has the terminal's own colours, whose contrast is the user's choice."""
    shown = rendered(screen(), rollout_block(RECORD, 1, 1)) + rendered(screen(100), completions_table([RECORD], 3))
    for mark in re.findall(r"\x1b\[[\d;]*m", shown):
        assert mark in ("\x1b[0m", "\x1b[1m") or UNDERLINE.match(mark), repr(mark)


def test_marks_change_nothing_but_the_style() -> None:
    assert marked(RECORD).plain == "one two three four"
    assert [(span.start, span.end) for span in marked(RECORD).spans] == [(3, 13)]


def test_blanks_and_line_breaks_that_the_teacher_wrote_alone_are_seen() -> None:
    record = {**RECORD, "tokens": ["a", " ", "b", "\n", "c", " "], "author": ["student", "teacher"] * 3}
    assert marked(record).plain == f"a{BLANK}b{LINE_BREAK}\nc{BLANK}"
    of_student = {**record, "author": ["student"] * 6}
    assert marked(of_student).plain == "a b\nc "
    assert BLANK in legend().plain and LINE_BREAK in legend().plain


def test_no_line_ends_inside_a_style() -> None:
    """Pagers and `head` would go on in it."""
    record = {**RECORD, "tokens": ["c\n", "\nd"], "author": ["teacher", "teacher"]}
    for line in rendered(screen(), rollout_block(record, 1, 1)).split("\n"):
        assert re.findall(r"\x1b\[[\d;]*m", line)[-1:] in ([], ["\x1b[0m"])


@pytest.mark.parametrize(
    ("reason", "tokens", "end"),
    [
        ("length", RECORD["tokens"], "cut at the limit of 4 tokens"),
        ("stop", ["a", "b", "c", "</s>"], "ended with </s>"),
    ],
)
def test_the_header_says_how_the_completion_ended(reason: str, tokens: list[str], end: str) -> None:
    line = header({**RECORD, "finish_reason": reason, "tokens": tokens}, 2, 3)
    assert line == f"2 of 3: 4 tokens, the teacher wrote 2 (50%), {end}"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_what_is_shown_fits_the_terminal(width: int) -> None:
    seen = [{"student": [{"token": " long word", "id": 1, "probability": 0.5}] * 4, "jsd_nats": 0.1}] * 100
    many = {"tokens": ["word "] * 100, "author": ["student", "teacher"] * 50, "top_tokens": seen, "prompt": "p " * 300}
    record = {**RECORD, **many, "measured": None, "unit": "nats"}
    blocks = rollout_block(record, 1, 1), completions_table([record] * 2, 5), tokens_block(record, width)
    for block in blocks:
        assert max(map(len, without_styles(rendered(screen(width), block)).split("\n"))) <= width


def test_the_table_of_the_tokens_is_that_of_the_plain_text() -> None:
    seen = [{"student": [{"token": "a", "id": 1, "probability": 0.25}], "teacher": [], "jsd_nats": 0.5}] * 4
    compared = {"measured": "kl_nats", "unit": "nats", "divergence": [0.1, 0.2, 0.3, None], "threshold": [0.15] * 4}
    record = {**RECORD, **compared, "top_tokens": seen}
    plain = [line.split() for line in tokens_text(record).splitlines()]
    shown = [line.split() for line in without_styles(rendered(screen(160), tokens_block(record, 160))).splitlines()]
    assert [line for line in shown if line and line[0].isdecimal()] == plain[2:]
    assert " ".join(plain[0]).endswith("teacher's top tokens kl [nats] threshold [nats] jsd [nats]")


# ---- which terminals


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return monkeypatch


def test_text_is_plain_unless_there_is_a_terminal(variables: pytest.MonkeyPatch) -> None:
    assert terminal(io.StringIO()) is None and terminal(Terminal()) is not None
    assert terminal(Terminal(), "never") is None and terminal(io.StringIO(), "always") is not None
    variables.setenv("TERM", "dumb")
    assert terminal(Terminal()) is None
    forced = terminal(Terminal(), "always")
    assert forced is not None and UNDERLINE.search(rendered(forced, marked(RECORD)))


def test_force_color_marks_in_a_pipe_too(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("FORCE_COLOR", "1")
    forced = terminal(io.StringIO())
    assert forced is not None and ANY_COLOUR.search(rendered(forced, marked(RECORD)))


def test_no_color_keeps_the_underline(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("NO_COLOR", "1")
    plain = terminal(Terminal())
    assert plain is not None
    shown = rendered(plain, marked(RECORD))
    assert UNDERLINE.search(shown) and not ANY_COLOUR.search(shown)
