"""The inference copy: a plain, full model in inference precision that writes what a training student would write.

A student in training may be spread over processes, compute under autocast or carry adapters. Each of these makes its
forward pass slow for one token, and a sharded one needs all processes for every pass. So once per optimizer step its
weights are copied, one full tensor at a time, into a model that nothing trains: adapters are merged there, never in
the student. The tensors of the copy keep their places in memory.
"""

import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.errors import UserError
from switchkd.models.forward import class_of

# Modules that only surround another one, by the name under which they hold it.
_WRAPPED = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class _Source:
    """A tensor of the student: the module that owns it, its name there, the LoRA layer and FSDP1's unit around it."""

    module: nn.Module
    name: str
    adapter: Any = None
    unit: Any = None

    @property
    def parameter(self) -> nn.Parameter:
        # Asked anew each time: sharding puts other objects in the place.
        parameter: Any = self.module._parameters[self.name]
        return parameter

    @property
    def changes(self) -> bool:
        # Under an adapter also a frozen weight may: merged into it, or switched off.
        return self.adapter is not None or self.parameter.requires_grad


class InferenceCopy:
    """A model with a student's weights that only reads and writes text; it never gets gradients and is not saved.

    Built without ever holding the weights twice: on the meta device first, then tensor by tensor in its own
    precision. The weights are those of the last `refresh`, before the first one anything.

    Args:
        student: A causal language model, possibly with LoRA, inside DDP, or sharded by FSDP1, FSDP2 or ZeRO-3; by FSDP1
            with `use_orig_params`, and with the unit that surrounds it.
        dtype: Precision of its weights; each tensor's own if None. Buffers stay as the student has them.
        device: Where it lies; the student's device if None.

    Attributes:
        model: The copy, of the student's class, in eval mode.

    Raises:
        UserError: The student cannot be copied: adapters that cannot be merged, or a class that its configuration
            does not rebuild.
    """

    def __init__(
        self, student: nn.Module, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        reason = uncopied_reason(student)
        if reason is not None:
            raise UserError(f"the student cannot be copied for rollouts: {reason}")
        base, sources = _base(student), _sources(student)
        self.device = device or next(iter(sources.values())).parameter.device
        self.model: Any = _skeleton(base)
        self._fill(sources, dtype)
        _copy_buffers(base, self.model, self.device)
        self.model.eval().requires_grad_(False)
        if getattr(base, "generation_config", None) is not None:
            self.model.generation_config = copy.deepcopy(base.generation_config)
        #: Tensors that were copied while nothing trained them: they are not copied again.
        self._settled: set[str] = set()

    def _fill(self, sources: dict[str, _Source], dtype: torch.dtype | None) -> None:
        """Give every parameter of the skeleton memory, those that the student shares once."""
        places = {
            f"{path}.{name}" if path else name: (module, name)
            for path, module in self.model.named_modules(remove_duplicate=False)
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        shapes = {name: tuple(module._parameters[leaf].shape) for name, (module, leaf) in places.items()}
        wanted = _shapes(sources)
        for name in sorted(shapes.keys() | wanted.keys()):
            if shapes.get(name) != wanted.get(name):
                raise UserError(
                    f"the student cannot be copied for rollouts: a {type(self.model).__name__} made from its "
                    f"configuration has {name} of shape {shapes.get(name)}, the student {wanted.get(name)}"
                )
        made: dict[tuple[int, int], nn.Parameter] = {}
        #: Name -> parameter of the copy, shared ones under their first name only.
        self._targets: dict[str, nn.Parameter] = {}
        for name, (module, leaf) in places.items():
            source = sources[name]
            # A tied head is the embedding, unless an adapter belongs to one of the two only.
            identity = id(source.parameter), id(source.adapter)
            if identity not in made:
                kind = source.parameter.dtype if dtype is None else dtype
                empty = torch.empty(shapes[name], dtype=kind, device=self.device)
                made[identity] = self._targets[name] = nn.Parameter(empty, requires_grad=False)
            module._parameters[leaf] = made[identity]

    @property
    def nbytes(self) -> int:
        """Bytes of the copy: its weights, shared ones once, and its buffers."""
        return weight_bytes(self.model)

    @torch.no_grad()
    def refresh(self, student: nn.Module) -> nn.Module:
        """Take over the student's weights of this moment and return the copy.

        Sharded, every process must call it at the same time: one loop over the tensors in one order, each gathered,
        copied and let go before the next; under FSDP1 unit by unit. A merged weight is made from its base every time,
        so that nothing accumulates. Tensors that do not train are copied once.

        Args:
            student: The one that the copy was made from, however it is wrapped by now.
        """
        base = _base(student)
        for module in base.modules():
            # Units that stayed whole after a pass hold weights in the precision of that pass.
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()
        sources = _sources(student)
        self._come_back()
        wanted = {name: sources[name] for name in self._targets}
        wanted = {name: one for name, one in wanted.items() if one.changes or name not in self._settled}
        for unit, names in _by_unit(wanted):
            with summoned(unit):
                for name in names:
                    self._take(self._targets[name], wanted[name])
        self._settled = {name for name in self._targets if not sources[name].changes}
        _copy_buffers(base, self.model, self.device)
        return self.model

    def _take(self, target: Tensor, source: _Source) -> None:
        """Copy one tensor of the student, adapters merged."""
        with whole(source.parameter) as value:
            if source.adapter is None:
                target.copy_(value)
            else:
                target.copy_(value.to(self.device, torch.float32) + self._merged(source.adapter))

    def _merged(self, layer: Any) -> Tensor:
        """What the active adapters of a LoRA layer add to its weight, float32, on the copy's device."""
        total = torch.zeros((), device=self.device)
        for adapter in _adapters(layer):
            with _factors(layer, adapter) as (down, up):
                product = up.to(self.device, torch.float32) @ down.to(self.device, torch.float32)
            total = total + layer.scaling[adapter] * (product.t() if _is_transposed(layer) else product)
        return total

    def offload(self) -> None:
        """Keep the weights in main memory until the next `refresh`; they get other places on the device then."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.cpu()

    def _come_back(self) -> None:
        for parameter in self.model.parameters():
            if parameter.device != self.device:
                parameter.data = parameter.data.to(self.device)


def weight_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a model's weights, shared ones once, and buffers; a model on the meta device will do.

    Args:
        model: Any module.
        dtype: Precision that floating-point weights would have; their own if None.
    """
    weights = sum(
        parameter.numel() * (dtype.itemsize if dtype and parameter.is_floating_point() else parameter.element_size())
        for parameter in model.parameters()
    )
    return weights + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def uncopied_reason(student: nn.Module) -> str | None:
    """Return why no `InferenceCopy` of a student can be made, None where it can."""
    base = _base(student)
    if not hasattr(base, "config"):
        return f"{type(base).__name__} has no config"
    for module in base.modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        if "BaseTunerLayer" in names and "LoraLayer" not in names:
            return f"its adapter is of type {type(module).__name__}; use LoRA"
        if "LoraLayer" in names and (reason := _unmerged_reason(module, names)):
            return reason
        if "AuxiliaryTrainingWrapper" in names and "ModulesToSaveWrapper" not in names:
            return f"its adapter trains single tokens ({type(module).__name__}); use LoRA or modules_to_save"
    integers = [name for name, value in base.named_parameters() if not value.is_floating_point()]
    if integers:
        return f"its weights are quantised, first {integers[0]}"
    return None


@contextlib.contextmanager
def whole(parameter: Any) -> Iterator[Tensor]:
    """Give the full tensor of a parameter that may be sharded; every process that holds a part must ask for it.

    Args:
        parameter: A `DTensor` (FSDP2), a parameter of ZeRO-3, or any other, which is given as it is.
    """
    if hasattr(parameter, "full_tensor"):
        place = parameter.device_mesh.device_type
        # Parameters that FSDP2 offloads are gathered on the device.
        yield (parameter if parameter.device.type == place else parameter.to(place)).full_tensor()
    elif hasattr(parameter, "ds_id"):
        # Whoever gave the parameter its mark is loaded.
        with sys.modules["deepspeed"].zero.GatheredParameters([parameter]):
            yield parameter.data
    else:
        yield parameter.data


@contextlib.contextmanager
def summoned(unit: Any) -> Iterator[None]:
    """Make the parameters of one unit of FSDP1 whole inside, not those of units below it; all processes must ask.

    Args:
        unit: Any module; those that FSDP1 does not manage are left as they are.
    """
    if unit is not None and "_fsdp_wrapped_module" in unit._modules:
        with unit.summon_full_params(unit, recurse=False, writeback=False):
            yield
    else:
        yield


# ---- what a student consists of


def _base(student: nn.Module) -> Any:
    """The model inside wrappers of distributed training, of compilation and of adapters."""
    model: Any = student
    while (inner := _inside(model)) is not None and (len(model._modules) == 1 or not hasattr(model, "config")):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _inside(module: nn.Module) -> nn.Module | None:
    return next((module._modules[name] for name in _WRAPPED if module._modules.get(name) is not None), None)


def _sources(student: nn.Module) -> dict[str, _Source]:
    """Name in a model without adapters -> where the student has that tensor."""
    unit: Any = student
    while unit is not None and "_fsdp_wrapped_module" not in unit._modules:
        unit = _inside(unit)
    return {name: source for name, source in _walk(_base(student), "", None, unit) if isinstance(source, _Source)}


def _by_unit(sources: dict[str, _Source]) -> list[tuple[Any, list[str]]]:
    """Each unit of FSDP1 with the names of what it holds, the outermost first, which sets up all others at first."""
    units: dict[int, tuple[Any, list[str]]] = {}
    for name, source in sources.items():
        units.setdefault(id(source.unit), (source.unit, []))[1].append(name)
    return sorted(units.values(), key=lambda held: -sum(1 for _ in held[0].modules()) if held[0] is not None else 0)


def _shapes(sources: dict[str, _Source]) -> dict[str, tuple[int, ...]]:
    """The full shape of each tensor."""
    found: dict[str, tuple[int, ...]] = {}
    for unit, names in _by_unit(sources):
        with summoned(unit):
            found |= {name: shape_of(sources[name].parameter) for name in names}
    return found


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Return a parameter's full shape: ZeRO-3 leaves an empty tensor in its place, with the shape beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _walk(module: Any, path: str, adapter: Any, unit: Any = None) -> Iterator[tuple[str, Any]]:
    """Every parameter and buffer under its name in a model without adapters and wrappers."""
    if path and not module._parameters and len(module._modules) == 1 and (inner := _inside(module)) is not None:
        yield from _walk(inner, path, adapter, module if "_fsdp_wrapped_module" in module._modules else unit)
        return
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        used = module.modules_to_save[active[0]] if active and not module.disable_adapters else module.original_module
        yield from _walk(used, path, None, unit)
        return
    if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        yield from _walk(module.base_layer, path, module, unit)
        return
    prefix = f"{path}." if path else ""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, _Source(module, name, adapter if name == "weight" else None, unit)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield prefix + name, buffer
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, prefix + name, None, unit)


def _skeleton(base: Any) -> Any:
    """A model of the student's class and configuration, all of whose tensors lie on the meta device."""
    config = copy.deepcopy(base.config)
    config.use_cache = True  # training switches it off
    kind: Any = class_of(base)
    try:
        with torch.device("meta"):
            return kind(config)
    except TypeError as error:
        raise UserError(f"the student cannot be copied for rollouts: {kind.__name__}(config) fails, {error}") from error


def _copy_buffers(base: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Copy the student's buffers, and tensors that are plain attributes of its modules."""
    found = {name: value for name, value in _walk(base, "", None) if isinstance(value, Tensor)}
    modules = dict(model.named_modules())
    for name, value in found.items():
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        kept = module._buffers.get(leaf)
        if kept is None or kept.is_meta or kept.shape != value.shape:
            module._buffers[leaf] = value.detach().clone().to(device)
        else:
            kept.copy_(value)
    for path, module in modules.items():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, getattr(base.get_submodule(path), name).detach().clone().to(device))


# ---- LoRA


def _adapters(layer: Any) -> list[str]:
    """The adapters that act in a layer and are not in its base weight already."""
    if layer is None or layer.disable_adapters or layer.merged:
        return []
    held = (*layer.lora_A, *layer.lora_embedding_A)
    return [name for name in layer.active_adapters if name in held]


@contextlib.contextmanager
def _factors(layer: Any, adapter: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The two factors `[r, in]` and `[out, r]` of an adapter, whole."""
    if adapter not in layer.lora_A:
        first, second = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        with whole(first) as down, whole(second) as up:
            yield down, up
        return
    first, second = layer.lora_A[adapter], layer.lora_B[adapter]
    with summoned(first), summoned(second), whole(first.weight) as down, whole(second.weight) as up:
        yield down, up


def _is_transposed(layer: Any) -> bool:
    """Whether the base weight is `[in, out]`, as in GPT-2's layers and in embeddings."""
    return bool(getattr(layer, "fan_in_fan_out", False)) or isinstance(layer.base_layer, nn.Embedding)


def _unmerged_reason(layer: Any, names: set[str]) -> str | None:
    active = list(layer.active_adapters)
    variants = [type(layer.lora_variant[name]).__name__ for name in active if name in layer.lora_variant]
    if variants:
        return f"its adapter is a variant of LoRA that is not merged here ({variants[0]}); use plain LoRA"
    if any(layer.lora_bias.get(name) for name in active):
        return "its LoRA has biases of its own (lora_bias), which are not merged here"
    weight = getattr(layer.base_layer, "weight", None)
    # FSDP1 shows a flat part of it; what that was made from is looked at before.
    flat = hasattr(weight, "_fsdp_flattened")
    if (
        not isinstance(weight, Tensor)
        or not (flat or len(shape_of(weight)) == 2)
        or not {"Linear", "Embedding"} & names
    ):
        return f"its LoRA sits on a {type(layer.base_layer).__name__}, which is not merged here"
    if not weight.is_floating_point():
        return f"its LoRA sits on quantised weights ({type(layer.base_layer).__name__})"
    return None
