"""Tiny models of the recipes' very architectures, with tokenizers of the same kind and a few records."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM as Models
from transformers import (
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def byte_tokenizer(*, special: list[str], begin: str | None, chat: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, as GPT-2, OPT, Qwen and Llama 3 have below their merges; the last special token ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, vocabulary, special, begin, chat)


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Characters with a mark for blanks and bytes for the rest, a text begins with <s>: LLaMA's, without merges."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary = {token: index for index, token in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(backend, vocabulary, special, "<s>", chat=False)


def _finished(
    backend: Tokenizer, vocabulary: dict[str, int], special: list[str], begin: str | None, chat: bool
) -> PreTrainedTokenizerFast:
    if begin is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
        )
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, eos_token=special[-1], additional_special_tokens=special
    )
    if chat:
        result.chat_template = CHAT
    return result


LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 2048}


def config_of(kind: str, layers: int) -> tuple[Any, PreTrainedTokenizerFast]:
    """The configuration of a family, tiny, and its tokenizer."""
    if kind == "gpt2":
        tokenizer = byte_tokenizer(special=["<|endoftext|>"], begin=None)
        config: Any = GPT2Config(n_layer=layers, n_embd=32, n_head=2, n_positions=1024)
    elif kind.startswith("opt"):
        tokenizer = byte_tokenizer(special=["<pad>", "</s>"], begin="</s>")
        # The 350M model alone normalises after its blocks and has narrower embeddings.
        odd = {"do_layer_norm_before": False, "word_embed_proj_dim": 16} if kind == "opt-350m" else {}
        sizes = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 2, "word_embed_proj_dim": 32}
        config = OPTConfig(num_hidden_layers=layers, max_position_embeddings=2048, **{**sizes, **odd})
    elif kind == "open_llama":
        tokenizer = piece_tokenizer()
        config = LlamaConfig(num_hidden_layers=layers, num_key_value_heads=4, **LLAMA)
    elif kind == "qwen3":
        tokenizer = byte_tokenizer(special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], begin=None, chat=True)
        config = Qwen3Config(
            num_hidden_layers=layers, num_key_value_heads=2, head_dim=8, tie_word_embeddings=layers < 3, **LLAMA
        )
    else:
        tokenizer = byte_tokenizer(special=["<bos>", "<|im_start|>", "<|im_end|>"], begin="<bos>", chat=True)
        config = LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, tie_word_embeddings=layers < 3, **LLAMA)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config, tokenizer


def save_family(folder: Path, kind: str, layers: int) -> Path:
    """Write a tiny model of a family with its tokenizer."""
    config, tokenizer = config_of(kind, layers)
    torch.manual_seed(layers)
    Models.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_protocol_data(folder: Path) -> dict[str, str]:
    """Write a few records for each setting of the recipes that names data, and return setting -> folder."""
    word = " ".join(["word"] * 11)
    sizes = {"train": 8, "dev": 2, "valid": 2}
    rows = {
        name: [{"instruction": f"{name} {n}", "input": "", "output": word[: 9 + n]} for n in range(count)]
        for name, count in sizes.items()
    }
    lists = [{"instruction": f"list {n}", "input": "x", "output": [word, "other"]} for n in range(2)]
    found = {}
    for setting in ("dolly", "self_instruct", "vicuna", "sni", "unni"):
        of_setting = rows if setting == "dolly" else {"valid": lists if setting in ("sni", "unni") else rows["valid"]}
        for name, records in of_setting.items():
            path = folder / setting / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        found[setting] = str(folder / setting)
    return found
