"""Time of a whole optimizer step (rollout, loss, update) against TRL's on-policy `DistillationTrainer`.

    python benchmarks/step.py --pair tinystories --rounds 5
    python benchmarks/step.py --pair gpt2 --rounds 2 --steps 3 --batch 8 --completion 64
    python benchmarks/step.py --pair gpt2 --memory --batch 8 --completion 512

Contenders, all with reverse KL, the same models, prompts, batch, length limit and optimizer:

    trl          TRL's DistillationTrainer, transformers generation (pip install "switchkd[bench]")
    student      `opd` of this package: the student writes everything
    switch_10    `switch` with its constant threshold calibrated to a teacher share of 10%
    switch_53    likewise to 53%

Each round trains every contender for `--warmup` + `--steps` steps on fresh copies; rounds are interleaved, medians over
all measured steps are compared. Completions end where they end; their mean length is reported. `--memory` runs one
`switch_53` step in a process of its own and reports its highest resident memory. The last line of stdout is one JSON
object.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pairs import gpt2_pair, tinystories_pair
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

from switchkd import SwitchConfig, SwitchPolicy, SwitchTrainer
from switchkd.training.calibration import calibrate

SHARES = {"switch_10": 0.10, "switch_53": 0.53}
CONTENDERS = ("trl", "student", *SHARES)


class Clock(TrainerCallback):
    """Seconds of every optimizer step, its data included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


class Bench:
    """One pair of models and everything that all contenders share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if options.pair == "tinystories":
            self.student, self.teacher, prompts = tinystories_pair(options.shared)
            self.tokenizer = AutoTokenizer.from_pretrained(options.shared / "models" / "tinystories-char-teacher")
        else:
            self.student, self.teacher, prompts = gpt2_pair(dtype=torch.float32)
            self.teacher = self.teacher.to(torch.bfloat16)
            self.tokenizer = AutoTokenizer.from_pretrained(options.shared / "data" / "tokenizers" / "gpt2")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "left"
        self.prompts = prompts
        self.data = Dataset.from_dict({"prompt": self.tokenizer.batch_decode(prompts)})
        self.thresholds: dict[str, float] = {}

    def calibrate(self) -> None:
        """Find the thresholds of the wanted shares."""
        for name, share in SHARES.items():
            found = calibrate(
                self.student,
                self.teacher,
                self.prompts[: 2 * self.options.batch],
                policy=SwitchPolicy(schedule="constant"),
                target_teacher_share=share,
                max_new_tokens=self.options.completion,
            )
            self.thresholds[name] = found.initial_threshold
            print(f"{name}: threshold {found.initial_threshold:.4f} nats, share {found.teacher_share:.2f}", flush=True)

    def training_arguments(self, folder: str) -> dict[str, Any]:
        """Options that both trainers take."""
        return {
            "output_dir": folder,
            "max_steps": self.options.warmup + self.options.steps,
            "per_device_train_batch_size": self.options.batch,
            "max_completion_length": self.options.completion,
            "learning_rate": 1e-5,
            "bf16": self.options.pair == "gpt2",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": False,
            "logging_steps": 1,
            "disable_dropout": True,
        }

    def trainer(self, name: str, folder: str, clock: Clock) -> Any:
        """Return a trainer on fresh copies of the models."""
        student, teacher = copy.deepcopy(self.student), copy.deepcopy(self.teacher)
        arguments = self.training_arguments(folder)
        shared = {"train_dataset": self.data, "processing_class": self.tokenizer, "callbacks": [clock]}
        if name == "trl":
            from trl import DistillationConfig, DistillationTrainer

            return DistillationTrainer(
                model=student, teacher_model=teacher, args=DistillationConfig(beta=1.0, **arguments), **shared
            )
        method: dict[str, Any] = {"method": "opd"}
        if name in SHARES:
            method = {"method": "switch", "schedule": "constant", "initial_threshold": self.thresholds[name]}
        return SwitchTrainer(model=student, teacher_model=teacher, args=SwitchConfig(**arguments, **method), **shared)

    def run(self, name: str) -> dict[str, list[float]]:
        """Train one contender and return the seconds of its measured steps, in all and for writing."""
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(name, folder, clock)
            for callback in (ProgressCallback, PrinterCallback):
                trainer.remove_callback(callback)
            writing: list[float] = []
            if name == "trl":
                trainer._generate = timed(trainer._generate, writing)
            trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry][self.options.warmup :]
        if name == "trl":
            lengths = [entry.get("completions/mean_length", float("nan")) for entry in logs]
            shares = [0.0]
        else:
            writing = [entry["time/rollout_s"] for entry in logs]
            lengths = [entry["rollout/completion_tokens"] for entry in logs]
            shares = [entry["rollout/teacher_share"] for entry in logs]
        return {
            "seconds": clock.seconds[self.options.warmup :],
            "writing": writing[-self.options.steps :],
            "lengths": lengths,
            "shares": shares,
        }


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return the function, which then also appends how long each call took."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    return wrapper


def measure(bench: Bench) -> dict[str, Any]:
    """Return medians of every contender, and ratios to TRL's of the same round."""
    bench.calibrate()
    names = [name for name in CONTENDERS if name in bench.options.contenders]
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    per_round: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(bench.options.rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            result = bench.run(name)
            per_round[name].append(statistics.median(result["seconds"]))
            for key, values in result.items():
                found[name].setdefault(key, []).extend(values)
            print(f"round {turn + 1} {name}: {per_round[name][-1]:.3f} s a step", flush=True)
    report = {}
    for name, values in found.items():
        seconds = statistics.median(values["seconds"])
        length = statistics.mean(values["lengths"])
        ratios = [own / trl for own, trl in zip(per_round[name], per_round.get("trl", []), strict=False)]
        report[name] = {
            "seconds": seconds,
            "writing_share": statistics.median(values["writing"]) / seconds,
            "tokens_per_s": bench.options.batch * length / seconds,
            "mean_length": length,
            "teacher_share": statistics.mean(values["shares"]),
            "ratio_to_trl": statistics.median(ratios) if ratios else None,
            "ratio_range": [min(ratios), max(ratios)] if ratios else None,
        }
    return report


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Return the highest resident memory of one step, in 1e9 bytes, and what stood there before it."""
    bench.thresholds = dict.fromkeys(SHARES, 0.1)
    bench.options.warmup, bench.options.steps = 0, 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    result = bench.run("switch_53")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"before_gb": before, "highest_gb": after, **{name: values[0] for name, values in result.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=("tinystories", "gpt2"), default="tinystories")
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    if options.memory and not options.child:
        # A process of its own: its highest memory must not be that of something that ran before.
        raise SystemExit(subprocess.run([sys.executable, *sys.argv, "--child"], check=False).returncode)
    bench = Bench(options)
    result = measure_memory(bench) if options.memory else measure(bench)
    measured = ("torch", "transformers", *(("trl",) if "trl" in options.contenders else ()))
    versions = {name: metadata.version(name) for name in measured}
    settings = {name: str(value) for name, value in vars(options).items() if name != "shared"}
    print(json.dumps({"results": result, "settings": settings, "versions": versions, "cpus": os.cpu_count()}))


if __name__ == "__main__":
    main()
