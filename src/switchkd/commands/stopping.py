"""What a training does when it is asked to stop: it ends its step, saves a checkpoint, and says where."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from switchkd.cli.signals import NUMBERS, may_listen, stop

SIGNALS = (signal.SIGINT, *NUMBERS)
#: Seconds that the step in hand may still take; after that the last checkpoint must do.
GRACE = 8.0


class Stopper(TrainerCallback):
    """Ends training with a checkpoint at the end of the step in which a signal came.

    A second signal, or a step that takes longer than `GRACE`, ends it at once, without another checkpoint.

    Attributes:
        asked: The signal that came, None before.
    """

    def __init__(self) -> None:
        self.asked: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the signals of `SIGNALS` inside; elsewhere they do what they did before.

        Several processes must agree on the step they stop at, so that they are left to their launcher. A signal that
        is ignored, as `nohup` and shells in the background have it, or that somebody else handles stays so.
        """
        if not may_listen():
            yield
            return
        usual = (signal.SIG_DFL, signal.default_int_handler, stop)
        heard = [number for number in SIGNALS if signal.getsignal(number) in usual]
        before = {number: signal.signal(number, self._hear) for number in heard}
        timer = signal.signal(signal.SIGALRM, self._give_up)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, timer)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    def _give_up(self, number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end."""
        if self.asked is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)  # saving takes what it takes
            control.should_save = control.should_training_stop = True
