"""A measure of the user's own: a Python function that scores one answer."""

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from switchkd.errors import UserError, nearest_name

# What rows of answers and their means by length hold already.
_ROW = ("index", "seed", "prompt", "completion", "references", "rouge_l", "exact_match", "completion_tokens")
_TAKEN = (*_ROW, "finished", "reference_tokens", "examples")


@dataclass(frozen=True)
class Scorer:
    """A function of prompt, answer and references, and the name of its score.

    Attributes:
        name: That of the function; the score stands under it in rows and summaries.
        function: `(prompt, answer, references) -> score in [0, 1]`.
    """

    name: str
    function: Callable[[str, str, list[str]], float]

    def __call__(self, prompt: str, answer: str, references: Sequence[str]) -> float:
        """Return the score of one answer, times 100.

        Raises:
            UserError: The function fails, or returns anything but a number in [0, 1].
        """
        try:
            value = float(self.function(prompt, answer, list(references)))
        except Exception as error:
            raise UserError(
                f"scorer {self.name} failed on answer {answer[:60]!r} with {type(error).__name__}: {error}"
            ) from error
        if not (math.isfinite(value) and 0.0 <= value <= 1.0):
            raise UserError(
                f"scorer {self.name} must return a number in [0, 1], got {value} for answer {answer[:60]!r}"
            )
        return 100.0 * value


def load_scorer(spec: str) -> Scorer:
    """Return the scorer that is named.

    Args:
        spec: `path/to/file.py:function`, or `package.module:function`.

    Raises:
        UserError: There is no such file, module or function, or its name is that of another column.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise UserError(f"scorer must be path/to/file.py:function or module:function, got {spec!r}")
    module = _module(source)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = f"; the nearest is {nearest_name(name, known)!r}" if known else ""
        raise UserError(f"scorer: {source} has no function {name!r}{near}")
    if name in _TAKEN:
        raise UserError(f"scorer: {name!r} is a column of the answers already; call the function otherwise")
    return Scorer(name, function)


def _module(source: str) -> ModuleType:
    path = Path(source).expanduser()
    try:
        if path.suffix != ".py":
            return importlib.import_module(source)
        if not path.is_file():
            raise UserError(f"scorer: no file {source}; check the path")
        found = importlib.util.spec_from_file_location(re.sub(r"\W", "_", path.stem), path)
        assert found is not None and found.loader is not None  # for a .py file it is
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:  # whatever the file does when it is imported
        raise UserError(f"scorer: cannot import {source}: {type(error).__name__}: {error}") from error
