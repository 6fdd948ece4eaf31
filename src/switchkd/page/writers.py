"""A rollout for a page: its runs of one writer, and what is known of every token."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from switchkd.cli.rollouts import BLANK, LINE_BREAK, end, printable
from switchkd.errors import UserError

#: Writers; the style sheet marks all but the student by a letter, an underline and a ground.
AUTHORS = ("student", "teacher", "dataset")
#: Tokens of one rollout that are shown.
SHOWN_TOKENS = 1500
#: What all rollouts of a page may take together, bytes of HTML.
BUDGET = 1_000_000
#: A prompt is shown up to this length, characters: its beginning and its end.
SHOWN_PROMPT = 1200


@dataclass(frozen=True)
class Token:
    """One token: its text as it is shown, and what a reader is told of it."""

    text: str
    told: str


@dataclass(frozen=True)
class Run:
    """Tokens of one writer that follow each other."""

    author: str
    tokens: list[Token]


@dataclass(frozen=True)
class RolloutView:
    """A rollout as a page shows it.

    Attributes:
        title: Why it is shown.
        facts: Length, teacher's share and how it ended.
        prompt: What it goes on from.
        runs: The completion.
        name: Of its CSV file.
        headers: Of its CSV file.
        rows: Of its CSV file, one per token.
    """

    title: str
    facts: str
    prompt: str
    runs: list[Run]
    name: str
    headers: list[str]
    rows: list[list[Any]]

    kind = "rollout"

    @property
    def size(self) -> int:
        """About how many bytes of HTML it takes, its CSV file included."""
        told = sum(len(token.told.encode()) + 4 * len(token.text) + 60 for run in self.runs for token in run.tokens)
        return told + 60 * len(self.rows) + len(self.prompt) + 1000


def check_row(row: Any, where: str) -> dict[str, Any]:
    """Return a rollout that a file holds, if it is one.

    Raises:
        UserError: Tokens, authors or evidence are missing, of another kind, or of different lengths.
    """
    lists = ("tokens", "author", "divergence", "threshold")
    good = isinstance(row, dict) and all(isinstance(row.get(name), list) for name in lists)
    good = good and len({len(row[name]) for name in lists}) == 1 and isinstance(row.get("prompt"), str)
    good = (
        good and all(isinstance(text, str) for text in row["tokens"]) and all(one in AUTHORS for one in row["author"])
    )
    numbers = [*row["divergence"], *row["threshold"]] if good else []
    if not good or any(not (value is None or isinstance(value, int | float)) for value in numbers):
        raise UserError(f"{where} is not a rollout: prompt, tokens, author, divergence and threshold of every token")
    return dict(row)


def view(row: Mapping[str, Any], title: str, name: str) -> RolloutView:
    """Return a rollout as a page shows it.

    Args:
        row: Of `check_row`, with `finish_reason`, `measured` and `top_tokens` where they are recorded.
        title: Why it is shown.
        name: Of its CSV file, without the ending.
    """
    runs: list[Run] = []
    for place, (text, author) in enumerate(zip(row["tokens"][:SHOWN_TOKENS], row["author"], strict=False)):
        if not runs or runs[-1].author != author:
            runs.append(Run(author, []))
        told = "\n".join(_told(row, place))
        runs[-1].tokens.append(Token(_shown(text, author), told))
    headers, rows = _table(row)
    said = facts(row)
    if len(row["tokens"]) > SHOWN_TOKENS:
        said += f"; the first {SHOWN_TOKENS:,} tokens are shown"
    return RolloutView(title, said, shortened(row["prompt"]), runs, name, headers, rows)


def within(views: Sequence[RolloutView], budget: int = BUDGET) -> tuple[list[RolloutView], int]:
    """Return the rollouts that fit into a page, in their order, and how many do not.

    Args:
        views: Of `view`.
        budget: Bytes of HTML.
    """
    shown: list[RolloutView] = []
    for one in views:
        budget -= one.size
        if budget < 0 and shown:
            break
        shown.append(one)
    return shown, len(views) - len(shown)


def facts(row: Mapping[str, Any]) -> str:
    """Return the length of a rollout, what the teacher wrote of it, and how it ended."""
    length, by_teacher = len(row["author"]), teacher_tokens(row)
    parts = [f"{length} tokens", f"{by_teacher} by the teacher ({by_teacher / max(length, 1):.0%})"]
    if "finish_reason" in row and length:
        parts.append(end(row))
    return ", ".join(parts)


def teacher_tokens(row: Mapping[str, Any]) -> int:
    """Return how many tokens of a rollout the teacher wrote."""
    return list(row["author"]).count("teacher")


def shortened(text: str) -> str:
    """Return a prompt, or the beginning and the end of a very long one."""
    half = SHOWN_PROMPT // 2
    return text if len(text) <= SHOWN_PROMPT else f"{text[:half]} [...] {text[-half:]}"


def _told(row: Mapping[str, Any], place: int) -> Iterator[str]:
    """What is known of a token, a line each."""
    yield f"token {place + 1}, by the {row['author'][place]}"
    unit = row.get("unit") or "nats"
    measured = (row.get("measured") or "divergence").removesuffix(f"_{unit}").replace("_", " ")
    drafted = _drafted(row, place)
    if drafted is not None and row["author"][place] == "teacher":
        yield f"the student drafted {printable(repr(drafted))}"
    divergence, threshold = _numbers(row, place)
    if divergence is not None:
        against = "" if threshold is None else f", threshold {threshold:.3g}"
        yield f"{measured} {divergence:.3g}{against} {unit}"
    for model, likeliest in _likeliest(row, place):
        tokens = ", ".join(f"{printable(repr(token))} {_percent(probability)}" for token, probability in likeliest)
        yield f"{model}: {tokens}"


def _likeliest(row: Mapping[str, Any], place: int) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """The likeliest tokens of both models where they are recorded."""
    recorded = row.get("top_tokens")
    top = recorded[place] if isinstance(recorded, list) and place < len(recorded) else None
    for model in ("student", "teacher"):
        found = top.get(model) if isinstance(top, dict) else None
        pairs = [
            (one["token"], float(one["probability"]))
            for one in (found if isinstance(found, list) else [])
            if isinstance(one, dict) and isinstance(one.get("token"), str) and _is_number(one.get("probability"))
        ]
        if pairs:
            yield model, pairs


def _table(row: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = [
        [place, text, author, _drafted(row, place), *_numbers(row, place)]
        for place, (text, author) in enumerate(zip(row["tokens"], row["author"], strict=True))
    ]
    unit = row.get("unit") or "nats"
    return ["position", "token", "author", "drafted", row.get("measured") or "divergence", f"threshold_{unit}"], rows


def _drafted(row: Mapping[str, Any], place: int) -> str | None:
    """The student's draft where it is recorded."""
    recorded = row.get("drafted")
    found = recorded[place] if isinstance(recorded, list) and place < len(recorded) else None
    return found if isinstance(found, str) else None


def _numbers(row: Mapping[str, Any], place: int) -> Sequence[float | None]:
    return row["divergence"][place], row["threshold"][place]


def _shown(text: str, author: str) -> str:
    # A blank or a line break that a teacher wrote alone would not be seen.
    shown = printable(text)
    if author == "teacher":
        shown = (BLANK * len(shown) if shown and shown.strip(" ") == "" else shown).replace("\n", f"{LINE_BREAK}\n")
    return shown


def _percent(probability: float) -> str:
    if probability < 0.001:
        return "< 0.1%"
    return f"{probability:.0%}" if probability >= 0.095 else f"{probability:.1%}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
