"""Records of several shapes become prompts and answers in token ids.

`switchkd.data.records` reads a file, a folder or a hub data set; `prepare` turns its records into the columns that
training and evaluation use. Column sets, the first that fits:

- `instruction`, `output`, optional `input`: the Alpaca template; `output` is a text or a list of accepted answers;
- `prompt`, `completion`: text, or chat messages as in TRL; `completion` may also be a list of accepted answers;
- `messages`: a chat; a last message by the assistant is the answer, otherwise the whole chat is a prompt;
- `prompt`: text or chat messages, no answer.

`teacher_prompt` may be added to each: what the teacher sees instead of the student's prompt.
"""

from dataclasses import dataclass
from typing import Any

import jinja2
from datasets import Dataset, Features, Value

from switchkd.data.records import READ_COLUMNS
from switchkd.errors import UserError
from switchkd.models.vocabulary import require_eos

COLUMN_SETS = (("instruction", "output"), ("prompt", "completion"), ("messages",), ("prompt",))
_BATCH = 1000

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did with the records.

    Attributes:
        columns: The column set that was read, e.g. "instruction + output".
        kept: Records in the prepared data set.
        dropped_over_long: Records left out because their prompt exceeds the limit.
        truncated_completions: Kept records whose completion was cut at the limit, and so has no end of sequence.
    """

    columns: str
    kept: int
    dropped_over_long: int
    truncated_completions: int

    def __str__(self) -> str:
        return (
            f"{self.kept:,} of {self.kept + self.dropped_over_long:,} records kept ({self.columns}), "
            f"{self.dropped_over_long:,} over-long prompts dropped, {self.truncated_completions:,} completions cut"
        )


def prepare(
    records: Dataset, tokenizer: Any, *, max_prompt_length: int = 256, max_completion_length: int = 256
) -> tuple[Dataset, PrepareReport]:
    """Return the records as token ids, and the counts of what was dropped and cut.

    A prompt longer than the limit is dropped, never cut: cutting loses the end of its template. A completion ends with
    the tokenizer's end of sequence unless it was cut.

    Args:
        records: Rows with one of the column sets of this module.
        tokenizer: The student's Hugging Face tokenizer.
        max_prompt_length: Longest prompt kept, tokens.
        max_completion_length: Longest completion, end of sequence included, tokens.

    Returns:
        A data set with `prompt_ids`, `completion_ids` (empty where the source has no answer), `references` (accepted
        answers as text), `prompt` (the filled text) and, where given, `teacher_prompt_ids`; and the report.

    Raises:
        UserError: Unknown columns, no records, an empty or null text (row counted from 1), no end-of-sequence token,
            chat messages without a chat template, or no record within the limit.
    """
    names = _column_set(records.column_names)
    require_eos(tokenizer)
    if len(records) == 0:
        raise UserError("the data set holds no records: check the file and the split")
    columns: dict[str, list[Any]] = {name: [] for name in ("prompt_ids", "completion_ids", "references", "prompt")}
    if "teacher_prompt" in records.column_names:
        columns["teacher_prompt_ids"] = []
    dropped, cut, shortest, row = 0, 0, None, 0
    wanted = [name for name in READ_COLUMNS if name in records.column_names]
    for batch in records.select_columns(wanted).iter(batch_size=_BATCH):
        values = [dict(zip(batch, record, strict=True)) for record in zip(*batch.values(), strict=True)]
        places = [f"row {row + i}" for i in range(1, len(values) + 1)]
        examples = [_read(value, names, tokenizer, where) for value, where in zip(values, places, strict=True)]
        prompt_ids = _encode_prompts([(e.prompt, e.special) for e in examples], tokenizer, places)
        fits = [i for i, ids in enumerate(prompt_ids) if len(ids) <= max_prompt_length]
        dropped += len(examples) - len(fits)
        shortest = min([len(ids) for ids in prompt_ids] + ([] if shortest is None else [shortest]))
        kept = [examples[i] for i in fits]
        columns["prompt_ids"] += [prompt_ids[i] for i in fits]
        completions = _encode_completions(kept, [prompt_ids[i] for i in fits], tokenizer)
        cut += sum(len(ids) > max_completion_length for ids in completions)
        columns["completion_ids"] += [ids[:max_completion_length] for ids in completions]
        columns["references"] += [example.references for example in kept]
        columns["prompt"] += [example.prompt for example in kept]
        if "teacher_prompt_ids" in columns:
            texts = [_prompt_text(values[i]["teacher_prompt"], tokenizer, places[i]) for i in fits]
            columns["teacher_prompt_ids"] += _encode_prompts(texts, tokenizer, [places[i] for i in fits])
        row += len(examples)
    if not columns["prompt_ids"]:
        raise UserError(
            f"no record fits: all {dropped} prompts are longer than max_prompt_length={max_prompt_length} tokens "
            f"(the shortest has {shortest}); raise max_prompt_length"
        )
    kinds = {name: Value("string") if name == "prompt" else [Value("int32")] for name in columns}
    kinds["references"] = [Value("string")]
    report = PrepareReport(" + ".join(names), len(columns["prompt_ids"]), dropped, cut)
    return Dataset.from_dict(columns, features=Features(kinds)), report


def encode_prompt(prompt: str | Messages, tokenizer: Any) -> list[int]:
    """Return the token ids of one prompt, exactly as `prepare` makes them: no other code makes prompt ids.

    Text is encoded as the tokenizer does by default, so that a beginning-of-sequence token stays; an end of sequence
    that the tokenizer adds is taken off, because nothing can follow it. Chat messages go through the chat template
    up to where the assistant speaks.

    Args:
        prompt: Text, or chat messages ending with one that the assistant answers.
        tokenizer: A Hugging Face tokenizer.

    Raises:
        UserError: The prompt is empty, or it is a chat and the tokenizer has no chat template.
    """
    where = "this prompt"
    return _encode_prompts([_prompt_text(prompt, tokenizer, where)], tokenizer, [where])[0]


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Return the Alpaca template filled with an instruction and, where it is not empty, an input.

    Reference:
        Taori et al., "Stanford Alpaca", 2023.
    """
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


@dataclass(frozen=True)
class _Example:
    """One record as text; `special`: the tokenizer adds its own special tokens (a chat template writes them itself)."""

    prompt: str
    special: bool
    completion: str | None
    references: list[str]


def _column_set(found: list[str]) -> tuple[str, ...]:
    for names in COLUMN_SETS:
        if set(names) <= set(found):
            return names
    accepted = "; ".join(" + ".join(names) for names in COLUMN_SETS)
    raise UserError(f"unknown columns ({', '.join(found)}): a data set needs one of these sets: {accepted}")


def _read(record: dict[str, Any], names: tuple[str, ...], tokenizer: Any, where: str) -> _Example:
    answers: list[Any] = []
    if names == ("instruction", "output"):
        prompt: str | Messages = _filled_template(record, where)
        answers = _answers(record["output"], "output", where)
    elif names == ("messages",):
        prompt = _messages(record["messages"], "messages", where)
        if prompt[-1]["role"] == "assistant":
            prompt, answers = prompt[:-1], prompt[-1:]
    else:
        prompt = record["prompt"]
        if "completion" in names:
            answers = _answers(record["completion"], "completion", where)
    text, special = _prompt_text(prompt, tokenizer, where)
    references = [answer if isinstance(answer, str) else answer["content"] for answer in answers]
    if not answers or special:
        return _Example(text, special, references[0] if references else None, references)
    answer = {"role": "assistant", "content": answers[0]} if isinstance(answers[0], str) else answers[0]
    chat = _messages(prompt, "prompt", where)
    whole = _render([*chat, answer], tokenizer, where, add_generation_prompt=False)
    # Some templates rewrite the turn before the answer; then the answer's own text is what follows the prompt.
    completion = whole[len(text) :] if whole.startswith(text) else references[0]
    return _Example(text, special, completion, references)


def _filled_template(record: dict[str, Any], where: str) -> str:
    instruction = _text(record["instruction"], "instruction", where)
    if not instruction.strip():
        raise UserError(f"{where}: `instruction` is empty; remove the record or fill it")
    filled = alpaca_prompt(instruction, _text(record.get("input") or "", "input", where))
    if record.get("prompt") not in (None, filled):
        raise UserError(
            f"{where}: `prompt` is not the Alpaca template of its `instruction`; remove the column `prompt` to use the "
            "template, or `instruction` (and name `output` `completion`) to use `prompt`"
        )
    return filled


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise UserError(f"{where}: `{column}` must be text, found {found}")
    return value


def _answers(value: Any, column: str, where: str) -> list[Any]:
    """Accepted answers: texts, or the one message of the assistant."""
    if not isinstance(value, list):
        return [_text(value, column, where)]
    if not any(isinstance(item, dict) for item in value):
        return [_text(item, column, where) for item in value]
    messages = _messages(value, column, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{where}: `{column}` must be one message by the assistant, found {roles}")
    return list(messages)


def _messages(value: Any, column: str, where: str) -> Messages:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{where}: `{column}` must be text or a list of messages, found {str(value)[:40]!r}")
    # Arrow gives every message the keys of all messages; those it never had are null.
    messages = [{key: item for key, item in message.items() if item is not None} for message in value]
    for message in messages:
        _text(message.get("role"), f"{column}.role", where)
        _text(message.get("content"), f"{column}.content", where)
    return messages


def _prompt_text(prompt: Any, tokenizer: Any, where: str) -> tuple[str, bool]:
    """The text to encode, and whether the tokenizer adds its special tokens to it."""
    if isinstance(prompt, str) or prompt is None:
        text = _text(prompt, "prompt", where)
        if not text.strip():
            raise UserError(f"{where}: the prompt is empty; remove the record or fill it")
        return text, True
    if prompt == []:
        raise UserError(f"{where}: the prompt is empty, no message precedes the answer; remove the record")
    messages = _messages(prompt, "prompt", where)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: the prompt ends with the assistant's message; end it with the user's")
    return _render(messages, tokenizer, where, add_generation_prompt=True), False


def _render(messages: Messages, tokenizer: Any, where: str, *, add_generation_prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} holds chat messages but the tokenizer has no chat template: use the tokenizer of a chat model, "
            "set tokenizer.chat_template, or give prompts as text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: the tokenizer's chat template refuses the messages ({error})") from error


def _encode(texts: list[str], tokenizer: Any, special: bool) -> list[list[int]]:
    """Token ids of each text; an end of sequence that the tokenizer added is taken off."""
    options = {"padding": False, "truncation": False, "verbose": False}
    bare_options = {**options, "add_special_tokens": False}
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(texts, **(options if special else bare_options))["input_ids"]
    ending = [i for i, ids in enumerate(encoded) if special and ids and ids[-1] == tokenizer.eos_token_id]
    if ending:
        bare = tokenizer([texts[i] for i in ending], **bare_options)["input_ids"]
        for i, ids in zip(ending, bare, strict=True):
            # Text that spells the end of sequence itself keeps it.
            if encoded[i][len(encoded[i]) - len(ids) :] != ids:
                encoded[i] = encoded[i][:-1]
    return encoded


def _encode_prompts(prompts: list[tuple[str, bool]], tokenizer: Any, places: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = [[] for _ in prompts]
    for special in (True, False):
        chosen = [i for i, prompt in enumerate(prompts) if prompt[1] == special]
        for i, ids in zip(chosen, _encode([prompts[i][0] for i in chosen], tokenizer, special), strict=True):
            encoded[i] = ids
    for ids, (text, _), where in zip(encoded, prompts, places, strict=True):
        if not ids:
            raise UserError(f"{where}: the tokenizer encodes the prompt {text[:40]!r} to no tokens")
    return encoded


def _encode_completions(examples: list[_Example], prompt_ids: list[list[int]], tokenizer: Any) -> list[list[int]]:
    """Ids that follow the prompt's so that both together are the text of both, ended by the end of sequence.

    The prompt's ids are those of a rollout, whatever answer follows: they are never changed. The answer's are

    - the rest of the ids of the whole text, where these begin with the prompt's;
    - otherwise, where the tokenizer merges across the border ("colour: " + "red", whose blank belongs to the word), the
      ids of the answer alone, or, where a tokenizer puts a blank before every text, those of the answer behind some
      other text, which are then taken off: the first that decode to the whole text behind the prompt's.

    Only where a tokenizer can write no such ids, as one that reads words apart and joins them with blanks, is the
    answer encoded alone and the text is not kept.
    """
    completions: list[list[int]] = [[] for _ in examples]
    for special in (True, False):
        chosen = [i for i, e in enumerate(examples) if e.completion is not None and e.special == special]
        whole = _encode([f"{examples[i].prompt}{examples[i].completion}" for i in chosen], tokenizer, special)
        for i, both in zip(chosen, whole, strict=True):
            ids = both[len(prompt_ids[i]) :]
            if both[: len(prompt_ids[i])] != prompt_ids[i]:
                ids = _continuation(prompt_ids[i], both, str(examples[i].completion), tokenizer)
            eos = tokenizer.eos_token_id
            completions[i] = ids[: ids.index(eos) + 1] if eos in ids else [*ids, eos]
    return completions


# Texts to put before an answer that must not be encoded as the beginning of a text; nothing at first, then short texts,
# several because an answer may merge with one of them.
_STAND_INS = ("", "\n", ".", "0", "a", "|")


def _continuation(prompt_ids: list[int], whole: list[int], completion: str, tokenizer: Any) -> list[int]:
    """Ids of an answer that decode to the whole text behind the prompt's ids; those of the answer alone if none do."""
    text = tokenizer.decode(whole, clean_up_tokenization_spaces=False)
    found = []
    for stand_in in _STAND_INS:
        before, both = _encode([stand_in, stand_in + completion], tokenizer, False)
        before = before if stand_in else []  # some write a blank for no text at all
        if both[: len(before)] == before:
            found.append(both[len(before) :])
            if tokenizer.decode([*prompt_ids, *found[-1]], clean_up_tokenization_spaces=False) == text:
                return found[-1]
    return found[0]
