"""From values to places in a figure: round numbers for ticks, and how they are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A map from values to pixels.

    Attributes:
        low: The value at `start`.
        high: The value at `end`; greater than `low`.
        start: Pixels.
        end: Pixels.
        log: Whether equal factors, not equal differences, are equally far apart; `low` is then greater than 0.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value, pixels; values outside the range stand at its nearer end."""
        inside = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round values that enclose a range: steps of 1, 2 or 5 times a power of ten.

    Args:
        low: Smallest value.
        high: Largest value; where it is not greater, the range is widened.
        count: About how many steps.
    """
    if not high > low:
        reach = abs(low) * 0.1 or 0.5
        low, high = low - reach, high + reach
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def powers(low: float, high: float) -> list[float]:
    """Return powers of ten that enclose a range of numbers greater than 0, two or more."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**exponent for exponent in range(first, max(last, first + 1) + 1)]


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the values that are numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]


def short(value: float) -> str:
    """Return a tick's text: no more digits than it needs, a true minus sign."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")
