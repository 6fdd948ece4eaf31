"""Laws of the divergences: values, bounds, limits, symmetries, gradients."""

import math

import pytest
import torch

from switchkd.divergences import (
    DIVERGENCES,
    LN_2,
    adaptive_kl,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)

INF = math.inf
NAMES = list(DIVERGENCES)


def distribution(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def random_pair(rows: int = 64, size: int = 11, scale: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 batches of log-probabilities, from nearly equal rows to nearly disjoint ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, size, generator=generator, dtype=torch.float64) * scale
    nearness = torch.linspace(0, 1, rows, dtype=torch.float64).unsqueeze(1)
    logits[1] = torch.lerp(logits[0], logits[1], nearness)
    return logits[0].log_softmax(-1), logits[1].log_softmax(-1)


def naive(
    name: str,
    student: list[float],
    teacher: list[float],
    weight: float = 0.5,
    skew: float = 0.1,
    head_mass: float = 0.5,
) -> float:
    """The definition in probabilities, one id after the other: KL over ids with mass, in float64."""

    def kl(first: list[float], second: list[float]) -> float:
        return sum(a * math.log(a / b) if b else INF for a, b in zip(first, second, strict=True) if a)

    def mix(share: float) -> list[float]:
        return [share * t + (1 - share) * s for s, t in zip(student, teacher, strict=True)]

    if name == "forward_kl":
        return kl(teacher, student)
    if name == "reverse_kl":
        return kl(student, teacher)
    if name == "generalized_jsd":
        return weight * kl(teacher, mix(weight)) + (1 - weight) * kl(student, mix(weight))
    if name == "skewed_forward_kl":
        return kl(teacher, mix(skew))
    if name == "skewed_reverse_kl":
        return kl(student, mix(1 - skew))
    if name == "adaptive_kl":
        ranked = sorted(range(len(teacher)), key=lambda v: -teacher[v])
        gap = [abs(s - t) for s, t in zip(student, teacher, strict=True)]
        head, mass = 0.0, 0.0
        for v in ranked:
            if mass >= head_mass:
                break
            head, mass = head + gap[v], mass + teacher[v]
        share = head / sum(gap) if sum(gap) else 0.0
        return share * kl(teacher, student) + (1 - share) * kl(student, teacher)
    assert name == "total_variation"
    return 0.5 * sum(abs(s - t) for s, t in zip(student, teacher, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_definition_written_in_probabilities(name):
    student, teacher = random_pair()
    found = DIVERGENCES[name](student, teacher)
    expected = [naive(name, s, t) for s, t in zip(student.exp().tolist(), teacher.exp().tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_every_teacher_weight_equals_the_definition(weight):
    student, teacher = random_pair()
    expected = [
        naive("generalized_jsd", s, t, weight=weight)
        for s, t in zip(student.exp().tolist(), teacher.exp().tolist(), strict=True)
    ]
    found = generalized_jsd(student, teacher, teacher_weight=weight)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("skew", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["skewed_forward_kl", "skewed_reverse_kl"])
def test_every_skew_equals_the_definition(name, skew):
    student, teacher = random_pair()
    expected = [
        naive(name, s, t, skew=skew) for s, t in zip(student.exp().tolist(), teacher.exp().tolist(), strict=True)
    ]
    found = DIVERGENCES[name](student, teacher, skew=skew)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("head_mass", [0.1, 0.5, 0.99])
def test_every_head_mass_equals_the_definition(head_mass):
    student, teacher = random_pair(size=40, scale=1.0)
    expected = [
        naive("adaptive_kl", s, t, head_mass=head_mass)
        for s, t in zip(student.exp().tolist(), teacher.exp().tolist(), strict=True)
    ]
    found = adaptive_kl(student, teacher, head_mass=head_mass)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_flat_teachers_have_long_heads_that_are_found_too():
    """The head is looked for among a few likely ids first; a flat distribution needs thousands."""
    teacher = torch.zeros(1, 5000, dtype=torch.float64).log_softmax(-1)
    student = torch.linspace(0, 3, 5000, dtype=torch.float64).log_softmax(-1).unsqueeze(0)
    lower, upper = sorted([float(forward_kl(student, teacher)), float(reverse_kl(student, teacher))])
    assert lower < float(adaptive_kl(student, teacher, head_mass=0.9)) < upper


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_with_zero_gradient_where_the_two_agree(name, dtype):
    logits = random_pair()[0].to(dtype).requires_grad_()
    log_probs = logits.log_softmax(-1)
    value = DIVERGENCES[name](log_probs, log_probs.detach())
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-6)
    value.sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_positive_where_the_two_differ(name):
    assert DIVERGENCES[name](distribution(0.9, 0.1), distribution(0.8, 0.2)) > 1e-3


@pytest.mark.parametrize(
    ("student", "teacher", "nats"),
    [((0.9, 0.1), (0.8, 0.2), 0.0100), ((0.9, 0.1), (0.6, 0.4), 0.063), ((0.9, 0.1), (0.3, 0.7), 0.205)],
)
def test_symmetric_jsd_has_the_known_values(student, teacher, nats):
    found = float(generalized_jsd(distribution(*student), distribution(*teacher)))
    assert found == pytest.approx(nats, abs=5e-4 if nats > 0.05 else 5e-5)


def test_disjoint_distributions_reach_every_bound_exactly():
    student, teacher = distribution(1.0, 0.0).float(), distribution(0.0, 1.0).float()
    assert float(generalized_jsd(student, teacher)) == pytest.approx(LN_2, abs=1e-7)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert float(generalized_jsd(student, teacher, teacher_weight=0.9)) == pytest.approx(entropy, abs=1e-6)
    assert float(skewed_forward_kl(student, teacher, skew=0.1)) == pytest.approx(-math.log(0.1), abs=1e-6)
    assert float(skewed_reverse_kl(student, teacher, skew=0.1)) == pytest.approx(-math.log(0.1), abs=1e-6)
    assert float(total_variation(student, teacher)) == 1.0
    assert float(forward_kl(student, teacher)) == INF
    assert float(reverse_kl(student, teacher)) == INF


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
def test_jsd_never_leaves_its_range_in_float32(scale):
    """A threshold of ln 2 must be the student alone, so rounding may not push the JSD above it."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 4000, 7, generator=generator) * scale).log_softmax(-1)
    value = generalized_jsd(student, teacher)
    assert float(value.detach().min()) >= 0.0
    assert not bool((value > torch.tensor(LN_2)).any())


def test_symmetric_jsd_does_not_depend_on_the_order():
    student, teacher = random_pair()
    torch.testing.assert_close(generalized_jsd(student, teacher), generalized_jsd(teacher, student))


def test_swapping_the_models_turns_each_direction_into_the_other():
    student, teacher = random_pair()
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student))
    torch.testing.assert_close(skewed_forward_kl(student, teacher), skewed_reverse_kl(teacher, student))
    torch.testing.assert_close(
        generalized_jsd(student, teacher, teacher_weight=0.2), generalized_jsd(teacher, student, teacher_weight=0.8)
    )


def test_forward_kl_covers_and_reverse_kl_seeks():
    """The direction: a student that misses a mode of the teacher is dear under the forward KL only."""
    two_modes, one_mode = distribution(0.5, 0.5 - 1e-6, 1e-6), distribution(1 - 2e-6, 1e-6, 1e-6)
    assert forward_kl(one_mode, two_modes) > 5 * reverse_kl(one_mode, two_modes)


def test_jsd_over_a_vanishing_weight_tends_to_the_two_kls():
    student, teacher = random_pair(scale=1.0)
    weight = 1e-7
    torch.testing.assert_close(
        generalized_jsd(student, teacher, teacher_weight=weight) / weight,
        forward_kl(student, teacher),
        rtol=1e-4,
        atol=1e-6,
    )
    torch.testing.assert_close(
        generalized_jsd(student, teacher, teacher_weight=1 - weight) / weight,
        reverse_kl(student, teacher),
        rtol=1e-4,
        atol=1e-6,
    )


def test_zero_skew_is_the_plain_kl():
    student, teacher = random_pair()
    assert torch.equal(skewed_forward_kl(student, teacher, skew=0.0), forward_kl(student, teacher))
    assert torch.equal(skewed_reverse_kl(student, teacher, skew=0.0), reverse_kl(student, teacher))


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_vocabulary_changes_nothing(name):
    student, teacher = random_pair()
    order = torch.randperm(student.shape[-1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        DIVERGENCES[name](student[:, order], teacher[:, order]), DIVERGENCES[name](student, teacher)
    )


@pytest.mark.parametrize("name", NAMES)
def test_ids_without_mass_under_either_change_nothing(name):
    student, teacher = random_pair()
    excluded = torch.full((len(student), 3), -INF, dtype=torch.float64)
    torch.testing.assert_close(
        DIVERGENCES[name](torch.cat([student, excluded], 1), torch.cat([teacher, excluded], 1)),
        DIVERGENCES[name](student, teacher),
    )


@pytest.mark.parametrize("direction", [forward_kl, reverse_kl])
def test_pinsker_total_variation_squared_is_at_most_half_the_kl(direction):
    for seed in range(5):
        student, teacher = random_pair(seed=seed)
        assert bool((total_variation(student, teacher) ** 2 <= direction(student, teacher) / 2 + 1e-12).all())


def test_skew_bounds_what_the_kl_leaves_unbounded():
    student, teacher = random_pair(scale=30.0)
    assert float(forward_kl(student, teacher).max()) > 10
    assert float(skewed_forward_kl(student, teacher, skew=0.1).max()) <= -math.log(0.1) + 1e-9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_before_any_arithmetic(name, dtype):
    student, teacher = (log_probs.to(dtype) for log_probs in random_pair())
    value = DIVERGENCES[name](student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, DIVERGENCES[name](student.float(), teacher.float()))


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name):
    student, teacher = random_pair()
    value = DIVERGENCES[name](student.float(), teacher.float())
    torch.testing.assert_close(value.double(), DIVERGENCES[name](student, teacher), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("learner", ["student", "teacher"])
def test_gradients_stay_finite_at_extreme_logits(name, learner):
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0], [1e4, 1e4, -1e4]])
    student, teacher = extreme.repeat_interleave(4, 0), extreme.repeat(4, 1)
    leaf = (student if learner == "student" else teacher).requires_grad_()
    value = DIVERGENCES[name](student.log_softmax(-1), teacher.log_softmax(-1))
    assert bool(value.isfinite().all())
    value.sum().backward()
    assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_stay_finite_where_both_exclude_an_id(name):
    """Top-k and top-p leave -inf in both distributions: -inf - -inf must not become nan, forwards or backwards."""
    logits = torch.tensor([[1.0, 2.0, -INF, 0.5, -INF]], requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0, -INF, 0.5, -INF]]).log_softmax(-1)
    value = DIVERGENCES[name](logits.log_softmax(-1), teacher)
    assert 0 < value.item() < 1
    value.sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert logits.grad[0, [2, 4]].abs().sum() == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("forward_kl", "reverse_kl", "adaptive_kl")])
def test_bounded_divergences_survive_ids_that_one_side_excludes(name):
    logits = torch.tensor([[1.0, 2.0, -INF, 0.5]], requires_grad=True)
    teacher = torch.tensor([[2.0, -INF, 1.0, 0.5]]).log_softmax(-1)
    value = DIVERGENCES[name](logits.log_softmax(-1), teacher)
    assert bool(value.isfinite())
    value.sum().backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adaptive_kl"])
def test_gradient_equals_finite_differences(name):
    student, teacher = random_pair(rows=3, size=5, scale=1.0, seed=4)
    # Row 0 is left out: there the two are equal, and |x| of the total variation has its corner.
    student, teacher = student[1:].requires_grad_(), teacher[1:].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, t: DIVERGENCES[name](s.log_softmax(-1), t.log_softmax(-1)), (student, teacher)
    )


def test_gradient_of_the_adaptive_kl_is_that_of_the_two_kls_with_fixed_weights():
    student, teacher = random_pair(rows=8, seed=4)
    student.requires_grad_()
    value = adaptive_kl(student, teacher)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    share = ((value - reverse) / (forward - reverse)).detach()[1:]  # row 0: the two agree
    [found] = torch.autograd.grad(value[1:].sum(), student, retain_graph=True)
    [expected] = torch.autograd.grad((share * forward[1:] + (1 - share) * reverse[1:]).sum(), student)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_any_leading_shape_gives_one_value_per_distribution(name):
    student, teacher = random_pair(rows=6)
    flat = DIVERGENCES[name](student, teacher)
    assert torch.equal(DIVERGENCES[name](student.view(2, 3, -1), teacher.view(2, 3, -1)), flat.view(2, 3))
    assert DIVERGENCES[name](student[0], teacher[0]).shape == ()


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_end_points_of_the_teacher_weight_are_refused(weight):
    with pytest.raises(ValueError, match=r"teacher_weight must lie in \(0, 1\)"):
        generalized_jsd(distribution(0.5, 0.5), distribution(0.5, 0.5), teacher_weight=weight)


@pytest.mark.parametrize("skew", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("function", [skewed_forward_kl, skewed_reverse_kl])
def test_skew_outside_its_range_is_refused(function, skew):
    with pytest.raises(ValueError, match=r"skew must lie in \[0, 1\)"):
        function(distribution(0.5, 0.5), distribution(0.5, 0.5), skew=skew)


@pytest.mark.parametrize("head_mass", [0.0, 1.0, math.nan])
def test_head_mass_outside_its_range_is_refused(head_mass):
    with pytest.raises(ValueError, match=r"head_mass must lie in \(0, 1\)"):
        adaptive_kl(distribution(0.5, 0.5), distribution(0.5, 0.5), head_mass=head_mass)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_a_kl_is_not_negative_by_rounding_at_a_large_vocabulary(name, with_gradient):
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(16, 151_936, generator=generator)
    student = (logits + 1e-4 * torch.randn(logits.shape, generator=generator)).requires_grad_(with_gradient)
    value = DIVERGENCES[name](student.log_softmax(-1), logits.log_softmax(-1))
    assert float(value.detach().min()) >= 0.0
    if with_gradient:
        value.sum().backward()
        assert student.grad is not None and bool((student.grad != 0.0).any())
