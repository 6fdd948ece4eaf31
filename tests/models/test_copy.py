"""Laws of the inference copy: the student's logits at the moment of `refresh`, adapters merged, memory in its place."""

import contextlib
import copy
import sys
import types

import pytest
import torch
from helpers.tiny import BUILDERS, build_gpt2, build_llama

from switchkd.errors import UserError
from switchkd.models.copy import InferenceCopy, weight_bytes

peft = pytest.importorskip("peft")
TOKENS = torch.arange(1, 21).view(2, 10)


def logits(model) -> torch.Tensor:
    model = copy.copy(model).eval()
    with torch.no_grad():
        return model(TOKENS).logits.float()


def with_lora(model, **options):
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def trained_a_step(model, rate: float = 0.1):
    """Move every trainable weight."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(rate * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("family", list(BUILDERS))
def test_copy_gives_the_students_logits_of_now(family):
    """Stale weights: a copy that is not renewed writes what the student of the last step would."""
    student = BUILDERS[family](train=True)
    made = InferenceCopy(student)
    assert torch.equal(logits(made.refresh(student)), logits(student))
    before = logits(made.model)
    trained_a_step(student)
    assert torch.equal(logits(made.model), before)
    assert torch.equal(logits(made.refresh(student)), logits(student)) and not torch.equal(logits(made.model), before)


def test_copy_is_apart_from_training():
    student = build_llama(train=True)
    made = InferenceCopy(student)
    written = made.refresh(student)
    assert written is made.model and not written.training and student.training
    assert not any(parameter.requires_grad for parameter in written.parameters())
    assert not {p.data_ptr() for p in written.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert all(parameter.grad is None for parameter in student.parameters())


def test_memory_of_the_copy_stays_in_its_place():
    """CUDA graphs hold addresses."""
    student = build_gpt2(train=True)
    made = InferenceCopy(student)
    places = [tensor.data_ptr() for tensor in (*made.model.parameters(), *made.model.buffers())]
    for _ in range(2):
        made.refresh(trained_a_step(student))
    assert places == [tensor.data_ptr() for tensor in (*made.model.parameters(), *made.model.buffers())]


@pytest.mark.parametrize("family", list(BUILDERS))
def test_tied_head_is_copied_once(family):
    """A tied head copied twice would be of a size of its own, and could differ from the embedding."""
    student = BUILDERS[family](train=True)
    made = InferenceCopy(student)
    tied = family != "llama"
    assert (made.model.get_output_embeddings().weight is made.model.get_input_embeddings().weight) == tied
    assert made.nbytes == weight_bytes(student) == weight_bytes(made.model)


def test_bytes_count_tied_weights_once_and_half_precision_half():
    student = build_gpt2()
    made = InferenceCopy(student, dtype=torch.bfloat16)
    numbers = sum(parameter.numel() for parameter in student.parameters())
    buffers = weight_bytes(student) - 4 * numbers
    assert made.nbytes == 2 * numbers + buffers == weight_bytes(student, torch.bfloat16)
    with torch.device("meta"):
        assert weight_bytes(type(student)(student.config), torch.bfloat16) >= 2 * numbers


@pytest.mark.parametrize("family", list(BUILDERS))
def test_half_precision_copy_rounds_the_weights_and_keeps_tables(family):
    student = BUILDERS[family](train=True)
    made = InferenceCopy(student, dtype=torch.bfloat16)
    made.refresh(student)
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.bfloat16}
    for name, value in made.model.named_buffers():
        assert torch.equal(value, student.get_buffer(name)) and value.dtype == student.get_buffer(name).dtype
    spread = logits(student).std()
    assert float((logits(made.model) - logits(student)).square().mean().sqrt()) < 0.05 * float(spread)


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "modules_to_save": ["lm_head"]}])
def test_adapters_are_merged_in_the_copy_and_never_in_the_student(family, options):
    student = with_lora(BUILDERS[family](train=True), **options)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    written = InferenceCopy(student).refresh(student)
    assert torch.allclose(logits(written), logits(student), atol=2e-5)
    assert not any("lora" in name for name, _ in written.named_modules())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    trained_a_step(student)
    assert not torch.allclose(logits(written), logits(student), atol=1e-2)


def test_adapter_of_a_tied_embedding_leaves_the_head_alone():
    student = with_lora(build_gpt2(train=True), target_modules=["wte"])
    written = InferenceCopy(student).refresh(student)
    assert torch.allclose(logits(written), logits(student), atol=2e-5)
    assert written.get_output_embeddings().weight is not written.get_input_embeddings().weight


def test_roundings_of_merged_adapters_do_not_accumulate():
    """Merged, taken away and merged again, a bfloat16 weight drifts; here it is made from the base every time."""
    student = with_lora(build_llama(train=True))
    made = InferenceCopy(student, dtype=torch.bfloat16)
    first = {name: value.clone() for name, value in made.refresh(student).named_parameters()}
    for step in range(50):
        trained_a_step(student, rate=0.5 * (-1) ** step)
        made.refresh(student)
    torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert all(torch.equal(value, first[name]) for name, value in made.refresh(student).named_parameters())


def test_disabled_and_merged_adapters_are_not_added():
    student = with_lora(build_llama(train=True))
    made = InferenceCopy(student)
    with student.disable_adapter():
        assert torch.allclose(logits(made.refresh(student)), logits(student), atol=1e-6)
    student.merge_adapter()
    assert torch.allclose(logits(made.refresh(student)), logits(student), atol=2e-5)


def test_weights_frozen_after_a_step_are_copied_once_more():
    """What trained until now is stale in the copy; what is frozen for good need not be copied again."""
    student = build_llama(train=True)
    made = InferenceCopy(student)
    made.refresh(student)
    trained_a_step(student).requires_grad_(False)
    assert torch.equal(logits(made.refresh(student)), logits(student))
    student.model.embed_tokens.weight.requires_grad_(True)
    trained_a_step(student)
    assert torch.equal(logits(made.refresh(student)), logits(student))


def test_copy_that_was_offloaded_is_not_stale():
    student = with_lora(build_llama(train=True))
    made = InferenceCopy(student)
    made.refresh(student)
    made.offload()
    trained_a_step(student)
    assert torch.allclose(logits(made.refresh(student)), logits(student), atol=2e-5)


def test_buffers_are_taken_over():
    student = build_llama(train=True)
    made = InferenceCopy(student)
    student.model.rotary_emb.inv_freq.mul_(0.5)
    assert torch.equal(logits(made.refresh(student)), logits(student))


def test_wrappers_are_looked_through():
    student = build_llama(train=True)
    wrapped = torch.nn.ModuleDict({"module": student})
    assert torch.equal(logits(InferenceCopy(wrapped).refresh(wrapped)), logits(student))


def released(model):
    """Leave what ZeRO-3 leaves of a model's parameters between passes: nothing, and their shape beside it."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.ds_tensor = number, parameter.shape, parameter.data.clone()
        parameter.data = parameter.data.new_empty(0)
    return model


@pytest.fixture
def gathered(monkeypatch):
    """A stand-in for DeepSpeed that gathers parameters and lets them go; how many were whole at once, each time.

    The real one is run by `training/test_distributed.py` where it is installed.
    """
    seen: list[int] = []

    @contextlib.contextmanager
    def gathers(parameters):
        seen.append(len(parameters))
        for parameter in parameters:
            parameter.data = parameter.ds_tensor
        yield
        for parameter in parameters:
            parameter.data = parameter.ds_tensor.new_empty(0)

    zero = types.SimpleNamespace(GatheredParameters=gathers)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    return seen


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_copy_of_a_student_under_zero3_gathers_one_parameter_at_a_time(family, lora, gathered):
    student, twin = (BUILDERS[family](seed=4) for _ in range(2))
    if lora:
        student, twin = with_lora(student), with_lora(twin)
    made = InferenceCopy(released(student))
    assert gathered == []  # shapes are known without
    expected = logits(InferenceCopy(twin).refresh(twin))
    assert torch.equal(logits(made.refresh(student)), expected)
    assert set(gathered) == {1} and len(gathered) == len(list(student.parameters()))
    for parameter in student.parameters():
        parameter.ds_tensor.mul_(1.0 + parameter.requires_grad)
    gathered.clear()
    assert not torch.equal(logits(made.refresh(student)), expected)
    if lora:  # bases of adapters are merged anew; what nothing trains is not copied again
        assert 0 < len(gathered) < len(list(student.parameters()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: with_lora(model, use_dora=True), "variant of LoRA that is not merged here (DoraLinearVariant)"),
        (lambda model: with_lora(model, lora_bias=True), "biases of its own (lora_bias)"),
        (
            lambda model: peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM")),
            "its adapter is of type Linear; use LoRA",
        ),
        (lambda model: setattr(model.model, "extra", torch.nn.Linear(2, 2)) or model, "has model.extra.bias of shape"),
    ],
)
def test_students_that_cannot_be_copied_are_refused_by_name(change, message):
    with pytest.raises(UserError) as caught:
        InferenceCopy(change(build_llama(train=True)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_quantised_students_are_refused_by_name():
    student = build_llama()
    weight = student.model.layers[0].mlp.up_proj.weight
    student.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"its weights are quantised, first model.layers.0.mlp.up_proj.weight"):
        InferenceCopy(student)
