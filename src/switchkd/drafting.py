"""How many tokens to draft before the teacher checks them: the most text for the least time, as measured."""

from collections.abc import Sequence

LONGEST_DRAFT = 16
# Each new time or outcome weighs this much against the running value.
TIME_WEIGHT = 0.2
KEEP_WEIGHT = 0.08


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
        self.keep_rate = keep_rate
        self._row_rates: dict[int, float] = {}
        self._student = _LinearTime()
        self._teacher = _LinearTime()
        self._rounds = 0

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
        student = self._student.seconds(count)
        rates = [self._row_rates.get(row, self.keep_rate) for row in rows]
        emitted, powers = 0.0, [1.0] * count
        best_length, best_speed = 1, 0.0
        for length in range(1, min(LONGEST_DRAFT, longest) + 1):
            emitted += sum(powers)
            powers = [power * rate for power, rate in zip(powers, rates, strict=True)]
            speed = emitted / (length * student + self._teacher.seconds(count * length))
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
            kept: How many drafted tokens of each row stood before the first replaced one.
            length: The draft's length.
            student_s: Seconds of all student passes, their draws included.
            teacher_s: Seconds of the teacher's pass and the verification.
        """
        if self.fixed is not None:
            return
        self._student.observe(len(rows), student_s / length)
        self._teacher.observe(len(rows) * length, teacher_s)
        for row, count in zip(rows, kept, strict=True):
            rate = self._row_rates.get(row, self.keep_rate)
            for outcome in [1.0] * count + [0.0] * (count < length):
                rate += KEEP_WEIGHT * (outcome - rate)
                self.keep_rate += KEEP_WEIGHT / max(len(rows), 1) * (outcome - self.keep_rate)
            self._row_rates[row] = rate

    def forget(self, row: int) -> None:
        """Drop what is known of a finished row."""
        self._row_rates.pop(row, None)


class _LinearTime:
    """Seconds of a pass as fixed + slope * tokens, both at least 0, by weighted least squares that forgets."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        keep = 1.0 - TIME_WEIGHT * 0.25
        if self._weight > 3.0:
            # A single pass that was interrupted by another process must not turn the estimate over.
            seconds = min(seconds, 3.0 * self.seconds(tokens) + 1e-6)
        self._weight = keep * self._weight + 1.0
        self._x = keep * self._x + tokens
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + tokens * tokens
        self._xy = keep * self._xy + tokens * seconds

    def seconds(self, tokens: int) -> float:
        if self._weight == 0.0:
            return 1.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        slope = 0.0
        if variance > 1e-9:
            slope = max((self._xy / self._weight - mean_x * mean_y) / variance, 0.0)
        slope = min(slope, mean_y / mean_x)
        return max(mean_y + slope * (tokens - mean_x), 1e-9)
