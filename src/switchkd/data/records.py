"""Reading records: a file, a folder or a hub data set becomes a `datasets.Dataset` with its columns as they are."""

import contextlib
import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, Features, IterableDataset, Value

from switchkd.data_options import READ_COLUMNS
from switchkd.errors import UserError
from switchkd.models.hub import cache_only_if_unreachable, unreachable_reason

#: Suffix -> what `datasets` calls the format.
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
ACCEPTED = "a .jsonl, .json, .csv, .tsv or .parquet file, plain or .gz"
SPLIT_WORDS = {"train": ("training",), "validation": ("valid", "val", "dev"), "test": ("testing", "eval")}
_PATH_LIKE = re.compile(
    r"^([./~]|runs/)|\\|/.*/|\.(jsonl?|parquet|csv|tsv|txt|arrow|ya?ml|gz|zip|zst|xz|bz2)$", re.IGNORECASE
)
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")


def load_records(
    name_or_path: str, *, split: str | None = "train", configuration: str | None = None, streaming: bool = False
) -> Any:
    """Return the records of a file, a folder or a hub data set, all their columns as they are.

    Parquet, CSV and saved folders are read by `datasets`, which maps them from disk; JSON is read here, so that errors
    name the line.

    Args:
        name_or_path: A .jsonl, .json, .csv, .tsv or .parquet file, plain or .gz; a folder written by `save_to_disk`, or
            of such files with the split in their names; or a hub id, "id" or "id:configuration".
        split: The split to take. A file is one split: there it is ignored. None takes all files of a folder, or the
            only split of a saved or hub data set.
        configuration: Of a hub data set.
        streaming: Read records as they are asked for; nothing is downloaded or converted as a whole.

    Returns:
        A `datasets.Dataset`, or with `streaming` a `datasets.IterableDataset`; one row per record. A column that
        `prepare` does not read and whose values have no common type is left out.

    Raises:
        UserError: Nothing is there, or it cannot be read; file and line are named.
    """
    path = Path(name_or_path).expanduser()
    if path.exists() and configuration is not None:
        raise UserError(f"dataset_config={configuration} does nothing: {path} is not a hub data set; remove it")
    if path.is_dir():
        if streaming:
            raise UserError(f"dataset_streaming reads a file or a hub data set, and {path} is a folder; name its file")
        return _load_folder(path, split)
    if path.exists():
        return _stream_file(path) if streaming else _load_file(path)
    if _PATH_LIKE.search(name_or_path):
        raise UserError(f"no file or folder {name_or_path}: check the path (the current folder is {Path.cwd().name!r})")
    return _load_from_hub(name_or_path, split, configuration, streaming)


def _data_suffix(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def _known_suffix(path: Path) -> str:
    suffix = _data_suffix(path)
    if suffix is None:
        raise UserError(f"cannot read {path}: give {ACCEPTED}")
    return suffix


_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, pa.ArrowException, datasets.exceptions.DatasetsError)


def _load_file(path: Path) -> Dataset:
    suffix = _known_suffix(path)
    try:
        if suffix in (".csv", ".tsv"):
            return _load_table(path, suffix)
        if suffix == ".parquet" and path.suffix.lower() == suffix:
            with _quiet_datasets():
                return Dataset.from_parquet(str(path))
        data = _unpacked(path)
        if suffix == ".parquet":
            return Dataset(pq.read_table(io.BytesIO(data)))
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(f"cannot read {path}: {_first_line(error.__cause__ or error)}") from error
    return _from_rows([row for _, row in _json_rows(data, path, whole=suffix == ".json")], path)


def numbered_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the records of a file as they are, each with its place: "line 3" of JSON Lines, else "record 3".

    Raises:
        UserError: The file cannot be read; the line is named.
    """
    suffix = _known_suffix(path)
    if suffix in (".jsonl", ".json"):
        try:
            data = _unpacked(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {_first_line(error)}") from error
        return _json_rows(data, path, whole=suffix == ".json")
    return [(f"record {number}", row) for number, row in enumerate(_load_file(path), start=1)]


def _unpacked(path: Path) -> bytes:
    """The content of a file, decompressed where its name ends with .gz."""
    data = path.read_bytes()
    if not path.name.lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, zlib.error) as error:
        with contextlib.suppress(zlib.error):
            line = zlib.decompressobj(wbits=31).decompress(data).count(b"\n") + 1
            raise UserError(
                f"cannot read {path}: the compressed file breaks off in line {line}; copy or download it again"
            ) from error
        raise


def _load_table(path: Path, suffix: str) -> Dataset:
    """The rows of a CSV or TSV file, every column as text: an answer 42 or NA is one."""
    with _quiet_datasets():
        return Dataset.from_csv(str(path), **_table_options(path, suffix))


def _table_options(path: Path, suffix: str) -> dict[str, Any]:
    separator = "," if suffix == ".csv" else "\t"
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=separator), [])
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: the first line must name the columns, each once; found {','.join(names)[:60]!r}")
    features = Features({name: Value("string") for name in names})
    return {"sep": separator, "features": features, "keep_default_na": False, "encoding": "utf-8-sig"}


def _stream_file(path: Path) -> IterableDataset:
    """The rows of a file as they are asked for; what cannot be read is found then."""
    suffix = _known_suffix(path)
    options = _table_options(path, suffix) if suffix in (".csv", ".tsv") else {}
    return datasets.load_dataset(FORMATS[suffix], data_files=str(path), split="train", streaming=True, **options)


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep the bars and the error messages of `datasets` off the terminal; errors are told in one line here."""
    level, shown = datasets.logging.get_verbosity(), datasets.utils.logging.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _json_rows(data: bytes, path: Path, whole: bool) -> list[tuple[str, dict[str, Any]]]:
    """Place and row of JSON Lines, or with `whole` of one list of objects (a .json file may be either)."""
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
    if not numbered:
        raise UserError(f"{path} is empty: it holds no records")
    return [(f"{unit} {number}", row) for number, row in numbered]


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


def data_files(folder: Path) -> list[Path]:
    """Return the files of a folder, and of those in it, that can be read as records, by name."""
    return [path for path in sorted(folder.rglob("*")) if _is_data(path, str(path.relative_to(folder)))]


def _is_data(path: Path, name: str) -> bool:
    """Whether a file below a folder holds records; others describe those beside them."""
    about = r"(^|/)\.|dataset_infos?\.json$|(^|/)(prepared|versions)\.json$"
    return bool(_data_suffix(path)) and path.is_file() and not re.search(about, name)


def _load_folder(folder: Path, split: str | None) -> Dataset:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _one_split(datasets.load_from_disk(str(folder)), str(folder), split)
    files = {path: set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())) for path in data_files(folder)}
    if not files:
        raise UserError(f"folder {folder} holds no data: it needs {ACCEPTED}")
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


def _load_from_hub(name: str, split: str | None, configuration: str | None, streaming: bool) -> Any:
    if not _HUB_ID.match(name):
        raise UserError(f"{name!r} is not a file, a folder or a hub id (owner/name or owner/name:config)")
    repository, _, named = name.partition(":")
    if named and configuration not in (None, named):
        raise UserError(f"dataset_config={configuration} and {name!r} name two configurations; remove one")
    options = {"streaming": True} if streaming else {}
    try:
        with cache_only_if_unreachable():
            loaded = datasets.load_dataset(repository, named or configuration, split=split, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{name!r} is not a local file or folder, and loading it as hub data set {repository!r} "
            f"(split {split}) failed: {unreachable_reason(error) or _first_line(error)}"
        ) from error
    return _one_split(loaded, name, split)


def _one_split(loaded: Any, name: str, split: str | None) -> Any:
    if not isinstance(loaded, dict):  # a DatasetDict is one, an IterableDatasetDict too
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
