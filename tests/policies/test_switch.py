"""Laws of the policies: schedules, limits, behaviour distributions."""

import math

import pytest
import torch

from switchkd.divergences import LN_2, generalized_jsd
from switchkd.errors import UserError
from switchkd.policies import BlendPolicy, Positions, RelayPolicy, StudentPolicy, SwitchPolicy, TeacherPolicy
from switchkd.rollout import Author


def pairs(rows=200, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(rows, size, generator=generator) * 3).log_softmax(-1) for _ in range(2))


def test_exponential_schedule_is_the_papers_tau_0_times_e_to_the_minus_lambda_t():
    policy = SwitchPolicy(initial_threshold=0.4, final_ratio=0.1, horizon=50)
    position = torch.arange(200)
    rate = math.log(10) / 50
    assert torch.allclose(policy.threshold(position), 0.4 * torch.exp(-rate * position), rtol=1e-6)
    reading_a = SwitchPolicy(initial_threshold=0.4, final_ratio=math.exp(-1), horizon=10)  # lambda = 1/10 per token
    assert torch.allclose(reading_a.threshold(position), 0.4 * torch.exp(-0.1 * position), rtol=1e-5)


@pytest.mark.parametrize("schedule", ["exponential", "linear", "increasing"])
def test_schedules_meet_the_initial_threshold_and_the_final_ratio(schedule):
    policy = SwitchPolicy(initial_threshold=0.5, final_ratio=0.2, horizon=100, schedule=schedule)
    ends = policy.threshold(torch.tensor([0, 100]))
    expected = [0.1, 0.5] if schedule == "increasing" else [0.5, 0.1]
    assert torch.allclose(ends, torch.tensor(expected), rtol=1e-6)
    steps = policy.threshold(torch.arange(101)).diff()
    assert bool((steps > 0).all()) if schedule == "increasing" else bool((steps < 0).all())


def test_constant_schedule_and_final_ratio_one_are_the_same():
    position = torch.arange(50)
    constant = SwitchPolicy(initial_threshold=0.2, schedule="constant").threshold(position)
    assert torch.equal(constant, torch.full((50,), 0.2))
    for schedule in ("exponential", "linear", "increasing"):
        policy = SwitchPolicy(initial_threshold=0.2, final_ratio=1.0, schedule=schedule)
        assert torch.equal(policy.threshold(position), constant)


def test_teacher_writes_exactly_where_the_jsd_exceeds_the_threshold():
    student, teacher = pairs()
    policy = SwitchPolicy(initial_threshold=0.3, final_ratio=0.5, horizon=100)
    position = torch.arange(200)
    measure = policy.measure(student, teacher, torch.zeros(len(student), dtype=torch.int64))
    assert torch.allclose(measure, generalized_jsd(student, teacher))
    decision = policy.decide(Positions(measure, position))
    assert torch.equal(decision.author == Author.TEACHER, measure > decision.threshold)
    assert 0 < int((decision.author == Author.TEACHER).sum()) < 200


def test_threshold_ln_2_without_decay_never_gives_a_position_away_even_to_disjoint_distributions():
    student = torch.full((1, 4), -math.inf)
    teacher = student.clone()
    student[0, 0] = teacher[0, 1] = 0.0
    policy = SwitchPolicy(initial_threshold=LN_2, schedule="constant")
    measure = policy.measure(student, teacher, torch.zeros(len(student), dtype=torch.int64))
    assert float(measure) == pytest.approx(LN_2)
    assert policy.decide(Positions(measure, torch.tensor([0]))).author.item() == Author.STUDENT
    below = SwitchPolicy(initial_threshold=0.69, schedule="constant")
    assert below.decide(Positions(measure, torch.tensor([0]))).author.item() == Author.TEACHER


def test_threshold_zero_gives_every_position_where_the_two_differ_to_the_teacher():
    student, teacher = pairs()
    policy = SwitchPolicy(initial_threshold=0.0)
    measure = policy.measure(student, teacher, torch.zeros(len(student), dtype=torch.int64))
    decision = policy.decide(Positions(measure, torch.arange(200)))
    assert bool((decision.author == Author.TEACHER).all())


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_blend_is_the_weighted_sum_of_probabilities(weight):
    student, teacher = pairs()
    blended = BlendPolicy(weight).behaviour(student, teacher).exp()
    assert torch.allclose(blended, weight * teacher.exp() + (1 - weight) * student.exp(), atol=1e-6)


def test_pure_policies_give_every_position_to_one_author():
    measure = torch.full((5,), math.nan)
    for policy, author in ((StudentPolicy(), Author.STUDENT), (TeacherPolicy(), Author.TEACHER)):
        decision = policy.decide(Positions(measure, torch.arange(5)))
        assert decision.author.tolist() == [author] * 5
        assert bool(decision.threshold.isnan().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_threshold": 0.7}, "initial_threshold must lie in .*ln 2.*0.7"),
        ({"initial_threshold": -0.1}, "initial_threshold"),
        ({"initial_threshold": math.nan}, "initial_threshold"),
        ({"final_ratio": 0.0}, "final_ratio"),
        ({"final_ratio": 1.5}, "final_ratio"),
        ({"horizon": 0}, "horizon"),
        ({"schedule": "cosine"}, "schedule must be one of exponential, linear, constant, increasing, got 'cosine'"),
    ],
)
def test_switch_options_outside_their_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SwitchPolicy(**options)


def test_blend_weight_outside_its_range_is_refused():
    with pytest.raises(UserError, match="mixture_weight"):
        BlendPolicy(1.2)


def test_a_recorded_divergence_of_ln_2_is_a_valid_threshold():
    """float32 rounds ln 2 up: what a rollout recorded could not be given back as a threshold."""
    disjoint = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    recorded = float(generalized_jsd(disjoint[:1], disjoint[1:]).to(torch.float32))
    assert recorded > LN_2
    assert SwitchPolicy(initial_threshold=recorded).initial_threshold == recorded
    assert RelayPolicy(trigger_threshold=recorded).trigger_threshold == recorded
    with pytest.raises(UserError, match="ln 2"):
        SwitchPolicy(initial_threshold=recorded + 1e-6)
