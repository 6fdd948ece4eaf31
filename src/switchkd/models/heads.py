"""How a model turns the states that enter its output layer into logits, and how to get those states without logits.

Nothing here knows architectures by name: what a model does to its output layer's result (logit scales, final
soft-capping) is measured once on test values, and a model that does something else is not served.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.models.forward import class_of
from switchkd.models.known import known


@dataclass(frozen=True)
class OutputHead:
    """An output layer and what its model does to the result: logits = c tanh(scale * layer(states) / c).

    Attributes:
        module: The output layer, possibly with an adapter.
        scale: Multiplies the layer's result.
        softcap: c; None leaves the scaled result as it is.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def width(self) -> int:
        """How many ids the head scores, V."""
        module: Any = self.module
        features = getattr(module, "out_features", None)
        return int(module.weight.shape[0] if features is None else features)

    @property
    def is_plain(self) -> bool:
        """Whether the layer is nothing but its weight and bias: no adapter, no hook, no quantised or absent weight."""
        module = self.module
        if class_of(module) is not nn.Linear or "forward" in vars(module) or module.weight.is_meta:
            return False
        # FSDP2's hooks gather the weight, which `hidden_states_of` has done for the loss.
        hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        return not hooked or type(module) is not nn.Linear

    def layer(self, states: Tensor) -> Tensor:
        """Return what the output layer makes of states, `[..., V]`, outside of the model's own pass."""
        if self.is_plain:
            module: Any = self.module
            return nn.functional.linear(states, module.weight, module.bias)  # no hooks: FSDP2's belong to a pass
        raw: Tensor = self.module(states)
        return raw

    def logits(self, raw: Tensor) -> Tensor:
        """Return the model's logits for the layer's result `[..., V]`, scaled and capped."""
        if self.scale != 1.0:
            raw = raw * self.scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


def output_head(model: Any) -> OutputHead | None:
    """Return a model's head, or None, with one warning, where its logits cannot be computed from hidden states.

    Args:
        model: A causal language model; adapters and a distributed wrapper may surround it.
    """
    bare = _bare(model)
    record = known(bare)
    if record.head is None:
        record.head = _measure(bare)
        if isinstance(record.head, str):
            warnings.warn(f"{type(bare).__name__} is trained through full logits: {record.head}")
    measured = record.head
    return None if isinstance(measured, str) else OutputHead(bare.get_output_embeddings(), *measured)


def hidden_states_of(model: nn.Module, **forward: Any) -> Tensor:
    """Run a model up to its output layer and return the states that enter it: no logits are computed.

    The pass goes through the model itself, wrappers, hooks and all: only the output layer stands still, so that
    distributed wrappers see every parameter and gradients flow as ever.

    Args:
        model: A causal language model that `output_head` serves.
        forward: Arguments of its forward pass; `logits_to_keep` cuts the positions.

    Returns:
        `[B, n, H]`, with its graph where gradients are on.
    """
    head = _bare(model).get_output_embeddings()
    collected: list[Tensor] = []

    def collect(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        collected.append(states)
        # One column instead of V. The layer's own parameters join the graph because a distributed wrapper looks for
        # unused parameters in the output's graph; the value is not read.
        used = [parameter.flatten()[:1].sum() for parameter in head.parameters() if parameter.requires_grad]
        return states[..., :1] + sum(used)

    with _forward_replaced(head, collect):
        model(**forward)
    if len(collected) != 1:
        raise RuntimeError(f"the output layer of {type(model).__name__} was called {len(collected)} times in one pass")
    gather_head(model)
    return collected[0]


def gather_head(model: Any) -> None:
    """Make an output layer that FSDP2 sharded whole: the unit that owns it gathers its weights, until it trains.

    Args:
        model: A causal language model; sharded, all processes must ask.
    """
    model = _bare(model)
    head = model.get_output_embeddings()
    if not any(hasattr(parameter, "full_tensor") for parameter in head.parameters()):
        return
    path = next(name for name, module in model.named_modules() if module is head)
    parts = path.split(".")
    above = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    owner: Any = next(module for module in above if hasattr(module, "unshard"))
    owner.unshard()


def _bare(model: Any) -> Any:
    """The model inside a distributed wrapper."""
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module
    return model


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let a module do something else for a while; a forward that somebody else put there comes back afterwards."""
    absent = object()
    before = vars(module).get("forward", absent)
    module.forward = forward
    try:
        yield
    finally:
        if before is absent:
            del module.forward
        else:
            module.forward = before


def _measure(model: Any) -> tuple[float, float | None] | str:
    """Return the scale and soft-cap between a model's output layer and its logits, or why it cannot be served."""
    head = model.get_output_embeddings()
    if head is None:
        return "it names no output layer"
    if type(head) is nn.Linear and tuple(head.weight.shape) != (head.out_features, head.in_features):
        return f"the weight of its output layer has shape {tuple(head.weight.shape)}, as if it were sharded"
    device = next(model.parameters()).device
    tokens = torch.ones(1, 2, dtype=torch.int64, device=device)
    devices = [device] if device.type == "cuda" else []
    try:
        # Dropout draws numbers; a run must not depend on whether its model was measured in this process.
        with torch.random.fork_rng(devices=devices):
            return _measure_on(model, head, {"input_ids": tokens, "use_cache": False})
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        message = " ".join(str(error).split())
        return f"it does not run without its output layer ({type(error).__name__}: {message[:120]})"


def _measure_on(model: Any, head: nn.Module, forward: dict[str, Any]) -> tuple[float, float | None] | str:
    with torch.no_grad():
        passed: list[tuple[Any, ...]] = []
        hook = head.register_forward_hook(lambda module, inputs, output: passed.append((*inputs, output)))
        try:
            logits = model(**forward).logits
        finally:
            hook.remove()
    if len(passed) != 1 or len(passed[0]) != 2:
        return f"its output layer is called {len(passed)} times in one pass, or with more than the states"
    raw = passed[0][1]
    if raw.shape != logits.shape:
        return f"its output layer gives shape {tuple(raw.shape)}, its logits have {tuple(logits.shape)}"

    # Powers of two are exact in every precision; a soft-cap saturates at 2^15 and is a straight line at 2^-13.
    exponent = torch.linspace(-13, 15, raw.shape[-1], device=raw.device).round()
    values = torch.exp2(exponent) * (1 - 2 * (torch.arange(raw.shape[-1], device=raw.device) % 2))
    values = torch.stack([values, values.flip(0)]).unsqueeze(0)
    with torch.enable_grad(), _forward_replaced(head, lambda *args, **kwargs: values):
        answer = model(**forward).logits
    if answer.requires_grad:
        return "its logits pass through trainable parameters after the output layer"
    smallest = values.abs().argmin()
    slope = float(answer.flatten()[smallest].double() / values.flatten()[smallest].double())
    cap = float(answer.double().abs().max())
    for candidate in (OutputHead(head, slope), OutputHead(head, slope, cap)):
        if torch.allclose(candidate.logits(values.double()), answer.double(), rtol=1e-5, atol=0.0):
            hidden_states_of(model, **forward)
            return candidate.scale, candidate.softcap
    return "its logits are neither a multiple of its output layer's result nor a soft-capped one"
