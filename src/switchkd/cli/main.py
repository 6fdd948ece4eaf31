"""The command `switchkd`: finds the command that is named, and turns mistakes into one line.

Nothing heavy is imported here: `switchkd --help` must not wait for torch.
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, Protocol, cast

from switchkd.cli.console import Console, quiet, write
from switchkd.cli.options import OptionsMixin
from switchkd.cli.run_folder import first_folder, release_folders
from switchkd.cli.signals import heard
from switchkd.errors import (
    OutOfMemory,
    Stopped,
    UserError,
    UserErrors,
    is_out_of_memory,
    nearest_name,
    storage_problem,
)

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


NO_MEMORY = (
    "not enough memory: lower the rows at once (--batch_size, --per_device_train_batch_size) or the lengths, or load "
    "models with --dtype bfloat16"
)


class Command(Protocol):
    """What the module of a command offers."""

    def parser(self) -> Any:
        """Return the command's `OptionParser`."""

    def run(self, options: argparse.Namespace, console: "Console") -> dict[str, Any]:
        """Do the work and return what `--json` prints."""

    # One that goes on where it was stopped has `RESUME` too: what is to be added to the same call, or "".


def run(commands: Mapping[str, tuple[str, str]], argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    That is 0, 2 for mistakes, each explained in one line, 71 where memory runs out, 74 where nothing more can be
    written, 75 where another process of a distributed run is gone, 130 for Ctrl-C and 143 for SIGTERM.

    Args:
        commands: Name -> the module of the command, imported when the command runs, and its line of help.
        argv: Arguments; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character of the text gets an escape, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    release_folders()  # of an earlier command of this process: the first one held is this command's own
    try:
        return _run(commands, arguments)
    except UserError as error:
        if "--verbose" in arguments:
            traceback.print_exc()
        for message in error.messages if isinstance(error, UserErrors) else [str(error)]:
            write(sys.stderr, f"switchkd: error: {' '.join(message.split())}\n")
        return error.code
    except Exception as error:
        problem, code = storage_problem(error), os.EX_IOERR
        if problem is None and is_out_of_memory(error):
            problem, code = NO_MEMORY, OutOfMemory.code
        if problem is None or "--verbose" in arguments:
            raise
        write(sys.stderr, f"switchkd: error: {problem}\n")
        return code
    except Stopped as stop:
        write(sys.stderr, f"switchkd: {stop}\n")
        return stop.code
    except KeyboardInterrupt:
        write(sys.stderr, "switchkd: interrupted\n")
        return 130
    finally:
        release_folders()


def _run(commands: Mapping[str, tuple[str, str]], arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, commands))
        listing = "\n".join(f"  {name:<{width}}     {summary}" for name, (_, summary) in commands.items())
        write(sys.stdout if arguments else sys.stderr, HELP.format(commands=listing))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        write(sys.stdout, f"switchkd {version('switchkd')}\n")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        raise UserError(f"unknown command {name!r}; the nearest is {nearest_name(name, commands)!r}")
    command = cast(Command, import_module(commands[name][0]))
    parser: OptionsMixin = command.parser()
    if "-h" in rest or "--help" in rest:
        write(sys.stdout, parser.format_help())
        return 0
    if "--help-all" in rest or "--help_all" in rest:
        write(sys.stdout, parser.full_help())
        return 0
    options = parser.resolve(rest)
    console = Console(json=options.json, verbose=options.verbose)
    for note in parser.notes:
        console.progress(f"switchkd: note: {note}")
    with quiet(console), heard():
        try:
            console.result(command.run(options, console))
        except KeyboardInterrupt as stop:
            folder, more = first_folder(), getattr(command, "RESUME", None)
            if folder is None or more is None:
                raise
            said = str(stop).partition(";")[0] or "interrupted"
            number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
            raise Stopped(f"{said}; the same call with {more}--output_dir {folder} goes on", number) from None
        except UserErrors as error:
            if error.result is not None:
                console.result(error.result)
            raise
    return 0
