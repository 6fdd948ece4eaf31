"""Trains a few tiny runs under whatever launch it was started with; rank 0 writes what came out to a file.

Not a test: `test_distributed.py` starts it once alone and once as two processes.
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset

from helpers.tiny import EOS_ID, RAGGED_ROWS, build_gpt2, build_trainer

#: name -> options; 7 evaluation rows, so that the last batch of two processes is filled up.
RUNS = {
    "kd": {"method": "kd"},
    "switch": {"initial_threshold": 0.42, "schedule": "constant", "draft_length": "3"},
    "share_held": {
        "initial_threshold": 0.42,
        "schedule": "constant",
        "draft_length": "3",
        "target_teacher_share": 0.3,
    },
    "accumulated": {
        "initial_threshold": 0.42,
        "schedule": "constant",
        "draft_length": "3",
        "gradient_accumulation_steps": 2,
    },
}


def main(folder: Path, processes: int) -> None:
    """Run everything on a global batch of 4, however many processes share it."""
    results = {}
    for name, options in RUNS.items():
        teacher = build_gpt2(seed=1)
        teacher.generation_config.eos_token_id = [EOS_ID, *range(40, 55)]
        trainer = build_trainer(
            folder / f"{name}-{processes}",
            build_gpt2(),
            teacher,
            per_device_train_batch_size=4 // processes,
            per_device_eval_batch_size=4 // processes,
            eval_dataset=Dataset.from_list(RAGGED_ROWS[:7]),
            max_steps=2,
            learning_rate=0.1,
            ddp_backend="gloo" if processes > 1 else None,
            ddp_find_unused_parameters=False if processes > 1 else None,
            **options,
        )
        assert trainer.args.world_size == processes
        trainer.train()
        metrics = trainer.evaluate()
        results[name] = {
            "parameters": {key: value.detach() for key, value in trainer.model.named_parameters()},
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "eval": metrics,
        }
    if trainer.is_world_process_zero():
        torch.save(results, folder / f"result-{processes}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    # Threads of gloo that still run when the interpreter ends abort the process now and then.
    os._exit(0)
