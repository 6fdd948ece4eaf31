"""Rollouts for people: who wrote what, marked on a terminal, in [brackets] elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from switchkd.cli.display import rich_table, table

if TYPE_CHECKING:  # rich is only needed where a terminal shows something
    from rich.console import RenderableType
    from rich.text import Text

# Text on a ground of its own, like a marker pen: readable whatever colours the terminal has. The underline stays where
# colours are off (NO_COLOR) or not seen. A test computes the contrast.
TEACHER_STYLE = "bold underline #000000 on #ffd75f"
HEADER_STYLE = "bold"
# A blank or a line break that the teacher wrote alone would not be seen.
BLANK, LINE_BREAK = "\N{MIDDLE DOT}", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
#: What the table of the training shows of a completion, characters; completions.jsonl has all of it.
SHOWN_CHARACTERS = 400


def rollout_text(row: Mapping[str, Any]) -> str:
    """Return a rollout as plain text: the prompt, then the completion, each run of the teacher's tokens in [brackets].

    Args:
        row: One of `Rollout.to_dicts(tokenizer)`: `prompt`, `tokens` and `author` are read.
    """
    runs = (f"[{printable(text)}]" if by_teacher else printable(text) for by_teacher, text in _runs(row))
    return printable(row["prompt"]) + "".join(runs)


def marked(row: Mapping[str, Any]) -> "Text":
    """Return the completion of a rollout with the teacher's tokens marked, its blanks and line breaks visible."""
    from rich.text import Text

    text = Text()
    for by_teacher, run in _runs(row):
        text.append(_visible(printable(run)) if by_teacher else printable(run), TEACHER_STYLE if by_teacher else "")
    return text


def legend() -> "Text":
    """Return what the marks mean."""
    from rich.text import Text

    return Text.assemble(
        "written by: student  ",
        ("teacher", TEACHER_STYLE),
        f"   {BLANK} and {LINE_BREAK}: blanks and line breaks of the teacher",
    )


def header(row: Mapping[str, Any], number: int, total: int) -> str:
    """Return the line above a completion: its number, length, the teacher's share and how it ended.

    Args:
        row: As for `rollout_text`, with `finish_reason`.
        number: Of the completion, from 1.
        total: Of all completions.
    """
    by_teacher = list(row["author"]).count("teacher")
    length = len(row["author"])
    wrote = f"the teacher wrote {by_teacher} ({by_teacher / max(length, 1):.0%})"
    return f"{number} of {total}: {length} tokens, {wrote}, {end(row)}"


def end(row: Mapping[str, Any]) -> str:
    """Return how a completion ended: its end-of-sequence token, or the limit that cut it."""
    if row["finish_reason"] == "stop":
        return f"ended with {printable(row['tokens'][-1])}"
    return f"cut at the limit of {len(row['author'])} tokens"


def rollout_block(row: Mapping[str, Any], number: int, total: int) -> "RenderableType":
    """Return a rollout as a terminal shows it: a header, the prompt, and the completion with its writers marked."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("prompt", Text(printable(row["prompt"])))
    grid.add_row("completion", marked(row))
    return Group(Text(header(row, number, total), HEADER_STYLE), grid, "")


def completions_table(rows: Sequence[Mapping[str, Any]], step: int) -> "RenderableType":
    """Return what a running training shows of its rollouts: prompts and completions with their writers marked."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(
        box=box.ROUNDED, title=f"step {step}: completions", caption=legend(), show_lines=True, expand=True,
        title_style=HEADER_STYLE, caption_style="", caption_justify="left",
    )  # fmt: skip
    for name, ratio in (("prompt", 2), ("completion", 5)):
        result.add_column(name, ratio=ratio, overflow="fold")
    for name in ("teacher", "end"):
        result.add_column(name, no_wrap=True)
    for row in rows:
        prompt, completion = Text(printable(row["prompt"])), marked(row)
        if len(prompt) > SHOWN_CHARACTERS // 2:  # its end is what the completion goes on from
            prompt = Text("\N{HORIZONTAL ELLIPSIS}") + prompt[-SHOWN_CHARACTERS // 2 :]
        completion.truncate(SHOWN_CHARACTERS, overflow="ellipsis")
        share = list(row["author"]).count("teacher") / max(len(row["author"]), 1)
        how = printable(row["tokens"][-1]) if row["finish_reason"] == "stop" else f"cut at {len(row['author'])}"
        result.add_row(prompt, completion, f"{share:.0%}", how)
    return result


def tokens_table(row: Mapping[str, Any], between: str = "  ") -> tuple[list[list[Any]], list[str]]:
    """Return the rows and headers of the table of a rollout's tokens.

    Args:
        row: As for `rollout_text`, with the `top_tokens` that `switchkd.evaluation.top_tokens` made.
        between: What stands between the likeliest tokens of a model.
    """
    measured, unit = row["measured"], row["unit"]
    others = [name for name in ("jsd_nats",) if name != measured and name in row["top_tokens"][0]]
    models = [name for name in ("student", "teacher") if name in row["top_tokens"][0]]
    drafted = row.get("drafted")
    headers = ["#", "token", "writer", *(["drafted"] if drafted else []), *(f"{name}'s top tokens" for name in models)]
    headers += [*([_unit(measured), f"threshold [{unit}]"] if measured else []), *map(_unit, others)]
    cells = []
    for place, (token, author, top) in enumerate(zip(row["tokens"], row["author"], row["top_tokens"], strict=True)):
        likeliest = (between.join(f"{one['token']!r} {_percent(one['probability'])}" for one in top[m]) for m in models)
        compared = [row["divergence"][place], row["threshold"][place]] if measured else []
        draft = [repr(drafted[place]) if drafted[place] != token else ""] if drafted else []
        cells.append([place, repr(token), author, *draft, *likeliest, *compared, *(top[name] for name in others)])
    return cells, headers


def tokens_text(row: Mapping[str, Any]) -> str:
    """Return the table of a rollout's tokens as plain text."""
    return table(*tokens_table(row))


def tokens_block(row: Mapping[str, Any], width: int) -> "RenderableType":
    """Return the table of a rollout's tokens as a terminal shows it.

    Args:
        row: As for `tokens_table`.
        width: Of the terminal, characters; where a line does not fit, a model's tokens stand below each other.
    """
    from rich.console import Group
    from rich.text import Text

    fits = max(map(len, tokens_text(row).splitlines())) < width
    cells, headers = tokens_table(row, between="  " if fits else "\n")
    for line in cells:
        if line[2] == "teacher":
            line[1:3] = (Text(text, TEACHER_STYLE) for text in line[1:3])
    return Group(rich_table(cells, headers), "")


def printable(text: str) -> str:
    """Return text without characters that move the cursor or change colours; line breaks and tabs stay."""
    kept = text.replace("\r\n", "\n")
    return "".join(
        character if character in "\n\t" or character.isprintable() else ascii(character)[1:-1] for character in kept
    )


def _runs(row: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """The completion in runs of one writer: whether the teacher wrote it, and its text."""
    run, writer = "", None
    for token, author in zip(row["tokens"], row["author"], strict=True):
        by_teacher = author == "teacher"
        if writer is not None and by_teacher != writer:
            yield writer, run
            run = ""
        run, writer = run + token, by_teacher
    if writer is not None:
        yield writer, run


def _visible(run: str) -> str:
    return (BLANK * len(run) if run.strip(" ") == "" else run).replace("\n", f"{LINE_BREAK}\n")


def _percent(probability: float) -> str:
    return f"{probability:.0%}" if probability >= 0.095 else f"{probability:.1%}"


def _unit(measured: str) -> str:
    return measured.replace("_nats", " [nats]")
