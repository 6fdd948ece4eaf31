"""The options of reading data: what every command and `SwitchConfig` say about records; no heavy import."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from switchkd.errors import UserError, nearest_name

#: What a column may be read as.
READ_COLUMNS = (
    "prompt",
    "completion",
    "messages",
    "instruction",
    "input",
    "output",
    "text",
    "teacher_prompt",
    "tools",
)
#: What stands around prompts of text: `auto` is `alpaca` for instructions and `none` for prompts; `chat` is the
#: tokenizer's own.
TEMPLATES = ("auto", "none", "alpaca", "chat")
#: Which turns of a chat are trained on.
SUPERVISE = ("last", "all")

#: Option -> help.
HELP = {
    "columns": "what is read=its column, e.g. prompt=question,completion=answer; the usual names need none",
    "template": "around instructions and prompts of text: auto (alpaca for instructions, none for prompts), none, "
    "alpaca, or chat (the tokenizer's)",
    "split_special_tokens": "special tokens that the data spell, such as </s>, are text; false: they are the tokens",
    "chat_template_kwargs": 'JSON that the chat template reads, e.g. {"enable_thinking": false}',
    "chat_template_path": "another chat template: a jinja file, or the folder or hub id of a tokenizer that has it",
    "supervise": "which turns of the assistant are trained on in steps on dataset answers: last or all",
}


def parse_columns(value: Any) -> dict[str, str]:
    """Return name -> column as `columns` gives it: a dict, "prompt=question,completion=answer", or JSON.

    Raises:
        UserError: Something else, or a name that is never read.
    """
    if value is None:
        return {}
    pairs: Any = value
    if isinstance(value, str):
        try:
            pairs = json.loads(value) if value.lstrip().startswith("{") else _pairs(value)
        except ValueError:
            pairs = None
    if not isinstance(pairs, Mapping) or not all(isinstance(name, str) for item in pairs.items() for name in item):
        raise UserError(f"columns must be name=column pairs such as prompt=question,completion=answer, got {value!r}")
    for name in pairs:
        if name not in READ_COLUMNS:
            raise UserError(
                f"columns: nothing is read as {name!r}, the nearest name is {nearest_name(name, READ_COLUMNS)!r}; what "
                "it is read as comes first: prompt=question"
            )
    return dict(pairs)


def parse_mixture(values: Sequence[str]) -> dict[str, float]:
    """Return name -> weight as `dataset_mixture` gives it: "name=weight" each, or one JSON object.

    Raises:
        UserError: Something else, or a name that comes twice.
    """
    pairs = [value.rpartition("=")[::2] for value in values]
    try:
        if len(values) == 1 and values[0].lstrip().startswith("{"):
            pairs = list(json.loads(values[0]).items())
        weights = {str(name): float(weight) for name, weight in pairs}
    except (ValueError, TypeError):
        weights = {}
    if "" in weights or not weights or len(weights) < len(pairs):
        raise UserError(
            f"dataset_mixture must be different name=weight pairs, such as a.jsonl=0.7 b.jsonl=0.3, got {list(values)}"
        )
    return weights


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if not all(sign and name.strip() and column.strip() for name, sign, column in pairs):
        raise ValueError
    return {name.strip(): column.strip() for name, _, column in pairs}
