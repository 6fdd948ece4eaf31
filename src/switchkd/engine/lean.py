"""The forward of well-known decoders without what a general forward does around it.

A decoding pass over a few tokens costs transformers more time in Python, mask preparation and casts than in arithmetic.
For GPT-2, OPT and LLaMA-like models the same weights are read here in the same order with fewer calls. The model is not
changed, and `switchkd.engine.readable` compares the result with the model's own logits before it is used.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from switchkd.engine.caches import SlotCache

Map = Callable[[Tensor], Tensor]
# Adds a map of the second argument to the first: the residual stream and what a sublayer adds to it.
Residual = Callable[[Tensor, Tensor], Tensor]

# Decoders whose layers are: RMS norm, rotary attention with grouped queries, RMS norm, gated feed-forward.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")

# Up to this many scores the two products are formed plainly on CPU: fewer calls than the fused kernel, which streams.
MOST_PLAIN_SCORES = 1 << 18
# Models of up to this many bytes get joint copies of weights that read the same states: one call instead of three.
MOST_COPIED_BYTES = 64 << 20


@dataclass
class _Layer:
    attention_norm: Map
    query_key_value: Map  # [N, H] -> [N, (heads + 2 * key_value_heads) * head_dim]
    attention_out: Residual
    feed_forward_norm: Map
    feed_forward: Residual
    query_norm: Map | None = None
    key_norm: Map | None = None


@dataclass
class LeanDecoder:
    """A decoder taken apart; call it with tokens, their positions and a cache that is written.

    Attributes:
        embed: `(tokens [A, n], positions [A, n])` to states `[A * n, H]`.
        layers: The decoder layers.
        finish: Last norm before the output layer.
        head: The output layer.
        heads: Query heads.
        key_value_heads: Key and value heads.
        head_dim: Width of a head.
        scale: Factor of the attention scores.
        like: A weight of the model, for dtype and device.
        rotary: Tables `[positions, 2, 1, head_dim]` of cosine and sine, the sine with its sign per half; or None.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    layers: list[_Layer]
    finish: Map
    head: Map
    heads: int
    key_value_heads: int
    head_dim: int
    scale: float
    like: Tensor
    rotary: Tensor | None = None

    def __post_init__(self) -> None:
        on_cpu, half = self.like.device.type == "cpu", self.like.dtype in (torch.float16, torch.bfloat16)
        # Half-precision attention is slower on CPU than float32 of the rounded states, and no more exact.
        self._cached = self.like.new_zeros((), dtype=torch.float32 if on_cpu and half else self.like.dtype)
        self._hidden = torch.full_like(self._cached, -torch.inf)
        self._slots = torch.arange(0, device=self.like.device)

    def cache(self, rows: int, max_length: int) -> SlotCache:
        """Return an empty cache for this decoder."""
        return SlotCache(len(self.layers), rows, max_length, self.key_value_heads, self.head_dim, self._cached)

    def __call__(
        self,
        tokens: Tensor,
        start: Sequence[int],
        positions: Tensor,
        cache: SlotCache,
        *,
        first: int,
        last_position: int,
        last_only: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return logits `[A, n or 1, V]` and the states that enter the output layer, `[A, n or 1, H]`.

        Args:
            tokens: int64 `[A, n]`.
            start: The position of each row's first token.
            positions: Of every token, int64 `[A, n]`; its slot in the cache.
            cache: What earlier tokens left.
            first: The first row of the cache that reads.
            last_position: Where the model's tables end; drafts past it are never kept.
            last_only: Whether only the last token's logits are wanted.
        """
        shown = cache.begin(first, start, positions)
        inside = positions
        if max(start) + tokens.shape[1] - 1 > last_position:
            inside = positions.clamp(max=last_position)
        return self.forward(tokens, positions, inside, cache, shown, last_only=last_only)

    def forward(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: SlotCache, shown: int, *, last_only: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the same, where the cache has been told what comes: nothing is asked of the host.

        Args:
            tokens: int64 `[A, n]`.
            slots: Where each token's keys go, int64 `[A, n]`; it sees the slots up to there.
            positions: What its embedding is looked up for, int64 `[A, n]`, inside the model's tables.
            cache: What earlier tokens left.
            shown: How many slots the queries are shown.
            last_only: Whether only the last token's logits are wanted.
        """
        rows, count = tokens.shape
        plain = self.like.device.type == "cpu" and rows * self.heads * count * shown <= MOST_PLAIN_SCORES
        mask = self._mask(slots, shown, plain)
        states = self.embed(tokens, positions)
        rotary = None
        if self.rotary is not None:
            rotary = self.rotary[positions.view(-1)].unbind(1)
        for index, layer in enumerate(self.layers):
            joint = layer.query_key_value(layer.attention_norm(states)).view(rows * count, -1, self.head_dim)
            query = self._write(layer, joint, rotary, cache, index)
            attended = self._attend(query, *cache.views[index], mask, rows, plain)
            states = layer.attention_out(states, attended)
            states = layer.feed_forward(states, layer.feed_forward_norm(states))
        if last_only and count > 1:
            states = states.view(rows, count, -1)[:, -1]
            count = 1
        states = self.finish(states)
        return self.head(states).view(rows, count, -1), states.view(rows, count, -1)

    def reserve(self, slots: int) -> None:
        """Make what masks are made from for up to this many slots."""
        if len(self._slots) < slots:
            self._slots = torch.arange(slots, device=self.like.device)

    def tables(self) -> list[Tensor]:
        """Return the tensors beside the weights that every pass reads."""
        return [self._slots, self._cached, self._hidden, *([] if self.rotary is None else [self.rotary])]

    def _mask(self, positions: Tensor, shown: int, plain: bool) -> Tensor:
        """What is added to the scores: `[A * key_value_heads, groups * n, slots]`, or fit for the fused kernel."""
        if len(self._slots) < shown:
            self.reserve(2 * shown)
        rows, count = positions.shape
        mask = torch.where(self._slots[:shown] <= positions.unsqueeze(-1), self._cached, self._hidden)
        groups = self.heads // self.key_value_heads
        mask = mask.view(rows, 1, 1, count, shown)
        if plain:
            mask = mask.expand(-1, self.key_value_heads, groups, -1, -1)
            return mask.reshape(rows * self.key_value_heads, groups * count, shown)
        return mask.expand(-1, -1, groups, -1, -1).reshape(rows, 1, groups * count, shown)

    def _write(
        self, layer: _Layer, joint: Tensor, rotary: tuple[Tensor, ...] | None, cache: SlotCache, index: int
    ) -> Tensor:
        """Store the tokens' keys and values and return their queries, `[A * n, heads, head_dim]`."""
        heads, turning = self.heads, self.heads + self.key_value_heads
        if rotary is None:
            cache.write(index, joint[:, heads:].contiguous())
            return joint[:, :heads]
        both = joint[:, :turning]
        if layer.query_norm is not None and layer.key_norm is not None:
            both = torch.cat([layer.query_norm(both[:, :heads]), layer.key_norm(both[:, heads:])], dim=1)
        # Queries and keys turn together: x cos + swap_halves(x) sin, the sine carrying the sign.
        both = (both * rotary[0]).add_(both.roll(self.head_dim // 2, -1).mul_(rotary[1]))
        cache.write(index, torch.cat([both[:, heads:], joint[:, turning:]], dim=1))
        return both[:, :heads]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rows: int, plain: bool) -> Tensor:
        # Grouped queries are extra query rows of their key head: nothing is repeated.
        kv_heads, groups, width = self.key_value_heads, self.heads // self.key_value_heads, self.head_dim
        count = len(query) // rows
        query = query.unflatten(0, (rows, count)).unflatten(2, (kv_heads, groups)).permute(0, 2, 3, 1, 4)
        query = query.reshape(rows * kv_heads, groups * count, width).to(keys.dtype)
        if plain:
            scores = torch.baddbmm(mask, query, keys, alpha=self.scale)
            out = torch.bmm(scores.softmax(-1), values)
        else:
            out = functional.scaled_dot_product_attention(
                query.unflatten(0, (rows, kv_heads)),
                keys.transpose(1, 2).unflatten(0, (rows, kv_heads)),
                values.unflatten(0, (rows, kv_heads)),
                attn_mask=mask,
                scale=self.scale,
            )
        if count > 1:
            out = out.view(rows, kv_heads, groups, count, width).permute(0, 3, 1, 2, 4)
        return out.reshape(rows * count, self.heads * width).to(self.like.dtype)


def lean_decoder(model: Any, positions: int, *, live: bool = False) -> LeanDecoder | None:
    """Return the model taken apart for up to `positions` tokens, or None where its family is not known.

    It holds the weights as they are now, some as copies: make a new one after a training step. With `live` it holds no
    copies: it follows weights that are changed in place, at the price of more calls.
    """
    first = next(model.parameters())
    if torch.is_autocast_enabled(first.device.type) or hasattr(model, "hf_device_map") or hasattr(first, "full_tensor"):
        return None  # weights that are cast, elsewhere, or sharded, whenever the model's own forward runs
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = getattr(base.config, "model_type", None)
    try:
        if kind == "gpt2":
            return _gpt2(base)
        if kind == "opt":
            return _opt(base, live)
        if kind in LLAMA_LIKE:
            return _llama(base, positions, live)
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
            query_key_value=_linear(block.attn.c_attn),
            attention_out=_added(block.attn.c_proj),
            feed_forward_norm=_norm(block.ln_2),
            feed_forward=_feed_forward(block.mlp.c_fc, block.mlp.act, block.mlp.c_proj),
        )
        for block in body.h
    ]
    head_dim = config.n_embd // config.n_head

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        return (body.wte(tokens) + body.wpe(positions)).flatten(0, 1)

    return LeanDecoder(
        embed=embed,
        layers=layers,
        finish=_norm(body.ln_f),
        head=_linear(model.lm_head),
        heads=config.n_head,
        key_value_heads=config.n_head,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        like=body.wte.weight,
    )


def _opt(model: Any, live: bool) -> LeanDecoder | None:
    body, config = model.model.decoder, model.config
    if not config.do_layer_norm_before or body.final_layer_norm is None or body.project_in is not None:
        return None
    join = not live and _copies_allowed(model)
    layers = [
        _Layer(
            attention_norm=_norm(layer.self_attn_layer_norm),
            query_key_value=_joint(_projections(layer.self_attn), join),
            attention_out=_added(layer.self_attn.out_proj),
            feed_forward_norm=_norm(layer.final_layer_norm),
            feed_forward=_feed_forward(layer.fc1, layer.activation_fn, layer.fc2),
        )
        for layer in body.layers
    ]
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        return (body.embed_tokens(tokens) + body.embed_positions(tokens, 0, position_ids=positions)).flatten(0, 1)

    return LeanDecoder(
        embed=embed,
        layers=layers,
        finish=_norm(body.final_layer_norm),
        head=_linear(model.lm_head),
        heads=heads,
        key_value_heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        like=body.embed_tokens.weight,
    )


def _llama(model: Any, positions: int, live: bool) -> LeanDecoder | None:
    body, config = model.model, model.config
    attention = body.layers[0].self_attn
    join = not live and _copies_allowed(model)
    norm = functools.partial(_norm, live=live)
    layers = [
        _Layer(
            attention_norm=norm(layer.input_layernorm),
            query_key_value=_joint(_projections(layer.self_attn), join),
            attention_out=_added(layer.self_attn.o_proj),
            feed_forward_norm=norm(layer.post_attention_layernorm),
            feed_forward=_gated(layer.mlp, join),
            query_norm=norm(layer.self_attn.q_norm) if hasattr(layer.self_attn, "q_norm") else None,
            key_norm=norm(layer.self_attn.k_norm) if hasattr(layer.self_attn, "k_norm") else None,
        )
        for layer in body.layers
    ]
    weight = body.embed_tokens.weight
    cosine, sine = body.rotary_emb(weight[:1].unsqueeze(0), torch.arange(positions, device=weight.device).unsqueeze(0))
    half = sine.shape[-1] // 2
    signed = torch.cat([-sine[0, :, :half], sine[0, :, half:]], dim=-1)

    def embed(tokens: Tensor, positions: Tensor) -> Tensor:
        return body.embed_tokens(tokens).flatten(0, 1)

    return LeanDecoder(
        embed=embed,
        layers=layers,
        finish=norm(body.norm),
        head=_linear(model.lm_head),
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        like=weight,
        rotary=torch.stack([cosine[0], signed], dim=1).unsqueeze(2),
    )


def _copies_allowed(model: nn.Module) -> bool:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters()) <= MOST_COPIED_BYTES


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


def _added(module: nn.Module) -> Residual:
    """Add the module's map of the second argument to the first."""
    if type(module) is nn.Linear and module.bias is None and module.weight.dtype == torch.float32:
        # In half precision transformers rounds before it adds; there the two steps stay two.
        weight = module.weight.t()
        return lambda stream, states: torch.addmm(stream, states, weight)
    apply = _linear(module)
    return lambda stream, states: stream + apply(states)


def _projections(attention: Any) -> list[nn.Module]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _joint(modules: Sequence[nn.Module], join: bool) -> Map:
    """The modules' maps of the same states side by side; with `join` one map of copied weights."""
    linear: list[Any] = [module for module in modules if type(module) is nn.Linear]
    if join and len(linear) == len(modules) and len({module.bias is None for module in linear}) == 1:
        weight = torch.cat([module.weight for module in linear])
        bias = None if linear[0].bias is None else torch.cat([module.bias for module in linear])
        return lambda states: functional.linear(states, weight, bias)
    maps = [_linear(module) for module in modules]
    return lambda states: torch.cat([apply(states) for apply in maps], dim=-1)


def _norm(module: Any, live: bool = False) -> Map:
    if type(module) is nn.LayerNorm:
        return lambda states: functional.layer_norm(
            states, module.normalized_shape, module.weight, module.bias, module.eps
        )
    if type(module).__name__.endswith("RMSNorm"):
        width, eps = module.weight.shape[0], module.variance_epsilon
        if module.weight.dtype in (torch.float16, torch.bfloat16):
            # transformers rounds before the weight as well; the same roundings keep the two paths together.
            return lambda states: functional.rms_norm(states, (width,), None, eps) * module.weight
        if live:
            return lambda states: functional.rms_norm(states, (width,), module.weight, eps)
        # x / sqrt(mean x^2 + eps) as sqrt(width) x / hypot(|x|, sqrt(width eps)): fewer calls on CPU.
        weight, floor = module.weight * width**0.5, module.weight.new_tensor((width * eps) ** 0.5)
        return lambda states: (states / torch.hypot(torch.linalg.vector_norm(states, 2, -1, True), floor)).mul_(weight)
    return module


def _feed_forward(into: nn.Module, activation: Map, out: nn.Module) -> Residual:
    enter, leave = _linear(into), _added(out)
    return lambda stream, states: leave(stream, activation(enter(states)))


def _gated(mlp: Any, join: bool) -> Residual:
    activation, leave = mlp.act_fn, _added(mlp.down_proj)
    if join:
        both = _joint([mlp.gate_proj, mlp.up_proj], join)

        def apply(stream: Tensor, states: Tensor) -> Tensor:
            gate, up = both(states).chunk(2, dim=-1)
            return leave(stream, activation(gate) * up)

        return apply
    gate, into = _linear(mlp.gate_proj), _linear(mlp.up_proj)
    return lambda stream, states: leave(stream, activation(gate(states)) * into(states))
