"""Laws of the draft length: it maximises text per second as measured, and bad measurements do not stick."""

import copy

import pytest

from switchkd.engine.draft_length import LONGEST_DRAFT, MEMORY, DraftLength, PassTime


def settled(keep_rate: float, student_s: float, teacher_fixed_s: float, teacher_slope_s: float, rows: int = 4):
    """A chooser after rounds in which drafts stood as often as `keep_rate` says, in seconds that follow a line."""
    chooser = DraftLength()
    credit = [0.0] * rows
    for _ in range(300):
        length = chooser.next(range(rows), 100)
        kept = []
        for row in range(rows):
            # Low-discrepancy outcomes: in the long run a share of `keep_rate` of the tokens stands.
            stood = 0
            while stood < length:
                credit[row] += keep_rate
                if credit[row] < 1.0:
                    break
                credit[row] -= 1.0
                stood += 1
            kept.append(stood)
        teacher_s = teacher_fixed_s + teacher_slope_s * rows * length
        chooser.observe(range(rows), kept, length, student_s * length, teacher_s)
    return chooser


def speed(length: int, keep_rate: float, student_s: float, teacher_fixed_s: float, teacher_slope_s: float, rows: int):
    emitted = sum(keep_rate**step for step in range(length))
    return emitted / (length * student_s + teacher_fixed_s + teacher_slope_s * rows * length)


@pytest.mark.parametrize(
    ("keep_rate", "student_s", "teacher_fixed_s", "teacher_slope_s"),
    [
        (0.9, 1e-3, 10e-3, 0.0),
        (0.7, 1e-3, 4e-3, 0.1e-3),
        (0.3, 1e-3, 4e-3, 0.1e-3),
        (0.5, 5e-3, 1e-3, 1e-3),
        (0.95, 0.1e-3, 10e-3, 0.1e-3),
    ],
)
def test_the_chosen_length_is_about_as_fast_as_the_best_one(keep_rate, student_s, teacher_fixed_s, teacher_slope_s):
    costs = (student_s, teacher_fixed_s, teacher_slope_s)
    chosen = settled(keep_rate, *costs).next(range(4), 100)
    speeds = {length: speed(length, keep_rate, *costs, 4) for length in range(1, LONGEST_DRAFT + 1)}
    assert speeds[chosen] >= 0.93 * max(speeds.values())


def test_drafting_stops_where_it_loses():
    """A student as dear as its teacher, seldom right: one token at a time."""
    assert settled(0.1, 5e-3, 1e-3, 1e-3).next(range(4), 100) == 1


def test_no_draft_is_longer_than_what_is_left():
    chooser = settled(0.95, 0.1e-3, 10e-3, 0.0)
    assert chooser.next(range(4), 100) > 3
    assert chooser.next(range(4), 3) <= 3
    assert DraftLength(8).next(range(4), 3) == 3
    assert DraftLength(8).next(range(4), 0) == 1


def test_a_pass_interrupted_by_another_process_does_not_turn_the_choice_over():
    quiet = settled(0.8, 1e-3, 8e-3, 0.1e-3)
    busy = copy.deepcopy(quiet)
    length = quiet.next(range(4), 100)
    outcome = (range(4), [length - 1] * 4, length)
    quiet.observe(*outcome, length * 1e-3, 8e-3 + 0.4e-3 * length)
    busy.observe(*outcome, length * 0.2, 0.5)
    assert busy.next(range(4), 100) == quiet.next(range(4), 100)


def test_times_of_two_token_counts_give_fixed_cost_and_slope():
    time = PassTime()
    for tokens in (8, 16, 32):
        for noise in (0.0, 0.0, 5.0):
            time.observe(tokens, 2.0 + 0.5 * tokens + noise)
    line = time.line()
    assert line.fixed == pytest.approx(2.0) and line.slope == pytest.approx(0.5)
    assert line.at(10) == pytest.approx(7.0)


def test_what_was_measured_long_ago_is_forgotten():
    """A length that looked bad once, on a busy machine, is tried again some day."""
    time = PassTime()
    time.observe(32, 100.0)
    for _ in range(MEMORY + 1):
        time.observe(8, 1.0)
    assert time.line().at(32) == pytest.approx(1.0)


def test_another_rollout_begins_with_the_times_and_without_the_rows():
    chooser = settled(0.9, 1e-3, 10e-3, 0.0)
    rate, length = chooser.keep_rate, chooser.next(range(4), 100)
    again = chooser.restart()
    assert again.keep_rate == rate
    assert abs(again.next(range(4), 100) - length) <= 2
