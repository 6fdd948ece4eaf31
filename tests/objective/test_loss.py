"""Laws of the objective: which token is predicted from which logits, what is masked, what is divided by what."""

import math

import pytest
import torch

from switchkd.divergences import DIVERGENCES
from switchkd.errors import UserError
from switchkd.objective import (
    CROSS_ENTROPY,
    check_objective,
    completion_logits,
    objective_options,
    reduce_losses,
    token_losses,
)
from switchkd.objective_names import OBJECTIVES

NAMES = [CROSS_ENTROPY, *DIVERGENCES]
ROWS, PROMPT, COMPLETION, SIZE = 3, 4, 5, 7


def batch(seed: int = 0, teacher_size: int = SIZE) -> dict[str, torch.Tensor]:
    """Full-length logits of both models, ids, and a ragged mask of completions of 5, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = PROMPT + COMPLETION
    return {
        "student": torch.randn(ROWS, length, SIZE, generator=generator, dtype=torch.float64) * 2,
        "teacher": torch.randn(ROWS, length, teacher_size, generator=generator, dtype=torch.float64) * 2,
        "ids": torch.randint(SIZE, (ROWS, length), generator=generator),
        "mask": torch.arange(COMPLETION) < torch.tensor([[5], [3], [1]]),
    }


def loss_of(data: dict[str, torch.Tensor], objective: str, **options) -> torch.Tensor:
    """The package's own path: shift, token losses, mask and reduction."""
    losses = token_losses(
        completion_logits(data["student"], COMPLETION),
        objective=objective,
        teacher_logits=None if objective == CROSS_ENTROPY else completion_logits(data["teacher"], COMPLETION),
        labels=data["ids"][:, -COMPLETION:],
        **options,
    )
    return reduce_losses(losses, data["mask"])


def naive_loss(data: dict[str, torch.Tensor], objective: str) -> float:
    """The reference: row by row, token by token, in Python numbers. The token at place i is predicted at i - 1."""

    def probabilities(logits: list[float]) -> list[float]:
        weights = [math.exp(value - max(logits)) for value in logits]
        return [weight / sum(weights) for weight in weights]

    total, count = 0.0, 0
    for row in range(ROWS):
        for token in range(COMPLETION):
            if not bool(data["mask"][row, token]):
                continue
            place = PROMPT + token
            student = probabilities(data["student"][row, place - 1].tolist())
            teacher = probabilities(data["teacher"][row, place - 1].tolist())
            if objective == CROSS_ENTROPY:
                total += -math.log(student[int(data["ids"][row, place])])
            elif objective == "forward_kl":
                total += sum(t * math.log(t / s) for s, t in zip(student, teacher, strict=True))
            elif objective == "reverse_kl":
                total += sum(s * math.log(s / t) for s, t in zip(student, teacher, strict=True))
            else:
                assert objective == "total_variation"
                total += sum(abs(s - t) for s, t in zip(student, teacher, strict=True)) / 2
            count += 1
    return total / count


@pytest.mark.parametrize("objective", [CROSS_ENTROPY, "forward_kl", "reverse_kl", "total_variation"])
def test_equals_a_loss_written_token_by_token(objective):
    data = batch()
    assert float(loss_of(data, objective)) == pytest.approx(naive_loss(data, objective), rel=1e-9)


@pytest.mark.parametrize("objective", NAMES)
def test_first_and_last_completion_tokens_are_supervised_and_nothing_else(objective):
    """Ancestors lost the first generated token (labels not shifted) and every EOS (found by id while pad = EOS)."""
    data = batch()
    data["student"].requires_grad_()
    loss_of(data, objective).backward()
    touched = data["student"].grad.abs().sum(-1) > 0
    for row, length in enumerate((5, 3, 1)):
        # Token t of the completion stands at PROMPT + t and is predicted one place earlier.
        expected = [PROMPT - 1 <= place < PROMPT - 1 + length for place in range(PROMPT + COMPLETION)]
        assert touched[row].tolist() == expected


def test_first_completion_token_is_predicted_by_the_last_prompt_token():
    logits = torch.arange(PROMPT + COMPLETION).view(1, -1, 1)
    assert completion_logits(logits, COMPLETION).flatten().tolist() == [3, 4, 5, 6, 7]
    only_needed = logits[:, -COMPLETION - 1 :]
    assert torch.equal(completion_logits(only_needed, COMPLETION), completion_logits(logits, COMPLETION))


@pytest.mark.parametrize("family", ["make_gpt2", "make_opt", "make_llama"])
def test_cross_entropy_equals_the_loss_of_transformers(family, request):
    model = request.getfixturevalue(family)()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (2, PROMPT + COMPLETION), generator=generator)
    mask = torch.arange(COMPLETION) < torch.tensor([[5], [3]])
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    labels[:, PROMPT:][~mask] = -100
    output = model(input_ids=ids, labels=labels)
    losses = token_losses(
        completion_logits(output.logits, COMPLETION), objective=CROSS_ENTROPY, labels=ids[:, -COMPLETION:]
    )
    torch.testing.assert_close(reduce_losses(losses, mask), output.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_at_an_unsupervised_position_does_not_reach_the_loss(poison):
    losses = torch.tensor([[1.0, 3.0, poison], [2.0, poison, poison]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = reduce_losses(losses, mask)
    assert loss.item() == 2.0
    loss.backward()
    assert losses.grad.tolist() == [[pytest.approx(1 / 3)] * 2 + [0.0], [pytest.approx(1 / 3), 0.0, 0.0]]


@pytest.mark.parametrize("objective", NAMES)
def test_no_supervised_token_gives_zero_loss_with_zero_gradient(objective):
    data = batch()
    data["mask"] = torch.zeros_like(data["mask"])
    data["student"].requires_grad_()
    loss = loss_of(data, objective)
    assert loss.item() == 0.0
    loss.backward()
    assert data["student"].grad.abs().sum() == 0


def test_parts_over_one_denominator_add_up_to_the_whole():
    losses = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [1], [0], [4]])
    parts = sum(reduce_losses(losses[row : row + 1], mask[row : row + 1], mask.sum()) for row in range(4))
    torch.testing.assert_close(parts, reduce_losses(losses, mask))
    torch.testing.assert_close(reduce_losses(losses, mask, 22), reduce_losses(losses, mask) / 2)


@pytest.mark.parametrize("objective", list(DIVERGENCES))
def test_loss_temperature_divides_the_logits_of_both_models(objective):
    data = batch()
    warm = loss_of(data, objective, loss_temperature=4.0)
    divided = data | {"student": data["student"] / 4, "teacher": data["teacher"] / 4}
    torch.testing.assert_close(warm, loss_of(divided, objective))
    assert abs(float(warm - loss_of(data, objective))) > 1e-3


def test_loss_temperature_leaves_the_cross_entropy_alone():
    data = batch()
    assert torch.equal(loss_of(data, CROSS_ENTROPY, loss_temperature=4.0), loss_of(data, CROSS_ENTROPY))


@pytest.mark.parametrize("objective", list(DIVERGENCES))
def test_no_gradient_reaches_the_teacher(objective):
    data = batch()
    data["teacher"].requires_grad_()
    data["student"].requires_grad_()
    loss_of(data, objective).backward()
    assert data["teacher"].grad is None
    assert data["student"].grad is not None


@pytest.mark.parametrize("objective", list(DIVERGENCES))
@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_padded_vocabulary_rows_are_cut_and_the_rest_renormalised(objective, wider):
    """Equal tokenizers, different padded widths: the extra rows may hold anything and must not count."""
    data = batch()
    expected = loss_of(data, objective)
    garbage = 50 * torch.ones(ROWS, PROMPT + COMPLETION, 3, dtype=torch.float64)
    padded = data | {wider: torch.cat([data[wider], garbage], dim=-1).requires_grad_()}
    found = loss_of(padded, objective)
    torch.testing.assert_close(found.detach(), expected)
    if wider == "student":
        found.backward()
        assert padded["student"].grad[..., SIZE:].abs().sum() == 0


@pytest.mark.parametrize("objective", list(DIVERGENCES))
def test_ids_that_one_side_alone_knows_are_left_out_and_the_rest_renormalised(objective):
    """The loss and its gradient are those on logits without the columns, whatever these hold."""
    data = batch()
    expected_in = data | {name: data[name].clone() for name in ("student", "teacher")}
    expected_in["student"].requires_grad_()
    expected = loss_of(expected_in, objective)
    expected.backward()
    spread = [0, 2, 3, 4, 6, 7, 8]  # seven ids at these places, garbage at 1, 5 and 9
    wide = {}
    for name in ("student", "teacher"):
        wide[name] = torch.full((ROWS, PROMPT + COMPLETION, 10), 40.0, dtype=torch.float64)
        wide[name][..., spread] = data[name]
    wide["student"].requires_grad_()
    found = loss_of(data | wide, objective, excluded_ids=(1, 5, 9, 500))
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(wide["student"].grad[..., spread], expected_in["student"].grad)
    assert wide["student"].grad[..., [1, 5, 9]].abs().sum() == 0


@pytest.mark.parametrize("objective", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_raised_before_the_softmax(objective, dtype):
    data = batch()
    half = data | {name: data[name].to(dtype) for name in ("student", "teacher")}
    raised = data | {name: half[name].float() for name in ("student", "teacher")}
    assert loss_of(half, objective).dtype == torch.float32
    assert torch.equal(loss_of(half, objective), loss_of(raised, objective))


def test_options_reach_the_divergence():
    data = batch()
    assert float(loss_of(data, "generalized_jsd", options={"teacher_weight": 0.9})) != float(
        loss_of(data, "generalized_jsd", options={"teacher_weight": 0.1})
    )
    assert float(loss_of(data, "skewed_reverse_kl", options={"skew": 0.0})) == float(loss_of(data, "reverse_kl"))


def test_missing_inputs_are_named():
    logits = batch()["student"]
    with pytest.raises(ValueError, match="cross_entropy needs labels"):
        token_losses(logits, objective=CROSS_ENTROPY)
    with pytest.raises(ValueError, match="forward_kl needs teacher_logits"):
        token_losses(logits, objective="forward_kl")


def test_each_objective_names_the_options_it_takes():
    assert {name: objective_options(name) for name in NAMES} == {
        CROSS_ENTROPY: [],
        "forward_kl": [],
        "reverse_kl": [],
        "generalized_jsd": ["teacher_weight"],
        "skewed_forward_kl": ["skew"],
        "skewed_reverse_kl": ["skew"],
        "total_variation": [],
        "adaptive_kl": ["head_mass"],
    }


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("kl", {}, "unknown divergence 'kl'; choose one of cross_entropy, forward_kl"),
        ("forward_kl", {"skew": 0.1}, "skew=0.1 does nothing with forward_kl; remove it"),
        ("skewed_reverse_kl", {"teacher_weight": 0.5}, "teacher_weight=0.5 does nothing with skewed_reverse_kl, which"),
        ("cross_entropy", {"skew": 0.1}, "skew=0.1 does nothing with cross_entropy"),
        ("generalized_jsd", {"teacher_weight": 1.0}, "teacher_weight must lie in (0, 1), got 1.0"),
        ("skewed_forward_kl", {"skew": 1.0}, "skew must lie in [0, 1), got 1.0"),
    ],
)
def test_unknown_or_idle_options_are_refused_in_one_line(objective, options, message):
    with pytest.raises(UserError) as caught:
        check_objective(objective, options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_torch_free_table_of_objectives_is_that_of_the_functions():
    expected = {CROSS_ENTROPY: ()} | {name: tuple(objective_options(name)) for name in DIVERGENCES}
    assert expected == OBJECTIVES
