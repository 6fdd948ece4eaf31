"""One run of a comparison: its folder, what it wrote, and how it is executed in a separate process."""

import contextlib
import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from switchkd.cli.run_folder import folder_name, plain, remove_model, whole
from switchkd.errors import UserError

WARM_START = "warm start"
#: What the only test set is called where `evaluate` names none.
ONE_SET = "test"
#: What every evaluation measures, and what tables call it.
MEASURES = {"rouge_l": "ROUGE-L", "exact_match": "exact match"}
#: What it measures where `evaluate` names a teacher, in nats; the lower, the better.
TEACHER_MEASURES = {"reverse_sequence_kl": "KL(student, teacher) of a text"}


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
        evaluate: Test set -> options of `switchkd evaluate`.
        begins_with: Options of the warm start; empty where there is none.
        cell: Axis -> label of the run's cell of the grid; empty for other runs.
    """

    student: str
    label: str
    seed: int
    folder: Path
    train: dict[str, Any]
    evaluate: dict[str, dict[str, Any]]
    begins_with: dict[str, Any] = field(default_factory=dict)
    cell: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.student} {self.label}, seed {self.seed}" if self.student else f"{self.label}, seed {self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """What decides the result; a finished run with other options is another run."""
        options: dict[str, Any] = plain(
            {
                "train": self.train,
                **{scoring_folder(name): values for name, values in self.evaluate.items()},
                "warm_start": self.begins_with,
            }
        )
        return options

    def rows(self, test_set: str) -> list[dict[str, Any]]:
        """Return the answers to a test set with their scores, as the evaluation wrote them."""
        with (self.folder / scoring_folder(test_set) / "rows.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    @property
    def is_finished(self) -> bool:
        """Whether it was trained and scored."""
        return (self.folder / "result.json").exists()

    def result(self) -> dict[str, Any] | None:
        """Return what the finished run wrote down, or None.

        Raises:
            UserError: It was made with other options.
        """
        found = self._read_result()
        if found is None:
            return None
        for part in {**self.options, **found["options"]}:
            options, before = self.options.get(part, {}), found["options"].get(part, {})
            for name in sorted({*options, *before}):
                if options.get(name) != before.get(name):
                    raise UserError(
                        f"{self.name} was run with {name}={before.get(name)!r} ({part}), now it is "
                        f"{options.get(name)!r}; give another output_dir, or remove {self.folder} to run it again"
                    )
        return {**found, "cell": dict(self.cell)}

    def _read_result(self) -> dict[str, Any] | None:
        """What stands in result.json; None where that or the answers are damaged: such a run is made again."""
        try:
            found: dict[str, Any] = dict(json.loads((self.folder / "result.json").read_text(encoding="utf-8")))
            given = found.pop("checksums", None)
        except (OSError, ValueError, TypeError):
            return None
        return found if given is None or given == self.checksums(found) else None

    def checksums(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Return what tells that a result and the answers it is of are as they were written."""
        found = {"result": json.dumps(plain(result), sort_keys=True).encode("utf-8")}
        for name in self.evaluate:
            path = self.folder / scoring_folder(name) / "rows.jsonl"
            found[f"answers of {name}"] = path.read_bytes() if path.is_file() else b""
        return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def trim(task: Task) -> None:
    """Remove the model and the checkpoints of a finished run; scores, answers and logs stay.

    The models of warm starts stay: other runs begin with them.
    """
    if task.is_finished and task.label != WARM_START:
        remove_model(task.folder / "train")


def scoring_folder(test_set: str) -> str:
    """The folder of an evaluation, and what messages call its options."""
    return "evaluate" if test_set == ONE_SET else f"evaluate-{folder_name(test_set)}"


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

    from switchkd.training.card import add_scores

    if threads is not None:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    task.folder.mkdir(parents=True, exist_ok=True)
    log = task.folder / "log.txt"
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            trained = _command("train", task.folder / "train", task.train)
            model = {"model_name_or_path": str(task.folder / "train")}
            scored = {
                name: _command("evaluate", task.folder / scoring_folder(name), {**values, **model})
                for name, values in task.evaluate.items()
            }
            add_scores(task.folder / "train", scored)
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
    written = {**plain(result), "checksums": task.checksums(result)}
    with whole(task.folder / "result.json") as part:
        part.write(json.dumps(written, indent=1, allow_nan=False) + "\n")
    return result


def _command(name: str, folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Run a command as its command line would: its options stand in a config file that can be run again."""
    from switchkd.cli.console import Console

    config = folder.parent / f"{folder.name}.yaml"
    text = yaml.safe_dump(plain({**values, "output_dir": str(folder)}), sort_keys=False)
    same = config.exists() and config.read_bytes() == text.encode("utf-8")
    with whole(config) as part:
        part.write(text)
    module = import_module(f"switchkd.commands.{name}")

    def run(*flags: str) -> dict[str, Any]:
        result: dict[str, Any] = module.run(module.parser().resolve(["--config", str(config), *flags]), Console())
        return result

    if same and name == "train" and (trained := _trained(folder)) is not None:
        print(f"trained before: {folder}")
        return trained
    if same and _is_cut_off(name, folder):
        goes_on = ["--resume_from_checkpoint", "auto"] if name == "train" else ["--resume"]
        try:
            return run(*goes_on)
        except UserError as error:
            print(f"cannot go on from what is there, begins again: {error}")
    if folder.exists():
        shutil.rmtree(folder)  # what a run that did not end left behind: a comparison owns the folders of its runs
    return run()


def _trained(folder: Path) -> dict[str, Any] | None:
    """What a training that ended returned; None where it did not, or where its model is no longer there."""
    if not any(folder.glob("*.safetensors")):
        return None
    try:
        return {**json.loads((folder / "summary.json").read_text(encoding="utf-8")), "output_dir": str(folder)}
    except (OSError, ValueError, TypeError):
        return None


def _is_cut_off(name: str, folder: Path) -> bool:
    """Whether a command left something that it can go on from; of what ended, the answers may be damaged."""
    if name == "train":
        return any(folder.glob("checkpoint-*"))
    from switchkd.commands.scoring import ANSWERS

    return (folder / ANSWERS).is_file() and not (folder / "summary.json").is_file()
