"""Which columns of a data set are read, and as what: names of our own, names known from the hub, names that are given.

A record is read as one of the sets of `COLUMN_SETS`. Other names for the same things are found by `KNOWN_NAMES`, and
`columns` gives any others: `{"prompt": "question"}` reads the column `question` as the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from switchkd.errors import UserError

#: Sets of columns that make a record, the first that fits.
COLUMN_SETS = (("instruction", "output"), ("prompt", "completion"), ("messages",), ("prompt",))
#: Sets under other names, looked for where none of those fits: name of the column -> what it is read as.
KNOWN_NAMES: tuple[dict[str, str], ...] = (
    {"instruction": "instruction", "response": "output"},  # hub Dolly; its context is the input
    {"conversations": "messages"},  # ShareGPT
    {"question": "prompt", "answer": "completion"},
)
#: Sets that hold less than a prompt with its answer could, looked for last.
LAST_SETS = (("instruction",), ("text",))
#: What may stand beside a set.
OPTIONAL = ("teacher_prompt", "tools")
INPUT_NAMES = ("input", "context")


@dataclass(frozen=True)
class Columns:
    """The columns that are read of a data set.

    Attributes:
        names: The set that was chosen, e.g. `("prompt", "completion")`.
        sources: Name in this package -> name of the column, for the set and for what stands beside it.
    """

    names: tuple[str, ...]
    sources: Mapping[str, str]

    def __str__(self) -> str:
        return " + ".join(self.sources[name] for name in self.names)

    def rows(self, batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """Return the records of a batch of columns under the names of this package."""
        read = [batch[column] for column in self.sources.values()]
        return [dict(zip(self.sources, record, strict=True)) for record in zip(*read, strict=True)]


def choose_columns(found: Sequence[str], given: Mapping[str, str]) -> Columns:
    """Return which columns are read.

    Args:
        found: Names of the data set's columns.
        given: Name -> column, as `switchkd.data_options.parse_columns` returns it; these come first.

    Raises:
        UserError: A given column is not there, or no set fits.
    """
    for name, column in given.items():
        if column not in found:
            raise UserError(f"columns: {name}={column}, but the data set has no such column; it has {', '.join(found)}")
    there = {name: name for name in found} | dict(given)
    wanted = set(given) - {*OPTIONAL, "input"}
    known: list[Mapping[str, str]] = [{name: there[name] for name in names if name in there} for names in COLUMN_SETS]
    sets = [(names, read) for names, read in zip(COLUMN_SETS, known, strict=True) if len(read) == len(names)]
    sets += [
        (tuple(names.values()), {name: column for column, name in names.items()})
        for names in KNOWN_NAMES
        if set(names) <= set(found) and not given.keys() & set(names.values())
    ]
    sets += [(names, {name: there[name] for name in names}) for names in LAST_SETS if set(names) <= set(there)]
    for names, sources in sets:
        if wanted <= set(names):
            return Columns(names, {**sources, **_beside(names, there, given, found)})
    if wanted:
        raise UserError(f"columns: {' and '.join(sorted(wanted))} make no record; {_accepted()}")
    raise UserError(f"unknown columns ({', '.join(found)}): {_accepted()}; or name them: columns prompt=...")


def _accepted() -> str:
    sets = [*COLUMN_SETS, *(tuple(names) for names in KNOWN_NAMES), *LAST_SETS]
    return "a data set needs one of these sets: " + "; ".join(" + ".join(names) for names in sets)


def _beside(
    names: tuple[str, ...], there: Mapping[str, str], given: Mapping[str, str], found: Sequence[str]
) -> dict[str, str]:
    beside = {name: there[name] for name in OPTIONAL if name in there}
    if names[0] == "instruction":
        column = given.get("input") or next((name for name in INPUT_NAMES if name in found), None)
        beside |= {"input": column} if column is not None else {}
        # A prompt that was filled already is compared with what the template gives.
        beside |= {"prompt": there["prompt"]} if "prompt" in there else {}
    return beside
