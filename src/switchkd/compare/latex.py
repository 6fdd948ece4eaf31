"""Tables as LaTeX, in the style of booktabs."""

import re
from collections.abc import Sequence
from typing import Any

_ESCAPED = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
}
_NUMBER = re.compile(r"[+-]?[\d,.]+%?( \+- [\d.]+)?|-|< 0\.\d+")


def latex_document(tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]) -> str:
    """Return one `table` environment per table; a document that includes them needs the package booktabs.

    Args:
        tables: Title, headers and rows of each; None is an empty cell.
    """
    head = "% Written by switchkd compare; needs \\usepackage{booktabs}\n"
    return head + "\n" + "\n".join(_table(*one) for one in tables)


def escaped(text: str) -> str:
    """Return text as LaTeX shows it; plus-minus and minus signs of numbers are set as such."""
    plain = "".join(_ESCAPED.get(character, character) for character in text)
    plain = plain.replace("+-", r"$\pm$")
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", plain)


def _table(title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [["--" if value is None else str(value) for value in row] for row in rows]
    columns = "".join(
        "r" if all(_NUMBER.fullmatch(row[index]) or row[index] == "--" for row in cells) else "l"
        for index in range(len(headers))
    )
    lines = [_line(headers), r"\midrule", *map(_line, cells)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escaped(title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"
