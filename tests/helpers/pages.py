"""Reads the pages that this package writes, as a browser would: elements, their attributes, and text."""

import csv
import io
from html.parser import HTMLParser
from urllib.parse import unquote

VOID = {"meta", "br", "img", "link", "input", "hr"}
#: Attributes through which an element loads something or runs a script.
LOADING = ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background", "style")


class Document(HTMLParser):
    """Elements in their order as `(tag, attributes)`; the text of each tag; whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.strays: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.strays.append(tag)

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str = "") -> str:
        """All text that a reader sees, or that of one kind of element."""
        hidden = ("script", "style")
        return "".join(text for name, text in self.texts if (name == tag if tag else name not in hidden))

    def loads(self) -> list[tuple[str, str, str | None]]:
        """What the page would load or run: nothing but its own anchors and files in it is allowed."""
        return [
            (tag, name, value)
            for tag, attributes in self.elements
            for name, value in attributes.items()
            if name.startswith("on") or (name in LOADING and not (value or "").startswith(("#", "data:text/csv")))
        ]

    def files(self) -> dict[str, list[dict[str, str]]]:
        """Name without its ending -> the lines of every CSV file that can be downloaded."""
        return {
            str(link["download"]).removesuffix(".csv"): list(
                csv.DictReader(io.StringIO(unquote(str(link["href"]).partition(",")[2])))
            )
            for link in self.of("a")
            if "download" in link
        }
