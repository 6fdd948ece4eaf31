"""What is known of a model: found out once, kept as long as the model lives."""

import weakref
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


@dataclass
class Known:
    """What was found out about one model.

    Attributes:
        head: Scale and soft-cap between output layer and logits, or why there is no reading them; None: not measured.
        refusals: Length of a probe -> why the model cannot be used at all, and why not beside longer rows.
        row_faults: Length of a probe of rows each at its own position -> what was wrong with it, None if nothing.
        lean: Whether the lean decoder gives the logits of the model's own forward.
        rereads: Whether its own cache changes its logits, so that everything is read anew for every token.
        warned: Whether it was said that it is decoded token by token.
        drafting: Its last teacher and the chooser of draft lengths of the pair.
        session: What the static decoder keeps for it between rollouts, tensors and graphs.
    """

    head: tuple[float, float | None] | str | None = None
    refusals: dict[int, tuple[str | None, str | None]] = field(default_factory=dict)
    row_faults: dict[int, str | None] = field(default_factory=dict)
    lean: bool = False
    rereads: bool = False
    warned: bool = False
    drafting: tuple[weakref.ref[nn.Module], Any] | None = None
    session: Any = None


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known(model: nn.Module) -> Known:
    """Return what is known of a model, empty at first."""
    record = _KNOWN.get(model)
    if record is None:
        record = _KNOWN[model] = Known()
    return record
