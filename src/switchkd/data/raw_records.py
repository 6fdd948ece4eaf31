"""Published instruction data as they are found: which files hold which split, and one shape for all their records."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from switchkd.data.columns import choose_columns
from switchkd.data.reader import alpaca_prompt
from switchkd.data.records import FORMATS, data_files, load_records, numbered_records
from switchkd.data_options import parse_columns
from switchkd.errors import UserError
from switchkd.models.hub import cache_only_if_unreachable, unreachable_reason
from switchkd.sources import Source

Record = dict[str, Any]
#: A record with the place that errors name: "data/dolly/train.jsonl, line 3".
Placed = tuple[str, Record]

#: The papers' raw Dolly file begins with the validation split.
RAW, RAW_VALIDATION = "raw", 1000
_WITH_INPUT = re.compile(re.escape(alpaca_prompt("\0", "\1")).replace("\0", "(.*)").replace("\1", "(.*)"), re.DOTALL)
_ALONE = re.compile(re.escape(alpaca_prompt("\0")).replace("\0", "(.*)"), re.DOTALL)
_RESPONSES = ("output", "response", "completion", "answer", "target", "targets")


@dataclass
class ReadSource:
    """What the files of a source hold.

    Attributes:
        splits: Split -> records, where the files are splits.
        whole: The records of a file that holds all, None otherwise.
        inputs: One dict per file: `split`, `name`, `sha256`, `records`.
        notes: What a reader should know, a sentence each.
    """

    splits: dict[str, list[Placed]] = field(default_factory=dict)
    whole: list[Placed] | None = None
    inputs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_source(
    source: Source,
    dataset_name: str | None,
    files: Mapping[str, str],
    configuration: str | None,
    columns: Mapping[str, str] | str | None,
) -> ReadSource:
    """Return the records of a source, each complete; the arguments are those of `prepare_source`.

    Raises:
        UserError: Nothing is there, or a record is not complete; the line is named.
    """
    if files and dataset_name is not None:
        raise UserError("dataset_name and files of splits exclude each other; give one of them")
    result = ReadSource()
    given = parse_columns(columns)
    if files:
        for split, file in files.items():
            _add(result, source, _existing(file), file, split, given)
        return result
    name = dataset_name or source.hub_id
    if name is None:
        raise UserError("give --dataset_name, or the files: --train_file, --validation_file, --test_file")
    path = Path(name).expanduser()
    if path.is_file():
        _add(result, source, path, name, None, given)
    elif path.is_dir():
        _add_folder(result, source, path, name, given)
    elif source.hub_id is None:
        records = load_records(name, split="train", configuration=configuration)
        rows = [(f"record {number}", row) for number, row in enumerate(records, start=1)]
        content = "".join(json.dumps(row, sort_keys=True, default=str) for _, row in rows)
        digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
        result.inputs.append({"split": "train", "name": name, "sha256": digest, "records": len(rows)})
        result.whole = _complete(rows, name, source, given, result.notes)
    elif re.search(r"^[./~]|/.*/", name) or path.suffix:
        raise UserError(f"no file or folder {name}: check the path (the current folder is {Path.cwd().name!r})")
    else:
        _add_folder(result, source, _downloaded(name), name, given)
    return result


def prompt_key(record: Record) -> str:
    """Return what two records have in common exactly if they ask for the same thing."""
    asked = [record.get(name) or "" for name in ("instruction", "input", "prompt")]
    if not any(asked):
        messages = record.get("messages") or []
        asked = [messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages]
    return json.dumps(asked, ensure_ascii=False, sort_keys=True)


def response_words(response: Any) -> int:
    """Return the number of words, parted by white space, of a response; of the first where there are several."""
    text = response[0] if isinstance(response, list) else response
    return len(str(text).split())


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"no file {name}: check the path (the current folder is {Path.cwd().name!r})")
    return path


def _downloaded(hub_id: str) -> Path:
    """The folder of a hub data set's files as they were uploaded, so that they can be hashed."""
    try:
        with cache_only_if_unreachable():
            patterns = [f"*{suffix}{packed}" for suffix in FORMATS for packed in ("", ".gz")]
            return Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:
        reason = unreachable_reason(error) or f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(f"cannot load hub data set {hub_id!r}: {reason}") from error


def _add_folder(result: ReadSource, source: Source, folder: Path, name: str, given: Mapping[str, str]) -> None:
    found = data_files(folder)
    if not found:
        raise UserError(f"folder {name} holds no data: it needs files such as train.jsonl or valid.jsonl.gz")
    chosen = {split: path for split, stems in source.stems.items() if (path := _of_stems(found, stems, source, name))}
    raw = _of_stems(found, (RAW,), source, name) if source.name == "dolly" and "train" not in chosen else None
    if raw is not None:
        _add(result, source, raw, str(raw.relative_to(folder)), "train", given)
        records = result.splits["train"]
        result.splits["validation"], result.splits["train"] = records[:RAW_VALIDATION], records[RAW_VALIDATION:]
        result.notes.append(f"validation is the first {RAW_VALIDATION:,} records of {raw.name}, as in MiniLLM's code.")
        chosen.pop("validation", None)
    for split, path in chosen.items():
        _add(result, source, path, str(path.relative_to(folder)), split, given)
    if chosen or raw is not None:
        return
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:5])
        raise UserError(f"which file of {name} holds what? It has {names}; name the files: --test_file {found[0]}")
    _add(result, source, found[0], str(found[0].relative_to(folder)), None, given)


def _of_stems(files: list[Path], stems: tuple[str, ...], source: Source, name: str) -> Path | None:
    """The file of the first of these names that is there; where there are several, that of the source's subfolder."""
    for stem in stems:
        fitting = [path for path in files if path.name.partition(".")[0] == stem]
        preferred = [path for path in fitting if path.parent.name == source.subfolder] or fitting
        if len(preferred) > 1:
            raise UserError(f"{name} has several files called {stem}: {', '.join(map(str, preferred))}; name one")
        if preferred:
            return preferred[0]
    return None


def _add(
    result: ReadSource, source: Source, path: Path, name: str, split: str | None, given: Mapping[str, str]
) -> None:
    rows = _complete(numbered_records(path), str(path), source, given, result.notes)
    if split is None and source.whole == "test":
        split = "test"
    if split is None:
        result.whole = rows
    else:
        result.splits[split] = rows
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    result.inputs.append({"split": split or "all", "name": name, "sha256": digest, "records": len(rows)})


def _complete(
    rows: list[Placed], file: str, source: Source, given: Mapping[str, str], notes: list[str]
) -> list[Placed]:
    """The rows of a file in one shape."""
    if source.name == "custom" and not any("instances" in row for _, row in rows):
        return _of_any_shape(rows, file, given)
    for name, column in given.items():
        if not any(column in row for _, row in rows):
            names = ", ".join(dict.fromkeys(name for _, row in rows for name in row))
            raise UserError(f"columns: {name}={column}, but {file} has no such column; it has {names}")
    found: list[Placed] = []
    other_prompts = 0
    for place, row in rows:
        where = f"{file}, {place}"
        for one in _instances(row | {name: row.get(column) for name, column in given.items()}, where):
            record = _instruction(one, where)
            filled = one.get("prompt")
            other_prompts += filled is not None and filled != alpaca_prompt(record["instruction"], record["input"])
            found.append((where, record))
    if other_prompts:
        notes.append(
            f"{other_prompts:,} records of {Path(file).name} have a filled prompt that is not the Alpaca template of "
            "their instruction; the template is used."
        )
    if len(found) != len(rows):
        notes.append(f"{Path(file).name}: {len(found):,} instances of {len(rows):,} tasks.")
    return found


def _instances(row: Record, where: str) -> list[Record]:
    """The instances of a task, each with its instruction; a record without instances is its own."""
    instances = next((row[name] for name in ("instances", "Instances") if row.get(name) is not None), None)
    if instances is None:
        return [row]
    instruction = row.get("instruction") or row.get("Definition") or row.get("definition")
    if isinstance(instruction, list) and instruction:
        instruction = instruction[0]
    if isinstance(instances, dict):  # the columns that `datasets` makes of a list of dicts
        instances = [dict(zip(instances, values, strict=True)) for values in zip(*instances.values(), strict=True)]
    if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
        raise UserError(f"{where}: `instances` must be a list of objects, found {str(instances)[:40]!r}")
    return [{"instruction": instruction, "input": one.get("input"), "output": one.get("output")} for one in instances]


def _instruction(row: Record, where: str) -> Record:
    """A record as instruction, input and output, whatever its columns are called."""
    instruction, context = row.get("instruction"), row.get("input") or row.get("context") or ""
    if instruction is None and isinstance(row.get("prompt"), str):
        match = _WITH_INPUT.fullmatch(row["prompt"]) or _ALONE.fullmatch(row["prompt"])
        if match is None:
            raise UserError(f"{where}: `prompt` is not the Alpaca template, and there is no `instruction`")
        instruction, context = (*match.groups(), "")[:2]
    if not isinstance(instruction, str) or not instruction.strip():
        kind = "empty" if isinstance(instruction, str) else "missing"
        raise UserError(f"{where}: `instruction` is {kind}; it has {', '.join(row) or 'no columns'}")
    if not isinstance(context, str):
        raise UserError(f"{where}: `input` must be text, found {str(context)[:40]!r}")
    response = next((row[name] for name in _RESPONSES if row.get(name) is not None), None)
    texts = response if isinstance(response, list) else [response]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        shown = "missing" if response is None else f"{str(response)[:40]!r}"
        raise UserError(f"{where}: `output` must be a text or a list of texts, none of them empty; it is {shown}")
    return {"instruction": instruction, "input": context, "output": response}


def _of_any_shape(rows: list[Placed], file: str, given: Mapping[str, str]) -> list[Placed]:
    """Records in the shapes that `switchkd.prepare` reads, their columns under the names of this package."""
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    chosen = choose_columns(names, given)
    if chosen.names == ("text",):
        raise UserError(f"{file}: plain text has no prompts; give it to training as lm_dataset_name")
    found = []
    for place, row in rows:
        record = {name: row.get(column) for name, column in chosen.sources.items()}
        for name in chosen.names:
            if not record[name]:
                raise UserError(f"{file}, {place}: `{chosen.sources[name]}` is empty or missing")
        found.append((f"{file}, {place}", {name: value for name, value in record.items() if value is not None}))
    return found
