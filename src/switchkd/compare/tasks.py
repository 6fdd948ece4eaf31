"""Methods side by side: what to run, in which folders, what is finished, and one run in a separate process."""

import contextlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from switchkd.cli.run_folder import json_line, plain
from switchkd.errors import UserError

WARM_START = "warm start"
# What a comparison does not need from every single run, unless the options say otherwise.
TRAIN_DEFAULTS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}


@dataclass(frozen=True)
class Task:
    """One model to train and score.

    Attributes:
        student: Name of the student.
        label: Name of the run; `WARM_START` for the training that the others begin with.
        seed: Training seed.
        folder: Holds `train` and `evaluate`, the folders of the two commands, their configs, `log.txt` and, when all is
            done, `result.json`.
        train: Options of `switchkd train`.
        evaluate: Options of `switchkd evaluate`.
        begins_with: Options of the warm start; empty where there is none.
    """

    student: str
    label: str
    seed: int
    folder: Path
    train: dict[str, Any]
    evaluate: dict[str, Any]
    begins_with: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.student} {self.label}, seed {self.seed}" if self.student else f"{self.label}, seed {self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """What decides the result; a finished run with other options is another run."""
        options: dict[str, Any] = plain(
            {"train": self.train, "evaluate": self.evaluate, "warm_start": self.begins_with}
        )
        return options

    def result(self) -> dict[str, Any] | None:
        """Return what the finished run wrote down, or None.

        Raises:
            UserError: It was made with other options.
        """
        path = self.folder / "result.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for part, options in self.options.items():
            before = found["options"].get(part, {})
            for name in sorted({*options, *before}):
                if options.get(name) != before.get(name):
                    raise UserError(
                        f"{self.name} was run with {name}={before.get(name)!r} ({part}), now it is "
                        f"{options.get(name)!r}; give another output_dir, or remove {self.folder} to run it again"
                    )
        return found


def plan(
    *,
    output_dir: Path,
    seeds: Sequence[int],
    train: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, Any] | None],
    evaluate: Mapping[str, Any],
    students: Mapping[str, Mapping[str, Any] | None] | None = None,
    warm_start: Mapping[str, Any] | None = None,
) -> list[Task]:
    """Return every run: all warm starts first, then student by student and seed by seed in the order given.

    Args:
        output_dir: Folder of the comparison.
        seeds: Training seeds.
        train: Options of `switchkd train` that all runs share.
        runs: Label -> options that override them; `method` defaults to the label.
        evaluate: Options of `switchkd evaluate`.
        students: Name -> options that make the student; one without a name if None.
        warm_start: Options of the training that all runs of a student and seed begin with, once; None for none.

    Raises:
        UserError: A name that is not valid as the name of a folder.
    """
    students = students or {"": {}}
    for name in (*filter(None, students), *runs):
        if not name.replace("-", "").replace("_", "").replace(".", "").replace(" ", "").isalnum() or name[0] == ".":
            raise UserError(f"{name!r} is not a valid name of a run; use letters, digits, blanks, - _ and .")
    if WARM_START in runs:
        raise UserError(f"a run may not be called {WARM_START!r}: that is the name of the training before all runs")

    def folder_of(student: str, label: str, seed: int) -> Path:
        return output_dir / student / label.replace(" ", "-") / f"seed-{seed}"

    def task(student: str, label: str, seed: int, overrides: Mapping[str, Any]) -> Task:
        folder = folder_of(student, label, seed)
        # The student itself is made by the warm start where there is one.
        maker = dict(students[student] or {}) if label == WARM_START or warm_start is None else {}
        options = _as_typed({**TRAIN_DEFAULTS, **train, **maker, **overrides, "seed": seed})
        if label != WARM_START:
            options["method"] = overrides.get("method", label)
        if label != WARM_START and warm_start is not None:
            options["model_name_or_path"] = str(folder_of(student, WARM_START, seed) / "train")
        return Task(student, label, seed, folder, options, _as_typed(evaluate), warm.get((student, seed), {}))

    warm: dict[tuple[str, int], dict[str, Any]] = {}
    tasks = []
    if warm_start is not None:
        tasks = [task(s, WARM_START, seed, {"method": "sft", **warm_start}) for s in students for seed in seeds]
        warm |= {(one.student, one.seed): one.train for one in tasks}
    tasks += [task(s, label, seed, over or {}) for s in students for seed in seeds for label, over in runs.items()]
    return tasks


def _as_typed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Truth values as words: YAML reads `save_strategy: no` as False, and the option wants the word."""
    return {name: {True: "yes", False: "no"}[v] if isinstance(v, bool) else v for name, v in options.items()}


def check(tasks: Sequence[Task]) -> None:
    """Refuse options that a run would refuse, before the first one starts.

    Raises:
        UserError: Names the run.
    """
    from switchkd.commands import train_options
    from switchkd.training.resolve import resolve

    parser = train_options.parser()
    scorer = import_module("switchkd.commands.evaluate").parser()
    seen: set[str] = set()
    for task in tasks:
        key = json_line({**task.options, "seed": 0, "train": {**task.train, "seed": 0, "model_name_or_path": ""}})
        if key in seen:
            continue
        seen.add(key)
        try:
            options = parser.resolve([*_flags(task.train), "--output_dir", str(task.folder / "train")])
            _, config = train_options.read_options(options)
            resolve(config)
            scorer.resolve([*_flags(task.evaluate), "--model_name_or_path", "x"])
        except UserError as error:
            raise UserError(f"{task.name}: {error}") from None


def execute(task: Task, threads: int | None) -> dict[str, Any]:
    """Train and score one model in this process, and return its result, which is then written down.

    Everything the two commands print goes to `log.txt`.

    Args:
        task: What to run.
        threads: Threads of torch; None leaves torch's default.

    Returns:
        The content of `result.json`; or `{"error": one line}` where the run failed.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    task.folder.mkdir(parents=True, exist_ok=True)
    log = task.folder / "log.txt"
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            trained = _command("train", task, task.train)
            scored = _command("evaluate", task, {**task.evaluate, "model_name_or_path": str(task.folder / "train")})
        except UserError as error:
            return {"error": " ".join(str(error).split())}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]} (see {log})"}
    result = {
        "student": task.student,
        "run": task.label,
        "seed": task.seed,
        "options": task.options,
        "train": trained,
        "evaluate": scored,
        "seconds": time.perf_counter() - started,
    }
    # Written beside and moved: a file that is there is whole.
    part = task.folder / "result.json.part"
    part.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, task.folder / "result.json")
    return result


def _command(name: str, task: Task, values: Mapping[str, Any]) -> dict[str, Any]:
    """Run a command as its command line would: its options stand in a config file that can be run again."""
    from switchkd.cli.console import Console

    folder, config = task.folder / name, task.folder / f"{name}.yaml"
    text = yaml.safe_dump(plain({**values, "output_dir": str(folder)}), sort_keys=False)
    same = config.exists() and config.read_text(encoding="utf-8") == text
    config.write_text(text, encoding="utf-8")
    module = import_module(f"switchkd.commands.{name}")
    flags = ["--config", str(config)]
    if name == "train" and same and any(folder.glob("checkpoint-*/trainer_state.json")):
        flags += ["--resume_from_checkpoint", "true"]
    elif folder.exists():
        shutil.rmtree(folder)  # what a run that did not end left behind: a comparison owns the folders of its runs
    result: dict[str, Any] = module.run(module.parser().resolve(flags), Console())
    return result


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Options as one would type them; a name that does not exist is refused by the parser itself."""
    tokens: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            tokens.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list):
            tokens += [f"--{name}", *map(str, value)]
        elif value is not None:
            tokens.append(f"--{name}={value}")
    return tokens
