"""The folder of a run: options, versions and results."""

import contextlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import yaml
from filelock import FileLock, Timeout

from switchkd.errors import UserError

PACKAGES = ("switchkd", "torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "numpy")
HEADER = "# Written by switchkd"

# Options that say how a command was called, not what it did: a run started from this config must not inherit them.
NOT_KEPT = ("config", "json", "verbose", "overwrite_output_dir", "resume_from_checkpoint", "hub_token")

_SECRET_NAME = re.compile(r"token$|password|secret|api_?key", re.IGNORECASE)
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")

#: Held while a command writes there; the hub leaves out names that begin so.
LOCK = "_switchkd.lock"

# What a run may leave in its folder: what it reports, and its model. Overwriting removes these and nothing else.
REPORT_FILES = (
    "config.yaml",
    "versions.json",
    "metrics.jsonl",
    "summary.json",
    "rows.jsonl",
    "answers.jsonl",
    "rollouts.jsonl",
    "completions.jsonl",
    "skipped_steps.jsonl",
    "summary.png",
    "diagnose.png",
    "prepared.json",
)
MODEL_FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "training_args.bin",
)
MODEL_FOLDERS = ("checkpoint-[0-9]*",)
OWN_FILES = (*REPORT_FILES, *MODEL_FILES)


# How a run is continued in its folder.
_CONTINUED = {
    "train": ", or --resume_from_checkpoint true to continue it",
    "evaluate": ", or --resume to continue it",
    "judge": ", or --resume to continue it",
}

_HELD: dict[Path, FileLock] = {}


def release_folders() -> None:
    """Let go of every folder that this process holds; other processes may write there then."""
    while _HELD:
        _HELD.popitem()[1].release()


def first_folder() -> Path | None:
    """Return the folder that the command of this process was given, or chose, to write into; None before it does."""
    return next(iter(_HELD), None)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[TextIO]:
    """Give a text file to write; it takes its name, and the place of an older one, once it is whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class RunFolder:
    """One run's folder; nothing is written before `claim`.

    Under a launcher only the first process writes.

    Args:
        path: The folder, or None for the first of runs/<command>, runs/<command>-2, ... that is free.
        command: Name of the command, noted in the files.

    Raises:
        UserError: No folder is given and several processes would each find their own.
    """

    def __init__(self, path: str | None, command: str) -> None:
        if path is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("give --output_dir: several processes must agree on one folder")
        self.path = Path(path).expanduser() if path is not None else _free_folder(command)
        self.command = command
        self.writes = is_main_process()

    def check(self, *, overwrite: bool = False) -> None:
        """Refuse a folder that cannot be written or that holds something else.

        Args:
            overwrite: Whether an earlier run's files may be replaced.

        Raises:
            UserError: The folder is a file, cannot be written, or is not empty.
        """
        if not self.writes:
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path} is a file; give a folder")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"output_dir {self.path} cannot be written: {parent} is not a folder you can write to")
        if not self.path.is_dir() or not any(map(_counts, self.path.iterdir())):
            return
        if not self.holds_run():
            raise UserError(
                f"output_dir {self.path} is not empty and was not written by switchkd "
                "(no config.yaml); give another folder"
            )
        if not overwrite:
            raise UserError(
                f"output_dir {self.path} holds another run; give another folder, add --overwrite_output_dir to replace "
                f"that run{_CONTINUED.get(self.command, '')}"
            )

    def holds_run(self, command: str = "") -> bool:
        """Return whether a run of switchkd, of one command where it is named, wrote this folder."""
        config = self.path / "config.yaml"
        try:
            first = config.read_text(encoding="utf-8").partition("\n")[0] if config.is_file() else ""
            return first.startswith(HEADER) and first.endswith(command)
        except (OSError, UnicodeDecodeError):
            return False

    def make(self) -> None:
        """Make the folder where it is missing.

        Raises:
            UserError: It cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be made: {error.strerror or error}") from error

    def claim(self, config: Mapping[str, Any], *, keep: bool = False) -> None:
        """Make the folder and write `config.yaml` and `versions.json`.

        Args:
            config: Every option as it was resolved; those of the call itself are left out.
            keep: Leave what an earlier part of the same run wrote; otherwise its files are removed.

        Raises:
            UserError: The folder cannot be written.
        """
        if not self.writes:
            return
        self.make()
        self._lock()
        try:
            if not keep:
                self._remove_own_files()
            with whole(self.path / "config.yaml") as file:
                file.write(f"{HEADER} {version('switchkd')}: switchkd {self.command}\n")
                kept = {name: value for name, value in without_secrets(plain(config)).items() if name not in NOT_KEPT}
                yaml.safe_dump(kept, file, sort_keys=False, allow_unicode=True)
            self.write_json("versions.json", versions())
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be written: {error}") from error

    def _lock(self) -> None:
        """Keep the folder to this process until its command ends."""
        path = self.path.resolve()
        if path in _HELD:
            return  # commands of one process may share a folder: a comparison and its runs
        try:
            _HELD[path] = FileLock(path / LOCK)
            _HELD[path].acquire(blocking=False)
        except Timeout:
            del _HELD[path]
            raise UserError(
                f"output_dir {self.path} is in use by another switchkd; wait for it, or give another folder"
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        """Write one JSON document, indented."""
        if self.writes:
            text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
            with whole(self.path / name) as file:
                file.write(text + "\n")

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a JSON Lines file, whole or not at all."""
        if self.writes:
            with whole(self.path / name) as file:
                file.writelines(_line(row) for row in rows)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a JSON Lines file."""
        if self.writes:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.writelines(_line(row) for row in rows)

    def write_again(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put a JSON Lines file that exists into a known state; a line that says the same stays as it is."""
        path = self.path / name
        if not self.writes or not path.exists():
            return
        there = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                there[json.dumps(json.loads(line), sort_keys=True)] = line
        with whole(path) as file:
            for row in rows:
                file.write(there.get(json.dumps(plain(row), sort_keys=True), _line(row).rstrip("\n")) + "\n")

    def forget_after(self, name: str, step: int) -> None:
        """Take the rows of later steps out of a JSON Lines file: a resumed run writes them again.

        Raises:
            UserError: A line is damaged; a last line that was not written to its end is taken out too.
        """
        path = self.path / name
        if not self.writes or not path.exists():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                if number < len(lines):
                    raise UserError(f"{path}, line {number} is damaged; remove that line to go on") from None
        with whole(path) as file:
            file.write("".join(kept))

    def _remove_own_files(self) -> None:
        for pattern in OWN_FILES:
            for path in self.path.glob(pattern):
                if path.name != "config.yaml":  # replaced when the new one is whole: without one it is nobody's folder
                    path.unlink()
        remove_model(self.path)


def remove_model(folder: Path) -> None:
    """Remove the model that a run left in its folder, its tokenizer and its checkpoints."""
    for pattern in MODEL_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    for pattern in MODEL_FOLDERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the options that a run wrote into its folder, or None where there are none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    return config if isinstance(config, dict) else None


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def is_main_process() -> bool:
    """Return whether this is the first process of a launch, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def json_line(value: Any) -> str:
    """Return one compact line of JSON that any terminal and any parser can read; nan becomes null."""
    return json.dumps(plain(value), separators=(",", ":"), allow_nan=False)


def _counts(path: Path) -> bool:
    """Whether a file is more than what a command leaves that was killed before it wrote anything."""
    return path.name != LOCK and path.suffix != ".part"


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _free_folder(command: str) -> Path:
    folder, number = Path("runs") / command, 1
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = Path("runs") / f"{command}-{number}"
    return folder


def folder_name(label: str) -> str:
    """Return the name of the folder that holds what has this label."""
    return re.sub(r"[^\w.%+=()-]+", "-", label)


def check_name(name: str, what: str) -> None:
    """Refuse what cannot be the name of a folder and stand in a label."""
    valid = name.isprintable() and any(map(str.isalnum, name)) and name[0] not in "." and name.strip() == name
    if not valid or set(name) & set("/:,"):
        raise UserError(f"{name!r} is not a valid name of a {what.rstrip(',')}; leave out / : , and a dot in front")


def plain(value: Any) -> Any:
    """Return a value as JSON and YAML have it: enums by their values, nan and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if type(value) is str else str(getattr(value, "value", value))


def without_secrets(value: Any) -> Any:
    """Return a plain value with access tokens and the like blacked out, by name and by look."""
    if isinstance(value, Mapping):
        return {
            name: "***" if _SECRET_NAME.search(name) and isinstance(item, str) else without_secrets(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return _SECRET.sub("***", value) if isinstance(value, str) else value
