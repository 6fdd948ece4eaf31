"""Chat messages become text through a chat template, and it is known which part of the text the assistant said."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jinja2

from switchkd.data.encoding import Text
from switchkd.errors import UserError

Messages = list[dict[str, Any]]

#: Who speaks in ShareGPT's records -> role.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "user": "user", "assistant": "assistant"}
ROLES |= {"system": "system", "tool": "tool"}
# Characters that no text has, one for each special token that a chat spells.
_MARKS = 0xF0000


def as_text(value: Any, column: str, where: str) -> str:
    """Return a value that is text.

    Raises:
        UserError: It is not.
    """
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise UserError(f"{where}: `{column}` must be text, found {found}")
    return value


def as_messages(value: Any, column: str, where: str) -> Messages:
    """Return chat messages with `role` and `content`; ShareGPT's `from` and `value` are read as these.

    Raises:
        UserError: Something else.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{where}: `{column}` must be text or a list of messages, found {str(value)[:40]!r}")
    # Arrow gives every message the keys of all messages; those it never had are null.
    messages = [_without_nulls(message) for message in value]
    for place, message in enumerate(messages):
        if "from" in message and "role" not in message:
            speaker = as_text(message["from"], f"{column}.from", where)
            if speaker not in ROLES:
                raise UserError(f"{where}: `from` is {speaker!r} in `{column}`; known: {', '.join(ROLES)}")
            messages[place] = message = {"role": ROLES[speaker], "content": message.get("value")}
        if message.get("tool_calls"):
            message.setdefault("content", "")
        as_text(message.get("role"), f"{column}.role", where)
        as_text(message.get("content"), f"{column}.content", where)
    return messages


def as_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return a record's tools as JSON schemas, None where it has none; JSON text is read.

    Raises:
        UserError: Something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise UserError(f"{where}: `tools` is not JSON ({error})") from None
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise UserError(f"{where}: `tools` must be a list of JSON schemas, found {str(value)[:40]!r}")
    return [_without_nulls(tool) for tool in value] if value else None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Chat:
    """A conversation and what turns it into text.

    While a template fills it in, special tokens that its messages spell are hidden behind marks: so it is known
    afterwards which ones the template wrote.

    Attributes:
        messages: The conversation.
        tokenizer: A Hugging Face tokenizer with a chat template.
        where: How errors call the record.
        tools: JSON schemas that the template shows.
        tokens: Finds the tokenizer's special tokens, None if it has none.
        split: Special tokens are only text in what the user wrote.
        options: What the template reads besides messages and tools, e.g. `enable_thinking`.
    """

    messages: Messages
    tokenizer: Any
    where: str
    tools: list[dict[str, Any]] | None = None
    tokens: re.Pattern[str] | None = None
    split: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    _marks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise UserError(
                f"{self.where} holds chat messages but the tokenizer has no chat template: use the tokenizer of a chat "
                "model, set tokenizer.chat_template, or give prompts as text"
            )
        if self.tools and "tools" not in str(template):
            raise UserError(
                f"{self.where} has tools, which the tokenizer's chat template does not show; remove the column tools"
            )
        object.__setattr__(self, "messages", self._hidden(self.messages))
        object.__setattr__(self, "tools", self._hidden(self.tools))

    def _hidden(self, value: Any) -> Any:
        if self.tokens is None or not self.split:
            return value
        if isinstance(value, Mapping):
            return {key: self._hidden(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._hidden(item) for item in value]
        return self.tokens.sub(lambda found: self._mark(found[0]), value) if isinstance(value, str) else value

    def _mark(self, token: str) -> str:
        return self._marks.setdefault(token, chr(_MARKS + len(self._marks)))

    def render(self, count: int, *, waits: bool) -> str:
        """Return the text of the first messages, special tokens hidden.

        Args:
            count: How many messages.
            waits: Whether the assistant is to speak next.
        """
        options = {**self.options, **({} if self.tools is None else {"tools": self.tools})}
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                self.messages[:count], tokenize=False, add_generation_prompt=waits, **options
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{self.where}: the tokenizer's chat template refuses the messages ({error})") from error
        return rendered

    def text(self, rendered: str) -> Text:
        """Return a rendered text as it is: what was hidden stands in it, as text."""
        tokens = {mark: token for token, mark in self._marks.items()}
        text, plain = "", []
        for part in re.split(f"([{''.join(tokens)}])", rendered) if tokens else [rendered]:
            if part in tokens:
                plain.append((len(text), len(text) + len(tokens[part])))
            text += tokens.get(part, part)
        return Text(text, chat=True, plain=tuple(plain))

    def answer(self, prompt: str) -> str:
        """Return what the assistant's last message adds to the prompt before it.

        Args:
            prompt: The rendered messages before it.
        """
        whole = self.render(len(self.messages), waits=False)
        # Some templates rewrite the turn before the answer; then the answer's own text is what follows the prompt.
        return whole[len(prompt) :] if whole.startswith(prompt) else str(self.messages[-1]["content"])

    def earlier_answers(self, prompt: str, count: int) -> Iterator[tuple[int, int]]:
        """Yield where the assistant's turns stand in a prompt, each with the end of sequence that follows it.

        Args:
            prompt: The first messages, rendered with the assistant to speak next.
            count: How many messages these are.

        Yields:
            (start, end) in the text of the prompt, in order.

        Raises:
            UserError: The template changes what the assistant said, so that it is not found.
        """
        behind = 0
        for turn in range(count):
            if self.messages[turn]["role"] != "assistant":
                continue
            start, end = self._place(prompt, turn, behind)
            behind = end
            yield len(self.text(prompt[:start]).text), len(self.text(prompt[:end]).text)

    def _place(self, prompt: str, turn: int, behind: int) -> tuple[int, int]:
        """Where a turn of the assistant stands in a rendered prompt, behind the turns before it."""
        before = self.render(turn, waits=True) if turn > 0 else ""
        through = self.render(turn + 1, waits=False)
        begins = len(before) if turn > 0 and prompt.startswith(before) else None
        if begins is not None and prompt.startswith(through):
            eos = str(self.tokenizer.eos_token)
            ended = prompt.find(eos, begins, len(through))
            return begins, len(through.rstrip()) if ended < 0 else ended + len(eos)
        # The template writes an earlier turn otherwise than a last one: the words themselves are looked for.
        said = str(self.messages[turn]["content"]).strip()
        found = prompt.find(said, behind if begins is None else begins)
        if found < 0 or not said:
            # A thought is left out, or a call of tools has no words: the turn ends with the token that ends a last one.
            last = [match[0] for match in self.tokens.finditer(through)][-1:] if self.tokens is not None else []
            ended = prompt.find(last[0], begins) if last and begins is not None else -1
            if ended < 0 or not through.rstrip().endswith(last[0]):
                raise UserError(
                    f"{self.where}: the chat template rewrites the assistant's message {turn + 1}, so that its tokens "
                    "are not known; use supervise=last"
                )
            return len(before), ended + len(last[0])
        # The special token behind them ends the turn where it also stands behind a last turn.
        end = found + len(said)
        token = self._token_behind(prompt, end)
        as_last = self._token_behind(through, through.rfind(said) + len(said))
        return found if begins is None else begins, end + len(token) if token == as_last else end

    def _token_behind(self, text: str, place: int) -> str:
        """The special token that stands behind a place, with the blanks before it; nothing if there is none."""
        blanks = len(text[place:]) - len(text[place:].lstrip())
        found = self.tokens.match(text, place + blanks) if self.tokens is not None else None
        return "" if found is None else text[place : found.end()]
