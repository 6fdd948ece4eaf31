"""Command-line options: a YAML file gives the defaults, every key is also a flag, flags win."""

import argparse
import copy
import functools
import itertools
import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from switchkd.cli.config_file import construct, read_entries, read_value
from switchkd.errors import UserError, UserErrors, nearest_name
from switchkd.other_names import changes_nothing, way_out

WIDEST_HELP = 110


class HelpFormatter(argparse.HelpFormatter):
    """Help that shows the defaults that matter."""

    def __init__(self, prog: str) -> None:
        # As wide as the terminal, but lines longer than 110 characters are hard to read; 110 without a terminal.
        columns = shutil.get_terminal_size((WIDEST_HELP + 2, 24)).columns
        super().__init__(prog, max_help_position=34, width=max(min(columns - 2, WIDEST_HELP), 40))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # A description of several lines is a list: its lines stay, and a long one goes on below its second column.
        lines = text.splitlines()
        if len(lines) < 2:
            return super()._fill_text(text, width, indent)
        column = " " * re.match(r"\S*\s*", lines[0]).end()  # type: ignore[union-attr]
        fill = functools.partial(textwrap.fill, width=width, initial_indent=indent, subsequent_indent=indent + column)
        return "\n".join(map(fill, lines))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS)) or action.default == []
        return action.help if silent else f"{action.help} (default: %(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # HfArgumentParser gives every option a second spelling with dashes; one is enough to read.
        if len(action.option_strings) > 1 and action.option_strings[0].startswith("--"):
            action = copy.copy(action)
            action.option_strings = action.option_strings[:1]
        return super()._format_action_invocation(action)


# The mixin comes before the ArgumentParser that a command builds on; only the type checker needs to know.
if TYPE_CHECKING:
    _Parser = argparse.ArgumentParser
else:
    _Parser = object


class OptionsMixin(_Parser):
    """Gives an `argparse.ArgumentParser` a `--config` file and one-line errors."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=HelpFormatter)
        #: What `resolve` left out, a line each.
        self.notes: list[str] = []

    def add_shared_options(self, output_dir: str | None, *, overwrite: bool = True) -> None:
        """Add what every command takes.

        Args:
            output_dir: Help of `--output_dir`, or None where the parser has that option already, or has none.
            overwrite: Whether the command writes a folder that may hold another run.
        """
        group = self.add_argument_group("every command")
        group.add_argument("--config", metavar="FILE", help="YAML file with any of these options; flags win")
        if output_dir is not None:
            group.add_argument("--output_dir", metavar="DIR", help=output_dir)
        if overwrite:
            group.add_argument("--overwrite_output_dir", **flag("replace the run that DIR holds"))
        group.add_argument("--json", **flag("end standard output with one compact JSON object"))
        group.add_argument("--verbose", **flag("show the messages of transformers and datasets too"))

    def full_help(self) -> str:
        """Return the help with every option; the same as `--help` where that leaves none out."""
        return self.format_help()

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with its usage as one `UserError`."""
        # "argument --top_k/--top-k: invalid ..." names an option twice.
        message = re.sub(r"^argument (--\w+)(/--[\w-]+)*: ", r"\1: ", message)
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        if choice is not None:
            valid = [word.strip(" '") for word in choice[2].split(",")]
            shown = (
                f"choose from {', '.join(valid)}"
                if len(valid) <= 12
                else f"the nearest is {nearest_name(choice[1], valid)!r}"
            )
            message = f"{message[: choice.start()]}invalid choice {choice[1]!r}; {shown}"
        raise UserError(message)

    def resolve(self, argv: Sequence[str]) -> argparse.Namespace:
        """Return all options: the flags of `argv` over the keys of its `--config` file over the defaults.

        Options that do not exist here, but whose value changes nothing, are left out; `notes` says so.

        Raises:
            UserError: A value of the wrong type, or a file that cannot be read.
            UserErrors: Unknown options or keys, all of them.
        """
        flags = self._known_flags(argv)
        options = self._parse(flags)
        if options.config is None:
            return options
        of_file = self._parse(self._config_flags(options.config))
        for action in self._actions:
            # Flags win: a list that they give is not added to that of the file.
            if isinstance(action, argparse._AppendAction) and getattr(options, action.dest) is not None:
                setattr(of_file, action.dest, None)
        return self._parse(flags, of_file)

    def add_to(self, options: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
        """Return options that were resolved before, with the flags of `argv` over them.

        Raises:
            UserError: As `resolve`.
        """
        return self._parse(self._known_flags(argv), options)

    def _known_flags(self, argv: Sequence[str]) -> list[str]:
        """The arguments with `--top-k=5` as `--top_k=5`; unknown options that would change nothing are left out."""
        flags: list[str] = []
        problems: list[str] = []
        words = list(argv)
        while words:
            word = words.pop(0)
            if not word.startswith("--") or word == "--":
                flags.append(word)
                continue
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if f"--{name}" in self._known():
                flags.append(f"--{name}{equals}{value}")
                continue
            if not equals:
                given = list(itertools.takewhile(lambda one: not one.startswith("--"), words))
                del words[: len(given)]
                value = " ".join(given) or "true"
            self._leave_out(name, read_value(value), problems, f"unknown option --{name}")
        if problems:
            raise UserErrors(problems)
        return flags

    def _leave_out(self, name: str, value: Any, problems: list[str], what: str) -> None:
        """Note that an unknown option changes nothing, or add to the problems what to write instead."""
        if changes_nothing(name, value):
            self.notes.append(f"{name}={value} changes nothing here; left out")
            return
        hint = way_out(name, self._names())
        problems.append(f"{what}; {hint}" if hint else what)

    def _parse(self, flags: list[str], known: argparse.Namespace | None = None) -> argparse.Namespace:
        options, rest = self.parse_known_args(flags, known)
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; {self._way_out(flags, rest[0])}")
        return options

    def _way_out(self, flags: list[str], stray: str) -> str:
        """How to give a word that belongs to no option."""
        if stray.lower().endswith((".yaml", ".yml")):
            return f"give a config file as --config {stray}"
        if "--set" in self._known() and "=" in stray:
            return f"settings are given after --set: --set {stray}"
        before = flags[: flags.index(stray)]
        start = max(
            (place for place, flag in enumerate(before) if flag.startswith("--") and flag != "--"), default=None
        )
        if start is None:
            return "every option is given as --name value"
        action = self._known()[before[start].partition("=")[0]]
        if action.type not in (None, str) or action.choices is not None:
            return f"--{action.dest} takes one value, and every option is given as --name value"
        after = next((place for place, flag in enumerate(flags) if place > start and flag.startswith("--")), len(flags))
        inline = [value for value in [before[start].partition("=")[2]] if value]
        return f'put text with blanks in quotes: --{action.dest} "{" ".join([*inline, *flags[start + 1 : after]])}"'

    def _config_flags(self, path: str) -> list[str]:
        """The keys of a YAML file as flags, so that a value is read in one way only."""
        flags: list[str] = []
        seen: set[str] = set()
        problems: list[str] = []
        for key_node, value_node in read_entries(path):
            where = f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}"
            name = str(key_node.value).replace("-", "_")
            action = self._known().get(f"--{name}")
            if action is None or name in ("config", "help"):
                what = f"{where}: unknown key {key_node.value!r}"
                self._leave_out(name, construct(value_node), problems, what)
                continue
            if name in seen:
                problems.append(f"{where}: duplicate key {name!r}")
                continue
            seen.add(name)
            tokens = _flag_tokens(f"--{name}", value_node, action)
            try:
                self._parse(tokens)
            except UserError as error:
                problems.append(f"{where}: {str(error).removeprefix('--')}")
            flags += tokens
        if problems:
            raise UserErrors(problems)
        return flags

    def _known(self) -> dict[str, argparse.Action]:
        return self._option_string_actions

    def _names(self) -> list[str]:
        return [flag[2:] for flag in self._known() if flag.startswith("--") and "-" not in flag[2:]]


class OptionParser(OptionsMixin, argparse.ArgumentParser):
    """The parser of the commands that need no `transformers` to list their options."""


def flag(help: str, default: bool = False) -> dict[str, Any]:
    """Return what `add_argument` needs for a switch that is also a key: `--json`, `--json false`."""
    return {"nargs": "?", "const": True, "default": default, "type": truth, "metavar": "BOOL", "help": help}


def truth(text: str) -> bool:
    """Return the boolean that a word means."""
    word = text.lower()
    if word in ("true", "yes", "on", "t", "y", "1"):
        return True
    if word in ("false", "no", "off", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def integers(texts: Iterable[str] | None, name: str) -> list[int] | None:
    """Return the numbers of a list option, given apart or joined by commas: `1,2`, `1 2`.

    Raises:
        UserError: A value is not an integer.
    """
    if texts is None:
        return None
    words = [word for text in texts for word in text.replace(",", " ").split()]
    try:
        return [int(word) for word in words]
    except ValueError:
        raise UserError(f"{name} must be integers joined by commas, got {' '.join(texts)!r}") from None


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Return options as one would type them; a name that does not exist is refused by the parser itself."""
    tokens: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            tokens.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list):
            tokens += [f"--{name}", *map(str, value)]
        elif value is not None:
            tokens.append(f"--{name}={value}")
    return tokens


def is_terminal(stream: Any) -> bool:
    """Return whether this stream is a terminal."""
    return bool(getattr(stream, "isatty", lambda: False)())


def _flag_tokens(flag_name: str, node: yaml.Node, action: argparse.Action) -> list[str]:
    """The command-line words for a key's value; none for an empty value, which leaves the default."""
    takes_list = action.nargs == "+"
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:null":
            return []
        return [flag_name, node.value] if takes_list else [f"{flag_name}={node.value}"]
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        values = [item.value for item in node.value]
        if not values:
            return []
        if isinstance(action, argparse._AppendAction):
            return [f"{flag_name}={value}" for value in values]
        return [flag_name, *values] if takes_list else [f"{flag_name}={','.join(values)}"]
    return [f"{flag_name}={json.dumps(construct(node))}"]
