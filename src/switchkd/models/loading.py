"""Loading models and tokenizers, with one clear line where that fails."""

import contextlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import cached_file, is_bitsandbytes_available, is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from switchkd.errors import UserError
from switchkd.models.hub import cache_only_if_unreachable, unreachable_reason
from switchkd.models.vocabulary import check_tokenizers

Loaded = TypeVar("Loaded")

# Whatever a library raises on files that are absent, cut off, not of their kind or do not fit the memory.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError, EOFError),
    *(SafetensorError, pickle.UnpicklingError),
)
_PICKLED = (
    "it has no weights in safetensors. Pickled ones (.bin, .pt) can run code when they are read: convert them, with "
    "save_pretrained, or set allow_pickled_weights if you trust their source"
)
SAFE_ADAPTER = "adapter_model.safetensors"
_PLACE = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
# Masks and position tables that old checkpoints hold and newer code computes.
_COMPUTED = re.compile(r"(^|\.)((attn|attention)\.(bias|masked_bias|causal_mask)|inv_freq|position_ids)$")


def load_model(name_or_path: str, init_kwargs: dict[str, Any] | None = None, *, role: str = "model") -> Any:
    """Return a causal language model from a local folder or the hub, every weight of it read from there.

    An adapter of `peft` is loaded together with the base model that it names.

    Args:
        name_or_path: A folder, or a hub id.
        init_kwargs: Passed to `from_pretrained`. Remote code stays off unless `trust_remote_code` is set here, pickled
            weights are refused unless `use_safetensors` is None or False here.
        role: What the model is for, named in errors.

    Raises:
        UserError: The model cannot be found or read, its weights are pickled, or its file lacks a tensor, holds one
            that the model has not, or one of another shape: transformers would put random weights in its place.
    """
    # Said explicitly: where nothing is said, transformers asks on a terminal whether to run the code.
    init_kwargs = {"trust_remote_code": False, "use_safetensors": True, **(init_kwargs or {})}
    # Else transformers asks a service of the hub to convert pickled weights, and loads what that made of them.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    path = local_folder(name_or_path, role)
    source = str(path or name_or_path)
    # Where an adapter's files are looked for, as for those of a model.
    place = {name: init_kwargs[name] for name in _PLACE if name in init_kwargs}
    adapter = _reading(f"{role} {name_or_path!r}", source, lambda: _adapter_config(source, place))
    if adapter is None:
        model = _complete_model(source, init_kwargs, f"{role} {name_or_path!r}")
        if next(model.parameters()).dtype == torch.float16 and default_device().type == "cpu":
            warnings.warn(
                f"{role} is in float16, which a CPU computes slowly and which overflows: use float32 or bfloat16"
            )
        return model
    if not is_peft_available():
        raise UserError(f"{role} {name_or_path!r} is an adapter, which needs peft: pip install 'switchkd[peft]'")
    named = f"adapter {name_or_path!r}"
    if (Path(source) / "config.json").is_file():
        # A whole model and an adapter in one folder. Adapters are looked for below `subfolder`: first without it.
        alone = {**init_kwargs, "adapter_kwargs": {"subfolder": "no adapter yet"}}
        model = _complete_model(source, alone, f"{role} {name_or_path!r}")
    else:
        model = _base_of(adapter, init_kwargs, named)

    def read_adapter() -> Any:
        file = cached_file(source, SAFE_ADAPTER, **place, _raise_exceptions_for_missing_entries=False)
        if file is None and init_kwargs["use_safetensors"]:
            raise UserError(f"cannot load {named}: {_PICKLED}")
        as_pickle = {} if file is not None else {"use_safetensors": False}
        return model.load_adapter(source, adapter_kwargs=place, ignore_mismatched_sizes=True, **as_pickle)

    found = _reading(named, source, read_adapter)
    _check_complete(model, vars(found), named, "save the adapter again with the version of peft that reads it here")
    return model


def load_tokenizer(
    name_or_path: str,
    *,
    role: str = "tokenizer",
    init_kwargs: dict[str, Any] | None = None,
    template: str | None = None,
) -> Any:
    """Return the tokenizer saved with a model; its padding token is the EOS token where it has none.

    Args:
        name_or_path: A folder, or a hub id.
        role: What it is for, named in errors.
        init_kwargs: Passed to `from_pretrained`. Remote code stays off unless `trust_remote_code` is set here.
        template: As `set_chat_template` takes it.

    Raises:
        UserError: The tokenizer, or the chat template, cannot be found or read.
    """
    source = str(local_folder(name_or_path, role) or name_or_path)
    given = {name: value for name, value in (init_kwargs or {}).items() if value is not None}
    options = {"trust_remote_code": False, **given}
    tokenizer = _reading(f"{role} {name_or_path!r}", source, lambda: AutoTokenizer.from_pretrained(source, **options))
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    set_chat_template(tokenizer, template)
    return tokenizer


def set_chat_template(tokenizer: Any, template: str | None) -> None:
    """Give a tokenizer another chat template, as TRL's `chat_template_path` does.

    Args:
        tokenizer: A Hugging Face tokenizer; it is changed.
        template: A file of jinja, or the folder or hub id of a tokenizer that has one; None changes nothing.

    Raises:
        UserError: It cannot be read, or has no chat template.
    """
    if template is None:
        return
    path = Path(template).expanduser()
    if path.is_file() or path.suffix in (".jinja", ".jinja2", ".txt"):
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat_template_path: cannot read {template}: {error}") from error
        return
    found = load_tokenizer(template, role="chat_template_path").chat_template
    if not found:
        raise UserError(f"chat_template_path: the tokenizer of {template} has no chat template")
    tokenizer.chat_template = found


def excluded_with(tokenizer: Any, teacher: str, *, init_kwargs: dict[str, Any] | None = None) -> list[int]:
    """Return the ids that only the student's tokenizer or only the teacher's knows, see `check_tokenizers`.

    Args:
        tokenizer: The student's.
        teacher: Folder or hub id of the teacher, with its tokenizer.
        init_kwargs: Passed to `from_pretrained` of the teacher's tokenizer.

    Raises:
        UserError: The teacher's tokenizer cannot be read, or the two give one id two meanings.
    """
    return check_tokenizers(tokenizer, load_tokenizer(teacher, role="teacher tokenizer", init_kwargs=init_kwargs))


def with_adapter(model: nn.Module, peft_config: Any, *, gradient_checkpointing: bool = False) -> nn.Module:
    """Return the model with a fresh adapter of `peft`, the only part that trains.

    A model in 4 or 8 bits is prepared as `peft` asks for it (QLoRA): norms and output layer in float32.

    Args:
        model: The student.
        peft_config: A `peft` config.
        gradient_checkpointing: Whether training computes activations again in the backward pass.

    Raises:
        UserError: `peft` is not installed.
    """
    try:
        from peft import get_peft_model, prepare_model_for_kbit_training
    except ImportError:
        raise UserError("peft_config needs the peft package: pip install 'switchkd[peft]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if is_quantized(model):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
        return get_peft_model(model, peft_config)


def is_quantized(model: Any) -> bool:
    """Return whether a model's weights are in 4 or 8 bits, so that only an adapter of it can train."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def quantization(*, in_4bit: bool, in_8bit: bool, **options: Any) -> Any:
    """Return the `BitsAndBytesConfig` of two switches, None where both are off; 4 bits compute in bfloat16.

    Args:
        in_4bit: `load_in_4bit`.
        in_8bit: `load_in_8bit`.
        options: Further options of 4 bits.

    Raises:
        UserError: Both are set, or bitsandbytes is not installed.
    """
    if not (in_4bit or in_8bit):
        return None
    if in_4bit and in_8bit:
        raise UserError("load_in_4bit and load_in_8bit exclude each other; give one")
    if not is_bitsandbytes_available():
        raise UserError("load_in_4bit and load_in_8bit need bitsandbytes: pip install 'switchkd[quantization]'")
    if in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)


def default_device() -> torch.device:
    """Return the accelerator torch sees, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def local_folder(name_or_path: str, role: str) -> Path | None:
    """Return the folder of that name, or None for a hub id.

    Raises:
        UserError: The name is that of a folder, and there is none.
    """
    path = Path(name_or_path).expanduser()
    looks_local = path.is_absolute() or name_or_path.startswith((".", "runs/")) or name_or_path.count("/") > 1
    if looks_local and not path.is_dir():
        raise UserError(f"{role} folder {name_or_path} does not exist; give a model folder or a hub id")
    return path if path.is_dir() else None


def _reading(what: str, source: str, read: Callable[[], Loaded]) -> Loaded:
    """Return what `read` returns; an error is reported in one line."""
    from_hub = not Path(source).is_dir()
    try:
        with cache_only_if_unreachable() if from_hub else contextlib.nullcontext():
            return read()
    except UserError:
        raise
    except _UNREADABLE as error:
        if from_hub and (unreachable := unreachable_reason(error)):
            raise UserError(f"cannot load {what}: no such folder here, {unreachable}") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which only runs with trust_remote_code; read that code first"
        # What transformers says of a folder and of a place on the hub.
        no_file = "no file named model.safetensors" in reason and any(Path(source).glob("*.[bp][ti]*"))
        if no_file or "use_safetensors=True" in reason:
            reason = _PICKLED
        if isinstance(error, SafetensorError | pickle.UnpicklingError | EOFError):
            reason = f"its weight file is damaged ({reason}); copy or download it again"
        raise UserError(f"cannot load {what}: {reason}") from error


def _complete_model(source: str, init_kwargs: dict[str, Any], what: str) -> Any:
    """Load a model without adapters and refuse it unless every weight came from its file."""
    # Other shapes are listed like the rest, instead of an error that names none.
    options = {**init_kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = _reading(what, source, lambda: AutoModelForCausalLM.from_pretrained(source, **options))
    model, found = loaded
    remedy = (
        "config.json and the weight file do not belong together or the file is not whole: copy both again, or load the "
        "model yourself and pass the object"
    )
    _check_complete(model, found, what, remedy)
    for module in model.modules():
        # For such CPUs bitsandbytes (0.50) reorders 4-bit weights in their first pass. Whoever asks for a state_dict
        # after that, to save an adapter or to compare checksums, gets and leaves behind scales in another order.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return model


def _check_complete(model: nn.Module, found: dict[str, Any], what: str, remedy: str) -> None:
    """Refuse a model whose weights do not all come from its file, and a file whose tensors do not all go into it.

    Args:
        model: As loaded.
        found: What transformers reports: `missing_keys`, `unexpected_keys`, `mismatched_keys`.
        what: Named in the error.
        remedy: The way out.
    """
    buffers = {name for name, _ in model.named_buffers()}
    # A tied head is the embedding once more: where that is missing it is named already.
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    problems = {
        "lacks": set(found["missing_keys"]) - tied,
        "has in another shape": {name for name, *_ in found["mismatched_keys"]},
        "has and the model has not": {
            name for name in set(found["unexpected_keys"]) - buffers if not _COMPUTED.search(name)
        },
    }
    faults = [f"{_first(names)} which the file {problem}" for problem, names in problems.items() if names]
    if faults:
        raise UserError(f"cannot load {what}: {'; '.join(faults)}; {remedy}")


def _first(names: Iterable[str], shown: int = 3) -> str:
    ordered = sorted(names)
    more = ", ..." if len(ordered) > shown else ""
    return f"{len(ordered)} tensor{'s' if len(ordered) > 1 else ''} ({', '.join(ordered[:shown])}{more})"


def _adapter_config(source: str, place: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of the adapter that a folder or hub id holds, or None."""
    file = find_adapter_config_file(source, **place)
    if file is None:
        return None
    config: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    return config


def _base_of(adapter: dict[str, Any], init_kwargs: dict[str, Any], named: str) -> Any:
    """Load the base model of an adapter."""
    base = adapter.get("base_model_name_or_path")
    way_out = "write the right place into base_model_name_or_path of its adapter_config.json"
    if not base:
        raise UserError(f"{named} names no base model; {way_out}")
    if Path(base).expanduser().is_dir():
        return load_model(base, init_kwargs, role=f"base model of {named},")
    try:
        return load_model(base, init_kwargs, role="base model")
    except UserError as error:
        reason = str(error.__cause__).splitlines()[0] if error.__cause__ else "no such folder"
        raise UserError(f"{named} names base {base!r}, which cannot be found ({reason}); {way_out}") from error
