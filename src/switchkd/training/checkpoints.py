"""Checkpoints are whole or they do not count: what says so, and which one training goes on from."""

import hashlib
import json
import os
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from switchkd.errors import UserError

#: Written last, and moved into place: a checkpoint without it was not written to its end.
MANIFEST = "manifest.json"


def write_manifest(folder: Path, step: int) -> None:
    """Write down what a checkpoint consists of, once everything else of it is written.

    Args:
        folder: The checkpoint.
        step: Optimizer step.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(MANIFEST)
    }
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / MANIFEST)


def problem_of(folder: Path) -> str | None:
    """Return why training cannot go on from a checkpoint, None where it is whole; every file of it is read."""
    path = folder / MANIFEST
    if not folder.is_dir():
        return "there is no such folder"
    if not path.is_file():
        return f"it was not written to its end (no {MANIFEST})"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (found := file.stat().st_size) != size:
            return f"{name} has {found:,} instead of {size:,} bytes"
        if _digest(file) != digest:
            return f"{name} is damaged (another checksum)"
    return None


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint of a run that is whole, and why newer ones are passed over.

    Args:
        run: Folder of the run.
    """
    passed_over: list[str] = []
    for folder in sorted(run.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"), key=_step, reverse=True):
        problem = problem_of(folder)
        if problem is None:
            return folder, passed_over
        passed_over.append(f"{folder.name} is passed over: {problem}")
    return None, passed_over


def require_whole(folder: Path) -> None:
    """Refuse a checkpoint that was named and is not whole.

    Raises:
        UserError: Names the file, what is wrong with it, and a checkpoint that is whole if there is one.
    """
    problem = problem_of(folder)
    if problem is None:
        return
    other, _ = newest_whole(folder.parent)
    way_out = f"go on from {other}" if other is not None else "start again without it"
    raise UserError(f"resume_from_checkpoint: {folder} cannot be gone on from: {problem}; {way_out}")


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
