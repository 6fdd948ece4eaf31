"""Signals that ask a command to stop: it ends as by Ctrl-C, what it wrote stays, and one line says how it goes on."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from switchkd.errors import Stopped

#: What batch systems and terminals send before they kill.
NUMBERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_listening = 0  # the process that listens: what it forks has its handlers, and must end as if it had none


def stop(number: int, frame: Any) -> None:
    """End a command where it stands; this is the handler of `heard`.

    Raises:
        Stopped: Always, but for a process that was forked from the one that listens: that ends by the signal.
    """
    if os.getpid() != _listening:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    raise Stopped(f"stopped by {signal.Signals(number).name}", number)


def may_listen() -> bool:
    """Return whether signals are this process's and this thread's to hear.

    Several processes are left to their launcher: one that waits for another in a collective would not hear.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return alone and threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Let the signals of `NUMBERS` raise `Stopped` inside.

    A signal that is ignored, as `nohup` has it, or that somebody else handles stays so.
    """
    global _listening
    if not may_listen():
        yield
        return
    _listening = os.getpid()
    before = {number: signal.signal(number, stop) for number in NUMBERS if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
