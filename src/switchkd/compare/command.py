"""`switchkd compare`: methods x training seeds from one file, and which differences are significant."""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from switchkd.cli.console import Console, quiet_bitsandbytes, quiet_libraries
from switchkd.cli.options import OptionParser, flag, integers
from switchkd.cli.run_folder import RunFolder, folder_name
from switchkd.compare.checks import check
from switchkd.compare.grid import all_runs, axes_of
from switchkd.compare.pairs import partners
from switchkd.compare.plan import plan
from switchkd.compare.tasks import MEASURES, TEACHER_MEASURES, WARM_START, Task, execute, trim
from switchkd.errors import UserError, UserErrors

Pair = tuple[str, str]
SECTIONS = {
    "train": "options of `switchkd train` that all runs share",
    "runs": "label -> options that override them; `method` defaults to the label",
    "grid": "axis -> labels -> options: their product are runs too; `exclude` and `include` list cells",
    "students": "name -> options that make the student",
    "warm_start": "options of the training that all runs of a student and seed start from",
    "evaluate": "options of `switchkd evaluate`",
}
#: A stopped comparison goes on by the same call.
RESUME = ""


def parser() -> OptionParser:
    """Return the options of `switchkd compare`."""
    result = OptionParser(
        prog="switchkd compare",
        usage="switchkd compare --config compare.yaml --output_dir DIR",
        description="Train and score several methods with several training seeds, and say which differences are "
        "significant. A stopped comparison continues where it was: finished runs are not repeated.",
    )
    group = result.add_argument_group("what to compare (sections of the config file; JSON as flags)")
    for name, help in SECTIONS.items():
        group.add_argument(f"--{name}", metavar="JSON", help=help)
    group.add_argument("--seeds", nargs="+", default=["0,1,2"], metavar="N,N,...", help="training seeds")
    group.add_argument(
        "--baseline",
        metavar="RUN",
        help="run that all others are compared with; in a grid a label of an axis, or JSON {axis: label}: every cell "
        "is compared with the cell of that label that is equal on the other axes (default: the first)",
    )
    group.add_argument(
        "--pairs",
        nargs="+",
        metavar="RUN:RUN",
        help="more pairs to compare, also by answer length; two labels of an axis for that pair in every cell",
    )
    group.add_argument(
        "--measure", default="rouge_l", metavar="NAME", help="what is compared: rouge_l, exact_match or a scorer's name"
    )
    machine = result.add_argument_group("machine")
    machine.add_argument("--jobs", type=int, default=1, metavar="N", help="number of runs at the same time")
    machine.add_argument("--threads", type=int, metavar="N", help="threads of each run (default: cores / jobs)")
    machine.add_argument(
        "--keep_models", **flag("keep the models of finished runs, not only their scores", default=True)
    )
    result.add_shared_options("where to write (default: the first free one of runs/compare, runs/compare-2, ...)")
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run what is not finished, then print and write the results."""
    folder = RunFolder(options.output_dir, "compare")
    tasks, sections, seeds = planned(options, folder.path)
    pairs = compared(options, sections)
    quiet_libraries(options.verbose)
    check(tasks)
    resumes = folder.holds_run("switchkd compare")
    if not resumes:
        folder.check(overwrite=options.overwrite_output_dir)
    folder.claim({**vars(options), **sections, "seeds": seeds}, keep=resumes)
    if resumes and options.overwrite_output_dir:
        for task in tasks:
            shutil.rmtree(task.folder, ignore_errors=True)
    if not options.keep_models:
        for task in tasks:
            trim(task)
    from switchkd.compare.findings import too_few_seeds  # scipy takes a while to import

    for line in too_few_seeds(len(seeds)):
        console.say(line)
    failed = _run_all(tasks, options, console)
    summary = _report(folder, tasks, pairs, axes_of(sections["grid"]), options.measure, console)
    summary |= {"failed": failed, "output_dir": str(folder.path)}
    if failed:
        for name, error in failed.items():
            console.progress(f"failed: {name}: {error}")
        message = (
            f"{len(failed)} of {len(tasks)} runs failed, the first with: {next(iter(failed.values()))}; what is "
            f"finished is in {folder.path}; repeat the command to try the others again"
        )
        raise UserErrors([message], result=summary)
    return summary


def planned(options: argparse.Namespace, output_dir: Path) -> tuple[list[Task], dict[str, Any], list[int]]:
    """Return every run of a comparison, the sections of its file and its training seeds.

    Args:
        options: Of `switchkd compare`.
        output_dir: Where the runs have their folders.

    Raises:
        UserError: A section, a seed or a measure that cannot be used.
    """
    sections = {name: _section(name, getattr(options, name)) for name in SECTIONS}
    seeds = integers(options.seeds, "seeds") or []
    if not sections["runs"] and not sections["grid"]:
        raise UserError("give `runs` (labels with options) or `grid` (axes) in the config file")
    for name in ("jobs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"seeds must be different integers, got {' '.join(options.seeds)}")
    tasks = plan(output_dir=output_dir, seeds=seeds, **sections)
    _check_measure(options.measure, tasks)
    return tasks, sections, seeds


def _section(name: str, text: str | None) -> Any:
    """The content of a section; None where it is absent and may be."""
    if text is None:
        return {} if name in ("train", "evaluate") else None
    value = _json(text)
    if name == "grid" and isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{name} must be a mapping, {SECTIONS[name]}; got {str(value)[:60]!r}")
    if name in ("runs", "students"):
        wrong = next((key for key, item in value.items() if not isinstance(item, dict | None)), None)
        if wrong is not None:
            raise UserError(f"{name}: {wrong!r} must be a mapping of options, got {value[wrong]!r}")
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def compared(options: argparse.Namespace, sections: Mapping[str, Any]) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs of labels that are compared: with the baseline, and those that `pairs` names."""
    runs = all_runs(sections["runs"], sections["grid"], sections["train"])
    baseline = _json(options.baseline) if (options.baseline or "").startswith("{") else options.baseline
    pairs = [pair for text in options.pairs or [] for pair in text.split(",")]
    return partners(runs, baseline, pairs, [WARM_START] if options.warm_start else [])


def _check_measure(measure: str, tasks: Sequence[Task]) -> None:
    scorers = [str(values.get("scorer", "")).rpartition(":")[2] for values in tasks[0].evaluate.values()]
    known = [*MEASURES, *(scorers[:1] if len(set(scorers)) == 1 and scorers[0] else [])]
    if all(values.get("teacher_model_name_or_path") for values in tasks[0].evaluate.values()):
        known += TEACHER_MEASURES
    if measure not in known:
        raise UserError(
            f"measure must be one of {', '.join(known)}, got {measure!r}; the function of evaluate's scorer is another,"
            f" and {', '.join(TEACHER_MEASURES)} where evaluate has a teacher_model_name_or_path"
        )


def _run_all(tasks: Sequence[Task], options: argparse.Namespace, console: Console) -> dict[str, str]:
    """Run what is not finished, warm starts first; return the error of each run that failed."""
    waiting = [task for task in tasks if task.result() is None]
    done = len(tasks) - len(waiting)
    if done:
        console.say(f"{done} of {len(tasks)} runs are already finished")
    threads = options.threads
    if threads is None and options.jobs > 1:
        threads = max(multiprocessing.cpu_count() // options.jobs, 1)
    failed: dict[str, str] = {}
    clock = _Clock(len(tasks), done)
    pool = worker_pool(options.jobs)
    try:
        for phase in ([t for t in waiting if t.label == WARM_START], [t for t in waiting if t.label != WARM_START]):
            missing = {(t.student, t.seed) for t in tasks if t.label == WARM_START and t.result() is None}
            ready = [task for task in phase if task.label == WARM_START or (task.student, task.seed) not in missing]
            failed |= {task.name: "its warm start failed" for task in phase if task not in ready}
            futures = {pool.submit(execute, task, threads): task for task in ready}
            broken = False
            for future in as_completed(futures):
                task = futures[future]
                try:
                    result = future.result()
                except BrokenProcessPool:
                    broken = True
                    result = {"error": "worker process died without an error message (out of memory?)"}
                if "error" in result:
                    failed[task.name] = result["error"]
                    console.say(f"{clock.next()} {task.name}: FAILED, {result['error']}")
                else:
                    said = _line(result, options.measure)
                    console.say(f"{clock.next()} {task.name}: {said}{clock.left(options.jobs)}")
                    if not options.keep_models:
                        trim(task)
            if broken:
                pool.shutdown()
                pool = worker_pool(options.jobs)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    pool.shutdown()
    return failed


def worker_pool(jobs: int) -> Executor:
    """Return processes that run tasks one after another and end with this one, however it ends.

    Args:
        jobs: Their number.
    """
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker)


class _Clock:
    """Counts runs and estimates how long the rest takes."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.number, self.began, self.ended = total, done, time.perf_counter(), 0

    def next(self) -> str:
        self.number, self.ended = self.number + 1, self.ended + 1
        return f"[{self.number}/{self.total}]"

    def left(self, jobs: int) -> str:
        waiting = self.total - self.number
        if self.ended < jobs:
            return ""  # the first of several at once says too little
        seconds = waiting * (time.perf_counter() - self.began) / self.ended
        return f", about {seconds / 60:.0f} min left" if waiting and seconds > 90 else ""


def _line(result: Mapping[str, Any], measure: str) -> str:
    share = result["train"].get("teacher_share")
    teacher = f", teacher {share:.0%}" if share is not None else ""
    scores = ", ".join(
        f"{(MEASURES | TEACHER_MEASURES).get(measure, measure)} {_mean_score(scored, measure):.1f}"
        + (f" ({name})" if len(result["evaluate"]) > 1 else "")
        for name, scored in result["evaluate"].items()
    )
    return f"{result['train']['steps']} steps, {scores}{teacher}, {result['seconds']:.0f} s"


def _check_same_prompts(test_set: str, rows: Mapping[tuple[str, str, int], Sequence[Mapping[str, Any]]]) -> None:
    """Refuse to compare answers to different prompts: a test set may have changed since some of them were written.

    Raises:
        UserError: Names two runs.
    """
    (first, one), *others = rows.items()
    for key, other in others:
        if {(row["index"], row["prompt"]) for row in other} != {(row["index"], row["prompt"]) for row in one}:
            names = " and ".join(" ".join(filter(None, (name[0], name[1], f"seed {name[2]}"))) for name in (first, key))
            raise UserError(
                f"{names} answered different prompts: {test_set!r} has changed between the two; remove the folders of "
                "the older runs, or give another output_dir"
            )


def _mean_score(scored: Mapping[str, Any], measure: str) -> float:
    if measure in TEACHER_MEASURES:
        return float(scored["sequence_divergences"][measure]["per_sequence"])
    return float({**scored, **scored["by_scorer"]}[measure])


def _begin_worker() -> None:
    """Leave Ctrl-C, which reaches every process of the terminal, to the first one, and end when that one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # tqdm's own lock is shared between processes; a worker that is ended would leave it behind, with a warning.
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_bitsandbytes()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _report(
    folder: RunFolder,
    tasks: Sequence[Task],
    compared: tuple[list[Pair], list[Pair]],
    axes: Mapping[str, Sequence[str]],
    measure: str,
    console: Console,
) -> dict[str, Any]:
    """Write tables, sentences and pictures of what is finished, and return them in short."""
    from switchkd.compare import pictures, report
    from switchkd.compare.findings import Comparison, by_length, find, sentences

    finished = [(task, result) for task in tasks if (result := task.result()) is not None]
    if not finished:
        return {"runs": 0}
    found = [result for _, result in finished]
    comparisons = {}
    for name in tasks[0].evaluate:
        rows = {(task.student, task.label, task.seed): task.rows(name) for task, _ in finished}
        _check_same_prompts(name, rows)
        results = [{**one, "evaluate": one["evaluate"][name]} for one in found]
        comparisons[name] = Comparison(results, rows, measure, axes)
    against, pairs = compared
    baseline_of = dict(against)
    findings = find(comparisons, [*against, *pairs])
    words = sentences(comparisons, findings, pairs)
    lengths = by_length(comparisons, pairs or against)
    tables = report.all_tables(comparisons, findings, lengths)
    text = report.as_text(tables, words)
    console.say(f"\n{text}")
    (folder.path / "report.txt").write_text(f"{text}\n", encoding="utf-8")
    written = report.as_markdown(comparisons, findings, baseline_of, tables, words)
    (folder.path / "results.md").write_text(written, encoding="utf-8")
    report.write_tables(tables, folder.path / "results.tex")
    report.write_runs(comparisons, folder.path / "results.csv")
    report.write_differences(comparisons, findings, folder.path / "differences.csv")
    report.write_lengths(lengths, folder.path / "differences_by_length.csv")
    folder.write_json("results.json", {"results": found, "words": words})
    names = ["report.txt", "results.md", "results.tex", "results.csv", "differences.csv", "differences_by_length.csv"]
    names.append("results.json")
    for name, comparison in comparisons.items():
        suffix = f"_{folder_name(name)}.png" if len(comparisons) > 1 else ".png"
        chosen = [one for one in findings if one.test_set == name]
        pictures.forest(comparison, chosen, baseline_of, folder.path / f"comparison{suffix}")
        names.append(f"comparison{suffix}")
        if pictures.heat_map(comparison, chosen, baseline_of, folder.path / f"map{suffix}"):
            names.append(f"map{suffix}")
    console.say(f"\n{', '.join(names)} in {folder.path}")
    scores = {
        name: {
            student: {
                label: [comparison.score(result) for result in comparison.of(student, label)]
                for label in comparison.labels
            }
            for student in comparison.students
        }
        for name, comparison in comparisons.items()
    }
    return {"runs": len(found), measure: scores, "words": words}
