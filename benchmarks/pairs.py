"""Student/teacher pairs that the benchmarks measure: related enough for drafts to be kept, as real pairs are."""

import copy
import gzip
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen3Config


def tinystories_pair(folder: Path, *, steps: int = 300, seed: int = 0) -> tuple[Any, Any, torch.Tensor]:
    """Return the TinyStories character teacher, a 2-layer student warm-started on the sample, and prompts.

    The student takes the teacher's first and last layer and is trained by cross-entropy on the stories.

    Args:
        folder: Where `models/tinystories-char-teacher` and `data/tinystories` lie.
        steps: Warm-start steps of 16 x 128 characters.
        seed: Seed of the batches.

    Returns:
        Student and teacher in float32 and eval mode, prompts int64 `[64, 32]`.
    """
    path = folder / "models" / "tinystories-char-teacher"
    teacher = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = 2
    student = AutoModelForCausalLM.from_config(config)
    weights = teacher.state_dict()
    last = teacher.config.num_hidden_layers - 1
    kept = {name: value for name, value in weights.items() if ".layers." not in name or ".layers.0." in name}
    kept |= {
        name.replace(f".layers.{last}.", ".layers.1."): value
        for name, value in weights.items()
        if f".layers.{last}." in name
    }
    student.load_state_dict(kept)
    with gzip.open(folder / "data" / "tinystories" / "tinystories_sample.txt.gz", "rt") as file:
        stories = file.read().split("<|endoftext|>")
    ids = [tokenizer("<s>" + story.strip(), add_special_tokens=False).input_ids for story in stories]
    ids = [story for story in ids if len(story) >= 128]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    student.train()
    for _ in range(steps):
        rows = torch.randint(64, len(ids), (16,), generator=generator)
        batch = torch.tensor([ids[row][:128] for row in rows])
        loss = student(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student.eval(), teacher, torch.tensor([story[:32] for story in ids[:64]])


def gpt2_pair(*, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Any, Any, torch.Tensor]:
    """Return GPT-2 shapes of 124M and 26M parameters whose output heads are correlated, and prompts.

    Nothing can be downloaded here, and two random models would agree on nothing. The teacher's embeddings lie in a
    random subspace as wide as the student, both models read and write the same coordinates of it, and the blocks,
    random and different, add what the two disagree on.
    """
    torch.manual_seed(seed)
    vocabulary, width, narrow = 50257, 768, 384
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=12, n_head=12))
    student = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=narrow, n_layer=4, n_head=6))
    basis = torch.linalg.qr(torch.randn(width, narrow)).Q
    coordinates = torch.randn(vocabulary, narrow) / narrow**0.5
    # A bigram-like task: the state after reading a token points to a few likely next ones.
    following = torch.randint(vocabulary, (vocabulary, 4))
    reading = coordinates[following].mul(torch.tensor([1.0, 0.8, 0.6, 0.5]).view(1, 4, 1)).sum(1)
    with torch.no_grad():
        for model, project in ((teacher, basis.T), (student, torch.eye(narrow))):
            # Untied: what is read (the following tokens' mixture) is not what is written (the token's own vector).
            model.lm_head.weight = torch.nn.Parameter((coordinates @ project) * HEAD_SCALE)
            model.transformer.wte.weight.copy_(reading @ project * READ_SCALE)
            model.transformer.wpe.weight.mul_(0.1)
    prompts = torch.randint(vocabulary, (64, 32))
    return student.to(dtype).eval(), teacher.to(dtype).eval(), prompts


# How peaked the next-token distributions of `gpt2_pair` are; about 2 nats of entropy.
HEAD_SCALE = 1.1
# How much the shared part of the states outweighs what the random blocks add.
READ_SCALE = 3.8

# Hidden width, layers, query heads, key/value heads, width of a head, feed-forward width of student and teacher.
QWEN3_SHAPES = {
    "full": {"vocabulary": 151_936, "student": (1024, 28, 16, 8, 128, 3072), "teacher": (2560, 36, 32, 8, 128, 9728)},
    "tiny": {"vocabulary": 512, "student": (32, 2, 4, 2, 16, 48), "teacher": (64, 3, 4, 2, 16, 96)},
}
# How much of a state before the head is what the random blocks added, against the part that both models share.
BLOCK_SHARE = 0.5
# The likeliest token's logit above the logarithm of the vocabulary's size: about 2 nats of entropy.
PEAK = 2.0


def qwen3_pair(
    sizes: str = "full", *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0
) -> tuple[Any, Any, torch.Tensor]:
    """Return models of the shapes of Qwen3 0.6B and 4B with correlated heads, made on the device, and prompts.

    As `gpt2_pair`: the teacher's embeddings lie in a subspace as wide as the student. What the random blocks add is
    scaled to a share of the states, so that the pair is alike at every size.

    Args:
        sizes: "full", or "tiny" for trying a script.
        dtype: Of both models.
        device: Where they are made: 4.6 billion weights take minutes on a CPU.
        seed: Of weights and prompts.
    """
    shapes: dict[str, Any] = QWEN3_SHAPES[sizes]
    vocabulary, narrow, width = shapes["vocabulary"], shapes["student"][0], shapes["teacher"][0]
    torch.manual_seed(seed)
    with torch.device(device), torch.no_grad():
        basis = torch.linalg.qr(torch.randn(width, narrow)).Q
        coordinates = torch.randn(vocabulary, narrow) / narrow**0.5
        following = torch.randint(vocabulary, (vocabulary, 4))
        mixture = torch.tensor([1.0, 0.8, 0.6, 0.5])
        reading = torch.zeros_like(coordinates)
        for place in range(4):
            reading += mixture[place] * coordinates[following[:, place]]
        prompts = torch.randint(vocabulary, (128, 32))
        models = []
        for role, project in (("student", torch.eye(narrow)), ("teacher", basis.T)):
            hidden, layers, heads, kv_heads, head_dim, feed_forward = shapes[role]
            config = Qwen3Config(
                vocab_size=vocabulary,
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=head_dim,
                intermediate_size=feed_forward,
                max_position_embeddings=4096,
                tie_word_embeddings=False,
            )
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            # The states before the head have norm sqrt(hidden); a following token's vector has cosine 0.67 to them.
            peak = (math.log(vocabulary) + PEAK) / (0.67 * (1.0 - BLOCK_SHARE**2) ** 0.5 * hidden**0.5)
            model.lm_head.weight.copy_(coordinates @ project * peak)
            embedded = reading @ project
            model.model.embed_tokens.weight.copy_(embedded / embedded.square().mean().sqrt())
            _scale_blocks(model, prompts[:8])
            models.append(model)
    return models[0], models[1], prompts


def _scale_blocks(model: Any, tokens: torch.Tensor) -> None:
    """Scale what the blocks of a model add to its states to `BLOCK_SHARE`, by two measured corrections."""
    states: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0].float()))
    embedded = model.model.embed_tokens(tokens).float()
    for _ in range(2):
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        added = (states.pop() - embedded).square().mean().sqrt()
        wanted = BLOCK_SHARE / (1.0 - BLOCK_SHARE**2) ** 0.5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(wanted / added)
            layer.mlp.down_proj.weight.mul_(wanted / added)
    hook.remove()
