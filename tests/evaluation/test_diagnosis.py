"""The verdict of a diagnosis follows the rule that docs/diagnose.md states."""

import copy

import pytest
from helpers.guidance import diagnosed
from helpers.pairs import make_pair

from switchkd.evaluation.diagnosis import FEWEST_PROMPTS, diagnose, loss_of, verdict
from switchkd.evaluation.guidance import Kept, Quality
from switchkd.evaluation.metrics import Mean, share_of
from switchkd.evaluation.scorers import Scorer
from switchkd.policies import SwitchPolicy

LETTERS = Scorer("letters", lambda prompt, answer, references: len(set(answer) & set(references[0])) / 100)


def losing(value, low, high):
    """Guidance that loses so much, with the ends of the interval of the loss."""
    return Kept(50.0 * (1 - value), 50.0, Mean(1 - value, (1 - high, 1 - low)), 20)


@pytest.mark.parametrize(
    ("student", "switch", "expected"),
    [
        (losing(0.20, 0.1, 0.3), losing(0.10, 0.0, 0.2), "switch"),
        (losing(0.20, 0.1, 0.3), losing(0.11, 0.0, 0.2), "teacher"),
        (losing(0.20, 0.1, 0.3), None, "teacher"),
        (losing(0.02, 0.01, 0.03), losing(-0.1, -0.2, 0.1), "switch"),
        (losing(0.019, 0.01, 0.03), losing(0.0, 0.0, 0.0), "student"),
        (losing(0.0, 0.0, 0.0), losing(0.0, 0.0, 0.0), "student"),
        (losing(-0.3, -0.4, -0.2), losing(0.0, 0.0, 0.0), "student"),
        (losing(0.04, -0.01, 0.09), losing(0.0, 0.0, 0.0), "unclear"),
        (losing(0.0, -0.06, 0.051), losing(0.0, 0.0, 0.0), "unclear"),
        (Kept(0.0, 0.0, None, 20), None, "unclear"),
        (Kept(10.0, 50.0, Mean(0.2, None), 1), None, "unclear"),
        (None, None, "unclear"),
    ],
)
def test_the_verdict_is_the_documented_rule(student, switch, expected):
    assert verdict(student, switch, FEWEST_PROMPTS) == expected
    assert verdict(student, switch, FEWEST_PROMPTS - 1) == "unclear"


def test_a_loss_is_what_is_not_kept():
    found = loss_of(losing(0.2, 0.1, 0.4))
    assert found is not None and found.interval is not None
    assert (found.value, *found.interval) == pytest.approx((0.2, 0.1, 0.4))


def test_a_student_equal_to_its_teacher_may_write():
    teacher = make_pair("gpt2")[1]
    pair = diagnosed((copy.deepcopy(teacher), teacher))
    found = diagnose(pair, SwitchPolicy(0.1, horizon=12), Quality(pair, LETTERS), [0, 2, 4])
    assert found.prompts >= FEWEST_PROMPTS - 1
    for name in ("student", "random", "switch"):
        loss = loss_of(found.writer(name).against_teacher)
        assert loss is not None and loss.value == 0.0
    assert found.verdict in ("student", "unclear")
    assert all(one.share is None or one.share.value == 0 for one in found.harm.caught)


def test_where_only_position_0_is_compared_there_is_no_verdict():
    """All writers are equal there, with an interval of no width."""
    pair = diagnosed(length=1)
    found = diagnose(pair, SwitchPolicy(0.1), Quality(pair, LETTERS), [0])
    assert found.prompts == 0 and found.verdict == "unclear"


def test_random_tokens_are_as_many_as_those_of_switch():
    pair = diagnosed(rows=[{"prompt": f"{n} a", "completion": "bcd efg"} for n in range(40)])
    found = diagnose(pair, SwitchPolicy(0.3, horizon=12), Quality(pair, LETTERS), [0, 4])
    switch, random = (found.writer(name).teacher_share for name in ("switch", "random"))
    assert switch is not None and 0.1 < switch < 0.9 and random == pytest.approx(switch, abs=0.1)


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (3, 11)])
def test_the_interval_of_a_share_stays_a_share_and_has_a_width(hits, count):
    """Wilson: the ends are the shares from which the observed one is 1.96 standard errors away."""
    found = share_of(hits, count)
    assert found is not None and found.value == hits / count
    low, high = found.interval
    assert 0.0 <= low <= found.value <= high <= 1.0 and high - low > 0.1
    for end in (low, high):
        if 0.0 < end < 1.0:
            assert abs(found.value - end) == pytest.approx(1.959964 * (end * (1 - end) / count) ** 0.5, rel=1e-5)
    assert share_of(0, 0) is None
