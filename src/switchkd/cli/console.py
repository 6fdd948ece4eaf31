"""Where text for people goes, and which messages of other libraries are shown."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from switchkd.cli.display import rich_table, table
from switchkd.cli.run_folder import is_main_process, json_line

if TYPE_CHECKING:  # only a terminal needs it
    import rich.console


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
            write(self.stream, text + "\n")

    def table(self, rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
        """Return a table for people: as wide as the terminal where there is one, else plain text."""
        screen = terminal(self.stream)
        return table(rows, headers) if screen is None else rendered(screen, rich_table(rows, headers))

    def progress(self, text: str) -> None:
        """Print a passing remark to standard error."""
        if is_main_process():
            write(sys.stderr, text + "\n")

    def result(self, value: dict[str, Any]) -> None:
        """Print the JSON line that `--json` asks for."""
        if self.json and is_main_process():
            write(sys.stdout, json_line(value) + "\n")


@contextlib.contextmanager
def quiet(console: Console) -> Iterator[None]:
    """Show this package's warnings as one line each, and those of others only under `--verbose`."""
    home = str(Path(__file__).parents[1])

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if console.verbose or filename.startswith(home):
            console.progress(f"switchkd: warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        if not console.verbose:
            # Where it is installed, peft imports it, and without a GPU it complains although nothing asked for it.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
    # A download of gigabytes should have a bar; transformers' switch turned that one off as well.
    enable_progress_bars()


def terminal(stream: TextIO, color: str = "auto") -> "rich.console.Console | None":
    """Return rich's console of a stream that can show marks; None where text must stay plain.

    Args:
        stream: Where the text goes.
        color: "auto" for a terminal (rich knows NO_COLOR, FORCE_COLOR and dumb terminals), "always" or "never".
    """
    if color == "never":
        return None
    from rich.console import Console as RichConsole

    always = color == "always"
    options: dict[str, Any] = {"file": stream, "highlight": False, "markup": False, "emoji": False}
    console = RichConsole(**options, force_terminal=always or None, no_color=False if always else None)
    if always and console.color_system is None:
        console = RichConsole(**options, force_terminal=True, no_color=False, color_system="256")
    return console if console.is_terminal and console.color_system is not None else None


def rendered(console: "rich.console.Console", renderable: Any) -> str:
    """Return what a console would print, without the last line break: who writes it knows of readers that leave."""
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().removesuffix("\n")


def write(stream: TextIO, text: str) -> None:
    """Write text to a stream; a reader that went away (`| head`) does not end the run."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # The reader is gone. Point the stream at nothing, or the interpreter complains again when it exits.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
