"""Runs as their folders hold them: what each command wrote, checked while it is read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from switchkd.cli.run_folder import RunFolder, read_config
from switchkd.errors import UserError
from switchkd.page.writers import check_row

#: Commands whose folders a report shows.
COMMANDS = ("train", "compare", "demo", "evaluate", "judge", "calibrate", "diagnose", "rollout")


@dataclass(frozen=True)
class Run:
    """The folder of a run. Files are read when they are asked for; what is not there is empty.

    Attributes:
        path: The folder.
        command: That wrote it.
        name: What the report calls it.
        config: Its options.
        test_set: Of an evaluation: what its data are called.
    """

    path: Path
    command: str
    name: str
    config: dict[str, Any]
    test_set: str = ""

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        return read_object(self.path / "summary.json")

    @cached_property
    def versions(self) -> dict[str, Any]:
        """What `versions.json` holds."""
        return read_object(self.path / "versions.json")

    @cached_property
    def prepared(self) -> dict[str, Any]:
        """What `prepared.json` holds: where the data came from, with their hashes."""
        return read_object(self.path / "prepared.json")

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return read_lines(self.path / "metrics.jsonl")

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The lines of `rows.jsonl`."""
        return read_lines(self.path / "rows.jsonl")

    @cached_property
    def rollouts(self) -> list[dict[str, Any]]:
        """Rollouts with the writer of every token, of `rollouts.jsonl` or `completions.jsonl`."""
        found = []
        for name in ("rollouts.jsonl", "completions.jsonl"):
            path = self.path / name
            found += [check_row(row, f"{path}, line {line}") for line, row in enumerate(read_lines(path), 1)]
        return found


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Return a run.

    Args:
        folder: What a command of switchkd wrote as its output_dir.
        name: What the report calls it; the folder's own if None.

    Raises:
        UserError: There is no such folder, or no such command wrote it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give the folder of a run, the output_dir of one of {', '.join(COMMANDS)}")
    for command in COMMANDS:
        if RunFolder(str(path), command).holds_run(f"switchkd {command}"):
            return Run(path, command, name or path.resolve().name, read_config(path) or {})
    inside = sorted(str(config.parent) for config in path.glob("*/config.yaml") if RunFolder(
        str(config.parent), "report").holds_run())  # fmt: skip
    hint = f"; it holds runs, give those: {' '.join(inside[:3])}" if inside else ""
    raise UserError(f"{path} is not the output_dir of one of {', '.join(COMMANDS)}{hint}")


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Return several runs, each with a name of its own.

    Raises:
        UserError: As in `read_run`, or a folder is given twice.
    """
    found = [read_run(folder) for folder in folders]
    seen: set[Path] = set()
    for run in found:
        if run.path.resolve() in seen:
            raise UserError(f"{run.path} is given twice")
        seen.add(run.path.resolve())
    names = [run.name for run in found]
    return [
        run if names.count(run.name) == 1 else Run(run.path, run.command, str(run.path), run.config) for run in found
    ]


def evaluations(run: Run) -> list[Run]:
    """Return what an evaluation scored, a run for each test set: several have folders of their own."""
    if run.rows:
        data = run.config.get("dataset_name")
        return [replace(run, test_set=Path(" ".join(data) if isinstance(data, list) else str(data)).name)]
    found = []
    for path in sorted(run.path.glob("*/rows.jsonl")):
        if RunFolder(str(path.parent), "evaluate").holds_run("switchkd evaluate"):
            found.append(replace(read_run(path.parent, run.name), test_set=path.parent.name))
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; empty where there is no file.

    Raises:
        UserError: The file holds something else.
    """
    text = _read(path)
    if text is None:
        return {}
    value = _json(text, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file's lines; none where there is no file.

    A last line without its end is left out where it is not whole: a run may be writing it.

    Raises:
        UserError: A line holds something else.
    """
    text = _read(path)
    lines = (text or "").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = _json(line, f"{path}, line {number}")
        except UserError:
            if number == len(lines):
                break
            raise
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number} is not a JSON object")
        found.append(value)
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {error}") from error
