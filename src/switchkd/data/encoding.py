"""Text becomes token ids: what a user wrote is text, what a chat template writes may be special tokens."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from switchkd.errors import UserError

Spans = tuple[tuple[int, int], ...]

_OPTIONS = {"padding": False, "truncation": False, "verbose": False}


@dataclass(frozen=True)
class Text:
    """A text to encode.

    Attributes:
        text: The text.
        chat: A chat template wrote it, with its own special tokens; otherwise the tokenizer adds its own.
        plain: Where it spells special tokens that are text: (start, end), in order.
    """

    text: str
    chat: bool = False
    plain: Spans = ()

    def __add__(self, other: "Text") -> "Text":
        shift = len(self.text)
        moved = tuple((start + shift, end + shift) for start, end in other.plain)
        return replace(self, text=self.text + other.text, plain=self.plain + moved)


def special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Return what finds the special tokens of a tokenizer in a text, the longest first; None if it has none."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first))) if names else None


def encode(texts: Sequence[Text], tokenizer: Any, *, alone: bool = False) -> list[list[int]]:
    """Return the token ids of each text; an end of sequence that the tokenizer added is taken off.

    Args:
        texts: What to encode.
        tokenizer: A Hugging Face tokenizer.
        alone: Never let the tokenizer add its special tokens.

    Raises:
        UserError: A chat spells special tokens, and the tokenizer does not say where its tokens stand.
    """
    encoded: list[list[int]] = [[] for _ in texts]
    for adds in (True, False):
        for splits in (True, False):
            chosen = [
                i
                for i, text in enumerate(texts)
                if (not text.chat and not alone) == adds and (bool(text.plain) and not text.chat) == splits
            ]
            found = _encode([texts[i].text for i in chosen], tokenizer, adds=adds, splits=splits)
            for i, ids in zip(chosen, found, strict=True):
                encoded[i] = ids if splits or not texts[i].plain else encode_with_places(texts[i], tokenizer)[0]
    return encoded


def _encode(texts: list[str], tokenizer: Any, *, adds: bool, splits: bool) -> list[list[int]]:
    if not texts:
        return []
    # Not every tokenizer knows the option, and few texts need it.
    options = {**_OPTIONS, "split_special_tokens": True} if splits else _OPTIONS
    bare_options = {**options, "add_special_tokens": False}
    encoded: list[list[int]] = tokenizer(texts, **(options if adds else bare_options))["input_ids"]
    ending = [i for i, ids in enumerate(encoded) if adds and ids and ids[-1] == tokenizer.eos_token_id]
    if ending:
        bare = tokenizer([texts[i] for i in ending], **bare_options)["input_ids"]
        for i, ids in zip(ending, bare, strict=True):
            # Text that spells the end of sequence itself keeps it.
            if encoded[i][len(encoded[i]) - len(ids) :] != ids:
                encoded[i] = encoded[i][:-1]
    return encoded


def encode_with_places(text: Text, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the token ids of a chat and the place (start, end) of each in its text.

    Raises:
        UserError: The tokenizer does not say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a text, which supervise=all and chats "
            "that spell special tokens need: use a fast tokenizer, or supervise=last and split_special_tokens=False"
        )
    found = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, **_OPTIONS)
    added, ids, places = tokenizer.added_tokens_decoder, [], []
    for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        spelled = any(start < last and first < end for first, last in text.plain)
        if spelled and token in added:
            letters = _plain_ids(text.text[start:end], tokenizer)
            ids += letters
            places += [(start, end)] * len(letters)
        else:
            ids.append(token)
            places.append((start, end))
    return ids, places


def _plain_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a special token's name as text, in the middle of a text."""
    return next(
        (ids for ids in _behind_something(Text(text, plain=((0, len(text)),)), tokenizer, stand_ins=_STAND_INS[1:])),
        encode([Text(text, plain=((0, len(text)),))], tokenizer, alone=True)[0],
    )


def encode_prompts(prompts: Sequence[Text], tokenizer: Any, places: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
        prompts: Texts.
        tokenizer: A Hugging Face tokenizer.
        places: How errors call each of them.

    Raises:
        UserError: A prompt has no tokens.
    """
    encoded = encode(prompts, tokenizer)
    for ids, prompt, where in zip(encoded, prompts, places, strict=True):
        if not ids:
            raise UserError(f"{where}: the tokenizer encodes the prompt {prompt.text[:40]!r} to no tokens")
    return encoded


def encode_completions(
    pairs: Sequence[tuple[Text, Text | None]], prompt_ids: Sequence[list[int]], tokenizer: Any
) -> list[list[int]]:
    """Return ids that follow the prompt's so that both together are the text of both, ended by the end of sequence.

    The prompt's ids are those of a rollout, whatever answer follows: they are never changed. The answer's are

    - the rest of the ids of the whole text, where these begin with the prompt's;
    - otherwise, where the tokenizer merges across the border ("colour: " + "red", whose blank belongs to the word), the
      ids of the answer alone, or, where a tokenizer puts a blank before every text, those of the answer behind some
      other text, which are then taken off: the first that decode to the whole text behind the prompt's.

    Only where a tokenizer can write no such ids, as one that reads words apart and joins them with blanks, is the
    answer encoded alone and the text is not kept.

    Args:
        pairs: Prompt and answer; None for no answer, which has no ids.
        prompt_ids: Those of the prompts.
        tokenizer: A Hugging Face tokenizer.
    """
    completions: list[list[int]] = [[] for _ in pairs]
    answered = [(i, prompt, answer) for i, (prompt, answer) in enumerate(pairs) if answer is not None]
    whole = encode([prompt + answer for _, prompt, answer in answered], tokenizer)
    for (i, _, answer), both in zip(answered, whole, strict=True):
        ids = both[len(prompt_ids[i]) :]
        if both[: len(prompt_ids[i])] != prompt_ids[i]:
            ids = _continuation(prompt_ids[i], both, answer, tokenizer)
        completions[i] = ended(ids, tokenizer.eos_token_id)
    return completions


def ended(ids: list[int], eos: int) -> list[int]:
    """Return ids up to the first end of sequence, which is added where there is none."""
    return ids[: ids.index(eos) + 1] if eos in ids else [*ids, eos]


# Texts to put before an answer that must not be encoded as the beginning of a text; nothing at first, then short texts,
# several because an answer may merge with one of them.
_STAND_INS = ("", "\n", ".", "0", "a", "|")


def _continuation(prompt_ids: list[int], whole: list[int], completion: Text, tokenizer: Any) -> list[int]:
    """Ids of an answer that decode to the whole text behind the prompt's ids; those of the answer alone if none do."""
    text = tokenizer.decode(whole, clean_up_tokenization_spaces=False)
    found = []
    for ids in _behind_something(completion, tokenizer, stand_ins=_STAND_INS):
        found.append(ids)
        if tokenizer.decode([*prompt_ids, *ids], clean_up_tokenization_spaces=False) == text:
            return ids
    return found[0]


def _behind_something(text: Text, tokenizer: Any, stand_ins: Iterable[str]) -> Iterable[list[int]]:
    """Yield the ids that a text has behind each of some short texts with which it does not merge."""
    for stand_in in stand_ins:
        start = Text(stand_in, chat=text.chat)
        before, both = encode([start, start + text], tokenizer, alone=True)
        before = before if stand_in else []  # some write a blank for no text at all
        if both[: len(before)] == before:
            yield both[len(before) :]
