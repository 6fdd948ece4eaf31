"""Records as text: what is the prompt, what is the answer, and what stands around them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from switchkd.data.chats import Chat, Messages, as_messages, as_text, as_tools
from switchkd.data.encoding import Text, encode, encode_completions, encode_prompts, encode_with_places, ended
from switchkd.errors import UserError


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
class Example:
    """One record as text.

    Attributes:
        prompt: What the answer follows.
        completion: The answer, None where there is none.
        references: Accepted answers.
        earlier: Places in the prompt's text where the assistant spoke before, each with its end of sequence.
    """

    prompt: Text
    completion: Text | None
    references: list[str]
    earlier: tuple[tuple[int, int], ...] = ()

    @property
    def spelled(self) -> str | None:
        """A special token that is read as text, None where there is none."""
        texts = [text for text in (self.prompt, self.completion) if text is not None and text.plain]
        return texts[0].text[slice(*texts[0].plain[0])] if texts else None


@dataclass(frozen=True)
class Reader:
    """Reads the records of one data set.

    Attributes:
        tokenizer: The student's.
        names: The column set.
        called: Name in this package -> name of the column, for errors.
        template: As `prepare` takes it.
        supervise: Likewise.
        tokens: Finds the tokenizer's special tokens, None if it has none.
        split: Special tokens that a record spells are only text.
        template_options: What the chat template reads besides messages and tools.
    """

    tokenizer: Any
    names: tuple[str, ...]
    called: Mapping[str, str]
    template: str
    supervise: str
    tokens: re.Pattern[str] | None
    split: bool
    template_options: Mapping[str, Any]

    @property
    def reads_answers(self) -> bool:
        """Whether the records may hold answers."""
        return self.names not in (("prompt",), ("instruction",))

    def read(self, record: dict[str, Any], where: str) -> Example:
        """Return one record as text."""
        if self.names == ("text",):
            text = as_text(record["text"], self.called["text"], where)
            return Example(Text(""), self._text(text), [text])
        if self.names == ("messages",):
            self._refuse_template(where)
            messages = as_messages(record["messages"], self.called["messages"], where)
            answers: list[Any] = messages[-1:] if messages[-1]["role"] == "assistant" else []
            prompt: Any = messages[:-1] if answers else messages
        else:
            prompt = self._wrapped(record, where)
            column = next((name for name in ("output", "completion") if name in self.names), None)
            answers = [] if column is None else _answers(record[column], self.called[column], where)
        if not isinstance(prompt, list):
            if as_tools(record.get("tools"), where):
                raise UserError(f"{where} has tools, which only a chat can show: use template=chat, or remove them")
            references = [answer if isinstance(answer, str) else str(answer["content"]) for answer in answers]
            return Example(self._prompt(prompt, where), self._text(references[0]) if answers else None, references)
        return self._read_chat(prompt, answers, record, where)

    def _read_chat(self, prompt: Messages, answers: list[Any], record: dict[str, Any], where: str) -> Example:
        messages = self._chat_prompt(prompt, where)
        references = [answer if isinstance(answer, str) else str(answer["content"]) for answer in answers]
        said = [{"role": "assistant", "content": one} if isinstance(one, str) else one for one in answers[:1]]
        chat = self._chat(messages + said, record, where)
        before = chat.render(len(messages), waits=True)
        return Example(
            chat.text(before),
            chat.text(chat.answer(before)) if answers else None,
            references,
            tuple(chat.earlier_answers(before, len(messages))) if self.supervise == "all" else (),
        )

    def prompt_of(self, record: dict[str, Any], column: str, where: str) -> Text:
        """Return the prompt of a column, up to where the assistant speaks."""
        prompt = record[column]
        if column == "prompt":
            prompt = self._wrapped(record, where)
        elif self.template == "chat" and isinstance(prompt, str) and prompt.strip():
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list):
            return self._prompt(prompt, where)
        messages = self._chat_prompt(prompt, where)
        chat = self._chat(messages, record, where)
        return chat.text(chat.render(len(messages), waits=True))

    def _wrapped(self, record: dict[str, Any], where: str) -> Any:
        """The prompt of a record inside the template that was asked for."""
        if self.names[0] == "instruction":
            instruction = as_text(record["instruction"], self.called["instruction"], where)
            if not instruction.strip():
                raise UserError(f"{where}: `{self.called['instruction']}` is empty; remove the record or fill it")
            input = as_text(record.get("input") or "", self.called.get("input", "input"), where)
            if self.template in ("auto", "alpaca"):
                filled = alpaca_prompt(instruction, input)
                if record.get("prompt") not in (None, filled):
                    raise UserError(
                        f"{where}: `prompt` is not the Alpaca template of its `instruction`; remove the column `prompt`"
                        " to use the template, or `instruction` (and name `output` `completion`) to use `prompt`"
                    )
                return filled
            prompt: Any = f"{instruction}\n\n{input}" if input else instruction
        else:
            prompt = record["prompt"]
            if isinstance(prompt, list):
                self._refuse_template(where)
                return prompt
            if self.template == "alpaca" and isinstance(prompt, str) and prompt.strip():
                return alpaca_prompt(prompt)
        if self.template == "chat" and isinstance(prompt, str) and prompt.strip():
            return [{"role": "user", "content": prompt}]
        return prompt

    def _refuse_template(self, where: str) -> None:
        if self.template in ("alpaca", "none"):
            raise UserError(f"{where}: template={self.template} does nothing to chat messages; remove it")

    def _prompt(self, prompt: Any, where: str) -> Text:
        if not isinstance(prompt, str) and prompt is not None:
            raise UserError(f"{where}: `prompt` must be text or a list of messages, found {str(prompt)[:40]!r}")
        text = as_text(prompt, "prompt", where)
        if not text.strip():
            raise UserError(f"{where}: the prompt is empty; remove the record or fill it")
        return self._text(text)

    def _text(self, text: str) -> Text:
        found = tuple(match.span() for match in self.tokens.finditer(text)) if self.split and self.tokens else ()
        return Text(text, plain=found)

    def _chat_prompt(self, prompt: Any, where: str) -> Messages:
        if prompt == []:
            raise UserError(f"{where}: the prompt is empty, no message precedes the answer; remove the record")
        messages = as_messages(prompt, "prompt", where)
        if messages[-1]["role"] == "assistant":
            raise UserError(f"{where}: the prompt ends with the assistant's message; end it with the user's")
        return messages

    def _chat(self, messages: Messages, record: dict[str, Any], where: str) -> Chat:
        tools = as_tools(record.get("tools"), where)
        return Chat(messages, self.tokenizer, where, tools, self.tokens, self.split, self.template_options)

    def prompt_ids(self, examples: list[Example], places: list[str]) -> list[list[int]]:
        """Return the ids of each prompt; those of plain text have only the token that begins a text."""
        if self.names == ("text",):
            begins = self.tokenizer.bos_token_id
            return [[self.tokenizer.eos_token_id if begins is None else begins] for _ in examples]
        return encode_prompts([example.prompt for example in examples], self.tokenizer, places)

    def completion_ids(self, examples: list[Example], prompt_ids: list[list[int]]) -> list[list[int]]:
        """Return the ids of each answer."""
        if self.names == ("text",):
            texts = [example.completion for example in examples if example.completion is not None]
            return [ended(ids, self.tokenizer.eos_token_id) for ids in encode(texts, self.tokenizer, alone=True)]
        return encode_completions([(e.prompt, e.completion) for e in examples], prompt_ids, self.tokenizer)

    def earlier_answers(self, example: Example) -> list[int]:
        """Return start, end, start, end, ... of what the assistant said among the prompt's tokens.

        A token that also holds text of another part is left out.
        """
        if not example.earlier:
            return []
        _, places = encode_with_places(example.prompt, self.tokenizer)
        ends: list[int] = []
        for start, end in example.earlier:
            inside = [i for i, (first, last) in enumerate(places) if start <= first and last <= end and first < last]
            if inside and inside[-1] > 0:
                ends += [max(inside[0], 1), inside[-1] + 1]  # the first token of a text is predicted by nothing
        return ends


def _answers(value: Any, column: str, where: str) -> list[Any]:
    """Accepted answers: texts, or the one message of the assistant."""
    if not isinstance(value, list):
        return [as_text(value, column, where)]
    if not any(isinstance(item, dict) for item in value):
        return [as_text(item, column, where) for item in value]
    messages = as_messages(value, column, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{where}: `{column}` must be one message by the assistant, found {roles}")
    return list(messages)
