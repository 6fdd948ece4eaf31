"""The one exception for mistakes that a user can correct, and the checks that raise it."""

import contextlib
import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class UserError(ValueError):
    """Raised where input, configuration or files cannot be used.

    The message is one line: what is wrong, with which value, and the way out. The command line prints it after
    `switchkd: error:` and exits with its code; library users catch it as a `ValueError`.

    Attributes:
        code: Exit code of the process.
    """

    code = 2


class LostProcess(UserError):
    """Raised where another process of a distributed run is gone; the same command may go on (EX_TEMPFAIL)."""

    code = 75


class UserErrors(UserError):
    """Several mistakes at once, or a command that reached a part of what it should.

    Attributes:
        messages: One line each.
        result: What `--json` prints nevertheless; None for nothing.
    """

    def __init__(self, messages: Sequence[str], result: dict[str, Any] | None = None) -> None:
        super().__init__("\n".join(messages))
        self.messages, self.result = tuple(messages), result


# What libraries say where the disk is full or does not take more; errno is lost on the way through some of them.
_NO_ROOM = re.compile(
    r"no space left|disk quota|file too large|read-only file system|input/output error|file name too long"
    r"|os error (28|122|27|30|5|36)\b|code: (28|122|27|30|5|36)\b|PytorchStreamWriter failed"
    r"|inline_container.*unexpected pos|iostream error",
    re.IGNORECASE,
)


def storage_problem(error: BaseException) -> str | None:
    """Return in one line that something could not be written, None where an error says something else."""
    text = " ".join(str(error).split())
    seen = _NO_ROOM.search(text)
    if seen is None:
        return None
    file = getattr(error, "filename", None)
    place = f"cannot write {file}" if file else "cannot write"
    by_torch = "inline_container" in seen[0] or seen[0].startswith(("Pytorch", "iostream"))
    what = getattr(error, "strerror", None) or ("no room" if by_torch else seen[0])
    return f"{place}: {what}; make room or give another output_dir, what was saved before is still there"


class OutOfMemory(UserError):
    """Raised where a command ends because memory ran out: the message says in which part, and what lowers it."""

    #: Exit code of the process, that of a resource which the system did not give.
    code = os.EX_OSERR


# What PyTorch says where memory runs out, on a GPU, on the CPU, and in a library of the GPU.
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|ALLOC_FAILED|std::bad_alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error)) is not None
    )


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Note on an error that comes out of the block what was being done, its attribute `phase`; the innermost counts."""
    try:
        yield
    except BaseException as error:
        if not hasattr(error, "phase"):
            error.phase = phase  # type: ignore[attr-defined]
        raise


class Stopped(KeyboardInterrupt):
    """Raised where a command ends because a signal asked for it, after it has saved what it could.

    Attributes:
        number: The signal.
        code: Exit code of the process, 128 + the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number, self.code = number, 128 + number


def check_range(name: str, value: Any, low: float, high: float, high_name: str = "") -> None:
    """Refuse a number outside [low, high], with one line."""
    if not low <= value <= high:
        raise UserError(f"{name} must lie in [{low:g}, {high_name or f'{high:g}'}], got {value}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not among the choices, with one line."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse anything but an integer of at least that size, with one line."""
    if not (isinstance(value, int) and value >= least):
        raise UserError(f"{name} must be an integer >= {least}, got {value!r}")


def check_share_of_training(name: str, value: Any) -> None:
    """Refuse a number outside (0, 1], with one line."""
    if not 0.0 < value <= 1.0:
        raise UserError(f"{name} must lie in (0, 1], a share of the training, got {value}")


def check_warping(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse a sampling option outside its range, with one line."""
    if not (temperature >= 0.0 and math.isfinite(temperature)):
        raise UserError(f"temperature must be >= 0 (0 is greedy), got {temperature}")
    if top_k < 0:
        raise UserError(f"top_k must be >= 0 (0 keeps every id), got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p must lie in (0, 1], got {top_p}")


def check_loss_temperature(temperature: float) -> None:
    """Refuse a temperature that logits cannot be divided by, with one line."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"loss_temperature must be a finite number > 0, got {temperature}")


def json_object(name: str, value: Any) -> dict[str, Any]:
    """Return the JSON object that an option is, as text or read already.

    Raises:
        UserError: It is something else.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError as error:
            raise UserError(f"{name} must be a JSON object, got {value!r} ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{name} must be a JSON object, got {found!r}")
    return found


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """Return the valid name most similar to a given one; a half-typed name is near the whole one."""

    def likeness(other: str) -> float:
        pairs = zip(name, other, strict=False)
        common = next((i for i, (one, two) in enumerate(pairs) if one != two), min(len(name), len(other)))
        alike = difflib.SequenceMatcher(None, name, other[: len(name) + 1]).ratio()
        return alike + 0.3 * common / max(len(name), 1)

    return max(valid, key=likeness)
