"""A pair with prompts and answers as `switchkd diagnose` measures it."""

from typing import Any

from datasets import Dataset

from helpers.pairs import make_pair
from helpers.tiny import RAGGED_ROWS, build_tokenizer
from switchkd.data import prepare
from switchkd.evaluation.guidance import Pair


def diagnosed(
    models: Any = None, rows: Any = RAGGED_ROWS, *, length: int = 12, excluded: Any = (), **over: Any
) -> Pair:
    """The ragged rows, or others, under a student and its teacher; sampling options and the rest by name."""
    student, teacher = models or make_pair("gpt2")
    tokenizer = build_tokenizer()
    data = prepare(Dataset.from_list(rows), tokenizer, max_completion_length=length)[0]
    fields = {name: over.pop(name) for name in ("seed", "batch_size") if name in over}
    return Pair(student, teacher, tokenizer, data, length, over, excluded_ids=excluded, **fields)
