"""What is compared: runs of `switchkd compare`, of the demo, or evaluations of the same prompts, as one thing."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from switchkd.compare.findings import Comparison, Finding, find
from switchkd.compare.significance import Difference
from switchkd.compare.tasks import WARM_START, scoring_folder
from switchkd.demo.settings import MODELS
from switchkd.errors import UserError
from switchkd.report.folders import Run, read_lines, read_object, read_run


@dataclass(frozen=True)
class Trained:
    """A training of a comparison, or one that was given by itself."""

    label: str
    seed: Any
    run: Run


@dataclass(frozen=True)
class Compared:
    """Runs that were scored on the same prompts.

    Attributes:
        name: Of the folder, or of the data.
        comparisons: Test set -> its results.
        rows: Test set -> `(student, label, seed)` -> the answers that were scored.
        findings: Differences with their intervals, corrected together.
        baseline: Label that the others are compared with, if there is one.
        words: What the comparison said.
        stages: Labels that are no competitors, such as the teacher.
        trained: Its trainings.
    """

    name: str
    comparisons: Mapping[str, Comparison]
    rows: Mapping[str, Mapping[tuple[str, str, Any], Sequence[Mapping[str, Any]]]]
    findings: Sequence[Finding] = ()
    baseline: str | None = None
    words: Sequence[str] = ()
    stages: frozenset[str] = frozenset({WARM_START})
    trained: Sequence[Trained] = field(default_factory=list)

    @property
    def competitors(self) -> int:
        """How many runs stand against each other."""
        return len({label for one in self.comparisons.values() for label in one.labels} - self.stages)


def read_compared(run: Run) -> Compared:
    """Return what `switchkd compare` or the demo left in its folder; runs that did not end are left out.

    Raises:
        UserError: No run has ended, or a file is not what these commands write.
    """
    paths = sorted(run.path.rglob("result.json"))
    found = [(read_object(path), path.parent) for path in paths]
    if not found:
        raise UserError(f"{run.path} holds no finished run yet (no result.json)")
    summary = read_object(run.path / "results.json")
    order = {(one["student"], one["run"], one["seed"]): place for place, one in enumerate(summary.get("results", []))}
    labels = list(run.summary.get("rouge_l", [])) if run.command == "demo" else []
    found.sort(key=lambda pair: _place(pair[0], order, labels))
    rows = {
        name: {
            (result["student"], result["run"], result["seed"]): read_lines(folder / scoring_folder(name) / "rows.jsonl")
            for result, folder in found
        }
        for name in found[0][0]["evaluate"]
    }
    measure, axes = run.config.get("measure") or "rouge_l", _axes(found)
    comparisons = {
        name: Comparison(
            [{"cell": {}, **result, "evaluate": result["evaluate"][name]} for result, _ in found], scored, measure, axes
        )
        for name, scored in rows.items()
    }
    students = {result["student"] for result, _ in found}
    trainings = [
        # The demo puts its models where other commands look for them.
        (result, run.path / MODELS[result["run"]] if run.command == "demo" else folder / "train")
        for result, folder in found
    ]
    trained = [
        Trained(_named(result, students), result["seed"], read_run(folder))
        for result, folder in trainings
        if (folder / "config.yaml").is_file()
    ]
    if run.command == "demo":
        pairs = [("SWITCH", other) for other in run.summary.get("switch_against", [])]
        return Compared(
            run.name,
            comparisons,
            rows,
            find(comparisons, pairs),
            baseline=pairs[0][1] if pairs else None,
            stages=frozenset({WARM_START, "teacher"}),
            trained=trained,
        )
    findings = _findings(run.path / "differences.csv")
    seconds = [one.second for one in findings]
    baseline = max(set(seconds), key=lambda label: (seconds.count(label), -seconds.index(label)), default=None)
    return Compared(run.name, comparisons, rows, findings, baseline, summary.get("words", []), trained=trained)


def beside(compared: Compared, evaluations: Sequence[Run]) -> tuple[Compared, list[Run]]:
    """Return a comparison with the evaluations of its very prompts beside its runs, and those that are of others.

    Such as the teacher's: they are shown with the runs, but are no competitors.

    Args:
        compared: Of `read_compared`.
        evaluations: Of `switchkd.report.folders.evaluations`.
    """
    comparisons, rows, others = dict(compared.comparisons), {key: dict(of) for key, of in compared.rows.items()}, []
    labels = {label for one in comparisons.values() for label in one.labels}
    added: set[str] = set()
    for run in evaluations:
        same = [name for name, of in rows.items() if _prompts(run.rows) == _prompts(next(iter(of.values())))]
        same = [run.test_set] if run.test_set in same else same[:1]
        if not same or run.name in labels:
            others.append(run)
            continue
        one = comparisons[same[0]]
        seed = one.results[0]["seed"]
        base = {"run": run.name, "seed": seed, "cell": {}, "evaluate": run.summary, "train": {}}
        rows[same[0]] |= {(student, run.name, seed): run.rows for student in one.students}
        results = [*one.results, *({**base, "student": student} for student in one.students)]
        comparisons[same[0]] = Comparison(results, rows[same[0]], one.measure, one.axes)
        added.add(run.name)
    return replace(compared, comparisons=comparisons, rows=rows, stages=compared.stages | added), others


def _prompts(rows: Sequence[Mapping[str, Any]]) -> set[tuple[Any, Any]]:
    return {(row["index"], row["prompt"]) for row in rows}


def compare_evaluations(runs: Sequence[Run]) -> list[Compared]:
    """Return evaluations, those of the same prompts compared with the first of them.

    Args:
        runs: Of `switchkd.report.folders.evaluations`; several test sets of the same models are one comparison.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        prompts = tuple(sorted(_prompts(run.rows)))
        groups.setdefault((run.test_set, prompts), []).append(run)
    by_models: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for (test_set, _), group in groups.items():
        by_models.setdefault(tuple(run.name for run in group), {})[test_set] = group
    return [_evaluated(names, sets) for names, sets in by_models.items()]


def _evaluated(names: Sequence[str], sets: Mapping[str, Sequence[Run]]) -> Compared:
    rows = {name: {("", run.name, 0): run.rows for run in group} for name, group in sets.items()}
    comparisons = {}
    for name, group in sets.items():
        results = [
            {"student": "", "run": run.name, "seed": 0, "cell": {}, "evaluate": run.summary, "train": {}}
            for run in group
        ]
        comparisons[name] = Comparison(results, rows[name])
    findings = find(comparisons, [(name, names[0]) for name in names[1:]])
    return Compared(", ".join(sets), comparisons, rows, findings, names[0] if findings else None)


def _place(result: Mapping[str, Any], order: Mapping[Any, int], labels: Sequence[str]) -> tuple[int, str]:
    key = result["student"], result["run"], result["seed"]
    place = labels.index(result["run"]) if result["run"] in labels else order.get(key, len(order) + len(labels))
    return place, str(key)


def _named(result: Mapping[str, Any], students: set[str]) -> str:
    return f"{result['student']}: {result['run']}" if len(students) > 1 else str(result["run"])


def _axes(found: Sequence[tuple[Mapping[str, Any], Path]]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for result, _ in found:
        for axis, label in result.get("cell", {}).items():
            axes.setdefault(axis, []).append(label)
    return {axis: list(dict.fromkeys(labels)) for axis, labels in axes.items()}


def _findings(path: Path) -> list[Finding]:
    """The lines of differences.csv; none where there is no such file."""
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        return [_finding(line) for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error


def _finding(line: Mapping[str, str]) -> Finding:
    mean, low, high, p_value = (float(line[name]) for name in ("difference", "low", "high", "p"))
    seeds, prompts, seeds_ahead = (int(line[name]) for name in ("seeds", "prompts", "seeds_ahead"))
    difference = Difference(mean, low, high, p_value, seeds, prompts, seeds_ahead)
    names = line["test_set"], line["student"], line["first"], line["second"]
    return Finding(*names, difference, float(line["adjusted_p"]))
