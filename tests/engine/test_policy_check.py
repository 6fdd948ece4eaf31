"""`check_policy`: every policy of the package passes; each mistake that would bias texts is found and named."""

from dataclasses import dataclass, replace

import pytest
import torch

import switchkd
from switchkd.errors import UserError
from switchkd.policies import POLICIES, Decision, Policy, SwitchPolicy, teacher_where
from switchkd.rollout import Author


def undecided(size):
    return torch.full((size,), float("nan"))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_of_the_package_passes(name):
    # Thresholds at which the tiny pair is divided between the two.
    options = {"initial_threshold": 0.05} if name == "switch" else {}
    held = switchkd.check_policy(POLICIES[name].of(**options))
    assert len(held) == 4


def test_a_paced_policy_keeps_its_state_along_a_text():
    held = switchkd.check_policy(SwitchPolicy.of(initial_threshold=0.05, minimum_leg=2, clock="since_teacher"))
    assert "12000 texts" in held[-1]


class ReadsOtherRows(SwitchPolicy):
    def decide(self, at):
        return Decision(teacher_where(at.measure > at.measure.mean()), undecided(len(at.measure)))


class Remembers(SwitchPolicy):
    calls = 0

    def decide(self, at):
        type(self).calls += 1
        even = torch.full_like(at.measure, type(self).calls % 2 == 0, dtype=torch.bool)
        return Decision(teacher_where(even), undecided(len(at.measure)))


class Draws(SwitchPolicy):
    def decide(self, at):
        return Decision(teacher_where(torch.rand(len(at.measure)) > 0.5), undecided(len(at.measure)))


class ReadsTheDraft(SwitchPolicy):
    def measure(self, student_log_probs, teacher_log_probs, drafted):
        return -teacher_log_probs.gather(-1, drafted.unsqueeze(-1)).squeeze(-1)


class KnowsTheDraftLength(SwitchPolicy):
    """Right about single decisions; asked about a draft in six rows, it decides by the number of positions."""

    def decide(self, at):
        drafts = len(at.measure) > 9
        return Decision(teacher_where((at.measure > 0.01) & (not drafts)), undecided(len(at.measure)))


@dataclass(frozen=True)
class NotNormalised(SwitchPolicy):
    def behaviour(self, student_log_probs, teacher_log_probs):
        return teacher_log_probs + 0.5


class WrongType(SwitchPolicy):
    def decide(self, at):
        return Decision((at.measure > 0.1).long(), undecided(len(at.measure)))


class WrongAuthor(SwitchPolicy):
    def decide(self, at):
        return Decision(torch.full_like(at.measure, int(Author.DATASET), dtype=torch.uint8), undecided(len(at.measure)))


class GivesAwayWithoutTeacher(Policy):
    needs_teacher = False

    def decide(self, at):
        return Decision(teacher_where(at.position >= 0), undecided(len(at.position)))


class ForgetsItsState(Policy):
    stateful = True

    def decide(self, at):
        return Decision(teacher_where(at.position > 3), undecided(len(at.position)))


class Fails(Policy):
    pass


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ReadsOtherRows, "changes with the rows beside it"),
        (Remembers, "decides otherwise when asked again"),
        (Draws, "decides otherwise when asked again"),
        (ReadsTheDraft, "reads the drafted token: set redraws = True"),
        (KnowsTheDraftLength, "draft_length 2 gives another rollout than 1: "),
        (NotNormalised, "behaviour() must return log-probabilities that sum to 1"),
        (WrongType, "author of torch.int64 [9] for 9 positions; it must be torch.uint8 [9]"),
        (WrongAuthor, "decide() returns the author 3; it must be Author.STUDENT or Author.TEACHER"),
        (GivesAwayWithoutTeacher, "it must be Author.STUDENT, because needs_teacher is False"),
        (ForgetsItsState, "stateful is True, but initial_state() returns NoneType"),
        (Fails, "fails with TypeError: Fails does not define decide()"),
    ],
)
def test_each_mistake_is_named_in_one_line(policy, message):
    with pytest.raises(UserError) as error:
        switchkd.check_policy(policy())
    assert policy.__name__ in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_texts_that_do_not_follow_the_behaviour_are_found_by_their_counts(monkeypatch):
    # An engine that accepts every draft writes the student's texts, whatever the policy says.
    monkeypatch.setattr(
        "switchkd.sampling.accept_at", lambda student, other, noise: torch.ones_like(student, dtype=torch.bool)
    )
    monkeypatch.setattr(
        "switchkd.sampling.coupled_draw", lambda drafted, *rest: (drafted, torch.ones_like(drafted, dtype=torch.bool))
    )
    with pytest.raises(UserError, match="texts do not have the probabilities"):
        switchkd.check_policy(SwitchPolicy(initial_threshold=0.0))


def test_a_behaviour_of_ones_own_is_drawn_from_at_every_draft_length_without_blends():
    """It used to be read only where `blends` was set: drafts were accepted by the teacher's distribution instead."""

    @dataclass(frozen=True)
    class Sharpened(SwitchPolicy):
        def behaviour(self, student_log_probs, teacher_log_probs):
            return (2 * teacher_log_probs).log_softmax(-1)

    assert len(switchkd.check_policy(Sharpened(initial_threshold=0.02))) == 4
    assert replace(Sharpened(), initial_threshold=0.1).initial_threshold == 0.1


def test_something_else_than_a_policy_is_one_line():
    with pytest.raises(UserError, match=r"needs a switchkd\.Policy, got <class"):
        switchkd.check_policy(SwitchPolicy)
