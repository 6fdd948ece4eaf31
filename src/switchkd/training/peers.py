"""The other processes of a training: a mistake in one ends all with that line, and none waits for one that is gone.

A process that waits in a collective hears nothing, so that each has a thread that gives signs of life and reads those
of the others, in the store through which the processes found each other.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import distributed

from switchkd.errors import LostProcess, UserError

#: Seconds between two signs of life.
BEAT = 1.0
#: Seconds without one after which a process counts as lost; it may hold the interpreter's lock while it loads a model.
LOST_AFTER = 40.0
#: The same once a collective has failed here, which says that somebody is gone but not who.
LOST_AFTER_FAILURE = 6.0
#: Seconds after which it is said that no process has begun anything new.
STALLED_AFTER = 600.0
#: Seconds that a process which fails waits until the others have said why.
TOLD_WITHIN = 8.0
DONE = "done"


class _Watch:
    """Signs of life of one process, and what it has heard of the others."""

    count = 0  # watches of this process: all processes open them in the same order

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.phase = rank, ranks, "the start"
        _Watch.count += 1
        self.store = distributed.PrefixStore(f"switchkd/{_Watch.count}", store.clone())
        self.others = [other for other in range(ranks) if other != rank]
        self.patience = LOST_AFTER
        #: Process -> what it does, as far as it is known here, and since when.
        self.doing: dict[int, tuple[str, float]] = {rank: (self.phase, time.monotonic())}
        self._told_of_stall = False
        self._beats = itertools.count(1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="switchkd-peers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(5 * BEAT)

    def sign(self) -> None:
        """Give a sign of life, with what this process does."""
        self.store.set(f"alive/{self.rank}", f"{next(self._beats)} {self.phase}")

    def _read(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _run(self) -> None:
        seen = dict.fromkeys(self.others, ("", 0.0))
        while not self._stopped.wait(BEAT):
            try:
                self.sign()
                fault = self._read("fault")
                signs = {other: self._read(f"alive/{other}") for other in self.others}
            except (distributed.DistError, RuntimeError):
                if not self._stopped.is_set() and seen.get(0, ("",))[0] != DONE:
                    self._end(LostProcess(self._lost("process 0 or the launcher", "")))
                return
            if fault is not None:
                self.store.set(f"heard/{self.rank}", "")
                self._end(LostProcess(fault) if self._read("stuck") else UserError(fault))
            now = time.monotonic()
            self._note(self.rank, self.phase, now)
            for other, sign in signs.items():
                if sign is not None and sign != seen[other][0]:
                    seen[other] = sign, now
                self._note(other, (sign or "").partition(" ")[2], now)
                sign, since = seen[other]
                if sign not in ("", DONE) and now - since > self.patience:
                    self._end(LostProcess(self._lost(f"process {other} of {self.ranks}", sign.partition(" ")[2])))

    def _note(self, process: int, phase: str, now: float) -> None:
        """Keep in mind what a process does; once nobody has begun anything new for long, say so."""
        if self.doing.get(process, ("", 0.0))[0] != phase:
            self.doing[process] = phase, now
            self._told_of_stall = False
        newest = max(since for _, since in self.doing.values())
        if self.rank == 0 and not self._told_of_stall and now - newest > STALLED_AFTER:
            self._told_of_stall = True
            sys.stderr.write(f"switchkd: nothing new for {now - newest:.0f} s: {self.everybody()}\n")

    def everybody(self) -> str:
        """Return what each process does, in words."""
        names = sorted(self.doing.items())
        return ", ".join(f"process {process} is in {phase or 'the start'}" for process, (phase, _) in names)

    def _lost(self, who: str, phase: str) -> str:
        last = f", last in {phase}" if phase else ""
        return (
            f"{who} is gone{last} (no sign of life; process {self.rank} waited in {self.phase}); look at what it said, "
            "and start the same command again with --resume_from_checkpoint auto"
        )

    def _end(self, error: UserError) -> NoReturn:
        """End this process, whose other threads may wait for ever, with one line."""
        sys.stdout.flush()
        sys.stderr.write(f"switchkd: error: {' '.join(str(error).split())}\n")
        sys.stderr.flush()
        os._exit(error.code)

    def tell(self, message: str, *, stuck: bool = False) -> None:
        """Let the others end with this message, and wait until they have heard it.

        Args:
            message: One line.
            stuck: Whether it is no mistake but a wait in vain, after which the same command may go on.
        """
        self._stopped.set()
        with contextlib.suppress(distributed.DistError, RuntimeError):
            if not self.store.check(["fault"]):
                if stuck:
                    self.store.set("stuck", "1")
                self.store.set("fault", f"process {self.rank} of {self.ranks}: {message}")
            self._await_others(TOLD_WITHIN)

    def finish(self) -> None:
        """Say that this process is through, and wait for the others as long as they live."""
        self.stop()
        fault = None
        with contextlib.suppress(distributed.DistError, RuntimeError):
            self.store.set(f"alive/{self.rank}", DONE)
            self._await_others(LOST_AFTER)
            fault = self._read("fault")
        if fault is not None:
            raise UserError(fault)

    def _await_others(self, seconds: float) -> None:
        """Wait until every process has said that it ends, for the last time."""
        self.store.set(f"heard/{self.rank}", "")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.store.check([f"heard/{other}" for other in self.others]):
            time.sleep(0.05)


_watch: _Watch | None = None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let all processes of a training end together inside; one process, or a second call inside, changes nothing.

    A `UserError` here ends the others with its line. Where another process fails, is killed or hangs, this one ends
    with one line and the exit code of `UserError` or `LostProcess`, wherever it waits.
    """
    global _watch
    if _watch is not None or not distributed.is_available() or not distributed.is_initialized():
        yield
        return
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if ranks == 1:
        yield
        return
    watch = _watch = _Watch(distributed.distributed_c10d._get_default_store(), rank, ranks)
    watch.start()
    finished = False
    try:
        yield
        finished = True
        watch.finish()
    except UserError as error:
        if finished:
            raise
        watch.tell(str(error))
        raise
    except Exception as error:
        if _failed_together(error):
            # Another one is gone or has said why: the thread finds out and ends this process.
            watch.patience = LOST_AFTER_FAILURE
            time.sleep(LOST_AFTER_FAILURE + 3 * BEAT)
            if _timed_out(error):  # and it does not: all are alive
                message = (
                    f"the processes wait for each other in vain (a time-out of process {rank}): {watch.everybody()}; "
                    "look at what each said, and start the same command again with --resume_from_checkpoint auto"
                )
                watch.tell(message, stuck=True)
                raise LostProcess(message) from error
        watch.tell(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        raise
    except BaseException:
        watch.tell("interrupted")
        raise
    finally:
        watch.stop()
        _watch = None


def enter(phase: str) -> None:
    """Say what this process begins to do, for the message of one that waits for it in vain."""
    if _watch is not None:
        _watch.phase = phase
        with contextlib.suppress(distributed.DistError, RuntimeError):  # the thread ends what is to be ended
            _watch.sign()


def _failed_together(error: Exception) -> bool:
    """Whether an exception came out of a collective."""
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out waiting")
    is_known = isinstance(error, distributed.DistError)
    return is_known or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def _timed_out(error: Exception) -> bool:
    """Whether a collective was given up because nobody else came to it in time."""
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()
