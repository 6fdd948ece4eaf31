"""The arguments of `roll_out`, checked: what has one obvious meaning is taken, the rest is one line.

Taken: tensors, arrays and lists; integers of numpy and torch; 8.0 for 8. Nothing here changes what a valid call does.
"""

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from switchkd.errors import UserError, check_warping
from switchkd.models.forward import context_length, device_of
from switchkd.models.vocabulary import model_vocabulary_size
from switchkd.policies import Policy
from switchkd.rollout import Prompts

#: Ids or a mask: a tensor, an array or lists; prompts as lists may differ in length.
IdsLike = Tensor | np.ndarray | Sequence[Any]


def checked_integer(name: str, value: Any, least: int | None = None) -> int:
    """Return an integer that may come as a whole float, from numpy or from torch.

    Raises:
        UserError: It is not a whole number, or below `least`.
    """
    found = _scalar(value)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if not isinstance(found, int):
        wanted = "an integer" if least is None else f"an integer >= {least}"
        raise UserError(f"{name} must be {wanted}, got {_shown(value)}")
    if least is not None and found < least:
        raise UserError(f"{name} must be >= {least}, got {found}")
    return found


def checked_sampling(temperature: Any, top_k: Any, top_p: Any) -> tuple[float, int, float]:
    """Return the three options of sampling as numbers.

    Raises:
        UserError: One is not a number, or lies outside its range.
    """
    numbers_found = []
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        found = _scalar(value)
        if found is None:
            raise UserError(f"{name} must be a number, got {_shown(value)}")
        numbers_found.append(float(found))
    top_k = checked_integer("top_k", top_k)
    check_warping(numbers_found[0], top_k, numbers_found[1])
    return numbers_found[0], top_k, numbers_found[1]


def checked_model(role: str, model: Any) -> None:
    """Refuse anything but a language model of transformers.

    Raises:
        UserError: Says what it is instead.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UserError(
            f"the {role} must be a causal language model of transformers, got {_shown(model)}; load it with "
            "AutoModelForCausalLM.from_pretrained"
        )


def checked_policy(policy: Any) -> None:
    """Refuse anything but a policy.

    Raises:
        UserError: It is a name, a class or something else.
    """
    if not isinstance(policy, Policy):
        hint = f"; write {policy.__name__}()" if isinstance(policy, type) and issubclass(policy, Policy) else ""
        raise UserError(f"policy must be a policy such as switchkd.SwitchPolicy(), got {_shown(policy)}{hint}")


def checked_draft_length(value: Any) -> Any:
    """Return "auto" or an integer >= 1.

    Raises:
        UserError: It is neither.
    """
    if isinstance(value, str) and value == "auto":
        return value
    try:
        return checked_integer("draft_length", value, 1)
    except UserError:
        raise UserError(f'draft_length must be "auto" or an integer >= 1, got {_shown(value)}') from None


def checked_flag(name: str, value: Any) -> bool:
    """Return a truth value, which may be numpy's.

    Raises:
        UserError: It is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} must be True or False, got {_shown(value)}")
    return bool(value)


def checked_eos(eos_token_id: Any, width: int) -> list[int]:
    """Return end-of-sequence ids as a sorted list without repeats; None gives an empty list.

    Args:
        eos_token_id: An id, several, or None.
        width: How many ids the models score; one beyond could end nothing.

    Raises:
        UserError: A value is not an id of the models.
    """
    found = sorted(set(_several("eos_token_id", eos_token_id)))
    outside = [index for index in found if not 0 <= index < width]
    if outside:
        raise UserError(
            f"eos_token_id {outside[0]} lies outside the vocabulary, ids 0 to {width - 1}: no text could end with it"
        )
    return found


def checked_pad(pad_token_id: Any) -> int:
    """Return what fills completions after their end: any integer that a tensor of ids can hold.

    Raises:
        UserError: It is not an id.
    """
    found = checked_integer("pad_token_id", pad_token_id)
    if not -(2**63) <= found < 2**63:
        raise UserError(f"pad_token_id {found} does not fit 64 bits")
    return found


def checked_excluded(excluded_ids: Any, width: int) -> tuple[int, ...]:
    """Return excluded ids as a sorted tuple, those beyond the vocabulary too, which are excluded anyway.

    Raises:
        UserError: A value is not an id, or no id would be left.
    """
    found = sorted(set(_several("excluded_ids", excluded_ids)))
    if found and found[0] < 0:
        raise UserError(f"excluded_ids must be >= 0, got {found[0]}")
    if found[:width] == list(range(width)):
        raise UserError(f"excluded_ids holds every one of the {width} ids that the models share")
    return tuple(found)


def checked_row_ids(row_ids: Any, rows: int, device: torch.device) -> Tensor:
    """Return the identities of rows, int64 `[B]`; 0 .. B-1 for None.

    Raises:
        UserError: Another shape, or no integers.
    """
    if row_ids is None:
        return torch.arange(rows, device=device)
    found = _tensor("row_ids", row_ids)
    if found.shape != (rows,):
        raise UserError(f"row_ids must be [{rows}], one for each prompt, got {list(found.shape)}")
    return _integers("row_ids", found).to(device)


def checked_prompts(
    model: nn.Module, prompt_ids: Any, prompt_mask: Any, max_new_tokens: int, role: str, pad_token_id: int
) -> Prompts:
    """Return left-padded prompts that a model can read, on its device.

    Under the padding any id may stand.

    Args:
        model: Reads them.
        prompt_ids: `[B, P]`, or lists of different lengths.
        prompt_mask: Likewise, True or 1 at prompt tokens; None if nothing is padded.
        max_new_tokens: What must fit the context besides.
        role: student or teacher, named in errors.
        pad_token_id: Pads lists.

    Raises:
        UserError: Shapes, dtypes, padding or ids that cannot be.
    """
    prompts = checked_rows(prompt_ids, prompt_mask, role, pad_token_id, model_vocabulary_size(model))
    name = "prompt" if role == "student" else f"{role} prompt"
    limit = context_length(model)
    longest = int(prompts.mask.sum(-1).max())
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"{name} of {longest} tokens + {max_new_tokens} new ones exceed the {role}'s context of {limit}; "
            "shorten the prompts or the completions"
        )
    return prompts.to(device_of(model))


def checked_rows(prompt_ids: Any, prompt_mask: Any, role: str, pad_token_id: int, width: int) -> Prompts:
    """Return left-padded prompts, every row with a token at least and ids 0 to `width` - 1; see `checked_prompts`.

    Raises:
        UserError: Shapes, dtypes, padding or ids that cannot be.
    """
    if prompt_mask is None and isinstance(prompt_ids, list | tuple):
        prompts = _of_lists(prompt_ids, role, pad_token_id)
        prompt_ids, prompt_mask = prompts.ids, prompts.mask
    ids = _tensor(f"{role} prompts", prompt_ids)
    if ids.dim() != 2 or 0 in ids.shape:
        raise UserError(f"{role} prompts must be [B, P] with at least one token, got {list(ids.shape)}")
    ids = _integers(f"{role} prompts", ids)
    mask = torch.ones_like(ids) if prompt_mask is None else _tensor(f"{role} prompt mask", prompt_mask)
    if mask.shape != ids.shape:
        raise UserError(f"{role} prompt mask is {list(mask.shape)}, its prompts are {list(ids.shape)}")
    if mask.dtype != torch.bool and (mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all())):
        raise UserError(f"{role} prompt mask must hold only True and False, or 1 and 0")
    mask = mask.to(ids.device, torch.bool)
    if not bool(mask.any(-1).all()):
        row = int((~mask.any(-1)).nonzero()[0])
        raise UserError(f"{role} prompt of row {row} is empty; a model needs at least one token to continue")
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise UserError(f"{role} prompts must be padded on the left; set tokenizer.padding_side='left'")
    read = ids[mask]
    for index in (int(read.min()), int(read.max())):
        if not 0 <= index < width:
            raise UserError(f"{role} prompt holds id {index}, but the model knows only ids 0 to {width - 1}")
    return Prompts(ids, mask)


def with_readable_padding(prompts: Prompts, width: int, fill: int) -> Prompts:
    """Return prompts whose padding a model can look up, as it does though the mask hides it.

    Args:
        prompts: Ids and mask, `[B, P]`.
        width: The model's vocabulary, V.
        fill: Replaces ids outside of it.
    """
    ids = prompts.ids
    return Prompts(ids.masked_fill((ids < 0) | (ids >= width), fill), prompts.mask)


def _scalar(value: Any) -> int | float | None:
    """A number as Python has it, or None for everything else; truth values do not count as numbers."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = None if isinstance(value, Tensor) and value.is_meta else value.item()
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return None


def _several(name: str, value: Any) -> list[int]:
    """Integers from one, from several or from None."""
    if value is None:
        return []
    if isinstance(value, Tensor | np.ndarray) and value.ndim > 0:
        value = _integers(name, _tensor(name, value)).flatten().tolist()
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Tensor | np.ndarray):
        return [checked_integer(name, item) for item in value]
    return [checked_integer(name, value)]


def _tensor(name: str, value: Any) -> Tensor:
    """Return a tensor of what a tensor, an array or lists hold."""
    try:
        if isinstance(value, np.ndarray):
            value = torch.tensor(np.ascontiguousarray(value))
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
            value = torch.stack(list(value))
        elif not isinstance(value, Tensor):
            value = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{name} must be a tensor, an array or lists of equal length, got {_shown(value)}") from error
    if value.is_meta or value.layout != torch.strided:
        raise UserError(f"{name} must be a dense tensor with values, got {_shown(value)}")
    return value


def _of_lists(rows: Sequence[Any], role: str, pad_token_id: int) -> Prompts:
    """Prompts of one list, or tensor, of ids for each row."""
    lists = []
    for number, row in enumerate(rows):
        if isinstance(row, list | tuple) and all(type(item) is int for item in row):
            lists.append(row)
        else:
            ids = _tensor(f"{role} prompt of row {number}", row)
            if ids.dim() != 1:
                raise UserError(f"{role} prompts must be [B, P] or a list of ids for each row, got {_shown(rows)}")
            lists.append(_integers(f"{role} prompt of row {number}", ids).tolist())
        if not lists[-1]:
            raise UserError(f"{role} prompt of row {number} is empty; a model needs at least one token to continue")
    if not lists:
        raise UserError(f"{role} prompts must be [B, P] with at least one token, got no rows")
    try:
        return Prompts.of(lists, pad_token_id)
    except (ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{role} prompts hold an id that does not fit 64 bits") from error


def _integers(name: str, values: Tensor) -> Tensor:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise UserError(f"{name} must hold integers, got {str(values.dtype).removeprefix('torch.')}")
    return values.to(torch.int64)


def _shown(value: Any) -> str:
    """A value in a few words on one line."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of {value.dtype} {list(value.shape)}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
