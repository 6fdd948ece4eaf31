"""Vocabulary-sized functions that a compiler may fuse: thirty passes over memory become one or two.

The functions as they stand are the oracle, and all that runs on a CPU. Noise and divergence are chains of element-wise
operations on `[N, V]`; on a GPU each of them alone reads and writes the whole of it, and together they cost as much as
a small model's pass.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

_FUSING: ContextVar[bool] = ContextVar("fusing", default=False)


@contextlib.contextmanager
def fusing(enabled: bool = True) -> Iterator[None]:
    """Call compiled versions of the functions marked `fusible` inside this context; TORCH_COMPILE_DISABLE=1 forbids."""
    token = _FUSING.set(enabled)
    try:
        yield
    finally:
        _FUSING.reset(token)


def fusible(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function of tensors and numbers that keeps nothing; it is compiled when `fusing` first calls it."""
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if not _FUSING.get():
            return function(*arguments)
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(*arguments)

    return call
