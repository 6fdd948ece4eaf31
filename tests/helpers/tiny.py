"""Tiny models of three families, their tokenizer, ragged data and a trainer on them, built in code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

torch.set_num_threads(1)

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
EOS_TOKEN = "<eos>"
TINY_VOCABULARY = ["<unk>", *CHARACTERS, EOS_TOKEN]
EOS_ID = len(TINY_VOCABULARY) - 1
CONTEXT = 128

ModelFactory = Callable[..., Any]


def build_tokenizer(vocabulary: list[str] = TINY_VOCABULARY) -> PreTrainedTokenizerFast:
    """One id per printable ASCII character and newline; `<eos>`, the last id, also pads."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _finish(architecture: type, config: Any, seed: int, train: bool) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(config)
        # Biases and norms start equal in every fresh model; moved, they show whether they are used.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().train(train)


def build_gpt2(seed: int = 0, vocab_size: int = len(TINY_VOCABULARY), train: bool = False, **over: Any) -> Any:
    """A 2-layer GPT-2 of width 32: learned positions, tied head, dropout 0.1 in train mode."""
    options = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
    }
    return _finish(GPT2LMHeadModel, GPT2Config(vocab_size=vocab_size, **(options | over)), seed, train)


def build_opt(seed: int = 0, vocab_size: int = len(TINY_VOCABULARY), train: bool = False, **over: Any) -> Any:
    """A 2-layer OPT of width 32: positions shifted by 2 and read from the mask, functional dropout 0.1."""
    options = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "init_std": 0.3,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
    }
    return _finish(OPTForCausalLM, OPTConfig(vocab_size=vocab_size, **(options | over)), seed, train)


def build_llama(seed: int = 0, vocab_size: int = len(TINY_VOCABULARY), train: bool = False, **over: Any) -> Any:
    """A 2-layer LLaMA of width 32: rotary positions, untied head, 4 query heads on 2 key/value heads."""
    options = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
    }
    return _finish(LlamaForCausalLM, LlamaConfig(vocab_size=vocab_size, **(options | over)), seed, train)


def build_qwen3(seed: int = 0, vocab_size: int = len(TINY_VOCABULARY), train: bool = False, **over: Any) -> Any:
    """A 2-layer Qwen3 of width 32: as LLaMA, with norms of queries and keys and heads wider than their share."""
    options = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
    }
    return _finish(Qwen3ForCausalLM, Qwen3Config(vocab_size=vocab_size, **(options | over)), seed, train)


#: The families that most laws are tested on; Qwen3 comes to those of reading and writing.
BUILDERS: dict[str, ModelFactory] = {"gpt2": build_gpt2, "opt": build_opt, "llama": build_llama}


#: Ragged on purpose: prompts of 1 to 15 tokens, answers of 1 to 13 (end of sequence not counted).
RAGGED_ROWS = [
    {"prompt": "a", "completion": "bcdefghijklmn"},
    {"prompt": "Say hello:", "completion": "hello"},
    {"prompt": "1 + 1 =", "completion": "2"},
    {"prompt": "Count to three:", "completion": "1 2 3"},
    {"prompt": "xyz", "completion": "zyx zyx"},
    {"prompt": "Repeat: ab ab", "completion": "ab ab"},
    {"prompt": "Q?", "completion": "A."},
    {"prompt": "Name a colour", "completion": "deep blue"},
]


def build_trainer(folder: Path, student: Any, teacher: Any = None, **options: Any) -> Any:
    """A `SwitchTrainer` on the ragged rows: plain SGD at rate 1, so that parameters move by the gradient."""
    from switchkd.training.config import SwitchConfig
    from switchkd.training.trainer import SwitchTrainer

    names = (
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "peft_config",
        "callbacks",
        "optimizers",
        "lm_dataset",
    )
    arguments = options.pop("trainer_kwargs", {}) | {name: options.pop(name) for name in names if name in options}
    arguments.setdefault("train_dataset", Dataset.from_list(RAGGED_ROWS))
    arguments.setdefault("processing_class", build_tokenizer())
    config = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_completion_length": 12,
    }
    return SwitchTrainer(model=student, teacher_model=teacher, args=SwitchConfig(**(config | options)), **arguments)
