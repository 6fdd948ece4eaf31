"""Students that no one has trained yet: from a configuration, or from some of a bigger model's layers."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, set_seed

from switchkd.errors import UserError, nearest_name
from switchkd.models.loading import load_model


def student_from_config(
    overrides: Mapping[str, Any],
    *,
    base: str | None,
    tokenizer: Any,
    seed: int,
    init_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a student with random weights, the same for the same seed.

    Args:
        overrides: Values of the model's configuration. With `model_type` the configuration starts from that type's
            defaults, and vocabulary and special tokens come from the tokenizer; otherwise it starts from `base`'s.
        base: Model folder or hub id whose configuration is the start, or None.
        tokenizer: The student's tokenizer.
        seed: Seed of the weights.
        init_kwargs: `dtype`, `attn_implementation` and the like.

    Raises:
        UserError: An option that the configuration does not have, or values that make no model.
    """
    config = student_config(overrides, base=base, tokenizer=tokenizer)
    set_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(config, **{"dtype": "float32", **(init_kwargs or {})})
    except (ValueError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise UserError(f"student_config is not a valid configuration: {str(error) or type(error).__name__}") from error


def student_config(overrides: Mapping[str, Any], *, base: str | None, tokenizer: Any = None) -> Any:
    """Return the configuration of such a student; arguments as in `student_from_config`.

    Args:
        overrides: Values of the model's configuration.
        base: Model folder or hub id whose configuration is the start, or None.
        tokenizer: The student's; None leaves the vocabulary to the type's defaults.

    Raises:
        UserError: An option that the configuration does not have, or values that make none.
    """
    given = dict(overrides)
    model_type = given.pop("model_type", None)
    if model_type is not None:
        if model_type not in CONFIG_MAPPING:
            near = nearest_name(str(model_type), CONFIG_MAPPING)
            raise UserError(f"student_config: no model_type {model_type!r}; the nearest is {near!r}")
        start = AutoConfig.for_model(model_type)
        given = given if tokenizer is None else {**_vocabulary_of(tokenizer), **given}
    elif base is not None:
        start = load_config(base)
    else:
        raise UserError('student_config needs a "model_type" (such as "gpt2" or "llama") or a model to start from')
    known = {*start.to_dict(), *start.attribute_map}
    for name in given:
        if name not in known:
            near = nearest_name(name, known)
            raise UserError(f"student_config: {start.model_type} has no option {name!r}; the nearest is {near!r}")
    try:
        # Rebuilt, not patched: lists that depend on the number of layers are made afresh, and what a type derives from
        # other values, such as the size of a head, from the given ones.
        inherited = {} if model_type is not None else start.to_dict()
        values = {name: value for name, value in inherited.items() if name not in _DERIVED}
        for name, value in given.items():
            values[start.attribute_map.get(name, name)] = value
        return type(start)(**values)
    except (ValueError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise UserError(f"student_config is not a valid configuration: {str(error) or type(error).__name__}") from error


def student_from_layers(base: str, layers: Sequence[int], init_kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a shallower copy of a model: embeddings, head and the named layers, in that order.

    Args:
        base: Model folder or hub id.
        layers: Layers to keep, counted from 0; negative ones count from the end.
        init_kwargs: `dtype`, `attn_implementation` and the like.

    Raises:
        UserError: A layer that the model does not have.

    Reference:
        Sanh et al., "DistilBERT", arXiv 1910.01108, section 3: every second layer of the teacher.
    """
    big = load_model(base, {"dtype": "float32", **(init_kwargs or {})}, role="model whose layers are taken")
    depth = big.config.num_hidden_layers
    check_layers(base, layers, depth)
    chosen = [layer % depth for layer in layers]
    stacks = [name for name, part in big.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(stacks) != 1:
        raise UserError(f"student_layers cannot tell the layers of a {big.config.model_type} model; use student_config")
    config = copy.deepcopy(big.config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth and name in _DERIVED:
            setattr(config, name, [value[layer] for layer in chosen])
    config.num_hidden_layers = len(chosen)
    small = AutoModelForCausalLM.from_config(config, dtype=big.dtype)
    old = big.state_dict()
    place = re.compile(rf"^{re.escape(stacks[0])}\.(\d+)\.")
    small.load_state_dict(
        {
            name: old[place.sub(lambda match: f"{stacks[0]}.{chosen[int(match[1])]}.", name)]
            for name in small.state_dict()
        }
    )
    small.generation_config = big.generation_config
    return small


def check_layers(base: str, layers: Sequence[int], depth: int) -> None:
    """Refuse layers that a model of this depth does not have.

    Raises:
        UserError: Names the layer.
    """
    if not layers:
        raise UserError("student_layers names no layer")
    for layer in layers:
        if not -depth <= layer < depth:
            raise UserError(f"student_layers: {base} has layers 0 to {depth - 1}, not {layer}")


def load_config(name_or_path: str) -> Any:
    """Return the configuration of a model folder or hub id.

    Raises:
        UserError: It cannot be found or read.
    """
    try:
        # Said explicitly: else transformers asks on a terminal whether to run code that comes with it.
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the configuration of {name_or_path!r}: {str(error).splitlines()[0]}") from error


# Options that list one value per layer: they follow from the others, or from the layers taken.
_DERIVED = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")


def _vocabulary_of(tokenizer: Any) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), **ids}
