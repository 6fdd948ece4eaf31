"""A model's weights as files that vLLM reads: at its start, and again whenever the student has learned."""

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import is_peft_available, logging
from transformers.utils.peft_utils import find_adapter_config_file

from switchkd.errors import UserError
from switchkd.models.loading import is_quantized

#: The one file of weights in a folder that `write_model` has written.
WEIGHTS = "model.safetensors"


def write_model(model: Any, folder: Path) -> Path:
    """Write a model with its configuration, adapters merged, in the names of its published form; return the file.

    Args:
        model: Of transformers or peft.
        folder: Where to.

    Raises:
        UserError: Its weights are in 4 or 8 bits.
    """
    if is_quantized(model):
        raise UserError("vllm: a model in 4 or 8 bits cannot be handed to vLLM; use the transformers engine")
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    plain = _merged(model)
    # Of several training processes transformers lets the first one save; here each has a vLLM of its own.
    plain.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        plain.save_pretrained(folder, max_shard_size="1TB")
    finally:
        del plain.should_save_on_this_rank
        if shows:
            logging.enable_progress_bar()
    return folder / WEIGHTS


def named(model: Any, folder: Path, name: str | None) -> str:
    """Return the name under which vLLM finds a model.

    Args:
        model: Of transformers or peft, or a name.
        folder: Where it is written to, if it has to be.
        name: Of the same weights as `model` has, if there are.
    """
    if isinstance(model, str):
        return model
    if name is not None:
        return name
    write_model(model, folder)
    return str(folder)


def plain_name(name: Any, revision: str | None) -> str | None:
    """Return a model's name where vLLM reads the same weights under it, None where they have to be written.

    Args:
        name: As the model was given: a folder, a hub id, or something else.
        revision: Of the hub; vLLM would take the newest one.
    """
    if not isinstance(name, str) or revision is not None or find_adapter_config_file(name) is not None:
        return None
    return name


def write_tensors(state: dict[str, Tensor], folder: Path) -> Path:
    """Write tensors with the names that transformers gives them; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    return folder / WEIGHTS


def _merged(model: Any) -> Any:
    """The model itself, or a copy with its adapters merged into the weights."""
    if not is_peft_available():
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if not any(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in model.modules()):
        return model
    plain = copy.deepcopy(model.get_base_model() if hasattr(model, "get_base_model") else model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            _replace(plain, name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            _replace(plain, name, module.modules_to_save[module.active_adapters[0]])
    plain._hf_peft_config_loaded = False  # what is left is a model like any other
    return plain


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
