"""Walks on a map of which a teacher knows a part: the map, the records and an exact scorer, in plain Python.

A prompt lists directions and a start, the answer the places that one comes through:

    prompt       n ese wnw . . . from ka
    completion    mo ti zu

Every place has three *streets*, each in one of 16 directions. In every other direction one gets to the place's
*detour*: one further place, the same for all those directions. Walks to be answered follow streets only, so nobody
needs a detour to answer. But after a wrong place the remaining directions are mostly no streets there, and the map goes
on by detours: what comes next is then known to somebody who has seen the detour of that place and to nobody else,
because detours follow no rule.

The dial is `rho`, the share of the places whose detour occurs in the teacher's training data. Everything else (the
map, the walks to be answered, the student's data) does not depend on it. The student's warm start shows it the whole
map, detours included: a teacher that knows them all (rho = 1) then asks nothing of it, after an error, that is foreign
to it. Without that, learning the detours costs a small student the streets, whoever is right about them.
"""

import functools
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLACES = 128
STREETS = 3
SHORTEST, LONGEST = 24, 48
DIRECTIONS = (
    "n", "nne", "ne", "ene", "e", "ese", "se", "sse", "s", "ssw", "sw", "wsw", "w", "wnw", "nw", "nnw",
)  # fmt: skip
NO_STEP, START = ".", "from"  # fill the list of directions up; stand before the place where the walk starts
# Every prompt has a word for each of LONGEST steps: the k-th place is always the same distance after its direction.
PROMPT_WORDS = LONGEST + 2
DETOUR_RATE = 0.5  # how often a walk that may take detours does so, where it can
LENGTH_BUCKETS = ((24, 32), (33, 40), (41, 48))  # steps, both edges inclusive

Record = dict[str, str]


@dataclass(frozen=True)
class WalkMap:
    """Where one gets from where.

    Attributes:
        names: Name of every place.
        streets: For every place, direction -> place.
        detours: For every place, where one gets in all directions without a street.
        known_order: The places in the order in which a growing `rho` adds their detours to the teacher's data.
        directions: All of them.
    """

    names: tuple[str, ...]
    streets: tuple[dict[str, int], ...]
    detours: tuple[int, ...]
    known_order: tuple[int, ...]
    directions: tuple[str, ...] = DIRECTIONS

    def step(self, place: int, direction: str) -> int:
        """Return the place that one gets to."""
        return self.streets[place].get(direction, self.detours[place])

    def known_detours(self, rho: float) -> set[int]:
        """Return the places whose detour the teacher's data show: a share `rho` of all, to the nearest place.

        Those of a smaller `rho` are among those of a larger one.
        """
        return set(self.known_order[: round(rho * len(self.names))])


@functools.cache
def make_map(places: int = PLACES, streets: int = STREETS) -> WalkMap:
    """Return the map, the same for every seed of the data.

    As many streets lead to every place as away from it, and one detour: long walks come through all places equally
    often. A place's streets and its detour end in different places, none of them itself.

    Args:
        places: Number of places, at most 142 (two- and three-letter names that are no directions).
        streets: Streets from each, at most 16.
    """
    draw = random.Random("switchkd partial walk")
    syllables = (first + rest for rest in ("a", "e", "i", "o", "u", "ai", "ou", "ei") for first in "bdfghjklmnprstvwxz")
    names = [name for name in syllables if name not in DIRECTIONS][:places]
    ends: list[list[int]] = []
    while len(ends) <= streets:
        shuffled = draw.sample(range(places), places)
        if all(end != place and all(end != other[place] for other in ends) for place, end in enumerate(shuffled)):
            ends.append(shuffled)
    *by_street, detours = ends
    return WalkMap(
        names=tuple(names),
        streets=tuple(
            dict(zip(draw.sample(DIRECTIONS, streets), (end[place] for end in by_street), strict=True))
            for place in range(places)
        ),
        detours=tuple(detours),
        known_order=tuple(draw.sample(range(places), places)),
    )


def draw_walk(walk_map: WalkMap, draw: random.Random, known: set[int] | frozenset[int] = frozenset()) -> Record:
    """Draw one walk of 24 to 48 steps, as a prompt and its completion.

    Args:
        walk_map: The map.
        draw: Source of randomness.
        known: Places where the walk may take the detour; it does so at half of its visits to them.
    """
    place = start = draw.randrange(len(walk_map.names))
    directions, visited = [], []
    for _ in range(draw.randint(SHORTEST, LONGEST)):
        detour = place in known and draw.random() < DETOUR_RATE
        directions.append(
            draw.choice([name for name in walk_map.directions if (name not in walk_map.streets[place]) == detour])
        )
        place = walk_map.step(place, directions[-1])
        visited.append(walk_map.names[place])
    words = [*directions, *[NO_STEP] * (LONGEST - len(directions)), START, walk_map.names[start]]
    return {"prompt": " ".join(words), "completion": " " + " ".join(visited)}


def generate(
    walk_map: WalkMap, rho: float, seed: int = 0, *, train: int = 6000, validation: int = 160, test: int = 240
) -> dict[str, list[Record]]:
    """Return the records of the splits teacher, warm_start, train, validation and test.

    Train, validation and test follow streets only. The teacher's records and those of the student's warm start are as
    many as those of train: half of them are records of train, the other half may take detours, in the warm start those
    of all places, in the teacher's those that `rho` lets it know. At `rho` = 1 the two are the same. Only the
    teacher's depend on `rho`. No prompt occurs twice in a split, none of validation or test in another split.

    Args:
        walk_map: The map.
        rho: Share of the places whose detour occurs in the teacher's records, in [0, 1].
        seed: Stream of the draw.
        train: Number of training records.
        validation: Number of validation records.
        test: Number of test records.
    """
    reserved: set[str] = set()

    def records(name: str, count: int, known: set[int] | frozenset[int] = frozenset()) -> list[Record]:
        draw = random.Random(f"partial walk {name} {seed}")
        rows: dict[str, Record] = {}
        while len(rows) < count:
            row = draw_walk(walk_map, draw, known)
            if row["prompt"] not in reserved:
                rows[row["prompt"]] = row
        return list(rows.values())

    splits = {}
    for split, count in (("test", test), ("validation", validation), ("train", train)):
        splits[split] = records(split, count)
        reserved |= {row["prompt"] for row in splits[split]}
    for split, share in (("warm_start", 1.0), ("teacher", rho)):
        others = records("detours", train - train // 2, walk_map.known_detours(share))
        splits[split] = splits["train"][: train // 2] + others
    return splits


def read_prompt(prompt: str, known: Sequence[str] = DIRECTIONS) -> tuple[list[str], str]:
    """Return the directions of a prompt and the name of the place where its walk starts.

    Args:
        prompt: The prompt.
        known: All directions.

    Raises:
        ValueError: The text is no prompt of this task.
    """
    directions, found, start = prompt.partition(f" {START} ")
    steps = [word for word in directions.split() if word != NO_STEP]
    if not found or not steps or not set(steps) <= set(known):
        raise ValueError(f"not a prompt of the partial-map walk: {prompt[:80]!r}")
    return steps, start.strip()


def following(
    walk_map: WalkMap, directions: Sequence[str], start: str, given: Sequence[str], first: int, end: int
) -> list[bool]:
    """Return for each step of `first` to `end` - 1 whether the map leads there from the place given before it.

    A step that begins or ends at a word that is no place does not follow the map.

    Args:
        walk_map: The map.
        directions: One per step of the walk.
        start: Name of the place before step 0.
        given: The words of an answer, at least `end` of them.
        first: First step that is looked at.
        end: Step after the last one, at most the number of directions.
    """
    number = {name: place for place, name in enumerate(walk_map.names)}
    before = [start, *given]
    return [
        before[k] in number and walk_map.names[walk_map.step(number[before[k]], directions[k])] == given[k]
        for k in range(first, end)
    ]


@dataclass(frozen=True)
class Score:
    """What one answer is worth.

    Attributes:
        steps: Steps of the walk that was asked for.
        correct: Places before the first error; equal to `steps` where every place is right.
        whole: Whether the answer is the walk, all of it and nothing after it.
        followed: How many of the steps after the first error follow the map from the place that the answer itself
            gives.
        after_error: How many steps the answer has after its first error, those beyond the walk's length not counted.
    """

    steps: int
    correct: int
    whole: bool
    followed: int
    after_error: int


def score(walk_map: WalkMap, prompt: str, answer: str, *, finished: bool = True) -> Score:
    """Score one answer against the map; the reference text is not needed.

    Args:
        walk_map: The map.
        prompt: The prompt.
        answer: Names of places with blanks between them.
        finished: Whether the answer ended by itself: one that was cut off is not whole.
    """
    directions, start = read_prompt(prompt, walk_map.directions)
    steps, given = len(directions), answer.split()
    end = min(len(given), steps)
    right = following(walk_map, directions, start, given, 0, end)
    correct = right.index(False) if False in right else end
    after = right[correct + 1 :]
    return Score(steps, correct, finished and correct == steps == len(given), sum(after), len(after))


def correct_prefix(prompt: str, answer: str, references: Sequence[str]) -> float:
    """Return the share of the walk before the first error, for `scorer:` of `switchkd evaluate` and `compare`."""
    found = score(make_map(), prompt, answer)
    return found.correct / found.steps


def followed(prompt: str, answer: str, references: Sequence[str]) -> float:
    """Return the share of steps that lead where the map leads from the place before, right or wrong as that is.

    For `scorer:` of `switchkd diagnose`: what is said after an error still counts, unlike in `correct_prefix`.
    """
    directions, start = read_prompt(prompt)
    given = answer.split()
    end = min(len(given), len(directions))
    return sum(following(make_map(), directions, start, given, 0, end)) / len(directions)


def summarize(scores: Sequence[Score]) -> dict[str, float]:
    """Return the figures of many answers, shares in percent.

    `whole`: answers that are the walk from end to end. `correct_prefix`: mean share of the steps before the first
    error. `first_error`: median, over the answers that are not whole, of the share of the walk before the error (nan
    without such answers). `followed`: steps after the first error that follow the map from the place before.

    Raises:
        ValueError: There is no score.
    """
    if not scores:
        raise ValueError("summarize needs at least one score")
    wrong = [one.correct / one.steps for one in scores if not one.whole]
    after_error = sum(one.after_error for one in scores)
    return {
        "whole": 100.0 * sum(one.whole for one in scores) / len(scores),
        "correct_prefix": 100.0 * statistics.fmean(one.correct / one.steps for one in scores),
        "first_error": 100.0 * statistics.median(wrong) if wrong else math.nan,
        "followed": 100.0 * sum(one.followed for one in scores) / after_error if after_error else math.nan,
    }


def score_rows(walk_map: WalkMap, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score the rows that `switchkd evaluate` and `switchkd compare` write.

    Args:
        walk_map: The map.
        rows: With `prompt`, `completion` and `finished`, of one model and any number of decoding seeds.

    Returns:
        The figures of `summarize`, and under `by_length` those of each bucket of steps.
    """
    scores = [score(walk_map, row["prompt"], row["completion"], finished=row["finished"]) for row in rows]
    by_length = {f"{low}-{high}": [one for one in scores if low <= one.steps <= high] for low, high in LENGTH_BUCKETS}
    return {**summarize(scores), "by_length": {name: summarize(part) for name, part in by_length.items() if part}}
