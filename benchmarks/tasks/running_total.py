"""Running totals of which a teacher has seen some sums only: the second task with a dial, with an exact scorer.

    python benchmarks/tasks/running_total.py --rho 0 --output_dir runs/total_0
    python benchmarks/tasks/running_total.py --score runs/map_total_0

A prompt lists what is added and the total to start from, the answer the running totals, on a dial of 64 marks:

    prompt       +6 +17 +43 . . . from 20
    completion    26 43 22

At every total three of the sixteen amounts are *usual*. Sums to be answered add usual amounts only, so nobody needs
another to answer; but after a wrong total the remaining amounts are mostly not usual there, and the sum is one that a
teacher can have seen or not. The dial is `rho`, the share of the totals at which the teacher's training data also add
the other amounts; the student's warm start shows them all. Unlike the detours of `partial_walk.py` those sums follow a
rule, addition on the dial, so that a teacher could know them without having seen them: the gate measures whether it
does. Records, training, figures and gate are those of `partial_walk.py`, with totals in place of places.
"""

import functools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # as a scorer it is loaded from elsewhere

from partial_walk import STUDENTS, run
from walk_map import WalkMap, following, read_prompt, score

TOTALS = 64
AMOUNTS = 16
USUAL = 3
#: Stopped where the student answers a third to a half of the prompts without an error: seeds 0, 1, 2 answer 42, 28, 28%
#: after 475 steps and 60, 53, 43% after 550.
WARM_START_STEPS = {"two_layers": 500}


@dataclass(frozen=True)
class TotalMap(WalkMap):
    """Running totals as a map: a total is a place, an amount a direction, a usual amount a street."""

    def step(self, place: int, direction: str) -> int:
        """Return the total after an amount is added, on the dial."""
        return (place + int(direction)) % len(self.names)


@functools.cache
def make_totals() -> TotalMap:
    """Return the dial and its usual amounts, the same for every seed of the data.

    As many usual sums lead to every total as away from it: long sums come through all totals equally often.
    """
    draw = random.Random("switchkd running total")
    amounts = sorted(draw.sample(range(1, TOTALS), AMOUNTS))
    usual: list[list[int]] = [[] for _ in range(TOTALS)]
    while not all(len(row) == USUAL for row in usual):
        # One round after the other gives every total one more usual amount, such that all sums of a round differ.
        usual = [[] for _ in range(TOTALS)]
        for _ in range(USUAL):
            free = set(range(TOTALS))
            for total in draw.sample(range(TOTALS), TOTALS):
                open_to = [one for one in amounts if one not in usual[total] and (total + one) % TOTALS in free]
                if not open_to:
                    break
                usual[total].append(draw.choice(open_to))
                free.discard((total + usual[total][-1]) % TOTALS)
    return TotalMap(
        names=tuple(str(total) for total in range(TOTALS)),
        streets=tuple({f"+{one}": (total + one) % TOTALS for one in row} for total, row in enumerate(usual)),
        detours=(),
        known_order=tuple(draw.sample(range(TOTALS), TOTALS)),
        directions=tuple(f"+{one}" for one in amounts),
    )


def correct_prefix(prompt: str, answer: str, references: Sequence[str]) -> float:
    """Return the share of the totals before the first error, for `scorer:` of `switchkd evaluate` and `compare`."""
    found = score(make_totals(), prompt, answer)
    return found.correct / found.steps


def followed(prompt: str, answer: str, references: Sequence[str]) -> float:
    """Return the share of totals that are the one before plus the amount, right or wrong as that one is."""
    totals = make_totals()
    amounts, start = read_prompt(prompt, totals.directions)
    given = answer.split()
    end = min(len(given), len(amounts))
    return sum(following(totals, amounts, start, given, 0, end)) / len(amounts)


if __name__ == "__main__":
    students = {name: STUDENTS[name] for name in WARM_START_STEPS}
    sys.exit(run(__doc__, "total", make_totals(), WARM_START_STEPS, students))
