"""Trains the demo's pair for 2,000 optimizer steps and watches memory, step time and files.

Memory that grows from step to step, a step that gets slower, or checkpoints that are not removed show in no short test.
`switchkd demo --output_dir DIR` makes the pair. A line of JSON on standard output is the result; what does not hold is
listed in `failed`, and the exit code is 1.

    python benchmarks/long_run.py --demo_dir runs/demo [--steps 2000]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from switchkd.data import load_records
from switchkd.training.config import SwitchConfig
from switchkd.training.trainer import SwitchTrainer

#: Resident memory may grow by this much per 100 steps after the warm-up, MB.
MOST_GROWTH = 1.0
#: How much slower the last quarter of the steps may be than the second.
MOST_SLOWER = 1.15
SAVE_TOTAL_LIMIT = 2


class Watch(TrainerCallback):
    """Memory and time at every step, files at every save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = psutil.Process()
        self.memory: list[float] = []
        self.times: list[float] = []
        self.files: list[int] = []
        self.checkpoints: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory.append(self.process.memory_info().rss / 1e6)
        self.times.append(time.perf_counter())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.files.append(sum(path.is_file() for path in self.folder.rglob("*")))
        self.checkpoints.append(len(list(self.folder.glob("checkpoint-*"))))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_completion_length", type=int, default=56)
    options = parser.parse_args(arguments)
    warm_up = options.steps // 4
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="long-run-") as place:
        config = SwitchConfig(
            output_dir=place,
            method="switch",
            divergence="forward_kl",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=1e-3,
            max_prompt_length=48,
            max_completion_length=options.max_completion_length,
            log_completions=True,
            logging_steps=max(options.steps // 100, 1),
            save_strategy="steps",
            save_steps=max(options.steps // 40, 1),
            save_total_limit=SAVE_TOTAL_LIMIT,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            log_level="error",
        )
        watch = Watch(Path(place))
        trainer = SwitchTrainer(
            model=str(options.demo_dir / "student_warm_start"),
            teacher_model=str(options.demo_dir / "teacher"),
            args=config,
            train_dataset=load_records(str(options.demo_dir / "data" / "train.jsonl")),
            callbacks=[watch],
        )
        trainer.train()
    steps = np.arange(warm_up, options.steps)
    slope = 100 * float(np.polyfit(steps, np.array(watch.memory[warm_up:]), 1)[0])
    taken = np.diff(watch.times)
    quarter = options.steps // 4
    early, late = (statistics.median(taken[first : first + quarter - 1]) for first in (quarter, 3 * quarter))
    result = {
        "benchmark": "long_run",
        "steps": options.steps,
        "memory_mb": {"after_warm_up": round(watch.memory[warm_up]), "at_the_end": round(watch.memory[-1])},
        "memory_slope_mb_per_100_steps": round(slope, 3),
        "step_s": {"second_quarter": round(early, 4), "last_quarter": round(late, 4), "ratio": round(late / early, 3)},
        "checkpoints_at_most": max(watch.checkpoints),
        "files": {"first_half_at_most": max(watch.files[: len(watch.files) // 2]), "at_most": max(watch.files)},
        "skipped_steps": trainer.skipped_steps,
        "failed": [],
    }
    result["failed"] = [
        name
        for name, holds in {
            "memory": slope < MOST_GROWTH,
            "step time": late < MOST_SLOWER * early,
            # One more than the limit while the next one is being made whole.
            "checkpoints": max(watch.checkpoints) <= SAVE_TOTAL_LIMIT,
            "files": result["files"]["at_most"] == result["files"]["first_half_at_most"],
        }.items()
        if not holds
    ]
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(bool(main()["failed"]))
