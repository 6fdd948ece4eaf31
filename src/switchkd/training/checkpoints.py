"""Checkpoints are whole or they do not count: what says so, and which one training goes on from."""

import functools
import hashlib
import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from switchkd.cli.run_folder import whole
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
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(MANIFEST)
    }
    with whole(folder / MANIFEST) as file:
        file.write(json.dumps({"step": step, "files": files}, indent=1) + "\n")


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
        if _digest_of(file) != digest:
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


def chosen(wanted: str | bool | None, run: Path) -> tuple[str | None, list[str]]:
    """Return the checkpoint to go on from, None to start, and why newer ones are passed over.

    Args:
        wanted: A checkpoint; True for the newest one of the run that is whole, "auto" for that one if there is one;
            False or None for none.
        run: Folder of the run.

    Raises:
        UserError: There is none, or the one that is named is not whole: the file is named, what is wrong with it, and
            a checkpoint that is whole if there is one.
    """
    if not wanted:
        return None, []
    if wanted is True or wanted == "auto":
        newest, passed_over = newest_whole(run)
        if newest is None and wanted is True:
            raise UserError(
                f"resume_from_checkpoint: {run} holds no whole checkpoint; remove the option to start from "
                "the beginning"
            )
        return None if newest is None else str(newest), passed_over
    folder = Path(wanted)
    problem = problem_of(folder)
    if problem is None:
        return wanted, []
    other, _ = newest_whole(folder.parent)
    way_out = f"go on from {other}" if other is not None else "start again without it"
    raise UserError(f"resume_from_checkpoint: {folder} cannot be gone on from: {problem}; {way_out}")


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _digest_of(path: Path) -> str:
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, modified: int) -> str:
    """Of a file as it is now: one that did not change is read once, however often a process asks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
