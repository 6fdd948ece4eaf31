"""Laws of the chunked objective: it is the plain one, whatever the chunks, and never holds all logits."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from switchkd.divergences import DIVERGENCES
from switchkd.models.forward import disable_dropout
from switchkd.models.heads import OutputHead, hidden_states_of, output_head
from switchkd.objective import CROSS_ENTROPY, Objective, completion_logits, reduce_losses, token_losses
from switchkd.objective import loss as objective
from switchkd.objective.chunked import MEMORY_BUDGET, TEMPORARIES, chunk_sizes, chunked_loss

OBJECTIVES = [*DIVERGENCES, CROSS_ENTROPY]
ROWS, LENGTH, WIDTH, TEACHER_WIDTH, VOCABULARY = 3, 7, 8, 12, 41
SMALLEST, TWO_ROWS = 1, 2 * (2 + TEMPORARIES) * VOCABULARY * 8
#: What a head or the comparison may have besides a weight.
VARIANTS = {
    "bare": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 3.0, "loss_temperature": 2.0, "weighted": True, "teacher_extra": 5},
    "temperature": {"loss_temperature": 0.6},
    "weights": {"weighted": True},
    "wider teacher": {"teacher_extra": 5},
    "narrower teacher": {"teacher_extra": -5, "bias": True},
    "denominator": {"denominator": 37.0},
    "module": {"plain": False, "bias": True, "scale": 0.7, "teacher_extra": -3},
}


class Wrapped(nn.Linear):
    """Not a bare `nn.Linear`, so taken through the module; counts the rows it projects."""

    rows = 0

    def forward(self, states):
        self.rows += states.numel() // states.shape[-1]
        return super().forward(states)


class Problem:
    """Random states, heads, mask and labels, and the loss of them by either road."""

    def __init__(
        self,
        name,
        *,
        dtype=torch.float64,
        bias=False,
        scale=1.0,
        softcap=None,
        loss_temperature=1.0,
        weighted=False,
        teacher_extra=0,
        denominator=None,
        plain=True,
        sizes=(ROWS, LENGTH, WIDTH, TEACHER_WIDTH, VOCABULARY),
        seed=0,
    ):
        rows, length, width, teacher_width, vocabulary = sizes
        self.generator = torch.Generator().manual_seed(seed)
        layer = nn.Linear if plain else Wrapped
        self.student_head = OutputHead(self.filled(layer(width, vocabulary, bias=bias), dtype), scale, softcap)
        teacher = self.filled(nn.Linear(teacher_width, vocabulary + teacher_extra, bias=bias), dtype)
        self.teacher_head = OutputHead(teacher.requires_grad_(False), 1.1 * scale, softcap)
        self.student_hidden = self.normal(rows, length, width, dtype=dtype).requires_grad_()
        self.teacher_hidden = self.normal(rows, length, teacher_width, dtype=dtype)
        self.mask = torch.rand(rows, length, generator=self.generator) < 0.7
        self.labels = torch.randint(vocabulary, (rows, length), generator=self.generator)
        self.weights = torch.rand(rows, length, generator=self.generator, dtype=dtype) if weighted else None
        self.objective, self.loss_temperature, self.denominator = name, loss_temperature, denominator
        self.leaves = [self.student_hidden, *self.student_head.module.parameters()]

    def normal(self, *shape, dtype):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def filled(self, layer, dtype):
        layer = layer.to(dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(self.normal(*parameter.shape, dtype=dtype))
        return layer

    def plain(self):
        student_logits, teacher_logits = (
            head.logits(raw.to(torch.promote_types(raw.dtype, torch.float32)))
            for head, raw in (
                (self.student_head, self.student_head.module(self.student_hidden)),
                (self.teacher_head, self.teacher_head.module(self.teacher_hidden)),
            )
        )
        losses = token_losses(
            student_logits,
            objective=self.objective,
            teacher_logits=teacher_logits,
            labels=self.labels,
            loss_temperature=self.loss_temperature,
        )
        weighted = losses if self.weights is None else losses * self.weights
        return reduce_losses(weighted, self.mask, self.denominator), torch.where(self.mask, losses.detach(), 0.0)

    def chunked(self, **over):
        # The cross-entropy has no temperature.
        temperature = 1.0 if self.objective == CROSS_ENTROPY else self.loss_temperature
        arguments = {
            "mask": self.mask,
            "objective": Objective(self.objective, temperature=temperature),
            "teacher_hidden": self.teacher_hidden,
            "teacher_head": self.teacher_head,
            "labels": self.labels,
            "weights": self.weights,
            "denominator": self.denominator,
        }
        return chunked_loss(self.student_hidden, self.student_head, **(arguments | over))

    def gradients(self, loss):
        return torch.autograd.grad(loss, self.leaves)


def assert_all_close(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# ---- it is the plain objective


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_are_those_of_the_plain_objective(name, variant):
    problem = Problem(name, **VARIANTS[variant])
    expected, expected_tokens = problem.plain()
    for budget in (SMALLEST, TWO_ROWS, MEMORY_BUDGET):
        loss, tokens = problem.chunked(memory_budget=budget)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(tokens, expected_tokens, rtol=1e-12, atol=1e-14)
        assert not tokens.requires_grad
        assert_all_close(problem.gradients(loss), problem.gradients(problem.plain()[0]), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_on_a_real_vocabulary_stays_near_float64(name, seed):
    """The promise: 1e-5 of the value, 1e-6 in every gradient."""
    shape = torch.randint(1, 9, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = (*shape, 16, 24, 3001)
    single, double = (Problem(name, dtype=dtype, bias=True, sizes=sizes) for dtype in (torch.float32, torch.float64))
    # Weights of a trained head's size: logits of a few nats.
    for head in (single.student_head, single.teacher_head):
        head.module.weight.data.mul_(0.25)
    for mine, theirs in zip(
        [*single.leaves, single.teacher_hidden], [*double.leaves, double.teacher_hidden], strict=True
    ):
        theirs.data.copy_(mine.data)
    for mine, theirs in zip(
        single.teacher_head.module.parameters(), double.teacher_head.module.parameters(), strict=True
    ):
        theirs.data.copy_(mine.data)
    single.mask[0, 0] = double.mask[0, 0] = True
    loss, expected = single.chunked(memory_budget=4 * 2**20).loss, double.plain()[0]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    for found, right in zip(single.gradients(loss), double.gradients(expected), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd", CROSS_ENTROPY])
def test_options_reach_the_divergence(name):
    options = {"teacher_weight": 0.9} if name == "generalized_jsd" else {}
    problem = Problem(name)
    losses = token_losses(
        problem.student_head.module(problem.student_hidden),
        objective=name,
        options=options,
        teacher_logits=problem.teacher_head.logits(problem.teacher_head.module(problem.teacher_hidden)),
        labels=problem.labels,
    )
    torch.testing.assert_close(
        problem.chunked(objective=Objective(name, options)).loss, reduce_losses(losses, problem.mask)
    )


def test_extreme_states_give_finite_gradients():
    for name in OBJECTIVES:
        problem = Problem(name, dtype=torch.float32)
        problem.student_hidden.data.mul_(1e4)
        loss = problem.chunked().loss
        assert all(bool(gradient.isfinite().all()) for gradient in problem.gradients(loss))


# ---- what is read, and what is not


def test_only_supervised_positions_are_projected():
    problem = Problem("forward_kl", plain=False)
    problem.teacher_head = OutputHead(Wrapped(TEACHER_WIDTH, VOCABULARY, dtype=torch.float64))
    for budget in (SMALLEST, MEMORY_BUDGET):
        problem.student_head.module.rows = problem.teacher_head.module.rows = 0
        problem.chunked(memory_budget=budget)
        count = int(problem.mask.sum())
        assert (problem.student_head.module.rows, problem.teacher_head.module.rows) == (count, count)
        assert count < problem.mask.numel()


@pytest.mark.parametrize("plain", [True, False])
def test_unsupervised_positions_may_hold_anything(plain):
    """0 * nan is nan: masking is by selection."""
    problem = Problem("reverse_kl", plain=plain)
    expected = problem.chunked().loss
    clean = problem.gradients(expected)
    problem.student_hidden.data[~problem.mask] = math.nan
    problem.teacher_hidden[~problem.mask] = math.inf
    loss = problem.chunked().loss
    assert loss.item() == expected.item()
    assert_all_close(problem.gradients(loss), clean, rtol=0, atol=0)
    assert bool((clean[0][~problem.mask] == 0).all())


@pytest.mark.parametrize("plain", [True, False])
def test_nothing_supervised_is_loss_zero_with_a_graph(plain):
    problem = Problem("generalized_jsd", bias=True, plain=plain)
    problem.mask = torch.zeros_like(problem.mask)
    for budget, learns in itertools.product((SMALLEST, MEMORY_BUDGET), (True, False)):
        with torch.set_grad_enabled(learns):
            loss, tokens = problem.chunked(memory_budget=budget)
        assert loss.item() == 0.0
        assert bool((tokens == 0).all())
        assert loss.requires_grad is learns
        if learns:
            assert all(bool((gradient == 0).all()) for gradient in problem.gradients(loss))


def test_teacher_and_weights_get_no_gradient():
    problem = Problem("forward_kl", weighted=True)
    problem.teacher_head.module.requires_grad_()
    problem.teacher_hidden.requires_grad_()
    problem.weights.requires_grad_()
    problem.chunked().loss.backward()
    learned = [problem.teacher_hidden, problem.weights, *problem.teacher_head.module.parameters()]
    assert all(tensor.grad is None for tensor in learned)


# ---- memory


class Largest(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation allocates; views are not allocated."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in function._schema.returns):
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_never_exist_in_full(name, plain):
    vocabulary, width = 1009, 4
    largest = {}
    for length in (50, 400):
        problem = Problem(name, dtype=torch.float32, plain=plain, sizes=(1, length, width, width, vocabulary))
        budget = 20 * (2 + TEMPORARIES) * vocabulary * 4
        with Largest() as watched:
            problem.chunked(memory_budget=budget).loss.backward()
        largest[length] = watched.elements
        assert chunk_sizes(vocabulary, memory_budget=budget).rows < 200
    assert largest[50] <= 50 * vocabulary
    assert largest[400] < 200 * vocabulary


def test_a_frozen_head_gets_no_gradient_buffer():
    problem = Problem("forward_kl", sizes=(2, 9, 6, 6, 301))
    problem.student_head.module.requires_grad_(False)
    problem.leaves = [problem.student_hidden]
    with Largest() as watched:
        problem.gradients(problem.chunked(memory_budget=SMALLEST).loss)
    assert watched.elements < 301 * 6
    expected = problem.gradients(problem.plain()[0])
    assert_all_close(problem.gradients(problem.chunked().loss), expected)


def test_without_gradients_nothing_is_differentiated():
    problem = Problem("generalized_jsd", sizes=(2, 9, 6, 6, 301))
    expected = problem.chunked()
    with torch.no_grad(), Largest() as watched:
        loss, tokens = problem.chunked(memory_budget=SMALLEST)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(tokens, expected.token_losses)
    assert not loss.requires_grad
    assert watched.elements < 301 * 6


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("width", [10, 50_257, 151_936])
def test_chunks_fit_their_budget_and_grow_with_it(width, element_size, cached):
    before = (0, 0)
    for budget in (2**28, 2**29, 2**32):
        rows, block = chunk_sizes(width, memory_budget=budget, element_size=element_size, cached=cached)
        used = 2 * rows * width * element_size + block * TEMPORARIES * width * max(element_size, 4)
        assert used <= budget
        assert 1 <= block <= rows
        assert rows > before[0]
        before = (rows, block)
    assert min(chunk_sizes(width, memory_budget=1, element_size=element_size, cached=cached)) == 1


# ---- gradients as autograd users know them


def test_gradients_accumulate_and_scale():
    problem = Problem("reverse_kl", bias=True)
    once = problem.gradients(problem.chunked().loss)
    (3 * problem.chunked().loss).backward()
    problem.chunked().loss.backward()
    assert_all_close([leaf.grad for leaf in problem.leaves], [4 * gradient for gradient in once])


def test_a_second_derivative_and_a_second_backward_say_so():
    problem = Problem("forward_kl")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(problem.chunked().loss, [problem.student_hidden], create_graph=True)
    loss = problem.chunked().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"teacher_hidden": None}, "needs teacher_hidden"),
        ({"teacher_head": None}, "needs teacher_hidden and teacher_head"),
        ({"objective": CROSS_ENTROPY, "labels": None}, "needs labels"),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, r"labels has shape \(2, 2\), the mask \(3, 7\)"),
        ({"weights": torch.zeros(3)}, "weights has shape"),
        ({"teacher_hidden": torch.zeros(3, 6, TEACHER_WIDTH)}, "teacher_hidden has shape"),
        ({"mask": torch.ones(3, 8, dtype=torch.bool)}, "student_hidden has shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(over, message):
    with pytest.raises(ValueError, match=message):
        Problem("forward_kl").chunked(**over)


def test_any_leading_shape_will_do():
    problem = Problem("forward_kl")
    flat = chunked_loss(
        problem.student_hidden[problem.mask],
        problem.student_head,
        mask=torch.ones(int(problem.mask.sum()), dtype=torch.bool),
        objective="forward_kl",
        teacher_hidden=problem.teacher_hidden[problem.mask],
        teacher_head=problem.teacher_head,
    )
    torch.testing.assert_close(flat.loss, problem.chunked().loss)


# ---- precision


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_bfloat16_states_and_weights_with_float32_arithmetic(name, plain):
    problem = Problem(name, dtype=torch.bfloat16, bias=True, plain=plain, sizes=(2, 6, 16, 16, 101))
    loss, tokens = problem.chunked()
    expected, _ = problem.plain()
    assert loss.dtype == tokens.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found = problem.gradients(loss)
    assert [gradient.dtype for gradient in found] == [torch.bfloat16] * 3
    for one, other in zip(found, problem.gradients(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03 * float(other.abs().max()))


@pytest.mark.parametrize("plain", [True, False])
def test_autocast_projects_in_half_precision_and_compares_in_float32(plain):
    problem = Problem("reverse_kl", dtype=torch.float32, bias=True, plain=plain, sizes=(2, 6, 16, 16, 101))
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = problem.chunked().loss, problem.plain()[0]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found = problem.gradients(loss)
    assert [gradient.dtype for gradient in found] == [torch.float32] * 3
    for one, other in zip(found, problem.gradients(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03 * float(other.abs().max()))


def test_sums_over_chunks_do_not_drown_in_half_precision():
    """4,096 equal contributions: a bfloat16 accumulator stops growing at 256 of them."""
    head = OutputHead(nn.Linear(1, 2, bias=True, dtype=torch.bfloat16))
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16, requires_grad=True)
    mask, labels = torch.ones(4096, dtype=torch.bool), torch.zeros(4096, dtype=torch.int64)
    loss = chunked_loss(hidden, head, mask=mask, objective=CROSS_ENTROPY, labels=labels, memory_budget=1).loss
    loss.backward()
    with torch.no_grad():
        expected = head.module(hidden[:1])[0].float().softmax(-1)[1]
    assert float(head.module.bias.grad[1]) == pytest.approx(float(expected), rel=0.01)
    assert float(head.module.weight.grad[1, 0]) == pytest.approx(float(expected), rel=0.01)


def test_teacher_states_kept_in_bfloat16_meet_a_float32_head():
    problem = Problem("forward_kl", dtype=torch.float32)
    kept = problem.teacher_hidden.bfloat16()
    problem.teacher_hidden = kept.float()
    torch.testing.assert_close(problem.chunked(teacher_hidden=kept).loss, problem.plain()[0], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_teacher_states_on_the_cpu_meet_a_student_on_the_gpu(name):
    problem = Problem(name, bias=True)
    expected = problem.gradients(problem.plain()[0])
    for head in (problem.student_head, problem.teacher_head):
        head.module.to("cuda")
    problem.student_hidden = problem.student_hidden.detach().cuda().requires_grad_()
    problem.mask, problem.labels = problem.mask.cuda(), problem.labels.cuda()
    problem.leaves = [problem.student_hidden, *problem.student_head.module.parameters()]
    found = problem.gradients(problem.chunked(memory_budget=TWO_ROWS).loss)
    assert_all_close([gradient.cpu() for gradient in found], expected, rtol=1e-9, atol=1e-12)


# ---- whole models


def whole_step(student, teacher, *, chunked, name="reverse_kl"):
    """The gradients of all parameters from one step on two ragged rows, by either road, in float64."""
    student.double(), teacher.double()
    ids = torch.randint(3, 98, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    length = mask.shape[1]
    forward = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
        "logits_to_keep": length + 1,
    }
    student.zero_grad()
    if chunked:
        with torch.no_grad():
            teacher_hidden = hidden_states_of(teacher, **forward)
        loss, _ = chunked_loss(
            completion_logits(hidden_states_of(student, **forward), length),
            output_head(student),
            mask=mask,
            objective=name,
            teacher_hidden=completion_logits(teacher_hidden, length),
            teacher_head=output_head(teacher),
            memory_budget=SMALLEST,
        )
    else:
        losses = objective.token_losses(
            completion_logits(student(**forward).logits, length),
            objective=name,
            teacher_logits=completion_logits(teacher(**forward).logits, length),
        )
        loss = reduce_losses(losses, mask)
    loss.backward()
    return {key: value.grad for key, value in student.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_a_whole_step_gives_every_parameter_its_gradient(make_model, make_gpt2, name, checkpointing):
    """GPT-2 and OPT share the head's weight with the embedding: both gradients arrive there."""
    student, teacher = make_model(), make_gpt2(seed=1, n_embd=48)
    if checkpointing:
        student.gradient_checkpointing_enable()
        disable_dropout(student)
        student.train()
    expected = whole_step(student, teacher, chunked=False, name=name)
    found = whole_step(student, teacher, chunked=True, name=name)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_adapters_get_their_gradients(make_llama, options):
    torch.manual_seed(0)
    student = get_peft_model(make_llama(), LoraConfig(r=2, init_lora_weights=False, **options))
    teacher = make_llama(seed=1)
    expected = whole_step(student, teacher, chunked=False)
    found = whole_step(student, teacher, chunked=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert any("lm_head" in key for key in found) == ("lm_head" in str(options))
