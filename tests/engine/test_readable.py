"""What a model can be trusted to read: windows under any name, rows beside padding, adapters of virtual tokens."""

import warnings

import pytest
import torch
from datasets import Dataset
from helpers.architectures import build
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_llama, build_tokenizer, build_trainer
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, MixtralConfig, Qwen2Config

from switchkd.data import prepare
from switchkd.divergences import generalized_jsd
from switchkd.engine import roll_out
from switchkd.engine.readable import _used_windows, require_readable, unserved_reason
from switchkd.errors import UserError
from switchkd.evaluation import evaluate, reference_losses
from switchkd.policies import SwitchPolicy

WINDOW = 16
POLICY = SwitchPolicy(initial_threshold=0.2, schedule="constant")
# Ragged: rows of one and of ten tokens, so that drafts of the short row are read beside slots past the window.
PROMPTS = torch.tensor([[0] * 9 + [6], [5, 4, 3, 7, 8, 9, 3, 4, 5, 6]])
MASK = PROMPTS != 0


def gpt_neo(seed, layers=("global", "local"), window=WINDOW, context=64):
    torch.manual_seed(seed)
    options = {"attention_types": [[list(layers), 1]], "window_size": window, "max_position_embeddings": context}
    shape = {"vocab_size": 98, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.3}
    return GPTNeoForCausalLM(GPTNeoConfig(**shape, **options, bos_token_id=1, eos_token_id=97)).eval()


def divergences_by_hand(student, teacher, rollout):
    """Of each row's emitted tokens, by one plain pass of each model over the row alone."""
    rows = []
    for row in range(len(rollout)):
        ids = torch.cat([rollout.prompt_ids[row][rollout.prompt_mask[row]], rollout.completion_ids[row]]).unsqueeze(0)
        with torch.no_grad():
            logits = [model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1) for model in (student, teacher)]
        rows.append(generalized_jsd(*logits)[-rollout.completion_ids.shape[1] - 1 : -1])
    return torch.stack(rows)


def write(student, teacher, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return roll_out(student, teacher, PROMPTS, MASK, policy=POLICY, **options)


def test_gpt_neo_writes_wrong_text_and_divergences_beyond_its_local_window():
    student, teacher = gpt_neo(0), gpt_neo(1)
    reference = write(student, teacher, max_new_tokens=30, draft_length=1)
    for length in (3, 8):
        rollout = write(student, teacher, max_new_tokens=30, draft_length=length)
        assert "rounds" not in rollout.stats
        assert torch.equal(rollout.completion_ids, reference.completion_ids)
        assert torch.allclose(rollout.divergence, divergences_by_hand(student, teacher, rollout), atol=1e-5)
    assert "rounds" in write(student, teacher, max_new_tokens=6, draft_length=3).stats


@pytest.mark.parametrize(
    ("new_tokens", "options"),
    [(14, {"layers": ("global", "global"), "context": 24}), (WINDOW - 10, {})],
    ids=["end in a traceback of the model's forward at the end of its context", "change other rows at a window's edge"],
)
def test_drafts_past_the_end_of_a_row(new_tokens, options):
    """GPT-Neo holds its mask in a buffer as long as its context, and counts its window from the longest row."""
    student, teacher = gpt_neo(0, **options), gpt_neo(0, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.15 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    # Rows of one length that part: where one ends, another still has room for a long draft.
    prompts = torch.randint(3, 97, (8, 10), generator=torch.Generator().manual_seed(0))
    arguments = {
        "policy": SwitchPolicy(initial_threshold=0.15, schedule="constant"),
        "max_new_tokens": new_tokens,
    }
    reference = roll_out(student, teacher, prompts, **arguments, draft_length=1)
    rollout = roll_out(student, teacher, prompts, **arguments, draft_length=8)
    assert "rounds" in rollout.stats
    assert torch.equal(rollout.completion_ids, reference.completion_ids)
    assert torch.allclose(rollout.divergence, reference.divergence, atol=1e-5)


def test_the_loss_from_reused_states_is_off_beyond_gpt_neos_local_window(tmp_path):
    losses = []
    for reuse in (True, False):
        trainer = build_trainer(
            tmp_path / str(reuse),
            gpt_neo(0),
            gpt_neo(1),
            initial_threshold=0.2,
            max_completion_length=24,
            reuse_teacher_hidden=reuse,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


class HiddenWindow(GPT2LMHeadModel):
    """A model whose attention is cut by a number that its config calls a block, counted from the longest row."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
        block = self.config.memory_block
        if past_key_values is not None and attention_mask is not None and attention_mask.dim() == 4:
            slots = torch.arange(attention_mask.shape[-1])
            attention_mask = attention_mask.masked_fill(slots < attention_mask.shape[-1] - block, -torch.inf)
            attention_mask = attention_mask.clamp_min(torch.finfo(attention_mask.dtype).min)
        return super().forward(input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)


def test_a_limit_that_no_rule_knows_shows_in_what_the_model_does():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=98, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, memory_block=WINDOW)
    model = HiddenWindow(config).eval()
    assert _used_windows(config) == []
    with torch.no_grad():
        assert unserved_reason(model, WINDOW) is None
        assert "differ from a plain pass" in unserved_reason(model, WINDOW + 1)


def test_windows_are_read_under_every_name_and_other_numbers_are_none():
    def names(config):
        return [name for name, _ in _used_windows(config)]

    assert names(GPTNeoConfig(attention_types=[[["global", "local"], 12]])) == ["window_size"]
    assert names(GPTNeoConfig(attention_types=[[["global"], 24]])) == []
    assert names(MixtralConfig(num_local_experts=8, sliding_window=None)) == []
    assert names(Qwen2Config(use_sliding_window=False, sliding_window=4096)) == []
    config = GPT2Config(attention_chunk_size=8, attn_config={"local": {"size": 4}}, rope_local_base_freq=10, local=[3])
    assert sorted(_used_windows(config)) == [("attention_chunk_size", 8), ("attn_config.local.size", 4), ("local", 3)]


def test_a_window_too_large_to_probe_is_left_to_the_config():
    model, passes = gpt_neo(0, window=300, context=512), []
    model.register_forward_pre_hook(
        lambda module, args, inputs: passes.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        require_readable(model, "model", length=400)
        assert "window size of 300 tokens" in unserved_reason(model, 400)
        assert unserved_reason(model, 300) is None
    assert max(passes) <= 16


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma"])
def test_a_model_that_ignores_the_mask_writes_and_trains_on_padding(kind, tmp_path):
    model, teacher, tokenizer = build(kind), build("llama"), build_tokenizer()
    data = prepare(Dataset.from_list(RAGGED_ROWS), tokenizer)[0]
    message = "cannot be used with rows of different lengths: padding on the left changes its logits"
    for refused in (
        lambda: write(model, teacher, max_new_tokens=4),
        lambda: build_trainer(tmp_path, model, teacher),
        lambda: reference_losses(model, tokenizer, data),
        lambda: evaluate(model, tokenizer, data, decoding_seeds=[1], max_completion_length=2, progress=False),
    ):
        with pytest.raises(UserError, match=message):
            refused()
    # Alone no row is padded.
    alone = reference_losses(model, tokenizer, data, batch_size=1)
    by_hand = []
    for prompt, answer in zip(data["prompt_ids"], data["completion_ids"], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
        by_hand.append(
            torch.nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="none")
        )
    assert alone["cross_entropy"] == pytest.approx(float(torch.cat(by_hand).mean()), abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rollout = roll_out(model, teacher, PROMPTS[:, -1:], policy=POLICY, max_new_tokens=24)
    assert torch.allclose(rollout.divergence, divergences_by_hand(model, teacher, rollout), atol=1e-4)


@pytest.mark.parametrize("family", [build_gpt2, build_llama])
@pytest.mark.parametrize(
    "adapter",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    ],
    ids=lambda adapter: adapter.peft_type.value,
)
def test_an_adapter_of_virtual_tokens_samples_and_trains_on_another_distribution(family, adapter, tmp_path):
    model, teacher, tokenizer = get_peft_model(family(), adapter).eval(), family(seed=1), build_tokenizer()
    data = prepare(Dataset.from_list(RAGGED_ROWS), tokenizer)[0]
    for refused in (
        lambda: write(model, teacher, max_new_tokens=4),
        lambda: roll_out(teacher, model, PROMPTS[1:], policy=POLICY, max_new_tokens=4),
        lambda: build_trainer(tmp_path, model, teacher),
        lambda: build_trainer(tmp_path, family(), teacher, peft_config=adapter),
        lambda: reference_losses(model, tokenizer, data, batch_size=1),
        lambda: evaluate(
            model, tokenizer, data, decoding_seeds=[1], max_completion_length=2, batch_size=1, progress=False
        ),
    ):
        with pytest.raises(UserError, match=rf"adapter of type {adapter.peft_type.value}.*use LoRA") as error:
            refused()
        assert "\n" not in str(error.value)
    require_readable(get_peft_model(family(), LoraConfig(task_type="CAUSAL_LM")), "student")
