"""The forward of well-known decoders without what a general forward does around it.

A decoding pass over a few tokens costs transformers more time in Python, mask preparation and casts than in arithmetic.
For GPT-2, OPT and LLaMA-like models the same modules' weights are read here in the same order with fewer calls. The
model is not changed, and `switchkd.cache` compares the result with the model's own logits before it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.pytorch_utils import Conv1D

Map = Callable[[Tensor], Tensor]

# Decoders whose layers are: RMS norm, rotary attention with grouped queries, RMS norm, gated feed-forward.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class _Layer:
    attention_norm: Map
    query_key_value: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # [N, H] -> three [N, heads * head_dim]
    attention_out: Map
    feed_forward_norm: Map
    feed_forward: Map
    query_norm: Map | None = None
    key_norm: Map | None = None


@dataclass
class LeanDecoder:
    """A decoder taken apart; call it with tokens, their positions, a cache that is written and the mask.

    Attributes:
        embed: `(tokens [A, n], positions [A, n])` to states `[A * n, H]`.
        layers: The decoder layers.
        finish: Last norm and projection before the output layer.
        head: The output layer.
        heads: Query heads.
        key_value_heads: Key and value heads.
        head_dim: Width of a head.
        scale: Factor of the attention scores.
        cosine, sine: Rotary tables `[positions, head_dim]`, the sine with its sign per half; None without rotary.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    layers: list[_Layer]
    finish: Map
    head: Map
    heads: int
    key_value_heads: int
    head_dim: int
    scale: float
    cosine: Tensor | None = None
    sine: Tensor | None = None

    def __call__(
        self, tokens: Tensor, positions: Tensor, cache: Cache, mask: Tensor, *, last_only: bool
    ) -> tuple[Tensor, Tensor]:
        """Return logits `[A, n or 1, V]` and the states that enter the output layer, `[A, n or 1, H]`."""
        rows, count = tokens.shape
        states = self.embed(tokens, positions)
        groups = self.heads // self.key_value_heads
        if groups > 1 and count > 1:
            mask = mask.repeat(1, 1, groups, 1)
        rotary = None
        if self.cosine is not None and self.sine is not None:
            flat = positions.reshape(-1)
            rotary = (self.cosine[flat].unsqueeze(1), self.sine[flat].unsqueeze(1))
        for index, layer in enumerate(self.layers):
            attended = self._attend(layer, layer.attention_norm(states), rows, count, rotary, cache, index, mask)
            states = states + layer.attention_out(attended)
            states = states + layer.feed_forward(layer.feed_forward_norm(states))
        if last_only and count > 1:
            states = states.view(rows, count, -1)[:, -1]
            count = 1
        states = self.finish(states)
        return self.head(states).view(rows, count, -1), states.view(rows, count, -1)

    def _attend(
        self,
        layer: _Layer,
        states: Tensor,
        rows: int,
        count: int,
        rotary: tuple[Tensor, Tensor] | None,
        cache: Cache,
        index: int,
        mask: Tensor,
    ) -> Tensor:
        query, key, value = layer.query_key_value(states)
        query = query.view(rows * count, self.heads, self.head_dim)
        key = key.view(rows * count, self.key_value_heads, self.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = layer.query_norm(query), layer.key_norm(key)
        if rotary is not None:
            # Queries and keys turn together: x cos + swap_halves(x) sin, the sine carrying the sign.
            both = torch.cat([query, key], dim=1)
            both = both * rotary[0] + both.roll(self.head_dim // 2, -1) * rotary[1]
            query, key = both.split([self.heads, self.key_value_heads], dim=1)
        keys, values = cache.update(
            key.view(rows, count, self.key_value_heads, self.head_dim).transpose(1, 2),
            value.view(rows, count, self.key_value_heads, self.head_dim).transpose(1, 2),
            index,
        )
        # Grouped queries are extra query rows of their key head: nothing is repeated.
        groups = self.heads // self.key_value_heads
        query = query.reshape(rows, count, self.key_value_heads, groups, self.head_dim).permute(0, 2, 3, 1, 4)
        query = query.reshape(rows, self.key_value_heads, groups * count, self.head_dim)
        out = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scale)
        out = out.view(rows, self.key_value_heads, groups, count, self.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(rows * count, self.heads * self.head_dim)


def lean_decoder(model: Any, positions: int) -> LeanDecoder | None:
    """Return the model taken apart for up to `positions` tokens, or None where it is none of the known families."""
    if torch.is_autocast_enabled(next(model.parameters()).device.type) or hasattr(model, "hf_device_map"):
        return None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = getattr(base.config, "model_type", None)
    try:
        if kind == "gpt2":
            return _gpt2(base)
        if kind == "opt":
            return _opt(base)
        if kind in LLAMA_LIKE:
            return _llama(base, positions)
    except AttributeError:
        # A class of that name with other parts; its own forward knows them.
        return None
    return None


def _gpt2(model: Any) -> LeanDecoder | None:
    body, config = model.transformer, model.config
    if config.scale_attn_by_inverse_layer_idx or config.add_cross_attention or not config.scale_attn_weights:
        return None
    layers = [
        _Layer(
            attention_norm=_norm(block.ln_1),
            query_key_value=_split_in_three(_linear(block.attn.c_attn)),
            attention_out=_linear(block.attn.c_proj),
            feed_forward_norm=_norm(block.ln_2),
            feed_forward=_feed_forward(_linear(block.mlp.c_fc), block.mlp.act, _linear(block.mlp.c_proj)),
        )
        for block in body.h
    ]
    head_dim = config.n_embd // config.n_head

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        return (body.wte(tokens) + body.wpe(positions)).flatten(0, 1)

    return LeanDecoder(
        embed, layers, _norm(body.ln_f), _linear(model.lm_head), config.n_head, config.n_head, head_dim, head_dim**-0.5
    )


def _opt(model: Any) -> LeanDecoder | None:
    body, config = model.model.decoder, model.config
    if not config.do_layer_norm_before or body.final_layer_norm is None or body.project_in is not None:
        return None
    layers = [
        _Layer(
            attention_norm=_norm(layer.self_attn_layer_norm),
            query_key_value=_three(layer.self_attn),
            attention_out=_linear(layer.self_attn.out_proj),
            feed_forward_norm=_norm(layer.final_layer_norm),
            feed_forward=_feed_forward(_linear(layer.fc1), layer.activation_fn, _linear(layer.fc2)),
        )
        for layer in body.layers
    ]
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        return (body.embed_tokens(tokens) + body.embed_positions(tokens, 0, position_ids=positions)).flatten(0, 1)

    return LeanDecoder(
        embed, layers, _norm(body.final_layer_norm), _linear(model.lm_head), heads, heads, head_dim, head_dim**-0.5
    )


def _llama(model: Any, positions: int) -> LeanDecoder | None:
    body, config = model.model, model.config
    attention = body.layers[0].self_attn
    layers = [
        _Layer(
            attention_norm=_norm(layer.input_layernorm),
            query_key_value=_three(layer.self_attn),
            attention_out=_linear(layer.self_attn.o_proj),
            feed_forward_norm=_norm(layer.post_attention_layernorm),
            feed_forward=_gated(layer.mlp),
            query_norm=_norm(layer.self_attn.q_norm) if hasattr(layer.self_attn, "q_norm") else None,
            key_norm=_norm(layer.self_attn.k_norm) if hasattr(layer.self_attn, "k_norm") else None,
        )
        for layer in body.layers
    ]
    like = body.embed_tokens.weight[:1].unsqueeze(0)
    cosine, sine = body.rotary_emb(like, torch.arange(positions, device=like.device).unsqueeze(0))
    half = sine.shape[-1] // 2
    signed = torch.cat([-sine[0, :, :half], sine[0, :, half:]], dim=-1)

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        return body.embed_tokens(tokens).flatten(0, 1)

    return LeanDecoder(
        embed,
        layers,
        _norm(body.norm),
        _linear(model.lm_head),
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        attention.scaling,
        cosine[0],
        signed,
    )


def _linear(module: nn.Module) -> Map:
    """The module's map on `[N, in]`; adapters, quantised layers and the like are called as they are."""
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
        return lambda states: functional.linear(states, weight, bias)
    if type(module) is Conv1D:
        # GPT-2 keeps its weights as [in, out].
        conv: Any = module
        return lambda states: torch.addmm(conv.bias, states, conv.weight)
    return module


def _norm(module: Any) -> Map:
    if type(module) is nn.LayerNorm:
        return lambda states: functional.layer_norm(
            states, module.normalized_shape, module.weight, module.bias, module.eps
        )
    if type(module).__name__.endswith("RMSNorm"):
        shape = tuple(module.weight.shape)
        if module.weight.dtype in (torch.float16, torch.bfloat16):
            # transformers rounds before the weight as well; the same roundings keep the two paths together.
            return lambda states: functional.rms_norm(states, shape, None, module.variance_epsilon) * module.weight
        return lambda states: functional.rms_norm(states, shape, module.weight, module.variance_epsilon)
    return module


def _three(attention: Any) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    query, key, value = _linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj)
    return lambda states: (query(states), key(states), value(states))


def _split_in_three(joint: Map) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    return lambda states: joint(states).chunk(3, dim=-1)  # type: ignore[return-value]


def _feed_forward(into: Map, activation: Map, out: Map) -> Map:
    return lambda states: out(activation(into(states)))


def _gated(mlp: Any) -> Map:
    gate, into, out, activation = _linear(mlp.gate_proj), _linear(mlp.up_proj), _linear(mlp.down_proj), mlp.act_fn
    return lambda states: out(activation(gate(states)) * into(states))
