"""What stands between a model's output layer and its logits, measured; and its states without any logits."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from switchkd.models.heads import OutputHead, hidden_states_of, output_head

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: name -> model class, config class, extra options, the scale and the soft-cap to be found
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}, 1.0, None),
    "mistral": (MistralForCausalLM, MistralConfig, {}, 1.0, None),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}, 1.0, None),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}, 1.0, None),
    "phi": (PhiForCausalLM, PhiConfig, {}, 1.0, None),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}, 1.0, None),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}, 1.0, 3.0),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 8, "final_logit_softcapping": 50.0}, 1.0, 50.0),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}, 0.3, None),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 13.0}, 1 / 13, None),
}


def build(name, train=False, **over):
    architecture, config, options, *_ = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return architecture(config(**(SIZES | options | over))).float().train(train)


@pytest.fixture
def make_any(make_gpt2, make_opt):
    def make(name, **over):
        if name == "gpt2":
            return make_gpt2(vocab_size=VOCABULARY, **over)
        if name == "opt":  # its states are projected to another width before the output layer
            return make_opt(vocab_size=VOCABULARY, word_embed_proj_dim=16, pad_token_id=0, **over)
        return build(name, **over)

    return make


ALL = ["gpt2", "opt", *FAMILIES]


def batch(rows=2, length=6):
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


@pytest.mark.parametrize("name", ALL)
def test_head_of_the_states_gives_the_logits_of_every_family(make_any, name):
    model = make_any(name)
    head = output_head(model)
    scale, softcap = (1.0, None) if name in ("gpt2", "opt") else FAMILIES[name][3:]
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    assert head.is_plain
    assert head.width == VOCABULARY
    with torch.no_grad():
        states = hidden_states_of(model, **batch(), logits_to_keep=4)
        logits = model(**batch(), logits_to_keep=4).logits
    torch.testing.assert_close(head.logits(head.module(states)), logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "granite"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_the_states_are_those_through_the_logits(make_any, name, checkpointing):
    model = make_any(name, train=True)
    if checkpointing:
        model.gradient_checkpointing_enable()
    head = output_head(model)

    def gradients(logits):
        model.zero_grad()
        logits.square().mean().backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    torch.manual_seed(5)
    expected = gradients(model(**batch()).logits)
    torch.manual_seed(5)
    found = gradients(head.logits(head.module(hidden_states_of(model, **batch()))))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_no_logits_are_computed_on_the_way(make_gpt2, monkeypatch):
    model = make_gpt2()
    output_head(model)

    def refuse(*args):
        raise AssertionError("projected")

    monkeypatch.setattr(nn.Linear, "forward", refuse)  # GPT-2's only nn.Linear is its output layer
    hidden_states_of(model, input_ids=torch.tensor([[5, 6]]))


def test_the_output_layer_is_whole_again_after_a_pass_and_after_an_error(make_gpt2):
    model = make_gpt2()
    hidden_states_of(model, **batch())
    with pytest.raises(IndexError):
        hidden_states_of(model, input_ids=torch.tensor([[98]]))
    assert "forward" not in vars(model.lm_head)
    assert model(**batch()).logits.shape[-1] == 98


def test_a_forward_that_others_put_on_the_layer_is_theirs_again(make_gpt2):
    model = make_gpt2()

    def moved(states, original=model.lm_head.forward):
        return original(states)

    model.lm_head.forward = moved
    hidden_states_of(model, **batch())
    assert model.lm_head.forward is moved
    assert not output_head(model).is_plain  # such a layer takes the path through the module


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_takes_the_path_through_the_module(make_llama, options):
    options = {"target_modules": ["q_proj"], **options}
    model = get_peft_model(make_llama(), LoraConfig(r=2, init_lora_weights=False, **options))
    head = output_head(model)
    assert not head.is_plain
    assert head.width == 98
    with torch.no_grad():
        states = hidden_states_of(model, **batch())
        torch.testing.assert_close(head.logits(head.module(states)), model(**batch()).logits)


def test_an_adapter_elsewhere_leaves_the_head_plain(make_llama):
    assert output_head(get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))).is_plain


def test_measuring_draws_no_random_numbers_and_leaves_the_mode(make_gpt2):
    model = make_gpt2(train=True)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert output_head(model) is not None
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Odd(LlamaForCausalLM):
    """A model that does something unforeseen to its logits."""

    def __init__(self, config, change):
        super().__init__(config)
        self.temper = nn.Parameter(torch.ones(()))
        self.change = change

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(self, output.logits)
        return output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model, logits: logits + torch.arange(logits.shape[-1]), "neither a multiple"),
        (lambda model, logits: logits.sign() * logits.abs().sqrt(), "neither a multiple"),
        (lambda model, logits: logits.log_softmax(-1), "neither a multiple"),
        (lambda model, logits: torch.cat([logits[..., :-1], logits[..., -1:] * 0], -1), "neither a multiple"),
        (lambda model, logits: logits * model.temper, "trainable parameters"),
        (lambda model, logits: logits[..., :-1], "logits have"),
        (lambda model, logits: model.lm_head(logits[..., :32]), "called 2 times"),
    ],
)
def test_an_unforeseen_model_is_not_served_and_warns_once(change, reason):
    model = Odd(LlamaConfig(**SIZES), change)
    with pytest.warns(UserWarning, match=reason):
        assert output_head(model) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert output_head(model) is None


@pytest.mark.parametrize("vocabulary", [2, 3, 7])
def test_a_tiny_vocabulary_still_shows_its_soft_cap(vocabulary):
    head = output_head(build("gemma2", vocab_size=vocabulary, bos_token_id=None, eos_token_id=None))
    assert head.softcap == pytest.approx(3.0)


def test_half_precision_models_are_measured_exactly():
    head = output_head(build("gemma2").to(torch.bfloat16))
    assert (head.scale, head.softcap) == (pytest.approx(1.0, rel=1e-6), pytest.approx(3.0, rel=1e-6))


@pytest.mark.parametrize("find_unused", [False, True])
def test_distributed_hooks_see_every_parameter(make_llama, tmp_path, find_unused):
    """The output layer's gradient arrives by another road than the wrapper's output."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        model = make_llama()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
        head = output_head(wrapped)
        seen = []
        wrapped.register_comm_hook(None, lambda state, bucket: _count(seen, bucket))
        for _ in range(2):
            model.zero_grad()
            states = hidden_states_of(wrapped, **batch())
            head.logits(nn.functional.linear(states, head.module.weight)).square().mean().backward()
        assert sum(seen) == 2 * sum(parameter.numel() for parameter in model.parameters())
        found = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
        model.zero_grad()
        model(**batch()).logits.square().mean().backward()
        torch.testing.assert_close(found, {key: parameter.grad for key, parameter in model.named_parameters()})
    finally:
        torch.distributed.destroy_process_group()


def _count(seen, bucket):
    seen.append(bucket.buffer().numel())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_logits_are_scaled_before_they_are_capped():
    raw = torch.tensor([1.0, -40.0])
    assert torch.equal(OutputHead(nn.Identity(), 0.5, 4.0).logits(raw), 4 * torch.tanh(raw * 0.5 / 4))
