"""Answers that the teacher writes once, before training: sequence-level distillation."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from torch import nn

from switchkd.cli.run_folder import whole
from switchkd.cli.sealed import append_sealed, read_sealed
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.models.copy import whole as gathered
from switchkd.policies import Policy
from switchkd.rollout import Rollout

#: Rows that are decoded at once, and rows that are written down together.
ACTIVE_ROWS = 32
ROWS_PER_PART = 128
# One seed's sample of the teacher is as good as another's, and drafts and padding change nothing.
NOT_DESCRIBED = ("cuda_graphs", "draft_length", "pad_token_id", "seed")


def with_teacher_text(
    data: Dataset,
    student: nn.Module,
    teacher: nn.Module,
    path: Path,
    *,
    policy: Policy,
    tokenizer: Any = None,
    say: Callable[[str], None] = lambda text: None,
    part: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
    writer: Callable[..., Rollout] | None = None,
    **rollout_options: Any,
) -> Dataset:
    """Return prepared data whose answers the policy wrote, one for each prompt.

    The answers stand in a JSONL file, with a description of what made them beside it. A file that is already there is
    taken up where it ends, if teacher, prompts and options are the same (the seed may differ: one sample is as good as
    another); it is itself a data set for `switchkd train`.
    Several processes write every n-th row each, into a file of their own beside it, which is taken up in the same way;
    the first one joins them, and the text is that of one process.
    The file says nothing about the student, whose drafts the teacher only corrects: the distribution is the teacher's.

    Args:
        data: Made by `switchkd.data.prepare`.
        student: Drafts.
        teacher: Decides.
        path: The JSONL file.
        policy: `TeacherPolicy()`.
        tokenizer: Adds the texts to the file.
        say: Prints a line for people.
        part: This process's number and how many there are; all must call.
        wait: Returns when all of them have called it.
        writer: Called in place of `roll_out`, with the same arguments; `write` of a `switchkd.vllm.Engine`.
        rollout_options: Passed on to `roll_out`; part of the description.

    Raises:
        UserError: The file was made by another teacher, from other prompts, or with other options.
    """
    description = {
        "teacher": _fingerprint(teacher),
        "prompts": hashlib.sha256(
            json.dumps([list(data[name]) for name in _prompt_columns(data)]).encode()
        ).hexdigest(),
        "rows": len(data),
        **{name: value for name, value in rollout_options.items() if name not in NOT_DESCRIBED},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {**rollout_options, "policy": policy}
    write = writer or roll_out
    number, parts = part
    if parts > 1 and len(_taken_up(path, description, data, range(len(data)))) < len(data):
        own, rows = _part_of(path, number, parts), range(number, len(data), parts)
        with FileLock(f"{own}.lock"):
            _write(write, data, student, teacher, own, description, rows, tokenizer, say, options)
        wait()  # every process has an equal share
        if number == 0:
            with FileLock(f"{path}.lock"):
                _join(path, [_part_of(path, one, parts) for one in range(parts)], description, len(data))
    wait()
    # Several runs may share a file: one writes, the others wait and take it up.
    with FileLock(f"{path}.lock"):
        rows = range(len(data))
        completions = _write(write, data, student, teacher, path, description, rows, tokenizer, say, options)
    return data.remove_columns("completion_ids").add_column("completion_ids", completions)


def _write(
    write: Callable[..., Rollout],
    data: Dataset,
    student: nn.Module,
    teacher: nn.Module,
    path: Path,
    description: dict[str, Any],
    rows: Sequence[int],
    tokenizer: Any,
    say: Callable[[str], None],
    options: dict[str, Any],
) -> list[list[int]]:
    """Write the answers to some rows of the data, in their order, as far as the file does not have them."""
    completions, names = _taken_up(path, description, data, rows), data.column_names
    if completions:
        say(f"teacher text: {len(completions)} of {len(rows)} answers are in {path}")
    _describe(path, description)
    while len(completions) < len(rows):
        some = rows[len(completions) : len(completions) + ROWS_PER_PART]
        asked = data.select(some)
        rollout = write(
            student,
            teacher,
            list(asked["prompt_ids"]),
            teacher_prompt_ids=list(asked["teacher_prompt_ids"]) if "teacher_prompt_ids" in names else None,
            row_ids=torch.tensor(some),
            max_active_rows=ACTIVE_ROWS,
            **options,
        )
        written = rollout.to_dicts(tokenizer)
        kept = ("prompt", "completion", "prompt_ids", "completion_ids")
        append_sealed(path, [{name: row[name] for name in kept if name in row} for row in written])
        completions += [row["completion_ids"] for row in written]
    if tokenizer is not None:
        say(f"teacher text: {len(completions)} answers, {sum(map(len, completions))} tokens, in {path}")
    return completions


def _part_of(path: Path, number: int, parts: int) -> Path:
    return path.with_name(f"{path.stem}-{number + 1}-of-{parts}{path.suffix}")


def _join(path: Path, parts: list[Path], description: dict[str, Any], rows: int) -> None:
    """Put the rows of all processes into one file, in the order of the data, and remove their own files."""
    lines = [part.read_text(encoding="utf-8").splitlines() for part in parts]
    _describe(path, description)
    with whole(path) as file:
        for row in range(rows):
            file.write(lines[row % len(parts)][row // len(parts)] + "\n")
    for part in parts:
        for one in (part, part.with_suffix(".json"), Path(f"{part}.lock")):
            one.unlink(missing_ok=True)


def _describe(path: Path, description: dict[str, Any]) -> None:
    with whole(path.with_suffix(".json")) as beside:
        beside.write(json.dumps(description, indent=1) + "\n")


def _prompt_columns(data: Dataset) -> list[str]:
    return [name for name in ("prompt_ids", "teacher_prompt_ids") if name in data.column_names]


def _taken_up(path: Path, description: dict[str, Any], data: Dataset, rows: Sequence[int]) -> list[list[int]]:
    """The answers to some rows that a file has already; a line that was cut off is dropped from it."""
    found_rows = read_sealed(path, "teacher_text_file")
    if not found_rows:
        return []
    beside = path.with_suffix(".json")
    try:
        found = dict(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"teacher_text_file {path} has no {beside.name} beside it that says who wrote it, or a damaged one; remove "
            f"{path}"
        ) from None
    for name, value in json.loads(json.dumps(description)).items():
        if found.get(name) != value:
            raise UserError(
                f"teacher_text_file {path} was made with {name} {found.get(name)}, this run has {value}; remove the "
                "file or name another"
            )
    prompts = data["prompt_ids"]
    for number, (line, row) in enumerate(zip(found_rows, rows, strict=False), start=1):
        if line.get("prompt_ids", prompts[row]) != list(prompts[row]) or len(found_rows) > len(rows):
            raise UserError(
                f"teacher_text_file {path}, line {number} does not answer prompt {row + 1} of the data: lines were "
                "added or taken out; remove the file or name another"
            )
    return [line["completion_ids"] for line in found_rows]


def _fingerprint(model: nn.Module) -> str:
    """A digest of shapes and of some values of every parameter: the same for the same weights, wherever they lie."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sample: list[float] = []  # of weights that a device map keeps elsewhere
        if not parameter.is_meta:
            with gathered(parameter) as value:
                sample = value.detach().flatten()[:: max(value.numel() // 16, 1)].float().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {sample}".encode())
    return digest.hexdigest()
