"""Trains with rollouts from one vLLM, as one of several processes; not a test, others start it.

Arguments: a folder, and options of the training as JSON. The first process writes its losses and weights there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from helpers.pairs import make_pair
from helpers.tiny import RAGGED_ROWS, build_trainer


def main(folder: Path, processes: int, *, shape: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Return the losses and the weights after two steps on a global batch of four rows."""
    arguments = {
        "train_dataset": Dataset.from_list([*RAGGED_ROWS[1:], {"prompt": "Last one", "completion": "yes"}]),
        "per_device_train_batch_size": 4 // processes,
        "max_steps": 2,
        "learning_rate": 0.1,
        "max_completion_length": 6,
        "initial_threshold": 0.05,
    }
    if processes > 1:
        arguments |= {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    trainer = build_trainer(folder, *make_pair("llama", noise=0.4, **(shape or {})), **(arguments | options))
    trainer.train()
    engine = trainer.text.engine
    if engine is not None:
        engine.close()
    return {
        "processes": trainer.args.world_size,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {name: value.detach().clone() for name, value in trainer.model.named_parameters()},
    }


def assert_trained_alike(found: dict[str, Any], wanted: dict[str, Any], *, rel: float, atol: float) -> None:
    """Two processes took the two steps that one did: losses within `rel`, weights within `atol`."""
    assert (found["processes"], wanted["processes"], len(found["losses"])) == (2, 1, 2)
    assert found["losses"] == pytest.approx(wanted["losses"], rel=rel)
    for name, value in wanted["weights"].items():
        assert torch.allclose(found["weights"][name], value, atol=atol), name


if __name__ == "__main__":
    place, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    result = main(place, 2, **given)
    if torch.distributed.get_rank() == 0:
        torch.save(result, place / "result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
