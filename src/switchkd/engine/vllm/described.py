"""Policies and rollouts as JSON: what goes to an engine in another process, and what comes back."""

import base64
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.plugins import load_object
from switchkd.policies import Policy
from switchkd.rollout import Author, Prompts, Rollout

#: Columns of the record of a rollout, one entry a token: how each is stored on the way.
COLUMNS = {
    "row": np.int64,
    "position": np.int64,
    "token": np.int64,
    "drafted": np.int64,
    "author": np.uint8,
    "divergence": np.float32,
    "threshold": np.float32,
}

Columns = dict[str, np.ndarray[Any, Any]]


def described(policy: Policy) -> dict[str, Any]:
    """Return a policy as JSON: where its class is found, and its options.

    Args:
        policy: One of this package, or one of the user's own whose options are attributes of the same names.

    Raises:
        UserError: Its class cannot be imported elsewhere, or an option is neither a number, text nor a policy.
    """
    kind = type(policy)
    if dataclasses.is_dataclass(policy):
        names = [option.name for option in dataclasses.fields(policy) if option.init]
    else:
        names = list(kind.options())
    options = {name: _plain(kind, name, getattr(policy, name, policy)) for name in names}
    return {"class": _place(kind), "options": options}


def policy_of(description: dict[str, Any]) -> Policy:
    """Return the policy that `described` has described."""
    options = {
        name: policy_of(value) if isinstance(value, dict) else value for name, value in description["options"].items()
    }
    found: Policy = load_object("policy", description["class"])(**options)
    return found


def _place(kind: type) -> str:
    """Where a class is found: `module:Class` in this package, `path/to/file.py:Class` elsewhere."""
    if kind.__module__.partition(".")[0] == "switchkd":
        return f"{kind.__module__}:{kind.__qualname__}"
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or kind.__module__ == "__main__" or not kind.__qualname__.isidentifier():
        raise UserError(
            f"policy {kind.__qualname__} cannot be found by another process: define it at the top of a file of its own "
            "and import it from there, or use the transformers engine"
        )
    return f"{Path(file).resolve()}:{kind.__name__}"


def _plain(kind: type, name: str, value: Any) -> Any:
    if isinstance(value, Policy) and type(value) is not kind:
        return described(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    what = "has no attribute of that name" if type(value) is kind else f"is {type(value).__name__}"
    raise UserError(
        f"policy {kind.__name__}: option {name} {what}, which cannot be sent to a vLLM process; let it be a number or "
        "text, or use the transformers engine"
    )


def packed(columns: Columns) -> dict[str, str]:
    """Return columns as base64 of their bytes, little-endian."""
    return {name: base64.b64encode(_little(columns[name], kind).tobytes()).decode() for name, kind in COLUMNS.items()}


def unpacked(texts: dict[str, str]) -> Columns:
    """Return the columns that `packed` has packed.

    Raises:
        ValueError: A column is missing, or not as long as the others.
    """
    if texts.keys() != COLUMNS.keys():
        raise ValueError(f"expected the columns {', '.join(COLUMNS)}, got {', '.join(texts)}")
    found = {
        name: np.frombuffer(base64.b64decode(texts[name]), dtype=np.dtype(kind).newbyteorder("<")).astype(kind)
        for name, kind in COLUMNS.items()
    }
    if len({len(column) for column in found.values()}) != 1:
        raise ValueError("the columns of a rollout's record differ in length")
    return found


def rollout_of(columns: Columns, prompts: Prompts, pad: int, *, keeps_drafted: bool) -> Rollout:
    """Return the rollout of a record.

    Args:
        columns: Ordered by row and position.
        prompts: Of all its rows.
        pad: Fills completions after their end.
        keeps_drafted: Whether `drafted_ids` is wanted.
    """
    device = prompts.ids.device
    lengths = np.bincount(columns["row"], minlength=len(prompts))
    shape = (len(prompts), int(lengths.max()))

    def spread(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        whole = torch.full(shape, fill, dtype=dtype)
        whole[torch.from_numpy(columns["row"]), torch.from_numpy(columns["position"])] = torch.from_numpy(
            columns[name]
        ).to(dtype)
        return whole.to(device)

    return Rollout(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        completion_ids=spread("token", pad, torch.int64),
        completion_mask=(torch.arange(shape[1]) < torch.from_numpy(lengths).unsqueeze(1)).to(device),
        author=spread("author", int(Author.NONE), torch.uint8),
        divergence=spread("divergence", math.nan, torch.float32),
        threshold=spread("threshold", math.nan, torch.float32),
        drafted_ids=spread("drafted", pad, torch.int64) if keeps_drafted else None,
    )


def _little(column: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(column, dtype=np.dtype(kind).newbyteorder("<"))
