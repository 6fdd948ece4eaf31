"""Who writes for the student: the model that trains, or its inference copy where that one cannot, or slowly."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from switchkd.errors import UserError
from switchkd.models.copy import InferenceCopy, uncopied_reason

logger = logging.getLogger(__name__)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Writer:
    """Gives, for every rollout, a model with the student's weights of that moment.

    Args:
        accelerator: Of the trainer; its autocast holds where the student itself writes.
        copies: `rollout_copy`: auto, always or never.
        dtype: `rollout_dtype`: the copy's precision by name; None is that of autocast, else the student's.
        offload: Keep the copy in main memory between rollouts.
        sharded: Whether the student's weights are spread over the processes.

    Attributes:
        copy: The inference copy, None before the first rollout and where the student itself writes.
    """

    def __init__(self, accelerator: Any, *, copies: str, dtype: str | None, offload: bool, sharded: bool) -> None:
        if sharded and copies == "never":
            raise UserError("rollout_copy=never: a sharded student cannot write alone; set auto")
        self.accelerator, self.copies, self.offload, self.sharded = accelerator, copies, offload, sharded
        autocast = AUTOCAST.get(accelerator.mixed_precision) if accelerator.native_amp else None
        self.autocasts = autocast is not None
        self.dtype: torch.dtype | None = getattr(torch, dtype) if dtype else autocast
        self.copy: InferenceCopy | None = None

    def reason(self, student: nn.Module) -> str | None:
        """Return why a copy of the student writes, None where it writes itself.

        Raises:
            UserError: A copy is needed or wanted and cannot be made.
        """
        if self.copies == "never":
            return None
        dtypes = {parameter.dtype for parameter in student.parameters() if parameter.is_floating_point()}
        reasons = {
            "its weights are spread over the processes": self.sharded,
            "it trains under autocast": self.autocasts,
            "it has adapters, which are merged in the copy": hasattr(student, "get_base_model"),
            f"rollout_dtype is {str(self.dtype).removeprefix('torch.')}": self.dtype is not None
            and dtypes != {self.dtype},
            "rollout_copy is always": self.copies == "always",
        }
        reason = next((text for text, holds in reasons.items() if holds), None)
        obstacle = None if reason is None else uncopied_reason(student)
        if obstacle is None:
            return reason
        if self.sharded or self.copies == "always":
            raise UserError(f"no copy of the student can write its rollouts: {obstacle}")
        return None

    @contextlib.contextmanager
    def of(self, student: nn.Module) -> Iterator[nn.Module]:
        """Give the model that writes now, in the precision it writes in; sharded, all processes must ask for it.

        Args:
            student: The model in training, wrapped or not.
        """
        bare = self.accelerator.unwrap_model(student)
        if self.copy is None and (reason := self.reason(bare)) is not None:
            # With the wrappers: one of them is FSDP1's outermost unit.
            self.copy = InferenceCopy(student, dtype=self.dtype, device=self.accelerator.device)
            dtype = str(next(self.copy.model.parameters()).dtype).removeprefix("torch.")
            logger.info(f"rollouts are written by a copy of the student, {self.copy.nbytes:,} bytes, {dtype}: {reason}")
        if self.copy is None:
            with self.accelerator.autocast():
                yield bare
            return
        try:
            yield self.copy.refresh(student)
        finally:
            if self.offload:
                self.copy.offload()

    def answering(self, student: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """Give the model whose answers are scored: the student as it is, a copy only where it is sharded."""
        return self.of(student) if self.sharded else contextlib.nullcontext(self.accelerator.unwrap_model(student))
