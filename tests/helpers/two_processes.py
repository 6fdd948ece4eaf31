"""Trains a few tiny runs under whatever launch it was started with; rank 0 writes what came out to a file.

Not a test: `test_distributed.py` starts it once alone and once as two processes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from helpers.tiny import EOS_ID, RAGGED_ROWS, build_gpt2, build_trainer
from switchkd.training.skipping import SKIPPED_FILE

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
    "skipped": {"method": "kd"},
}


def spoil(trainer: Any) -> None:
    """Make the loss of every micro-batch nan that holds a row of "Q?"; one process of two has it."""
    loss, ids = trainer.step_loss.loss, trainer.processing_class("Q?")["input_ids"]

    def spoiled(model: Any, teacher: Any, inputs: Any, *args: Any) -> Any:
        rows = [
            row[read.bool()].tolist() for row, read in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        bad = any(row[: len(ids)] == ids for row in rows)
        return loss(model, teacher, inputs, *args) * (float("nan") if bad else 1.0)

    object.__setattr__(trainer.step_loss, "loss", spoiled)


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
        if name == "skipped":
            spoil(trainer)
        trainer.train()
        if trainer.is_world_process_zero() and (skipped := folder / f"{name}-{processes}" / SKIPPED_FILE).is_file():
            lines = [json.loads(line) for line in skipped.read_text().splitlines()]
            results["rows"] = sorted((row["step"], row["prompt"]) for row in lines)
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
