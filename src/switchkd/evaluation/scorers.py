"""A measure of the user's own: a Python function that scores one answer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from switchkd.errors import UserError
from switchkd.plugins import load_object

# What rows of answers and their means by length hold already.
_ROW = ("index", "seed", "prompt", "completion", "references", "rouge_l", "exact_match", "completion_tokens")
_TAKEN = (*_ROW, "finished", "reference_tokens", "reference_words", "repetition", "examples")


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
    function = load_object("scorer", spec)
    name = spec.rpartition(":")[2]
    if not callable(function):
        raise UserError(f"scorer: {spec} is not a function")
    if name in _TAKEN:
        raise UserError(f"scorer: {name!r} is a column of the answers already; call the function otherwise")
    return Scorer(name, function)
