"""Well-known models under each attention implementation: how they are read, and that the text is the reference's."""

import warnings

import pytest
import torch
import transformers

from switchkd.divergences import LN_2, generalized_jsd
from switchkd.engine import roll_out
from switchkd.engine.readable import unserved_reason
from switchkd.engine.readers import row_reader
from switchkd.errors import UserError
from switchkd.policies import SwitchPolicy

NEW_TOKENS = 12

SHAPE = {
    "vocab_size": 98,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**SHAPE, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
NO_GROUPS = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
LINEAR = {f"linear_{part}": 2 if "num" in part else 8 for part in ("num_key_heads", "num_value_heads")} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_only_layers": [0, 1],
    "num_experts": 0,
}
STATE_SPACE = {"vocab_size": 98, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}
OLD_NAMES = {"vocab_size": 98, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
FALCON = {"vocab_size": 98, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
T5 = {"vocab_size": 98, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
MODELS = {
    "GPT-2": ("GPT2LMHeadModel", {"vocab_size": 98, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "OPT": ("OPTForCausalLM", {**NO_GROUPS, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "LLaMA": ("LlamaForCausalLM", SHAPE),
    "Mistral": ("MistralForCausalLM", {**SHAPE, "head_dim": 8, "sliding_window": 64}),
    "Qwen2": ("Qwen2ForCausalLM", SHAPE),
    "Qwen3": ("Qwen3ForCausalLM", {**SHAPE, "head_dim": 8}),
    "Gemma-2": ("Gemma2ForCausalLM", {**GEMMA, "sliding_window": 64}),
    "Gemma-3 (text)": ("Gemma3ForCausalLM", {**GEMMA, "sliding_window": 64}),
    "Phi": ("PhiForCausalLM", SHAPE),
    "Phi-3": ("Phi3ForCausalLM", SHAPE),
    "GPT-NeoX": ("GPTNeoXForCausalLM", NO_GROUPS),
    "Mistral beyond its window": ("MistralForCausalLM", {**SHAPE, "head_dim": 8, "sliding_window": 8}),
    "Gemma-2 beyond its window": ("Gemma2ForCausalLM", {**GEMMA, "sliding_window": 8}),
    "Gemma-3 (text) beyond its window": ("Gemma3ForCausalLM", {**GEMMA, "sliding_window": 8}),
    "Qwen3-Next (linear attention)": ("Qwen3NextForCausalLM", {**SHAPE, **LINEAR}),
    "Bloom": ("BloomForCausalLM", OLD_NAMES),
    "Falcon with ALiBi": ("FalconForCausalLM", {**FALCON, "initializer_range": 0.3}),
    "Mamba": ("MambaForCausalLM", STATE_SPACE),
    "T5 (encoder-decoder)": ("T5ForConditionalGeneration", T5),
}
LEAN = ("GPT-2", "OPT", "LLaMA", "Mistral", "Qwen2", "Qwen3")
FALLING_BACK = [
    "Mistral beyond its window",
    "Gemma-2 beyond its window",
    "Gemma-3 (text) beyond its window",
    "Qwen3-Next (linear attention)",
    "Bloom",
    "Falcon with ALiBi",
    "Mamba",
]
WAYS = {
    **dict.fromkeys(LEAN, "row by row, through its weights"),
    **dict.fromkeys(FALLING_BACK, "token by token"),
    "T5 (encoder-decoder)": "refused",
}
WITHOUT_SDPA = ("Gemma-2", "Gemma-2 beyond its window", "Bloom", "Mamba")
CASES = [(name, kind) for name in MODELS for kind in ("eager", "sdpa") if kind == "eager" or name not in WITHOUT_SDPA]

# Ragged, the shortest of one token.
PROMPTS = torch.tensor([[0, 0, 0, 0, 6], [3, 4, 5, 6, 7], [0, 9, 8, 7, 6]])
MASK = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)


def make_pair(name: str, implementation: str):
    """A teacher and a student that is a perturbed copy of it."""
    class_name, options = MODELS[name]
    architecture = getattr(transformers, class_name)
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = []
        for _ in range(2):
            config = transformers.Gemma3TextConfig if class_name.startswith("Gemma3") else architecture.config_class
            models.append(architecture._from_config(config(**options), attn_implementation=implementation))
    student, teacher = (model.float().eval() for model in models)
    with torch.no_grad():
        for mine, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            noise = torch.randn(theirs.shape, generator=generator)
            mine.copy_(theirs + (0.15 * theirs.std() * noise if theirs.numel() > 1 else 0.0))
    return student, teacher


def decode(student, teacher, threshold: float, draft_length: int):
    policy = SwitchPolicy(initial_threshold=threshold, schedule="constant")
    options = {"policy": policy, "max_new_tokens": NEW_TOKENS, "draft_length": draft_length}
    return roll_out(student, teacher, PROMPTS, MASK, **options)


def without_cache(model, rollout, row):
    """Log-probabilities of a row's completion tokens, by one plain pass over the row alone."""
    tokens = torch.cat([PROMPTS[row][MASK[row]], rollout.completion_ids[row]]).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0]
    return logits[-NEW_TOKENS - 1 : -1].float().log_softmax(-1)


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_every_model_is_read_as_expected_and_writes_the_reference_text(name, implementation):
    way = WAYS.get(name, "row by row, through its forward")
    student, teacher = make_pair(name, implementation)
    if way == "refused":
        with pytest.raises(UserError, match=r"the student, a T5\w+, is an encoder-decoder"):
            decode(student, teacher, 0.1, 4)
        return
    free = decode(student, teacher, LN_2, 1)
    # A mean, not a median: a threshold that equals a divergence would be a tie.
    threshold = float(free.divergence.mean())
    reference = decode(student, teacher, threshold, 1)
    assert 0.0 < reference.teacher_share < 1.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rollouts = [decode(student, teacher, threshold, length) for length in (4, 3)]
    told = [str(one.message) for one in caught if "token by token" in str(one.message)]
    for rollout in rollouts:
        assert torch.equal(rollout.completion_ids, reference.completion_ids)
        assert torch.equal(rollout.author, reference.author)
        assert torch.allclose(rollout.divergence, reference.divergence, atol=1e-4)
        assert ("rounds" in rollout.stats) == (way != "token by token")
    if way == "token by token":
        assert [line.split()[1] for line in told] == ["student", "teacher"]
    else:
        assert told == []
        assert unserved_reason(student, 5 + NEW_TOKENS) is None
        assert row_reader(student, 1, 8).lean == (way == "row by row, through its weights")
    for row in range(len(PROMPTS)):
        jsd = generalized_jsd(without_cache(student, reference, row), without_cache(teacher, reference, row))
        assert torch.allclose(jsd, reference.divergence[row], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["LLaMA", "GPT-2", "Phi", "Gemma-2", "Mamba"])
def test_teacher_hidden_is_what_the_output_layer_read_at_every_emitted_token_and_costs_no_pass(name, dtype):
    """Through the weights, the forward and token by token; rows that end early, rows that take freed places."""
    student, teacher = (model.to(dtype) for model in make_pair(name, "eager"))
    options = {
        "policy": SwitchPolicy(initial_threshold=0.05, schedule="constant"),
        "max_new_tokens": NEW_TOKENS,
        "eos_token_id": [5, 17, 29, 43, 60, 71, 88],
    }
    prompts, mask = PROMPTS.repeat(3, 1), MASK.repeat(3, 1)
    for more in ({"draft_length": 1}, {"draft_length": 4}, {"draft_length": 3, "max_active_rows": 2}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = roll_out(student, teacher, prompts, mask, **options, **more)
            rollout = roll_out(student, teacher, prompts, mask, return_teacher_hidden=True, **options, **more)
        assert len(set(rollout.completion_mask.sum(1).tolist())) > 1
        assert rollout.stats["teacher_passes"] == plain.stats["teacher_passes"]
        assert torch.equal(rollout.completion_ids, plain.completion_ids)
        hidden, head = rollout.teacher_hidden, teacher.get_output_embeddings()
        assert hidden.dtype == head.weight.dtype == dtype
        assert hidden.shape == (*rollout.completion_ids.shape, 32)
        assert bool((hidden[~rollout.completion_mask] == 0).all())
        for row in range(len(prompts)):
            kept = rollout.completion_ids[row][rollout.completion_mask[row]]
            read = []
            hook = head.register_forward_pre_hook(lambda module, inputs, read=read: read.append(inputs[0]))
            with torch.no_grad():
                teacher(input_ids=torch.cat([prompts[row][mask[row]], kept]).unsqueeze(0), use_cache=False)
            hook.remove()
            expected, got = read[0][0, -len(kept) - 1 : -1].float(), hidden[row, : len(kept)].float()
            close = 1e-3 if dtype == torch.float32 else 0.15
            assert float((got - expected).norm() / expected.norm()) < close
        # Not bound to inference mode: a loss reads them.
        weight = torch.ones(32, dtype=dtype, requires_grad=True)
        (hidden * weight).sum().backward()
        torch.nn.Embedding(98, 2)(rollout.completion_ids).sum().backward()
