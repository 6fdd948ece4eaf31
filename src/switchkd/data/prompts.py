"""Records of several shapes become prompts and answers in token ids.

`switchkd.data.records` reads a file, a folder or a hub data set; `prepare` turns its records into the columns that
training and evaluation use. docs/data.md shows every shape; `switchkd.data.columns` has their names. The first that
fits:

- `instruction`, `output`, optional `input`: the Alpaca template; `output` is a text or a list of accepted answers;
- `prompt`, `completion`: text, or chat messages as in TRL; `completion` may also be a list of accepted answers;
- `messages`: a chat; a last message by the assistant is the answer, otherwise the whole chat is a prompt;
- `prompt`, or `instruction` alone: no answer;
- `text`: an answer without a prompt, for methods that write no text.

`teacher_prompt` may be added to each: what the teacher sees instead of the student's prompt; and to chats `tools`.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

from switchkd.data.chats import Messages
from switchkd.data.columns import choose_columns
from switchkd.data.encoding import encode_prompts, special_tokens
from switchkd.data.reader import Reader
from switchkd.data_options import SUPERVISE, TEMPLATES, parse_columns
from switchkd.errors import UserError, check_choice
from switchkd.models.vocabulary import require_eos

#: A larger share of dropped records is worth a warning.
LARGE_SHARE = 0.1
_BATCH = 1000


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did with the records.

    Attributes:
        columns: The column set that was read, e.g. "instruction + output".
        kept: Records in the prepared data set.
        dropped_over_long: Records left out because their prompt exceeds the limit.
        truncated_completions: Kept records whose completion was cut at the limit, and so has no end of sequence; None
            where nobody reads completions.
    """

    columns: str
    kept: int
    dropped_over_long: int
    truncated_completions: int | None

    def __str__(self) -> str:
        cut = "" if self.truncated_completions is None else f", {self.truncated_completions:,} completions cut"
        return (
            f"{self.kept:,} of {self.kept + self.dropped_over_long:,} records kept ({self.columns}), "
            f"{self.dropped_over_long:,} over-long prompts dropped{cut}"
        )


#: No token has more characters: a text of more than so many times the limit exceeds it, and is not encoded to see that.
LONGEST_TOKEN = 1000


def prepare(
    records: Dataset,
    tokenizer: Any,
    *,
    max_prompt_length: int = 256,
    max_completion_length: int = 256,
    columns: Mapping[str, str] | str | None = None,
    template: str = "auto",
    supervise: str = "last",
    split_special_tokens: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    plain_text: bool = False,
) -> tuple[Dataset, PrepareReport]:
    """Return the records as token ids, and the counts of what was dropped and cut.

    A prompt longer than the limit is dropped, never cut: cutting loses the end of its template; where these are more
    than a tenth of the records there is a warning. A completion ends with the tokenizer's end of sequence unless it
    was cut.

    Args:
        records: Rows with one of the column sets of this module.
        tokenizer: The student's Hugging Face tokenizer.
        max_prompt_length: Longest prompt kept, tokens.
        max_completion_length: Longest completion, end of sequence included, tokens.
        columns: What is read -> name of its column, e.g. `{"prompt": "question", "completion": "answer"}`.
        template: Around instructions and prompts of text: `none`, `alpaca`, `chat` (the tokenizer's chat template) or
            `auto`, which is `alpaca` for instructions and `none` for prompts.
        supervise: `last`, the last answer of a chat, or `all`, every turn of the assistant.
        split_special_tokens: Special tokens that records spell, such as `</s>`, are read as text; otherwise as the
            tokens. Those that a chat template writes are always tokens.
        chat_template_kwargs: What the chat template reads besides the messages, e.g. `{"enable_thinking": False}`.
        plain_text: Whether a column `text` may be read: answers without a prompt, which nobody can continue.

    Returns:
        A data set with `prompt_ids`, `completion_ids` (empty where the source has no answer), `references` (accepted
        answers as text), `prompt` (the filled text), where given `teacher_prompt_ids`, and with `supervise="all"`
        `earlier_answers`: start, end, start, end, ... of the assistant's turns among the prompt's tokens; and the
        report.

    Raises:
        UserError: Unknown columns, no records, an empty or null text (row counted from 1), no end-of-sequence token,
            chat messages without a chat template, or no record within the limit.
    """
    check_choice("template", template, TEMPLATES)
    check_choice("supervise", supervise, SUPERVISE)
    chosen = choose_columns(records.column_names, parse_columns(columns))
    if chosen.names == ("text",) and not plain_text:
        raise UserError(
            "the data have only a column text, which has no prompt to write from: train on it with sft or kd, give it "
            "as lm_dataset_name, or name what is read: columns prompt=..."
        )
    if chosen.names == ("text",) and template != "auto":
        raise UserError(f"template={template} does nothing: a column text has no prompt; remove it")
    if supervise == "all" and "teacher_prompt" in chosen.sources:
        raise UserError("supervise=all and a column teacher_prompt exclude each other: the teacher's prompt is for one")
    require_eos(tokenizer)
    if len(records) == 0:
        raise UserError("the data set holds no records: check the file and the split")
    tokens = special_tokens(tokenizer)
    options = chat_template_kwargs or {}
    reader = Reader(tokenizer, chosen.names, chosen.sources, template, supervise, tokens, split_special_tokens, options)
    lengths: list[int] = []
    spelled: list[str] = []
    tables, cut, row = [], 0, 0
    for batch in records.select_columns(sorted(set(chosen.sources.values()))).iter(batch_size=_BATCH):
        values = chosen.rows(batch)
        places = [f"row {row + i}" for i in range(1, len(values) + 1)]
        examples = [reader.read(value, where) for value, where in zip(values, places, strict=True)]
        short = [i for i, one in enumerate(examples) if len(one.prompt.text) <= LONGEST_TOKEN * max_prompt_length]
        read = reader.prompt_ids([examples[i] for i in short], [places[i] for i in short]) if short else []
        prompt_ids = dict(zip(short, read, strict=True))
        lengths += [len(prompt_ids[i]) if i in prompt_ids else max_prompt_length + 1 for i in range(len(examples))]
        fits = [i for i, ids in prompt_ids.items() if len(ids) <= max_prompt_length]
        kept, kept_ids = [examples[i] for i in fits], [prompt_ids[i] for i in fits]
        completions = reader.completion_ids(kept, kept_ids)
        cut += sum(len(ids) > max_completion_length for ids in completions)
        spelled += [token for example in kept if (token := example.spelled) is not None]
        part: dict[str, list[Any]] = {
            "prompt_ids": kept_ids,
            "completion_ids": [ids[:max_completion_length] for ids in completions],
            "references": [example.references for example in kept],
            "prompt": [example.prompt.text for example in kept],
        }
        if "teacher_prompt" in chosen.sources:
            texts = [reader.prompt_of(values[i], "teacher_prompt", places[i]) for i in fits]
            part["teacher_prompt_ids"] = encode_prompts(texts, tokenizer, [places[i] for i in fits])
        if supervise == "all":
            part["earlier_answers"] = [reader.earlier_answers(example) for example in kept]
        # Tables of numbers take a fraction of the memory of lists.
        tables.append(pa.table({name: pa.array(value, type=_TYPES[name]) for name, value in part.items()}))
        row += len(examples)
    long = sum(length > max_prompt_length for length in lengths)
    if long == len(lengths):
        raise UserError(
            f"no record fits: all {long} prompts are longer than max_prompt_length={max_prompt_length} tokens "
            f"(the shortest has {min(lengths)}); raise max_prompt_length"
        )
    _warn(lengths, max_prompt_length, spelled)
    report = PrepareReport(str(chosen), len(lengths) - long, long, cut if reader.reads_answers else None)
    return Dataset(pa.concat_tables(tables)), report


_IDS = pa.list_(pa.int32())
_TYPES = dict.fromkeys(("prompt_ids", "completion_ids", "teacher_prompt_ids", "earlier_answers"), _IDS)
_TYPES |= {"references": pa.list_(pa.string()), "prompt": pa.string()}


def _warn(lengths: list[int], limit: int, spelled: list[str]) -> None:
    long = sum(length > limit for length in lengths)
    if long > LARGE_SHARE * len(lengths):
        most = sorted(lengths)[int(0.95 * (len(lengths) - 1))]
        warnings.warn(
            f"{long:,} of {len(lengths):,} records ({long / len(lengths):.0%}) are dropped: their prompts are longer "
            f"than max_prompt_length={limit}; 19 of 20 prompts have at most {most:,} tokens",
            stacklevel=3,
        )
    if spelled:
        warnings.warn(
            f"{len(spelled):,} of {len(lengths):,} records spell special tokens such as {spelled[0]!r}: they are text; "
            "split_special_tokens=False reads them as the tokens",
            stacklevel=3,
        )


def encode_prompt(
    prompt: str | Messages,
    tokenizer: Any,
    *,
    template: str = "auto",
    split_special_tokens: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of one prompt, exactly as `prepare` makes them: no other code makes prompt ids.

    Text is encoded as the tokenizer does by default, so that a beginning-of-sequence token stays; an end of sequence
    that the tokenizer adds is taken off, because nothing can follow it. Chat messages go through the chat template
    up to where the assistant speaks.

    Args:
        prompt: Text, or chat messages ending with one that the assistant answers.
        tokenizer: A Hugging Face tokenizer.
        template: As `prepare` takes it.
        split_special_tokens: Likewise.
        chat_template_kwargs: Likewise.

    Raises:
        UserError: The prompt is empty, or it is a chat and the tokenizer has no chat template.
    """
    where, tokens = "this prompt", special_tokens(tokenizer)
    options = chat_template_kwargs or {}
    reader = Reader(tokenizer, ("prompt",), {}, template, "last", tokens, split_special_tokens, options)
    return encode_prompts([reader.prompt_of({"prompt": prompt}, "prompt", where)], tokenizer, [where])[0]
