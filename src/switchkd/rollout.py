"""What a rollout returns: which tokens were written, by whom, and why.

Legend for the whole package: B rows, P prompt length, C completion length, T = P + C, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

#: What the policies of this package compare, with its unit: the Jensen-Shannon and the Kullback-Leibler divergence of
#: the two models, the student's entropy and the surprisal of its likeliest token, the drafted token's rank in the
#: teacher's order. A policy of the user's own may compare something else.
MEASURED = ("jsd_nats", "kl_nats", "entropy_nats", "surprisal_nats", "rank")
#: What a rollout has for every token `[B, C]`; `drafted_ids` only where it was asked for.
TOKEN_COLUMNS = ("completion_ids", "completion_mask", "author", "divergence", "threshold", "drafted_ids")


def unit_of(measured: str | None) -> str:
    """Return the unit of what a policy compares, which is the last word of its name: `jsd_nats` -> nats."""
    return "nats" if measured is None else measured.rpartition("_")[2]


def label_of(measured: str) -> str:
    """Return how tables and log lines name what a policy compares, without its unit: `kl_nats` -> kl."""
    return measured.removesuffix(f"_{unit_of(measured)}").replace("_", " ")


class Author(IntEnum):
    """Who wrote a token."""

    NONE = 0
    STUDENT = 1
    TEACHER = 2
    DATASET = 3


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts: the only padding of rows whose text is not known yet.

    Attributes:
        ids: int64 `[B, P]`; any id may stand under the padding.
        mask: True at prompt tokens, bool `[B, P]`.
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], pad_token_id: int) -> "Prompts":
        """Return the prompts of lists of ids, padded with an id that the models can read."""
        length = max(len(ids) for ids in rows)
        padded = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, ids in enumerate(rows):
            padded[row, length - len(ids) :] = torch.tensor(ids, dtype=torch.int64)
            mask[row, length - len(ids) :] = True
        return cls(padded, mask)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> "Prompts":
        """Return some rows, chosen as a tensor's rows are."""
        return Prompts(self.ids[rows], self.mask[rows])

    @property
    def width(self) -> int:
        """P, the length of the longest prompt and the padding beside it."""
        return self.ids.shape[1]

    def last(self, width: int) -> "Prompts":
        """Return the last columns, all that rows of at most `width` tokens need."""
        return Prompts(self.ids[:, -width:], self.mask[:, -width:])

    def to(self, device: torch.device) -> "Prompts":
        """Return the prompts on a device."""
        return Prompts(self.ids.to(device), self.mask.to(device))

    def rows(self) -> list[list[int]]:
        """Return the ids of every prompt without padding; one transfer for all of them."""
        ids, counts = self.ids[self.mask].tolist(), self.mask.sum(-1).tolist()
        ends = [0, *accumulate(counts)]
        return [ids[first:last] for first, last in pairwise(ends)]


@dataclass
class Rollout:
    """A batch of completions together with the author and the evidence of every token.

    Attributes:
        prompt_ids: Left-padded prompts, int64 `[B, P]`.
        prompt_mask: True at prompt tokens, bool `[B, P]`.
        completion_ids: Completions padded on the right, int64 `[B, C]`.
        completion_mask: True up to and including the first end-of-sequence token, bool `[B, C]`.
        author: An `Author` for every token, uint8 `[B, C]`; NONE exactly where the mask is False.
        divergence: The value the policy compared, in `unit`, float32 `[B, C]`; nan where there was none.
        threshold: What it was compared with, in `unit`, float32 `[B, C]`; nan where the policy has none.
        teacher_hidden: The teacher's last hidden state that predicted each token `[B, C, H]`, or None.
        drafted_ids: What the student would have written at each position, int64 `[B, C]`, or None.
        measured: What `divergence` holds, such as one of `MEASURED`; None for a policy that compares nothing.
        stats: Counts and times: `student_passes`, `teacher_passes`, `drafted`, `kept`, `seconds`, `tokens_per_s`.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    author: Tensor
    divergence: Tensor
    threshold: Tensor
    teacher_hidden: Tensor | None = None
    drafted_ids: Tensor | None = None
    measured: str | None = None
    stats: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, length = self.completion_ids.shape
        expected = {
            "completion_ids": torch.int64,
            "completion_mask": torch.bool,
            "author": torch.uint8,
            "divergence": torch.float32,
            "threshold": torch.float32,
        }
        for name, dtype in expected.items():
            value = getattr(self, name)
            if value.shape != (rows, length) or value.dtype != dtype:
                raise ValueError(
                    f"Rollout.{name} must be {dtype} [{rows}, {length}], got {value.dtype} {list(value.shape)}"
                )
        if self.prompt_ids.shape != self.prompt_mask.shape or len(self.prompt_ids) != rows:
            raise ValueError(
                f"Rollout prompts must be [{rows}, P] twice, got ids {list(self.prompt_ids.shape)} "
                f"and mask {list(self.prompt_mask.shape)}"
            )
        if bool(((self.author == Author.NONE) == self.completion_mask).any()):
            raise ValueError("Rollout.author must be NONE exactly where completion_mask is False")

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def unit(self) -> str:
        """Unit of `divergence` and `threshold`: "nats", "rank" in the teacher's order, or a policy's own."""
        return unit_of(self.measured)

    @property
    def teacher_share(self) -> float:
        """Share of the emitted tokens that the teacher wrote, in [0, 1]; nan for an empty rollout."""
        total = int(self.completion_mask.sum())
        return int((self.author == Author.TEACHER).sum()) / total if total else float("nan")

    def first(self, count: int) -> "Rollout":
        """Return the first rows, without teacher states; `stats` stay those of all rows."""
        return self.part(slice(count))

    def part(self, rows: slice) -> "Rollout":
        """Return some rows, without teacher states; `stats` stay those of all rows."""
        names = ("prompt_ids", "prompt_mask", *TOKEN_COLUMNS)
        found = {name: value[rows] for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **found, teacher_hidden=None)

    def completions(self) -> list[list[int]]:
        """Return the ids of every completion without padding, the end of sequence included."""
        return [ids[keep].tolist() for ids, keep in zip(self.completion_ids, self.completion_mask, strict=True)]

    def to_dicts(self, tokenizer: Any = None, eos_token_id: int | Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return one JSON-ready dict per row; with a tokenizer the text of prompt and tokens is added.

        Args:
            tokenizer: A Hugging Face tokenizer, or None for ids only.
            eos_token_id: Id or ids that end a text; with them `finish_reason` is added: "stop" or "length".

        Returns:
            Dicts with `prompt_ids`, `completion_ids`, `author` (lower-case names), `divergence`, `threshold` (None for
            nan), what was `measured`, the `unit`, where it was recorded `drafted_ids`, and with a tokenizer `prompt`,
            `completion`, `tokens` and `drafted`, what each drafted token would have added to the text.
        """
        rows = []
        for row in range(len(self)):
            keep = self.completion_mask[row]
            ids = self.completion_ids[row][keep].tolist()
            prompt_ids = self.prompt_ids[row][self.prompt_mask[row].bool()].tolist()
            result: dict[str, Any] = {
                "prompt_ids": prompt_ids,
                "completion_ids": ids,
                "author": [Author(value).name.lower() for value in self.author[row][keep].tolist()],
                "divergence": [_number_or_none(value) for value in self.divergence[row][keep].tolist()],
                "threshold": [_number_or_none(value) for value in self.threshold[row][keep].tolist()],
                "measured": self.measured,
                "unit": self.unit,
            }
            if self.drafted_ids is not None:
                result["drafted_ids"] = self.drafted_ids[row][keep].tolist()
            if eos_token_id is not None:
                ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
                result["finish_reason"] = "stop" if ids and ids[-1] in ends else "length"
            if tokenizer is not None:
                result["prompt"] = tokenizer.decode(prompt_ids)
                result["completion"] = tokenizer.decode(ids, skip_special_tokens=True)
                result["tokens"] = token_texts(tokenizer, ids, prompt_ids)
                if self.drafted_ids is not None:
                    result["drafted"] = _drafted_texts(tokenizer, result, ids, prompt_ids)
            rows.append(result)
        return rows


def token_texts(tokenizer: Any, token_ids: list[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    """Return what every token adds to the text: the pieces in a row are the text, which tokens decoded alone are not.

    A token alone loses its leading blank where the tokenizer writes it as a word border, and byte-level tokens may hold
    part of a character only: those add nothing, and the token that completes the character adds all of it.

    Args:
        tokenizer: A Hugging Face tokenizer.
        token_ids: The tokens.
        prompt_ids: What stands before them.
    """
    context = list(prompt_ids[-4:])
    ids = context + token_ids
    pieces = []
    # Decoded from one token before the new ones: enough for borders, and linear in the length.
    start, done = 0, len(context)
    for end in range(done + 1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(tokenizer.decode(ids[start:done])) :])
        start, done = done, end
    return pieces


def _drafted_texts(tokenizer: Any, row: dict[str, Any], ids: list[int], prompt_ids: list[int]) -> list[str]:
    """What the drafted tokens of a row would have added; a token that was kept adds what it did."""
    return [
        text if drafted == ids[place] else token_texts(tokenizer, [drafted], (prompt_ids + ids[:place])[-4:])[0]
        for place, (drafted, text) in enumerate(zip(row["drafted_ids"], row["tokens"], strict=True))
    ]


def _number_or_none(value: float) -> float | None:
    return None if value != value else value
