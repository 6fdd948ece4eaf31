"""Which prepared folders a run reads: their `prepared.json` goes into the folder of the run."""

import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from switchkd.data.protocol import PREPARED
from switchkd.errors import UserError


def prepared_facts(names: Iterable[str | None]) -> dict[str, Any]:
    """Return name -> what its `prepared.json` says, of those data that `switchkd prepare` wrote.

    There is a warning where a file was changed afterwards.

    Args:
        names: Files, folders and hub ids as a run was given them; None is skipped.

    Raises:
        UserError: A `prepared.json` that cannot be read.
    """
    found = {}
    for name in dict.fromkeys(name for name in names if name is not None):
        path = Path(name).expanduser()
        folder = path if path.is_dir() else path.parent
        description = folder / PREPARED
        if path.exists() and description.is_file():
            found[name] = _read(description)
            _warn_of_changes(folder, found[name])
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {**facts, "splits": {split: dict(counts) for split, counts in facts["splits"].items()}}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {type(error).__name__}; run switchkd prepare again") from error


def _warn_of_changes(folder: Path, facts: dict[str, Any]) -> None:
    for split, counts in facts["splits"].items():
        file = folder / f"{split}.jsonl"
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() != counts.get("sha256"):
            warnings.warn(f"{file} was changed after switchkd prepare wrote it: {PREPARED} beside it is out of date")
