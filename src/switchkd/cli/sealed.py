"""JSON Lines that a later call reads back: every line says whether it is as it was written."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from switchkd.cli.run_folder import plain, whole
from switchkd.errors import UserError

#: The checksum of the other keys of a line.
SEAL = "crc32"


def sealed(row: Mapping[str, Any]) -> str:
    """Return a row as a line, with its checksum."""
    values = {name: value for name, value in plain(row).items() if name != SEAL}
    return _text({**values, SEAL: _checksum(values)}) + "\n"


def append_sealed(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(sealed, rows))


def read_sealed(path: Path, what: str) -> list[dict[str, Any]]:
    """Return the rows of a file; a last line that was not written to its end is taken out of it.

    Args:
        path: The file; a missing one has no rows.
        what: The option that names it, for messages.

    Raises:
        UserError: Names a line that is damaged. Lines without a checksum are of an older version and pass.
    """
    if not path.is_file():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = dict(json.loads(line))
            last = next(reversed(row), "")
            given = row.pop(SEAL, None)
            intact = given == _checksum(row) if given is not None else not _is_nearly(last, SEAL)
        except (ValueError, TypeError):
            intact = False
        if not intact:
            raise UserError(
                f"{what}: {path}, line {number} is damaged; remove that file, or all of it from that line on"
            )
        rows.append(row)
    if rest:
        with whole(path) as file:
            file.write("".join(line.decode("utf-8") + "\n" for line in lines))
    return rows


def _text(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _is_nearly(name: str, other: str) -> bool:
    return len(name) == len(other) and sum(a != b for a, b in zip(name, other, strict=True)) <= 1


def _checksum(row: Mapping[str, Any]) -> int:
    return zlib.crc32(_text(row).encode("utf-8"))
