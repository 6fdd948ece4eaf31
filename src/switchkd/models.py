"""Loading models and tokenizers, with one clear line where that fails."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchkd.errors import UserError


def load_model(name_or_path: str, init_kwargs: dict[str, Any] | None = None, *, role: str = "model") -> Any:
    """Return a causal language model from a local folder or the hub.

    Args:
        name_or_path: A folder, or a hub id.
        init_kwargs: Passed to `from_pretrained`. Remote code stays off unless `trust_remote_code` is set here.
        role: What the model is for, named in errors.

    Raises:
        UserError: The model cannot be found or read.
    """
    return _load(AutoModelForCausalLM, name_or_path, init_kwargs or {}, role)


def load_tokenizer(name_or_path: str, *, role: str = "tokenizer") -> Any:
    """Return the tokenizer saved with a model; its padding token is the EOS token where it has none.

    Raises:
        UserError: The tokenizer cannot be found or read.
    """
    tokenizer = _load(AutoTokenizer, name_or_path, {}, role)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout layer to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # OPT, LLaMA and others call the functional form with the probability kept as a plain attribute.
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def check_finite(model: nn.Module, role: str, advice: str) -> None:
    """Refuse a model whose weights hold nan or inf: everything computed with it would be nan in silence.

    Args:
        model: Any module; parameters that lie elsewhere (sharded or on the meta device) are not looked at.
        role: What the model is, named in the error.
        advice: The way out, the end of the error.

    Raises:
        UserError: Says how many tensors hold such values, and names the first.
    """
    tensors = {name: value for name, value in model.named_parameters() if value.numel() and not value.is_meta}
    # One number a tensor, looked at together: a single transfer where the model lies on an accelerator.
    sums = [value.detach().abs().amax().float().cpu() for value in tensors.values() if value.is_floating_point()]
    names = [name for name, value in tensors.items() if value.is_floating_point()]
    wrong = [name for name, largest in zip(names, sums, strict=True) if not bool(largest.isfinite())]
    if wrong:
        count = f"{len(wrong)} of {len(names)} tensors of the {role}"
        raise UserError(f"{count} hold nan or inf, first {wrong[0]}; {advice}")


def with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """Return the model with a fresh adapter of `peft`, the only part that trains.

    Raises:
        UserError: `peft` is not installed.
    """
    try:
        from peft import get_peft_model
    except ImportError:
        raise UserError("peft_config needs the peft package: pip install 'switchkd[peft]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return get_peft_model(model, peft_config)


def default_device() -> torch.device:
    """Return the accelerator torch sees, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _load(factory: Any, name_or_path: str, init_kwargs: dict[str, Any], role: str) -> Any:
    path = Path(name_or_path).expanduser()
    looks_local = path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1
    if looks_local and not path.is_dir():
        raise UserError(f"{role} folder {name_or_path} does not exist; give a model folder or a hub id")
    try:
        return factory.from_pretrained(str(path) if path.is_dir() else name_or_path, **init_kwargs)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load {role} {name_or_path!r}: {reason}") from error
