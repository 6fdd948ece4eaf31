"""Students from a configuration are what the configuration class itself would make."""

import pytest
from helpers.tiny import build_tokenizer
from transformers import LlamaConfig, Qwen3Config

from switchkd.models.untrained import student_from_config

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_a_small_student_of_a_type_does_not_get_the_head_size_of_the_types_big_default(kind):
    tokenizer = build_tokenizer()
    made = student_from_config({"model_type": kind.model_type, **SHAPE}, base=None, tokenizer=tokenizer, seed=0)
    wanted = kind(**SHAPE, vocab_size=len(tokenizer))
    for name in ("head_dim", "num_key_value_heads", "layer_types"):
        assert getattr(made.config, name, None) == getattr(wanted, name, None)
