"""Reading records: a file, a folder or a hub data set becomes a `datasets.Dataset` with its columns as they are."""

import gzip
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict

from switchkd.errors import UserError
from switchkd.models.hub import cache_only_if_unreachable, unreachable_reason

READ_COLUMNS = ("instruction", "input", "output", "prompt", "completion", "messages", "teacher_prompt")
SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_WORDS = {"train": ("training",), "validation": ("valid", "val", "dev"), "test": ("testing", "eval")}
_PATH_LIKE = re.compile(
    r"^([./~]|runs/)|\\|/.*/|\.(jsonl?|parquet|csv|tsv|txt|arrow|ya?ml|gz|zip|zst|xz|bz2)$", re.IGNORECASE
)
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")


def load_records(name_or_path: str, *, split: str | None = "train") -> Dataset:
    """Return the records of a file, a folder or a hub data set, all their columns as they are.

    Args:
        name_or_path: A .jsonl, .json or .parquet file, plain or .gz; a folder written by `save_to_disk`, or of such
            files with the split in their names; or a hub id, "id" or "id:configuration".
        split: The split to take. A file is one split: there it is ignored. None takes all files of a folder, or the
            only split of a saved or hub data set.

    Returns:
        One row per record. A column that `prepare` does not read and whose values have no common type is left out.

    Raises:
        UserError: Nothing is there, or it cannot be read; file and line are named.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _load_folder(path, split)
    if path.exists():
        return _load_file(path)
    if _PATH_LIKE.search(name_or_path):
        raise UserError(f"no file or folder {name_or_path}: check the path (the current folder is {Path.cwd().name!r})")
    return _load_from_hub(name_or_path, split)


def as_dataset(data: Any, name: str) -> Dataset:
    """Return records in any of the usual containers as a `datasets.Dataset`.

    Args:
        data: A `Dataset`, a list of dicts, a pandas data frame, or an object with `__len__` and `__getitem__` that
            gives dicts (a map-style `torch.utils.data.Dataset`).
        name: What the data are for, named in errors.

    Raises:
        UserError: A streaming data set, several splits at once, or something without records.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, dict):  # a DatasetDict is one
        raise UserError(f"{name} holds several splits ({', '.join(map(str, data))}); give one of them")
    if hasattr(data, "iterrows"):
        return Dataset.from_pandas(data, preserve_index=False)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, str | bytes):
        raise UserError(
            f"{name} is a {type(data).__name__}, which has no random access; give a datasets.Dataset, e.g. "
            "datasets.Dataset.from_list(list(stream.take(1000)))"
        )
    rows = [data[index] for index in range(len(data))]
    wrong = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise UserError(f"{name}: record {wrong} is a {type(rows[wrong]).__name__}, not a dict of columns")
    try:
        return Dataset.from_list(rows)
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(f"{name}: {_first_line(error)}") from error


def _data_suffix(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _load_file(path: Path) -> Dataset:
    suffix = _data_suffix(path)
    if suffix is None:
        raise UserError(f"cannot read {path}: give a .jsonl, .json or .parquet file, plain or .gz")
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
        if suffix == ".parquet":
            return Dataset(pq.read_table(io.BytesIO(data)))
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {_first_line(error)}") from error
    rows = _json_rows(data, path, whole=suffix == ".json")
    if not rows:
        raise UserError(f"{path} is empty: it holds no records")
    return _from_rows(rows, path)


def _json_rows(data: bytes, path: Path, whole: bool) -> list[dict[str, Any]]:
    """Rows of JSON Lines, or with `whole` of one list of objects (a .json file may be either)."""
    if whole and data.strip():
        try:
            document = json.loads(data)
            rows, unit = document if isinstance(document, list) else [document], "record"
            numbered = list(enumerate(rows, start=1))
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise UserError(f"{path}, line {error.lineno}: malformed JSON ({error.msg})") from error
            return _json_rows(data, path, whole=False)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    else:
        numbered, unit = [], "line"
        for number, line in enumerate(data.split(b"\n"), start=1):
            try:
                if line.strip():
                    numbered.append((number, json.loads(line)))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: malformed JSON ({_first_line(error)})") from error
    for number, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"{path}, {unit} {number}: expected a JSON object, found {str(row)[:40]!r}")
    return [row for _, row in numbered]


def _from_rows(rows: list[dict[str, Any]], path: Path) -> Dataset:
    arrays = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if name in ("output", "completion") and kinds == {str, list}:
            values = [[value] if isinstance(value, str) else value for value in values]
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            if name in READ_COLUMNS:
                found = ", ".join(sorted(kind.__name__ for kind in kinds))
                raise UserError(f"{path}: column `{name}` mixes values ({found}): {_first_line(error)}") from error
    return Dataset(pa.table(arrays))


def _load_folder(folder: Path, split: str | None) -> Dataset:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _one_split(datasets.load_from_disk(str(folder)), str(folder), split)
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if _data_suffix(path) and path.is_file() and not re.search(r"(^|/)\.|dataset_infos?\.json$", name):
            files[path] = set(re.split(r"[^a-z0-9]+", name.lower()))
    if not files:
        raise UserError(f"folder {folder} holds no .jsonl, .json or .parquet file (plain or .gz)")
    chosen = list(files)
    if split is not None:
        matches = {w: [path for path in files if w in files[path]] for w in (split, *SPLIT_WORDS.get(split, ()))}
        fitting = [matches[split]] if matches[split] else [paths for paths in matches.values() if paths]
        names = ", ".join(str(path.relative_to(folder)) for path in files)
        if len(fitting) > 1:
            raise UserError(f"folder {folder} has several files that may be split {split!r}: name one ({names})")
        if not fitting and (split != "train" or len(files) > 1):
            raise UserError(f"folder {folder} has no file for split {split!r}; it holds {names}: name the file")
        chosen = fitting[0] if fitting else chosen
    try:
        return datasets.concatenate_datasets([_load_file(path) for path in chosen])
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the files of folder {folder} have different columns: {_first_line(error)}") from error


def _load_from_hub(name: str, split: str | None) -> Dataset:
    if not _HUB_ID.match(name):
        raise UserError(f"{name!r} is not a file, a folder or a hub id (owner/name or owner/name:config)")
    repository, _, configuration = name.partition(":")
    try:
        with cache_only_if_unreachable():
            loaded = datasets.load_dataset(repository, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{name!r} is not a local file or folder, and loading it as hub data set {repository!r} "
            f"(split {split}) failed: {unreachable_reason(error) or _first_line(error)}"
        ) from error
    return _one_split(loaded, name, split)


def _one_split(loaded: Dataset | DatasetDict, name: str, split: str | None) -> Dataset:
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
