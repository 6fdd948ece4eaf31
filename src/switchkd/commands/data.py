"""The options that say which records a command reads and how, and reading them."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from switchkd.cli.options import flag
from switchkd.data_options import HELP, TEMPLATES, parse_columns
from switchkd.errors import UserError, check_choice, json_object

if TYPE_CHECKING:
    from datasets import Dataset

    from switchkd.data import PrepareReport


def add_data_options(group: argparse._ArgumentGroup) -> None:
    """Add what a command that reads prompts from `dataset_name` takes besides that name, its split and its limits."""
    group.add_argument("--dataset_config", metavar="NAME", help="configuration of a hub data set")
    group.add_argument("--dataset_streaming", **flag("read only the records that max_samples asks for"))
    group.add_argument("--columns", metavar="NAME=COLUMN,...", help=HELP["columns"])
    group.add_argument("--template", default="auto", metavar="NAME", help=HELP["template"])
    group.add_argument("--chat_template_path", metavar="NAME", help=HELP["chat_template_path"])
    group.add_argument("--chat_template_kwargs", metavar="JSON", help=HELP["chat_template_kwargs"])
    group.add_argument("--split_special_tokens", **flag(HELP["split_special_tokens"], default=True))


def check_data_options(options: argparse.Namespace) -> None:
    """Refuse values out of range; nothing heavy is imported for it.

    Raises:
        UserError: Names the option.
    """
    parse_columns(options.columns)
    template_kwargs(options)
    check_choice("template", options.template, TEMPLATES)
    if options.dataset_streaming and options.max_samples is None:
        raise UserError("dataset_streaming needs max_samples: the number of records to take")


def template_kwargs(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return what `--chat_template_kwargs` gives, None where it gives nothing.

    Raises:
        UserError: It is no JSON object.
    """
    text = options.chat_template_kwargs
    return None if text is None else json_object("chat_template_kwargs", text)


def load_data(options: argparse.Namespace, split: str) -> "Dataset":
    """Return the records that the options name, the first `max_samples` of them.

    Raises:
        UserError: They cannot be found or read.
    """
    from switchkd.data.containers import first_records
    from switchkd.data.records import load_records

    records = load_records(
        options.dataset_name, split=split, configuration=options.dataset_config, streaming=options.dataset_streaming
    )
    return first_records(records, options.max_samples)


def prepare_data(
    options: argparse.Namespace,
    split: str,
    tokenizer: Any,
    *,
    answers: bool = True,
    max_prompt_length: int = 256,
    max_completion_length: int = 256,
) -> "tuple[Dataset, PrepareReport]":
    """Return the records that the options name as token ids, and the counts of what was dropped and cut.

    Args:
        options: Of a command with `add_data_options`.
        split: The split to take.
        tokenizer: The student's.
        answers: Whether the command reads the answers.
        max_prompt_length: Longer prompts are dropped, tokens.
        max_completion_length: Longer answers are cut, tokens.

    Raises:
        UserError: The records cannot be found, read or prepared.
    """
    from switchkd.data import prepare

    data, report = prepare(
        load_data(options, split),
        tokenizer,
        columns=options.columns,
        template=options.template,
        chat_template_kwargs=template_kwargs(options),
        split_special_tokens=options.split_special_tokens,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
    )
    return data, report if answers else replace(report, truncated_completions=None)
