"""The command `switchkd`: finds the command asked for, and turns mistakes into one line.

Nothing heavy is imported here: `switchkd --help` must not wait for torch.
"""

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

from switchkd.errors import UserError, nearest_name
from switchkd.options import OptionsMixin
from switchkd.run_folder import is_main_process, json_line

COMMANDS = {
    "demo": "distil a small student with SWITCH, no download, and report what it gained",
    "train": "distil a student on your models and data",
    "rollout": "write completions with the teacher in the loop and show who wrote what",
    "evaluate": "score a model's own answers: ROUGE-L over several decoding seeds",
    "calibrate": "find the threshold that gives a wanted teacher share on your prompts",
    "compare": "train and score methods side by side, several seeds each, and say which differences are real",
}

HELP = """usage: switchkd COMMAND [options]

Distil large language models with the teacher in the loop.

commands:
{commands}

options:
  -h, --help     this text; `switchkd COMMAND --help` lists a command's options
  --version      print the version

first steps:
  switchkd demo
  switchkd rollout --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER --prompt "Once upon a time"
  switchkd train --config train.yaml --output_dir runs/mine
  switchkd evaluate --model_name_or_path runs/mine --dataset_name test.jsonl
"""


class Command(Protocol):
    """What a module of `switchkd.commands` offers."""

    def parser(self) -> Any:
        """Return the command's `OptionParser`."""

    def run(self, options: argparse.Namespace, console: "Console") -> dict[str, Any]:
        """Do the work and return what `--json` prints."""


@dataclass
class Console:
    """Where text for people goes: standard output, or standard error when `--json` keeps the former for machines."""

    json: bool = False
    verbose: bool = False

    @property
    def stream(self) -> TextIO:
        """The stream for people."""
        return sys.stderr if self.json else sys.stdout

    def say(self, text: str = "") -> None:
        """Print text for people; a reader that went away (`| head`) does not end the run."""
        if is_main_process():
            _write(self.stream, text + "\n")

    def progress(self, text: str) -> None:
        """Print a passing remark to standard error."""
        if is_main_process():
            _write(sys.stderr, text + "\n")

    def result(self, value: dict[str, Any]) -> None:
        """Print the JSON line that `--json` asks for."""
        if self.json and is_main_process():
            _write(sys.stdout, json_line(value) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a mistake that one line explains, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character of the text gets an escape, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _main(arguments)
    except UserError as error:
        if "--verbose" in arguments:
            traceback.print_exc()
        _write(sys.stderr, f"switchkd: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        _write(sys.stderr, "switchkd: interrupted\n")
        return 130


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        listing = "\n".join(f"  {name:<{width}}     {summary}" for name, summary in COMMANDS.items())
        _write(sys.stdout if arguments else sys.stderr, HELP.format(commands=listing))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        _write(sys.stdout, f"switchkd {version('switchkd')}\n")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; the nearest is {nearest_name(name, COMMANDS)!r}")
    command = cast(Command, import_module(f"switchkd.commands.{name}"))
    parser: OptionsMixin = command.parser()
    if "-h" in rest or "--help" in rest:
        _write(sys.stdout, cast(argparse.ArgumentParser, parser).format_help())
        return 0
    options = parser.resolve(rest)
    console = Console(json=options.json, verbose=options.verbose)
    with quiet(console):
        console.result(command.run(options, console))
    return 0


@contextlib.contextmanager
def quiet(console: Console) -> Iterator[None]:
    """Show this package's warnings as one line each, and those of others only when asked for."""
    home = str(Path(__file__).parent)

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if console.verbose or filename.startswith(home):
            console.progress(f"switchkd: warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        if not console.verbose:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"switchkd\b")
        warnings.showwarning = show
        yield


def quiet_libraries(verbose: bool) -> None:
    """Keep the load bars and remarks of transformers and datasets off the terminal; call it after importing them."""
    import datasets
    import transformers
    from huggingface_hub.utils import enable_progress_bars

    if verbose:
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    # A download of gigabytes does want a bar; transformers' switch turned that one off as well.
    enable_progress_bars()


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # Nobody reads on. Point the stream at nothing, or the interpreter complains again when it exits.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
