"""Every option of every command as Markdown tables, read from the parsers themselves."""

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from switchkd.__main__ import COMMANDS

#: The group that every parser has.
SHARED = "every command"


def option_tables() -> str:
    """Return a section for what all commands share and one for each command, a table for each group of options."""
    parsers = {name: import_module(module).parser() for name, (module, _) in COMMANDS.items()}
    rows = {name: _rows(parser) for name, parser in parsers.items()}
    # What every command says in the same words is said once.
    counted = Counter(row for groups in rows.values() for row in groups[SHARED])
    shared = [row for row, count in counted.items() if count == len(parsers)]
    parts = ["## Every command\n", _table(shared)]
    for name, groups in rows.items():
        parts.append(f"## {name}\n\n`switchkd {name}`: {_text(COMMANDS[name][1])}.\n")
        for title, found in groups.items():
            own = [row for row in found if row not in shared]
            if own:
                heading = "output" if title == SHARED else title
                parts += [f"### {name}: {_text(heading)}\n", _table(own)]
    return "\n".join(parts)


def _rows(parser: Any) -> dict[str, list[str]]:
    """Title of a group -> the lines of its table."""
    groups = list(parser._action_groups)
    if (rare := getattr(parser, "rare", None)) is not None:
        groups.insert(-1, rare)  # what only --help-all lists
    rows = {}
    for group in groups:
        title = re.sub(r"^only with --method ", "only with ", str(group.title)).replace(" | ", ", ")
        listed = [_row(action) for action in group._group_actions if _is_listed(action)]
        if listed:
            rows["general" if title == "options" else title] = listed
    return rows


def _is_listed(action: argparse.Action) -> bool:
    # Hidden options are there to be refused with the name that is meant.
    return action.dest != "help" and action.help != argparse.SUPPRESS


def _table(rows: Iterable[str]) -> str:
    head = ["| option | value | default | meaning |", "|---|---|---|---|"]
    return "\n".join(['<div class="options" markdown>\n', *head, *rows, "\n</div>\n"])


def _row(action: argparse.Action) -> str:
    help = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    # What stands without a name, such as folders of runs, is called by its placeholder.
    name = action.option_strings[0].removeprefix("--") if action.option_strings else str(action.metavar)
    return f"| `{name}` | {_text(_value(action))} | {_default(action.default)} | {_text(help)} |"


def _value(action: argparse.Action) -> str:
    if action.nargs == "?" and action.const is True:
        return "true, false"
    if action.choices is not None:
        return ", ".join(map(str, action.choices))
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    name = metavar or {int: "N", float: "X"}.get(action.type, "VALUE")  # type: ignore[call-overload]
    return f"{name} ..." if action.nargs == "+" and "..." not in name else name


def _default(value: Any) -> str:
    if value in (None, argparse.SUPPRESS, "", []):
        return ""
    value = getattr(value, "value", value)  # of an enumeration
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def _text(text: Any) -> str:
    """One line for a cell of a table, with nothing that Markdown or HTML reads."""
    line = " ".join(str(text).split())
    return re.sub(r"[\\`*_{}\[\]<>|#&~^]", lambda found: f"&#{ord(found[0])};", line)
