"""Running totals: their records and scorer against plain addition."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "tasks"))

from running_total import TOTALS, USUAL, correct_prefix, followed, make_totals
from walk_map import generate, read_prompt

SIZES = {"train": 200, "validation": 10, "test": 20}
TOTAL_MAP = make_totals()


def totals_of(prompt):
    """The running totals of a prompt by addition alone, and whether each amount is usual."""
    amounts, start = read_prompt(prompt, TOTAL_MAP.directions)
    total, found = int(start), []
    for amount in amounts:
        usual = amount in TOTAL_MAP.streets[total]
        total = (total + int(amount)) % TOTALS
        found.append((total, usual))
    return found


@pytest.fixture(scope="module")
def splits():
    return {rho: generate(TOTAL_MAP, rho, seed=1, **SIZES) for rho in (0.0, 1.0)}


def test_every_answer_is_the_sum_and_asked_prompts_add_usual_amounts_only(splits):
    for rho, split in splits.items():
        for name, rows in split.items():
            for row in rows[-20:]:
                found = totals_of(row["prompt"])
                assert row["completion"].split() == [str(total) for total, _ in found]
                if name in ("train", "validation", "test") or (name == "teacher" and rho == 0):
                    assert all(usual for _, usual in found)
    assert any(not usual for row in splits[1.0]["teacher"] for _, usual in totals_of(row["prompt"]))


def test_every_total_has_as_many_usual_amounts_and_is_reached_as_often():
    ends = [end for streets in TOTAL_MAP.streets for end in streets.values()]
    assert all(len(streets) == USUAL for streets in TOTAL_MAP.streets)
    assert sorted(ends) == sorted(list(range(TOTALS)) * USUAL)


def test_the_scorer_counts_up_to_the_first_error_and_what_follows_from_it(splits):
    row = splits[0.0]["test"][0]
    words = row["completion"].split()
    assert correct_prefix(row["prompt"], row["completion"], []) == followed(row["prompt"], row["completion"], []) == 1
    amounts, _ = read_prompt(row["prompt"], TOTAL_MAP.directions)
    wrong = [*words[:5], str((int(words[5]) + 1) % TOTALS)]
    for amount in amounts[6:]:  # every later total is that of the wrong one
        wrong.append(str((int(wrong[-1]) + int(amount)) % TOTALS))
    assert correct_prefix(row["prompt"], " ".join(wrong), []) == 5 / len(words)
    assert followed(row["prompt"], " ".join(wrong), []) == (len(words) - 1) / len(words)
