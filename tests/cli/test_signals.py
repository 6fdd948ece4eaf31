"""SIGTERM and SIGHUP end a command as Ctrl-C does: one line that says how it goes on, and the code of the signal."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Run, evaluate_options

from switchkd.cli.run_folder import RunFolder
from switchkd.cli.signals import NUMBERS, heard, stop
from switchkd.commands import scoring


@contextlib.contextmanager
def handled(number: int, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [*NUMBERS, signal.SIGINT])
def test_a_signal_ends_an_evaluation_with_the_call_that_goes_on(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """SIGTERM ended it without a word."""
    folder, append = tmp_path / "run", scoring.append_sealed

    def write_and_receive(path: Path, rows: Any) -> None:
        append(path, rows)
        if any("seed" in row for row in rows):
            os.kill(os.getpid(), number)

    RunFolder(str(tmp_path / "earlier"), "evaluate").claim({})  # by a call that did not let go of it
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    options = evaluate_options(models, models / "student", folder, "--batch_size", 2)
    with handled(number, usual), monkeypatch.context() as patch:
        patch.setattr(scoring, "append_sealed", write_and_receive)
        code, _, err = run(*options)
        assert signal.getsignal(number) == usual
    said = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    assert code == 128 + number
    assert err.splitlines()[-1] == f"switchkd: {said}; the same call with --resume --output_dir {folder} goes on"
    code, out, err = run(*options, "--resume", "--output_dir", folder)
    assert code == 0 and "answers are there already" in out, err


def test_a_signal_that_is_ignored_or_of_several_processes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with handled(signal.SIGHUP, signal.SIG_IGN), heard():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    monkeypatch.setenv("WORLD_SIZE", "2")
    with handled(signal.SIGTERM, signal.SIG_DFL), heard():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_a_command_has_forked_still_ends_by_the_signal() -> None:
    """Workers of a data loader that are told to end would print a traceback of it."""
    with handled(signal.SIGTERM, signal.SIG_DFL), heard():
        assert signal.getsignal(signal.SIGTERM) == stop
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
