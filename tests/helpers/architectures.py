"""Every causal language model that transformers can build, as tiny as its config allows, and how it is read.

`python tests/helpers/architectures.py` writes the table of docs/exactness.md; tests/engine/test_architectures.py checks
every line of it.
"""

import contextlib
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from switchkd.engine.readable import require_readable, unserved_reason
from switchkd.errors import UserError
from switchkd.models.known import known

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "exactness.md"
BEGIN, END = "<!-- begin: written by tests/helpers/architectures.py -->", "<!-- end -->"
VOCABULARY = 98
# Every window that a config lets one choose. Rows are read on both sides of it.
WINDOW, INSIDE, BEYOND = 16, 13, 27

# What is set where a config has it.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 97,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "is_decoder": True,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "local_attention": WINDOW,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "chunk_size": WINDOW,
    "mamba_chunk_size": WINDOW,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32,
}
LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
NO_SHARED_CACHE = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8}
# What single configs need besides.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LINEAR,
    "bamba": {**STATE_SPACE, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "gemma3n_text": NO_SHARED_CACHE,
    "gemma4_text": NO_SHARED_CACHE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**STATE_SPACE, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8},
    "nemotron_h": {
        "layer_types": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
    },
    "olmo_hybrid": LINEAR,
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 16, "n_mamba_heads": 4, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
BIG = "its config cannot be made tiny in a line: it holds image, sound or patch models"
UNBUILT = "its tiny config was not found"
ASSISTANT = "a drafting head that reads another model's states"
NOT_JUDGED: dict[str, str] = {
    **dict.fromkeys(["blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git"], BIG),
    **dict.fromkeys(["got_ocr2", "llama4", "mllama", "moss_transcribe_diarize", "musicgen", "musicgen_melody"], BIG),
    **dict.fromkeys(["phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp"], BIG),
    **dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], ASSISTANT),
    **dict.fromkeys(["axk1", "cohere_compass_text", "dbrx", "kimi_linear", "longcat_flash"], UNBUILT),
    **dict.fromkeys(["qwen4_exp_text", "reformer", "zamba"], UNBUILT),
}
JUDGED = sorted(CLASSES.keys() - NOT_JUDGED.keys())


def build(kind: str, seed: int = 0) -> Any:
    """A float32 model in eval mode, of a model type."""
    config_class = CONFIG_MAPPING[kind]
    same = getattr(config_class, "attribute_map", {})
    known = {*inspect.signature(config_class.__init__).parameters, *config_class().to_dict(), *same}
    shape = dict(SHAPE)
    if "qk_rope_head_dim" in known:
        shape |= {**LATENT, "num_key_value_heads": 4}
        del shape["head_dim"]
    options = {same.get(name, name): value for name, value in shape.items() if name in known} | OVERRIDES.get(kind, {})
    name = CLASSES[kind] if isinstance(CLASSES[kind], str) else CLASSES[kind][0]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return getattr(transformers, name)._from_config(config_class(**options)).float().eval()


def build_pair(kind: str) -> tuple[Any, Any]:
    """A student and its teacher: near enough to each other that SWITCH takes turns."""
    student, teacher = build(kind), build(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            # Sinusoids are parameters too in a few models; moved, they would mean nothing.
            if mine.requires_grad and mine.numel() > 1:
                mine.copy_(theirs + 0.15 * theirs.std() * torch.randn(theirs.shape, generator=generator))
    return student, teacher


@contextlib.contextmanager
def _quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


@torch.no_grad()
def way_of(model: Any) -> str:
    """How a model is read, in the words of the table."""
    try:
        require_readable(model, "model")
    except UserError as error:
        reason = str(error)
        kind = "refused beside longer rows" if "different lengths" in reason else "refused"
        return f"{kind}: {reason.split(':', 1)[1].split(';')[0].split('(')[0].strip()}"
    inside, beyond = (unserved_reason(model, length) for length in (INSIDE, BEYOND))
    if inside is None:
        way = "row by row, through its " + ("weights" if known(model).lean else "forward")
        return way if beyond is None else f"{way}; beyond its window token by token"
    reason = re.split(r" \(| of type| of \d+ tokens| over \d+ tokens", inside)[0]
    return f"token by token: {reason}"


def table() -> str:
    """The table, one line for each way of reading."""
    ways: dict[str, list[str]] = {}
    for kind in JUDGED:
        ways.setdefault(way_of(build(kind)), []).append(kind)
    for kind, reason in sorted(NOT_JUDGED.items()):
        ways.setdefault(f"not judged: {reason}", []).append(kind)
    order = ("row by row, through its weights", "row by row", "token by token", "refused", "not judged")
    ranked = sorted(ways, key=lambda way: (next(i for i, start in enumerate(order) if way.startswith(start)), way))
    lines = [f"| {way} | {len(ways[way])} | {', '.join(ways[way])} |" for way in ranked]
    return "\n".join(["| read | types | model types |", "|---|---|---|", *lines])


def documented() -> dict[str, str]:
    """Model type -> way of reading, as the document has it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    text = text[text.index(BEGIN) : text.index(END)]
    rows = re.findall(r"^\| ([^|]+) \| \d+ \| ([^|]+) \|$", text, re.MULTILINE)
    return {kind: way for way, kinds in rows for kind in kinds.split(", ")}


if __name__ == "__main__":
    document = DOCUMENT.read_text(encoding="utf-8")
    before, after = document.split(BEGIN)[0], document.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
