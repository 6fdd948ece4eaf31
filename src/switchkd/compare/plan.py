"""All runs of a comparison: what each of its sections adds to their options, and the folders they get."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchkd.cli.run_folder import check_name, folder_name
from switchkd.commands.several_sets import named_test_sets
from switchkd.compare.grid import all_runs
from switchkd.compare.tasks import ONE_SET, WARM_START, Task, scoring_folder
from switchkd.errors import UserError

# What a comparison does not need from every single run, unless the options say otherwise.
TRAIN_DEFAULTS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
# What a comparison decides itself, and how a command is called.
_RESERVED = ("seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "config", "json", "verbose")
# What makes the student.
_MAKERS = ("model_name_or_path", "student_config", "student_layers")


def plan(
    *,
    output_dir: Path,
    seeds: Sequence[int],
    train: Mapping[str, Any],
    evaluate: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, Any] | None] | None = None,
    grid: Any = None,
    students: Mapping[str, Mapping[str, Any] | None] | None = None,
    warm_start: Mapping[str, Any] | None = None,
) -> list[Task]:
    """Return every run: all warm starts first, then student by student and seed by seed in the order given.

    Args:
        output_dir: Folder of the comparison.
        seeds: Training seeds.
        train: Options of `switchkd train` that all runs share.
        evaluate: Options of `switchkd evaluate`; `datasets` names several test sets, see `evaluations`.
        runs: Label -> options that override them; `method` defaults to the label.
        grid: Axes whose product are further runs, see `switchkd.compare.grid.all_runs`.
        students: Name -> options that make the student; one without a name if None.
        warm_start: Options of the training that all runs of a student and seed begin with, once; None for none.

    Raises:
        UserError: A name that is not valid as the name of a folder.
    """
    students = students or {"": {}}
    planned, scoring = all_runs(runs, grid, train), evaluations(evaluate)
    for name in filter(None, students):
        check_name(name, "student")
    own = "the comparison sets it for every run"
    named = [(f"students: {name}", options) for name, options in students.items()]
    given = [(f"run {run.label!r}", run.options) for run in planned]
    for section, values in [("train", train), ("warm_start", warm_start), *named, *given]:
        _check_reserved(section, values, _RESERVED, own)
    if warm_start is not None:
        for section, values in given:
            _check_reserved(section, values, _MAKERS, "the run begins with the warm start's model")
        _check_reserved("train", train, _MAKERS[1:], "the runs begin with the warm start's model; move it to students")
    for name, values in scoring.items():
        section = "evaluate" if name == ONE_SET else f"evaluate: {name}"
        _check_reserved(section, values, ("model_name_or_path", *_RESERVED[1:]), own)
    if any(run.label == WARM_START for run in planned):
        raise UserError(f"a run may not be called {WARM_START!r}: that is the name of the training before all runs")
    _check_folders({name: name for name in students})
    _check_folders({label: folder_name(label) for label in (WARM_START, *(run.label for run in planned))})

    def folder_of(student: str, label: str, seed: int) -> Path:
        return output_dir / student / folder_name(label) / f"seed-{seed}"

    def maker(student: str) -> dict[str, Any]:
        return {**TRAIN_DEFAULTS, **train, **(students[student] or {})}

    tasks = []
    warm: dict[tuple[str, int], dict[str, Any]] = {}
    if warm_start is not None:
        for student, seed in itertools.product(students, seeds):
            options = _as_typed({**maker(student), "method": "sft", **warm_start, "seed": seed})
            warm[student, seed] = options
            tasks.append(Task(student, WARM_START, seed, folder_of(student, WARM_START, seed), options, scoring))
    for student, seed, run in itertools.product(students, seeds, planned):
        # The student itself is made by the warm start where there is one.
        shared = maker(student) if warm_start is None else {**TRAIN_DEFAULTS, **train}
        options = _as_typed({**shared, **run.options, "seed": seed})
        if warm_start is not None:
            options["model_name_or_path"] = str(folder_of(student, WARM_START, seed) / "train")
        begins_with, folder = warm.get((student, seed), {}), folder_of(student, run.label, seed)
        tasks.append(Task(student, run.label, seed, folder, options, scoring, begins_with, run.cell))
    return tasks


def evaluations(evaluate: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return test set -> options of `switchkd evaluate`.

    Args:
        evaluate: Those options; or with `datasets` the shared ones, and there the test sets, see `named_test_sets`.
    """
    shared = {name: value for name, value in evaluate.items() if name != "datasets"}
    sets = evaluate.get("datasets")
    if sets is None and isinstance(shared.get("dataset_name"), list):
        sets = shared.pop("dataset_name")
    if sets is None:
        return {ONE_SET: _as_typed(shared)}
    if "dataset_name" in shared:
        raise UserError("evaluate: give dataset_name or datasets, not both")
    named = named_test_sets(sets, "evaluate: datasets")
    found = {name: _as_typed({**shared, **given}) for name, given in named.items()}
    _check_folders({name: scoring_folder(name) for name in found})
    return found


def _check_reserved(section: str, options: Mapping[str, Any] | None, names: Sequence[str], why: str) -> None:
    """Refuse options that would be overwritten in silence."""
    for name in names:
        if (options or {}).get(name) is not None:
            raise UserError(f"{name}={(options or {})[name]} in {section} does nothing: {why}; remove it")


def _check_folders(folders: Mapping[str, str]) -> None:
    """Refuse names, name -> folder, of which two would share one."""
    owner: dict[str, str] = {}
    for name, folder in folders.items():
        # Some file systems do not tell upper case from lower case.
        other = owner.setdefault(folder.lower(), name)
        if other != name:
            raise UserError(f"{other!r} and {name!r} would share the folder {folder!r}; rename one")


def _as_typed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Truth values as words: YAML reads `save_strategy: no` as False, and the option wants the word."""
    return {name: {True: "yes", False: "no"}[v] if isinstance(v, bool) else v for name, v in options.items()}
