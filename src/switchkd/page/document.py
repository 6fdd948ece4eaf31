"""One self-contained HTML file: what stands in it, and how it is written."""

import base64
import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from switchkd.cli.display import cell
from switchkd.cli.rollouts import printable
from switchkd.errors import UserError
from switchkd.page.figures import sample

#: A page is never larger, bytes.
LARGEST = 2_000_000
#: Stands in every page that this package writes, and in no other file.
MARK = '<meta name="generator" content="switchkd'


@dataclass(frozen=True)
class Table:
    """Cells under headers; `name` is that of its CSV file, without the ending."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    name: str
    note: str = ""
    open: bool = True

    kind = "table"


@dataclass(frozen=True)
class Figure:
    """Panels, `(title, SVG)`, with one legend, `(series, label)`, and their numbers as a table."""

    title: str
    panels: Sequence[tuple[str, Markup]]
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    name: str
    note: str = ""
    legend: Sequence[tuple[int, str]] = ()
    limit: str = ""

    kind = "figure"


@dataclass(frozen=True)
class Answers:
    """What several runs answered to one prompt: `(label, text, score)`."""

    title: str
    prompt: str
    references: Sequence[str]
    answers: Sequence[tuple[str, str, str]]

    kind = "answers"


@dataclass(frozen=True)
class Text:
    """Text as it stands in a file, line breaks and all."""

    title: str
    text: str

    kind = "text"


@dataclass(frozen=True)
class Section:
    """A heading, sentences, and what stands below them."""

    title: str
    blocks: Sequence[Any] = ()
    words: Sequence[str] = ()
    legend: bool = False

    @property
    def id(self) -> str:
        """The anchor of the section."""
        return "-".join(self.title.lower().split())


@dataclass(frozen=True)
class Page:
    """What a page says.

    Attributes:
        title: Its heading.
        subtitle: A line below it.
        cards: Questions with their answers, the first thing a reader sees.
        sections: In their order.
        missing: What was not recorded, and how to record it.
    """

    title: str
    subtitle: str
    cards: Sequence[tuple[str, Sequence[str]]] = ()
    sections: Sequence[Section] = ()
    missing: Sequence[str] = field(default_factory=list)


def render(page: Page) -> str:
    """Return the page as HTML: everything is in it, and nothing is loaded from elsewhere.

    All text is escaped, and characters that cannot be shown stand as escapes. A content security policy names the one
    script of the page by its hash: no other would run.
    """
    script, style = _part("page.js"), _part("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            page=page,
            mark=Markup(f'{MARK} {version("switchkd")}">'),
            script=Markup(script),
            style=Markup(style),
            digest=digest,
        )
    )


def check_file(path: Path) -> None:
    """Refuse to write over a file that is not a page of this package.

    Raises:
        UserError: The path is a folder, or such a file.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file, such as {path / 'report.html'}")
    try:
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:4000]:
            raise UserError(f"{path} exists and is not a page of switchkd; give another file, or remove it")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def write(page: Page, path: Path) -> int:
    """Write the page to a file, its folder too where it is missing, and return its size, bytes.

    Raises:
        UserError: The file cannot be written, or would be larger than `LARGEST`.
    """
    data = render(page).encode()
    if len(data) > LARGEST:
        raise UserError(f"{path} would have {len(data) / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}; give fewer runs")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return len(data)


def csv_link(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as the address of a CSV file that is in the page itself."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headers)
    for row in rows:
        writer.writerow(["" if value is None else _number(value) for value in row])
    return f"data:text/csv;charset=utf-8,{quote(text.getvalue().encode('utf-8', 'backslashreplace'), safe=',.:/()')}"


def _number(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _finalize(value: Any) -> Any:
    """Of everything that a template writes: text without characters that no screen shows, such as half a surrogate."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_part), autoescape=True, finalize=_finalize, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(csv_link=csv_link, sample=sample)
    environment.filters["cell"] = cell
    return environment


def _part(name: str) -> str:
    return resources.files("switchkd.page").joinpath(name).read_text(encoding="utf-8")
