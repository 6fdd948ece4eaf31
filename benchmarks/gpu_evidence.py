"""Does it matter who writes the text, on models of 20 to 100 million parameters? The main plane on one GPU.

    python benchmarks/gpu_evidence.py --output_dir runs/gpu_evidence              # 9 minutes; call it again to go on
    python benchmarks/gpu_evidence.py --output_dir /tmp/tiny --sizes tiny --seeds 0   # tiny models, also on a CPU

No weights are downloaded. On Dolly and TinyStories text, with the GPT-2 tokenizer, it trains a teacher (`sft`), then
runs `switchkd compare`: students from the same text, five writers x two objectives, three seeds, scored on the
protocol's test sets that are at hand (Dolly, Self-Instruct, Vicuna). On CUDA everything trains in bfloat16.

One call stops before `--time_budget` seconds are over, wherever it is: what is finished is kept (data, the teacher's
checkpoints, every run of the comparison), the same command goes on from there, and the end says what is left. The last
line of stdout is one JSON object.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
#: Width, layers and heads of the teacher and of each student; optimizer steps, rows of a step, tokens of a completion.
SIZES: dict[str, dict[str, Any]] = {
    "main": {
        "teacher": {"n_embd": 768, "n_layer": 8, "n_head": 12},  # 96M with its 50,257 ids
        "students": {"22M": {"n_embd": 384, "n_layer": 2, "n_head": 6}},
        "steps": {"teacher": 1500, "warm_start": 600, "run": 120},
        "rows": 32,
        "completion": 128,
        "samples": 240,
        "jobs": 4,
    },
    "two_students": {
        "teacher": {"n_embd": 768, "n_layer": 8, "n_head": 12},
        "students": {
            "22M": {"n_embd": 384, "n_layer": 2, "n_head": 6},
            "45M": {"n_embd": 512, "n_layer": 6, "n_head": 8},
        },
        "steps": {"teacher": 1500, "warm_start": 600, "run": 120},
        "rows": 32,
        "completion": 128,
        "samples": 240,
        "jobs": 4,
    },
    "tiny": {
        "teacher": {"n_embd": 32, "n_layer": 2, "n_head": 2},
        "students": {"tiny": {"n_embd": 16, "n_layer": 1, "n_head": 2}},
        "steps": {"teacher": 4, "warm_start": 2, "run": 2},
        "rows": 4,
        "completion": 12,
        "samples": 3,
        "jobs": 1,
    },
}
PROMPT = 256
WRITERS = {
    "student": {"method": "opd"},
    "dataset": {"method": "kd"},
    "random 50%": {"method": "random", "teacher_probability": 0.5},
    "switch 50%": {"method": "switch", "target_teacher_share": 0.5},
    "teacher": {"method": "teacher_first"},
}
OBJECTIVES = {"forward KL": {"divergence": "forward_kl"}, "reverse KL": {"divergence": "reverse_kl"}}
#: Seconds that a stage gets to stop: a training ends its step and saves.
GRACE = 20.0


@dataclass(frozen=True)
class Stage:
    """One part of the work: a command of its own.

    Attributes:
        name: For the reader.
        words: The command.
        done: The file that says that it was finished.
    """

    name: str
    words: tuple[str, ...]
    done: Path


def switchkd(*words: Any) -> tuple[str, ...]:
    """Return a command of the library, run by this Python."""
    return (sys.executable, "-m", "switchkd", *map(str, words))


def stages(options: argparse.Namespace) -> list[Stage]:
    """Return all parts in their order; configurations are written, nothing runs."""
    folder, sizes, shared = options.output_dir, SIZES[options.sizes], options.shared / "data"
    on_gpu = torch.cuda.is_available()
    places = {"dolly": shared / "dolly", "self_instruct": shared / "self-inst", "vicuna": shared / "vicuna"}
    sets = {name: place for name, place in places.items() if place.is_dir()}
    if "dolly" not in sets:
        raise SystemExit(f"gpu_evidence: {shared / 'dolly'} does not exist; give --shared")
    found = []
    for name, place in sets.items():
        target = folder / "data" / name
        words = ("prepare", "--source", name, "--dataset_name", place, "--output_dir", target)
        found.append(Stage(f"data: {name}", switchkd(*words), target / "prepared.json"))
    stories = shared / "tinystories" / "tinystories_sample.txt.gz"
    mixture = {f"{folder / 'data' / 'dolly'}": 0.7}
    if stories.is_file():
        target = folder / "data" / "stories"
        words = ("--stories", stories, "--output_dir", target, "--begin", "", "--prompt_characters", 80)
        script = (sys.executable, str(HERE / "tasks" / "stories.py"), *map(str, words))
        script += ("--completion_characters", "400", "--held_out", "50")
        found.append(Stage("data: stories", script, target / "data" / "validation.jsonl"))
        mixture[str(target / "data" / "train.jsonl")] = 0.3
    precision: dict[str, Any] = {"bf16": True} if on_gpu else {"use_cpu": True}
    common = {
        "max_prompt_length": PROMPT,
        "max_completion_length": sizes["completion"],
        "per_device_train_batch_size": sizes["rows"],
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "logging_steps": max(sizes["steps"]["run"] // 10, 1),
        "report_to": "none",
        **precision,
    }
    shape = {"model_type": "gpt2", "n_positions": PROMPT + sizes["completion"]}
    teacher = folder / "teacher"
    training = {
        **common,
        "method": "sft",
        "tokenizer_name_or_path": str(options.tokenizer or shared / "tokenizers" / "gpt2"),
        "student_config": {**shape, **sizes["teacher"]},
        **({"dataset_mixture": [f"{name}={weight}" for name, weight in mixture.items()]} if len(mixture) > 1 else {}),
        **({"dataset_name": next(iter(mixture))} if len(mixture) == 1 else {}),
        "max_steps": sizes["steps"]["teacher"],
        "learning_rate": 6e-4,
        "warmup_steps": min(100, sizes["steps"]["teacher"] // 4),
        "save_steps": max(sizes["steps"]["teacher"] // 6, 1),
        "save_total_limit": 1,
        "resume_from_checkpoint": "auto",
        "output_dir": str(teacher),
    }
    comparison = {
        "output_dir": str(folder / "compare"),
        "seeds": options.seeds,
        "jobs": sizes["jobs"],
        "threads": 1,
        "keep_models": False,
        "train": {
            **common,
            "teacher_model_name_or_path": str(teacher),
            "dataset_name": str(folder / "data" / "dolly"),
            "max_steps": sizes["steps"]["run"],
            "learning_rate": 5e-4,
            **({"teacher_model_init_kwargs": {"dtype": "bfloat16"}} if on_gpu else {}),
        },
        "students": {name: {"student_config": {**shape, **values}} for name, values in sizes["students"].items()},
        "warm_start": {"method": "sft", "max_steps": sizes["steps"]["warm_start"], "learning_rate": 1e-3},
        "grid": {
            "writer": {
                name: {**WRITERS[name], **({"teacher_tokens": sizes["completion"]} if name == "teacher" else {})}
                for name in options.writers
            },
            "objective": OBJECTIVES,
        },
        "evaluate": {
            "teacher_model_name_or_path": str(teacher),
            "datasets": {name: str(folder / "data" / name) for name in sets},
            "max_samples": sizes["samples"],
            "decoding_seeds": [10],
            "max_prompt_length": PROMPT,
            "max_completion_length": sizes["completion"],
            "batch_size": min(sizes["samples"], 120),
            **({"dtype": "bfloat16"} if on_gpu else {}),
        },
        "baseline": options.writers[0],
    }
    wanted = [
        pair for pair in (("switch 50%", "student"), ("switch 50%", "random 50%")) if {*pair} <= {*options.writers}
    ]
    if wanted:
        comparison["pairs"] = [":".join(pair) for pair in wanted]
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in {"teacher": training, "compare": comparison}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    found.append(Stage("teacher", switchkd("train", "--config", folder / "teacher.yaml"), teacher / "summary.json"))
    command = switchkd("compare", "--config", folder / "compare.yaml")
    found.append(Stage("compare", command, folder / "compare" / "results.md"))
    return found


def run(stage: Stage, seconds: float) -> bool:
    """Run a stage for at most so many seconds; return whether it was finished.

    Raises:
        SystemExit: The command failed.
    """
    child = subprocess.Popen(stage.words, start_new_session=True)
    try:
        code = child.wait(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        # The group of the child: the runs of a comparison hear of it too. In the background SIGINT may be ignored.
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return stage.done.is_file()
    if code != 0:
        raise SystemExit(f"gpu_evidence: {stage.name} ended with exit code {code}")
    return True


def left_of_comparison(options: argparse.Namespace) -> tuple[int, int]:
    """Return how many runs of the comparison are finished, and how many there are in all, warm starts left out."""
    runs = len(options.writers) * len(OBJECTIVES) * len(SIZES[options.sizes]["students"]) * len(options.seeds)
    finished = [path for path in (options.output_dir / "compare").rglob("result.json") if "warm" not in path.parts[-3]]
    return min(len(finished), runs), runs


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu_evidence"))
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared", help="where data/ lies")
    parser.add_argument("--tokenizer", type=Path, help="default: tokenizers/gpt2 in the data")
    parser.add_argument("--sizes", choices=SIZES, default="main")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="N,N,...")
    parser.add_argument("--writers", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--time_budget", type=float, default=540.0, help="seconds that one call may take")
    options = parser.parse_args()
    started = time.monotonic()
    end = started + options.time_budget - GRACE
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    seconds, left = {}, []
    for stage in stages(options):
        if stage.done.is_file():
            continue
        if left or time.monotonic() >= end:
            left.append(stage.name)
            continue
        before = time.monotonic()
        print(f"gpu_evidence: {stage.name}", file=sys.stderr, flush=True)
        if not run(stage, end - before):
            left.append(stage.name)
        seconds[stage.name] = round(time.monotonic() - before, 1)
    finished, runs = left_of_comparison(options)
    if left:
        print(f"left: {', '.join(left)}; {finished} of {runs} runs are finished; the same command goes on")
    else:
        print((options.output_dir / "compare" / "report.txt").read_text(encoding="utf-8"))
    print(
        json.dumps(
            {
                "benchmark": "gpu_evidence",
                "device": device,
                "sizes": options.sizes,
                "left": left,
                "finished_runs": finished,
                "runs": runs,
                "seconds": seconds,
                "results": None if left else str(options.output_dir / "compare" / "results.md"),
                "versions": {name: metadata.version(name) for name in ("torch", "transformers", "switchkd")},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
