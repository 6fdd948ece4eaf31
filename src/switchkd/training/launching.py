"""The processes of one training: what spreads the student over them, and sums over all of them."""

import logging
import math
import os
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
from torch import Tensor
from transformers import Trainer

from switchkd.errors import UserError
from switchkd.training.config import SwitchConfig

logger = logging.getLogger(__name__)


class LaunchedTrainer(Trainer):
    """A Trainer that knows how it was launched; a subclass has the configuration."""

    args: SwitchConfig

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; on CPUs too FSDP and ZeRO shard, where accelerate alone would do DDP and not say so."""
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        if self.args.deepspeed_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            _refuse_beside_gpu("DeepSpeed")
            plugin: Any = self.args.deepspeed_plugin
            plugin.set_mixed_precision(self.accelerator.mixed_precision)
            state.deepspeed_plugins, self.is_deepspeed_enabled = plugin, True
            _spread_as(state, DistributedType.DEEPSPEED)
            plugin.select(_from_accelerator_state=True)
        # accelerate itself sets this in processes that it launches, and where a plugin is given.
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if asked and state.distributed_type == DistributedType.MULTI_CPU:
            _refuse_beside_gpu("FSDP")
            plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            refuse_unsaved(plugin)
            if self.accelerator.mixed_precision != "no":
                plugin.set_mixed_precision(self.accelerator.mixed_precision)
            state.fsdp_plugin, self.is_fsdp_enabled = plugin, True
            _spread_as(state, DistributedType.FSDP)
        if self.is_fsdp_enabled and state.fsdp_plugin.cpu_ram_efficient_loading:
            raise UserError(
                "fsdp_cpu_ram_efficient_loading leaves the teacher of every process but the first without weights: set "
                "it to false"
            )

    @property
    def sharding(self) -> str | None:
        """What spreads the student's weights over the processes: fsdp1, fsdp2, zero3, or None."""
        if self.is_fsdp_enabled:
            return "fsdp2" if self.accelerator.is_fsdp2 else "fsdp1"
        return "zero3" if self.zero_stage == 3 else None

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's ZeRO stage, 0 to 3; None without DeepSpeed."""
        return int(self.accelerator.state.deepspeed_plugin.zero_stage) if self.is_deepspeed_enabled else None

    @property
    def has_flat_parameters(self) -> bool:
        """Whether FSDP1 puts flat parameters in the place of the student's own."""
        return self.sharding == "fsdp1" and not self.accelerator.state.fsdp_plugin.use_orig_params

    def launched_as(self) -> str:
        """Return what holds the processes together, in words."""
        state: Any = self.accelerator.state
        if self.args.world_size == 1:
            return "one process"
        if self.sharding is not None:
            names = {"fsdp1": "FSDP1", "fsdp2": "FSDP2", "zero3": "DeepSpeed ZeRO-3"}
            name = f"{names[self.sharding]}: the student is sharded"
        elif self.zero_stage is not None:
            name = f"DeepSpeed ZeRO-{self.zero_stage}"
        else:
            name = "DDP: every process has the whole student"
        return f"{self.args.world_size} processes, {name} ({torch.distributed.get_backend()}, {state.device.type})"

    def _gathered(self, values: Tensor) -> Tensor:
        """Return `[n]` of all processes, whose n may differ."""
        padded = self.accelerator.pad_across_processes(values.to(self.args.device), pad_index=math.nan)
        values = self.accelerator.gather(padded)
        return values[~values.isnan()]


def _refuse_beside_gpu(what: str) -> None:
    if torch.accelerator.is_available():
        raise UserError(f"{what} with use_cpu beside a GPU is not supported: hide it (CUDA_VISIBLE_DEVICES='')")


def refuse_unsaved(plugin: Any) -> None:
    """Refuse FSDP1 on CPUs, which trains there; what accelerate does to save it makes PyTorch crash.

    Raises:
        UserError: It is FSDP1.
    """
    if plugin.fsdp_version == 1:
        raise UserError("FSDP1 on CPUs is not supported, because PyTorch cannot save it there: use FSDP2")


def _spread_as(state: Any, kind: DistributedType) -> None:
    """Say it where accelerate itself does: every new state begins with what the partial one says."""
    for shared in (state, PartialState()):
        shared.distributed_type = kind
        shared.device = torch.device("cpu")  # FSDP1 takes no other name of it, such as cpu:0
