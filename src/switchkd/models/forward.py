"""How any causal language model of transformers is called: its device, its arguments and its mode."""

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.errors import UserError


def device_of(model: nn.Module) -> torch.device:
    """Return the device a model's first parameter lies on: where its inputs go."""
    return next(model.parameters()).device


def takes_argument(model: nn.Module, name: str) -> bool:
    """Return whether a model's forward has an explicit argument of that name."""
    # The wrappers of adapters and of distributed training take **kwargs; what counts is the model inside.
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings") and hasattr(inner, "module"):
        inner = inner.module
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return name in inspect.signature(inner.forward).parameters


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, and not the one that FSDP2 puts below it in its place."""
    return next(kind for kind in type(module).__mro__ if not hasattr(kind, "unshard"))


def prompt_positions(mask: Tensor) -> Tensor:
    """Return position ids that count real tokens from 0; padding on the left gets 0, int64 `[B, T]`."""
    return (mask.to(torch.int64).cumsum(-1) - 1).clamp_min(0)


@contextlib.contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Put models in eval mode and give every module its own mode back afterwards, also after an error."""
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def output_layer_input(model: Any, *, enabled: bool = True) -> Iterator[list[Tensor]]:
    """Collect what enters the model's output layer, `[B, n, H]` a pass: the states that predict tokens."""
    collected: list[Tensor] = []
    if not enabled:
        yield collected
        return
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: collected.append(inputs[0]))
    try:
        yield collected
    finally:
        hook.remove()


def context_length(model: Any) -> int | None:
    """Return the most tokens a model's positions reach, or None where its config names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout layer to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # OPT, LLaMA and others call the functional form with the probability kept as a plain attribute.
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def check_finite(model: nn.Module | None, role: str, advice: str) -> None:
    """Refuse a model whose weights hold nan or inf: everything computed with it would be nan in silence.

    Args:
        model: Any module, or None for none. Parameters that lie elsewhere (on the meta device) are not looked at.
        role: What the model is, named in the error.
        advice: The way out, the end of the error.

    Raises:
        UserError: Says how many tensors hold such values, and names the first.
    """
    parameters = () if model is None else model.named_parameters()
    # Of a sharded tensor every process looks at its part.
    parts = {name: _part(value) for name, value in parameters}
    tensors = {name: value for name, value in parts.items() if value.numel() and not value.is_meta}
    floating = {name: value.detach() for name, value in tensors.items() if value.is_floating_point()}
    # A bias of -inf is how some models exclude an id; nan and inf are never meant.
    wrong = [name for name, value in floating.items() if not float(value.amax()) < math.inf]
    if wrong:
        count = f"{len(wrong)} of {len(floating)} tensors of the {role}"
        raise UserError(f"{count} hold nan or inf, first {wrong[0]}; {advice}")


def _part(parameter: Any) -> Tensor:
    """What this process has of a parameter that may be sharded, by FSDP or by ZeRO-3."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return parameter.to_local() if hasattr(parameter, "to_local") else part
