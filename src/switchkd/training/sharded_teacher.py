"""A teacher whose weights are spread over the processes by FSDP2: all of them make every pass of it together.

Each process writes its own text, of its own length, and so would ask for its own number of passes and wait for ever.
Before every pass one number is summed over the processes: who asks. One that has nothing left to ask keeps step with
empty passes until the sum is 0.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from switchkd.errors import UserError
from switchkd.models.heads import output_head
from switchkd.models.loading import is_quantized


class ShardedTeacher:
    """Spreads a frozen teacher over all processes and keeps its passes in step.

    The model stays the object that it is, its parameters become `DTensor`s. Whatever reads it through its own forward
    needs to know nothing of this, as long as it does so inside `in_step`, which all processes enter the same number of
    times.

    Args:
        model: Whole and the same in every process, in eval mode, not trainable; its layers are moved to the device one
            by one.
        device: Where its passes run.

    Raises:
        UserError: Its weights cannot be spread.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if is_quantized(model) or hasattr(model, "hf_device_map"):
            raise UserError(
                "teacher_sharding=fsdp2 spreads plain weights: leave out quantization_config and device_map of "
                "teacher_model_init_kwargs, or teacher_sharding"
            )
        output_head(model)  # measured while the weights are in one place
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        names = set(getattr(model, "_no_split_modules", None) or ())
        for layer in [module for module in model.modules() if type(module).__name__ in names]:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        # In front of FSDP2's own hooks, which gather: a process that keeps step sums first, too.
        model.register_forward_pre_hook(self._ask, prepend=True)
        self.model, self.device = model, device
        self._keeps_step = False

    def _ask(self, *_: Any) -> None:
        if not self._keeps_step:
            distributed.all_reduce(torch.ones((), dtype=torch.int32, device=self.device))

    @contextlib.contextmanager
    def in_step(self) -> Iterator[Any]:
        """Give the teacher; at the end wait for the processes that still ask it, and let its output layer go."""
        yield self.model
        # Not after an error: whoever makes one tells the others, and none of them waits for a pass.
        self.keep_step()

    @torch.no_grad()
    def keep_step(self) -> None:
        """Make empty passes until no process asks for one any more."""
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        self._keeps_step = True
        try:
            while self._some_ask():
                self.model(input_ids=token, use_cache=False)
        finally:
            self._keeps_step = False
        self.model.reshard()  # a loss may have gathered its output layer

    def _some_ask(self) -> bool:
        asking = torch.zeros((), dtype=torch.int32, device=self.device)
        distributed.all_reduce(asking)
        return bool(asking)
