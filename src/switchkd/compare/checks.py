"""Everything that a run would refuse is refused before the first one starts: one line for each distinct mistake."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from switchkd.cli.options import as_flags, integers
from switchkd.cli.run_folder import json_line
from switchkd.compare.tasks import Task
from switchkd.errors import UserError, UserErrors, json_object

#: Options that name a file, a folder or a hub id.
INPUTS = (
    *("model_name_or_path", "teacher_model_name_or_path", "tokenizer_name_or_path"),
    *("dataset_name", "eval_dataset_name", "lm_dataset_name"),
)
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".gz")


def check(tasks: Sequence[Task], *, inputs: bool = True) -> None:
    """Refuse options and files that a run would refuse.

    Args:
        tasks: All runs.
        inputs: Read data, tokenizers and configurations of models too; those of finished runs are not needed again.

    Raises:
        UserErrors: One line for each distinct problem, with the first run that has it.
    """
    attempts = _Attempts()
    known: dict[str, list[str]] = {}
    affected: dict[str, list[Task]] = {}
    for task in tasks:
        reads = inputs and not task.is_finished
        same = {"train": {**task.train, "seed": 0, "model_name_or_path": ""}, "begins": {**task.begins_with, "seed": 0}}
        # With a warm start its model is the student, else the student is a part of the options.
        student = "" if task.begins_with else task.train.get("model_name_or_path")
        key = json_line({**task.options, "warm_start": None, **same, "student": student, "reads": reads})
        if key not in known:
            attempts.problems = []
            _try_task(task, attempts, inputs=reads)
            known[key] = list(dict.fromkeys(attempts.problems))
        for problem in known[key]:
            affected.setdefault(problem, []).append(task)
    if affected:
        raise UserErrors([_line(problem, having) for problem, having in _by_folder(affected).items()])


def _by_folder(affected: Mapping[str, list[Task]]) -> dict[str, list[Task]]:
    """One problem for all inputs that lie in one folder that does not exist: the usual slip is the folder."""
    missing: dict[Path, list[str]] = {}
    for task in {task.name: task for having in affected.values() for task in having}.values():
        for options in (task.train, task.begins_with, *task.evaluate.values()):
            for name in INPUTS:
                value = options.get(name)
                folder = _missing_folder(value) if isinstance(value, str) else None
                if folder is not None and value not in missing.setdefault(folder, []):
                    missing[folder].append(str(value))
    found: dict[str, list[Task]] = {}
    for problem, having in affected.items():
        for folder, inputs in missing.items():
            lacking = [one for one in inputs if any(one in other for other in affected)]
            if len(lacking) > 1 and any(one in problem for one in lacking):
                names = ", ".join(str(Path(one).expanduser().relative_to(folder)) for one in lacking)
                problem = (
                    f"no folder {folder}, which should hold {names}: check the path (the current folder is "
                    f"{Path.cwd().name!r})"
                )
                break
        found.setdefault(problem, []).extend(having)
    return {problem: list({task.name: task for task in having}.values()) for problem, having in found.items()}


def _missing_folder(name: str) -> Path | None:
    """The highest folder of a path that does not exist; None for a hub id and where only the last part is missing."""
    if not (name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in SUFFIXES):
        return None
    path = Path(name).expanduser()
    return next((folder for folder in reversed(path.parents) if not folder.exists()), None)


def _line(problem: str, tasks: Sequence[Task]) -> str:
    others = len({(task.student, task.label) for task in tasks}) - 1
    more = f" (and in {others} other run{'s' if others > 1 else ''})" if others else ""
    return f"{tasks[0].name}: {problem}{more}"


class _Attempts:
    """Does what may fail, the same thing once only, and notes the problems.

    Attributes:
        problems: Of the task at hand.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._outcomes: dict[Hashable, tuple[Any, str | None]] = {}

    def __call__(self, action: Callable[..., Any], *arguments: Any, key: Hashable = None) -> Any:
        """Return what the action returns, or None where it fails.

        Args:
            action: What is tried.
            *arguments: Its arguments.
            key: What names the outcome: it is not done again; None for an action that is cheap.
        """
        outcome = self._outcomes.get(key)
        if outcome is None:
            try:
                outcome = action(*arguments), None
            except UserError as error:
                outcome = None, str(error)
            if key is not None:
                self._outcomes[key] = outcome
        if outcome[1] is not None:
            self.problems.append(outcome[1])
        return outcome[0]


def _try_task(task: Task, attempt: _Attempts, *, inputs: bool) -> None:
    training = attempt(_read_training, task, _train_parser())
    if training is not None and inputs:
        _try_training(attempt, *training, begun=bool(task.begins_with))
    for values in task.evaluate.values():
        options = attempt(_read_scoring, values, key=("evaluate", json_line(values)))
        if options is not None and inputs:
            _try_scoring(options, attempt)


@cache
def _train_parser() -> Any:
    """The options of `switchkd train`; there are too many to list them for every run again."""
    from switchkd.commands import train_options

    return train_options.parser()


def _read_training(task: Task, parser: Any) -> tuple[Any, Any, Any]:
    from switchkd.commands import train_options
    from switchkd.training.resolve import resolve

    tokens = [*as_flags(task.train), "--output_dir", str(task.folder / "train")]
    args, config = train_options.read_options(parser.resolve(tokens))
    return args, config, resolve(config)


def _read_scoring(values: Mapping[str, Any]) -> Any:
    evaluate = import_module("switchkd.commands.evaluate")
    options = evaluate.parser().resolve(as_flags({**values, "model_name_or_path": "the run's"}))
    evaluate.check(options)
    return options


def _try_training(attempt: _Attempts, args: Any, config: Any, plan: Any, *, begun: bool) -> None:
    """Read data, tokenizers and configurations; weights only count by their shapes.

    Args:
        attempt: Notes what fails.
        args: Which models and data.
        config: The configuration.
        plan: What it means.
        begun: The student is that of a warm start, which is tried with the warm start.
    """
    from switchkd.commands.train_inputs import load_datasets

    data: tuple[Hashable, ...] = (args.dataset_name, args.dataset_train_split, args.eval_dataset_name)
    data += (args.dataset_test_split, tuple(args.dataset_mixture or ()), args.dataset_config, args.dataset_streaming)
    attempt(_silent, load_datasets, args, config, key=("data", *data, str(config.eval_strategy)))
    if args.lm_dataset_name is not None:
        attempt(_records, args.lm_dataset_name, "train", key=("data", args.lm_dataset_name, "train"))
    teacher = config.teacher_model_name_or_path
    if plan.needs_teacher:
        attempt(_require_teacher, plan, teacher)
        if teacher is not None and _model(teacher, "teacher", attempt) is not None:
            _tokenizer(teacher, attempt)
    if args.tokenizer_name_or_path is not None:
        _tokenizer(args.tokenizer_name_or_path, attempt)
    if not begun:
        _try_student(args, teacher, attempt)


def _try_student(args: Any, teacher: str | None, attempt: _Attempts) -> None:
    source = args.model_name_or_path or teacher
    start = _model(source, "student" if args.model_name_or_path else "teacher", attempt) if source is not None else None
    if source is not None and start is None:
        return
    tokenizer = _tokenizer(str(args.tokenizer_name_or_path or source), attempt)
    if args.student_layers is not None:
        attempt(_layers, source, args.student_layers, start)
    if args.student_config is not None and tokenizer is not None:
        key = ("student", args.student_config, source, args.tokenizer_name_or_path)
        attempt(_student, args.student_config, source, tokenizer, key=key)


def _try_scoring(options: Any, attempt: _Attempts) -> None:
    from switchkd.commands.data import load_data
    from switchkd.evaluation.scorers import load_scorer

    data = options.dataset_name, options.dataset_test_split, options.dataset_config, options.dataset_streaming
    attempt(_silent, load_data, options, options.dataset_test_split, key=("data", *data))
    if options.tokenizer_name_or_path is not None:
        _tokenizer(options.tokenizer_name_or_path, attempt)
    teacher = options.teacher_model_name_or_path
    if teacher is not None and _model(teacher, "teacher", attempt) is not None:
        _tokenizer(teacher, attempt)
    if options.scorer is not None:
        attempt(load_scorer, options.scorer, key=("scorer", options.scorer))


def _silent(action: Callable[..., Any], *arguments: Any) -> None:
    """Do it, and let go of what it returns."""
    action(*arguments)


def _records(name: str, split: str) -> None:
    from switchkd.data import load_records

    load_records(name, split=split)


def _tokenizer(name: str, attempt: _Attempts) -> Any:
    from switchkd.models.loading import load_tokenizer

    return attempt(load_tokenizer, name, key=("tokenizer", name))


def _model(name: str, role: str, attempt: _Attempts) -> Any:
    return attempt(_configuration, name, role, key=("model", name))


def _configuration(name: str, role: str) -> Any:
    """The configuration of a model; True for an adapter, whose model is found when it is loaded."""
    from switchkd.models.loading import local_folder
    from switchkd.models.untrained import load_config

    folder = local_folder(name, role)
    return True if folder is not None and (folder / "adapter_config.json").is_file() else load_config(name)


def _require_teacher(plan: Any, teacher: str | None) -> None:
    if teacher is None and not plan.method.own_teacher:
        raise UserError(f"method {plan.method.name!r} needs a teacher; give teacher_model_name_or_path")


def _layers(source: str, text: Sequence[str], start: Any) -> None:
    from switchkd.models.untrained import check_layers

    if start is not True:
        check_layers(source, integers(text, "student_layers") or [], start.num_hidden_layers)


def _student(text: str, source: str | None, tokenizer: Any) -> None:
    """Make the student without memory for its weights."""
    import torch

    from switchkd.models.untrained import student_from_config

    with torch.device("meta"):
        student_from_config(json_object("student_config", text), base=source, tokenizer=tokenizer, seed=0)
