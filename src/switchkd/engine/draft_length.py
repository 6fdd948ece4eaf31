"""How many tokens to draft before the teacher checks them: the most text for the least time, as measured."""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

LONGEST_DRAFT = 16
# Outcomes (a drafted token was accepted or not) are forgotten over about KEPT_OUTCOMES of them, in one row over
# ROW_OUTCOMES. A row starts as if PRIOR_OUTCOMES had been seen in it at the common rate.
KEPT_OUTCOMES = 200
ROW_OUTCOMES = 50
PRIOR_OUTCOMES = 10
# Number of timings kept per token count, and number of token counts kept.
KEPT_TIMES = 5
KEPT_COUNTS = 8
# A token count that was not read for this many rounds is forgotten, and with it what made its length look bad.
MEMORY = 256


class DraftLength:
    """Chooses the draft length round by round, from measured pass times and the running acceptance of each row.

    A draft of G tokens is kept up to the first token that is replaced. With keep rate a a row then emits
    1 + a + ... + a^(G-1) tokens in expectation, for G student passes and one teacher pass over G tokens. The length
    with the most expected tokens per second over all active rows is taken; 1 where drafting loses.

    Args:
        fixed: Always this length; None chooses.
        keep_rate: Where the running acceptance starts, in (0, 1).
    """

    def __init__(self, fixed: int | None = None, *, keep_rate: float = 0.7) -> None:
        self.fixed = fixed
        self._common = (keep_rate * PRIOR_OUTCOMES, float(PRIOR_OUTCOMES))  # accepted, of how many tried
        self._rows: dict[int, tuple[float, float]] = {}
        self._student = PassTime()
        self._teacher = PassTime()
        self._rounds = 0

    @property
    def keep_rate(self) -> float:
        """The running acceptance over all rows, in [0, 1]."""
        return self._common[0] / self._common[1]

    def next(self, rows: Sequence[int], longest: int) -> int:
        """Return the length of the next draft.

        Args:
            rows: Identities of the active rows.
            longest: No row can emit more than this many further tokens.
        """
        if self.fixed is not None:
            return max(min(self.fixed, longest), 1)
        self._rounds += 1
        if self._rounds <= 3:
            # Three different lengths, the shortest last, are what it takes to tell a pass's fixed cost from its slope.
            return max(min((2, 4, 1)[self._rounds - 1], longest), 1)
        count = len(rows)
        student = self._student.line().at(count)
        teacher = self._teacher.line()
        common = self.keep_rate
        seen = (self._rows.get(row, (0.0, 0.0)) for row in rows)
        rates = [(accepted + PRIOR_OUTCOMES * common) / (tried + PRIOR_OUTCOMES) for accepted, tried in seen]
        emitted, powers = 0.0, [1.0] * count
        best_length, best_speed = 1, 0.0
        for length in range(1, min(LONGEST_DRAFT, longest) + 1):
            emitted += sum(powers)
            powers = [power * rate for power, rate in zip(powers, rates, strict=True)]
            speed = emitted / (length * student + teacher.at(count * length))
            if speed > best_speed * (1.0 + 1e-3):
                best_length, best_speed = length, speed
            elif speed < 0.9 * best_speed:
                # Each further token adds less text at the same cost: past its maximum the speed only falls.
                break
        return best_length

    def observe(
        self, rows: Sequence[int], kept: Sequence[int], length: int, student_s: float, teacher_s: float
    ) -> None:
        """Learn from one round.

        Args:
            rows: Identities of the rows.
            kept: How many drafted tokens of each row were accepted before the first replaced one.
            length: The draft's length.
            student_s: Seconds of all student passes, their draws included.
            teacher_s: Seconds of the teacher's pass and the verification.
        """
        if self.fixed is not None:
            return
        self._student.observe(len(rows), student_s / length)
        self._teacher.observe(len(rows) * length, teacher_s)
        tried = [min(count + 1, length) for count in kept]
        self._common = _remembered(self._common, sum(kept), sum(tried), KEPT_OUTCOMES)
        for row, accepted, count in zip(rows, kept, tried, strict=True):
            self._rows[row] = _remembered(self._rows.get(row, (0.0, 0.0)), accepted, count, ROW_OUTCOMES)

    def forget(self, row: int) -> None:
        """Drop what is known of a finished row."""
        self._rows.pop(row, None)

    def restart(self) -> "DraftLength":
        """Return the chooser for another rollout of the same models: times and the common rate stay, rows go."""
        self._rows.clear()
        return self


def _remembered(before: tuple[float, float], accepted: int, tried: int, memory: int) -> tuple[float, float]:
    """Add outcomes to decayed counts."""
    keep = (1.0 - 1.0 / memory) ** tried
    return keep * before[0] + accepted, keep * before[1] + tried


class Clock:
    """Times of what runs on a device: its own events on CUDA, where calls return before the work is done.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """End one stretch and begin the next."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds of every stretch; on CUDA it waits for the last to end."""
        if self._device.type != "cuda":
            return [end - start for start, end in itertools.pairwise(self._marks)]
        self._marks[-1].synchronize()
        return [start.elapsed_time(end) / 1000.0 for start, end in itertools.pairwise(self._marks)]


class Line:
    """Seconds of a pass: fixed + slope * tokens."""

    def __init__(self, fixed: float, slope: float) -> None:
        self.fixed, self.slope = fixed, slope

    def at(self, tokens: int) -> float:
        """Return the seconds of a pass over this many tokens, > 0."""
        return max(self.fixed + self.slope * tokens, 1e-9)


class PassTime:
    """Measured seconds of passes over different numbers of tokens, and the line through their medians.

    Medians all the way (of repeated passes, of slopes between two token counts, of offsets): a pass that another
    process interrupted must not turn the choice over.
    """

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}
        self._passes = 0
        self._line: Line | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn the seconds of one pass over this many tokens."""
        self._passes += 1
        # The latest count comes last.
        times = self._times.pop(tokens, None) or deque(maxlen=KEPT_TIMES)
        times.append(seconds)
        self._times[tokens] = times
        self._seen[tokens] = self._passes
        oldest = next(iter(self._times))
        if len(self._times) > KEPT_COUNTS or self._passes - self._seen[oldest] > MEMORY:
            del self._times[oldest], self._seen[oldest]
        self._line = None

    def line(self) -> Line:
        """Return the line, slope and fixed cost both at least 0; where one count was seen its cost is all fixed."""
        if self._line is None:
            self._line = self._fitted()
        return self._line

    def _fitted(self) -> Line:
        points = [(tokens, statistics.median(times)) for tokens, times in self._times.items()]
        if not points:
            return Line(1.0, 0.0)
        slopes = [
            (second[1] - first[1]) / (second[0] - first[0]) for first, second in itertools.combinations(points, 2)
        ]
        # Twice as many tokens take at most twice as long, and not less time.
        latest = points[-1]
        slope = min(max(statistics.median(slopes), 0.0), latest[1] / latest[0]) if slopes else 0.0
        offset = statistics.median(seconds - slope * tokens for tokens, seconds in points)
        return Line(max(offset, 0.0), slope)
