"""MiniLLM's objective against brute force: all texts of a tiny table model, their probabilities, their gradient."""

import itertools
import math

import pytest
import torch

from switchkd.divergences import reverse_kl
from switchkd.errors import UserError
from switchkd.models.heads import OutputHead
from switchkd.objective.policy_gradient import future_returns, importance_weights, policy_gradient_losses
from switchkd.objective.predictions import Predictions

SIZE, EOS, FIRST = 3, 0, 1


def tables(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher.log_softmax(-1)


def all_texts(length):
    """Every text that ends with its first EOS or at the limit: ids `[N, C]`, mask `[N, C]`, contexts `[N, C]`."""
    found = set()
    for text in itertools.product(range(SIZE), repeat=length):
        end = text.index(EOS) + 1 if EOS in text else length
        found.add(text[:end])
    rows = sorted(found)
    ids = torch.tensor([[*text, *[EOS] * (length - len(text))] for text in rows])
    mask = torch.arange(length) < torch.tensor([len(text) for text in rows]).unsqueeze(1)
    context = torch.cat([torch.full((len(rows), 1), FIRST), ids[:, :-1]], dim=1)
    return ids, mask, context


def of_tokens(log_probs, ids, context):
    return log_probs[context].gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def surrogate(student_logits, teacher, length, *, weight, **options):
    """The loss expected under the blend: every text's loss times its probability, which has no gradient."""
    ids, mask, context = all_texts(length)
    student = student_logits.log_softmax(-1)
    chosen, taught = of_tokens(student, ids, context), of_tokens(teacher, ids, context)
    probability = torch.where(mask, (1 - weight) * chosen.exp() + weight * taught.exp(), 1.0).prod(-1).detach()
    assert float(probability.sum()) == pytest.approx(1.0)
    single = importance_weights(chosen, taught, mask, teacher_weight=weight)
    single = torch.where(mask, single * reverse_kl(student[context], teacher[context]), 0.0)
    long = policy_gradient_losses(chosen, taught, mask, teacher_weight=weight, **options)
    return (probability.unsqueeze(1) * (single + long)).sum()


def exact(student_logits, teacher, length):
    """KL(student, teacher) over whole texts."""
    ids, mask, context = all_texts(length)
    student = student_logits.log_softmax(-1)
    text, taught = (torch.where(mask, of_tokens(table, ids, context), 0.0).sum(-1) for table in (student, teacher))
    return (text.exp() * (text - taught)).sum()


def gradient(loss, student_logits):
    return torch.autograd.grad(loss, student_logits)[0]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_without_normalisation_and_clipping_the_gradient_is_that_of_the_reverse_kl_of_whole_texts(length):
    student, teacher = tables()
    estimated = surrogate(student, teacher, length, weight=0.0, clip_range=0.0, normalize_length=False)
    assert torch.allclose(gradient(estimated, student), gradient(exact(student, teacher, length), student), atol=1e-12)


def test_weights_correct_the_blend_exactly_where_nothing_stands_before_the_token():
    """Later tokens are corrected by their own weight only, as in the paper: an approximation to their product."""
    student, teacher = tables(1)
    estimated = surrogate(student, teacher, 1, weight=0.2, clip_range=0.0, normalize_length=False)
    assert torch.allclose(gradient(estimated, student), gradient(exact(student, teacher, 1), student), atol=1e-12)
    target = gradient(exact(student, teacher, 3), student)
    errors = []
    for weight in (0.05, 0.2):
        near = gradient(surrogate(student, teacher, 3, weight=weight, clip_range=0.0, normalize_length=False), student)
        assert float((near * target).sum() / near.norm() / target.norm()) > 0.99
        errors.append(float((near - target).norm() / target.norm()))
    assert 0.0 < errors[0] < errors[1] / 3


def test_length_normalisation_changes_nothing_where_one_token_is_left():
    student, teacher = tables(2)
    plain, normalised = (
        gradient(surrogate(student, teacher, 2, weight=0.2, clip_range=0.0, normalize_length=flag), student)
        for flag in (False, True)
    )
    assert torch.allclose(plain, normalised)


def test_each_token_follows_the_papers_formula():
    """Written out token by token for one batch: returns, weights and clipping."""
    generator = torch.Generator().manual_seed(6)
    student, teacher = (-torch.rand(6, 5, generator=generator).mul(4) - 0.05 for _ in range(2))
    lengths = [5, 1, 3, 4, 2, 0]
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    losses = policy_gradient_losses(student, teacher, mask, teacher_weight=0.2, clip_range=0.2)
    clipped = 0
    for row, length in enumerate(lengths):
        for place in range(5):
            if place >= length:
                assert losses[row, place] == 0.0
                continue
            later = [float(teacher[row, i] - student[row, i]) for i in range(place + 1, length)]
            returned = sum(later) / len(later) if later else 0.0
            q, p = math.exp(student[row, place]), math.exp(teacher[row, place])
            rho = q / (0.8 * q + 0.2 * p)
            bounded = min(max(rho, 0.8), 1.2)
            clipped += -bounded * returned > -rho * returned + 1e-6
            assert float(losses[row, place]) == pytest.approx(-min(rho * returned, bounded * returned), abs=1e-5)
    assert clipped > 0


def test_clipped_tokens_have_no_gradient_and_the_others_that_of_the_score():
    student = torch.tensor([[-3.0, -0.5, -1.0]], requires_grad=True)
    teacher = torch.tensor([[-0.1, -1.0, -1.2]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    gradients = [
        torch.autograd.grad(policy_gradient_losses(student, teacher, mask, clip_range=clip).sum(), student)[0]
        for clip in (0.0, 0.2)
    ]
    rho = importance_weights(student, teacher, mask)
    returns = future_returns((teacher - student).detach(), mask)
    assert torch.allclose(gradients[0], -rho * returns)
    # Weight below 0.8 with a negative return: the loss counts 0.8, and nothing is left to gain by moving it.
    assert float(rho[0, 0]) < 0.8 and float(returns[0, 0]) < 0.0
    assert float(gradients[1][0, 0]) == 0.0
    assert torch.equal(gradients[1][0, 1:], gradients[0][0, 1:])


def test_returns_are_sums_or_means_of_later_rewards():
    rewards = torch.tensor([[1.0, 2.0, 4.0, 100.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert future_returns(rewards, mask, normalize_length=False).tolist() == [[6.0, 4.0, 0.0, 0.0]]
    assert future_returns(rewards, mask).tolist() == [[3.0, 4.0, 0.0, 0.0]]


def test_weights_lie_in_their_range_and_average_to_one_under_the_blend():
    student, teacher = tables(3)
    student = student.detach().log_softmax(-1)
    mask = torch.ones_like(student, dtype=torch.bool)
    weights = importance_weights(student, teacher, mask, teacher_weight=0.2)
    assert bool(((weights > 0) & (weights <= 1.25)).all())
    blend = 0.8 * student.exp() + 0.2 * teacher.exp()
    assert torch.allclose((blend * weights).sum(-1), torch.ones(SIZE, dtype=torch.float64))
    assert torch.equal(importance_weights(student, teacher, mask, teacher_weight=0.0), torch.ones_like(student))


def test_half_precision_is_raised_and_padding_of_any_value_is_ignored():
    student = torch.tensor([[-1.0, math.nan]], dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.tensor([[-1.0, -math.inf]], dtype=torch.bfloat16)
    mask = torch.tensor([[True, False]])
    losses = policy_gradient_losses(student, teacher, mask)
    assert losses.dtype == torch.float32 and losses.tolist() == [[0.0, 0.0]]
    assert bool(torch.autograd.grad(losses.sum(), student)[0][0, 0].isfinite())


@pytest.mark.parametrize(
    ("options", "message"), [({"teacher_weight": 1.0}, "teacher_weight"), ({"clip_range": -0.1}, "clip_range must be")]
)
def test_options_outside_their_range_are_refused(options, message):
    one = torch.zeros(1, 1)
    with pytest.raises(UserError, match=message):
        policy_gradient_losses(one, one, one.bool(), **options)


def test_minillm_reads_states_of_another_precision_than_the_head() -> None:
    """OPT-350M ends in a linear layer: under autocast its states were bfloat16, its head float32, and it failed."""
    head = torch.nn.Linear(4, 7, bias=False)
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    logits = Predictions(states, OutputHead(head)).logits()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head(states.float()))
