"""The page of a report: from runs to its sections, most important first, and what is missing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from switchkd.errors import UserError
from switchkd.page.document import Page, Section
from switchkd.report.compared import Compared, Trained, beside, compare_evaluations, read_compared
from switchkd.report.curves import curve_section
from switchkd.report.folders import Run, evaluations
from switchkd.report.measured import (
    calibration_section,
    diagnosis_section,
    distance_section,
    judge_section,
    training_table,
)
from switchkd.report.records import config_section, data_section, version_section
from switchkd.report.scores import answer_section, cards, difference_section, score_section
from switchkd.report.texts import Texts, position_section, rollout_section

Cards = list[tuple[str, list[str]]]
Given = TypeVar("Given", Run, Sequence[Run])
Found = TypeVar("Found")


def make_page(runs: Sequence[Run], title: str | None = None) -> Page:
    """Return the page of some runs.

    Args:
        runs: Of `switchkd.report.folders.read_runs`.
        title: Its heading; the names of the runs if None.

    Raises:
        UserError: A file of a run is damaged, or is not what its command writes.
    """
    page = _guarded(_page, runs)
    return page if title is None else replace(page, title=title)


def _page(runs: Sequence[Run]) -> Page:
    by_command = {command: [run for run in runs if run.command == command] for command in {run.command for run in runs}}
    compared = [_guarded(read_compared, run) for run in runs if run.command in ("compare", "demo")]
    given = [Trained(run.name, run.config.get("seed"), run) for run in by_command.get("train", [])]
    scored = [each for run in by_command.get("evaluate", []) for each in evaluations(run)]
    others = scored
    for place, one in enumerate(compared):
        compared[place], others = beside(one, others)
    if others:
        compared += _guarded(compare_evaluations, others)
    trained = [one for each in compared for one in each.trained] + given
    texts = _texts(trained, by_command.get("rollout", []))
    firsts = {one.label: one.run for each in reversed(compared) for one in reversed(each.trained)}
    inner = [Run(run.path, run.command, label, run.config) for label, run in reversed(firsts.items())]
    everything = [*runs, *inner]
    sections: list[Section | None] = []
    of = {each.name: f": {each.name}" if len(compared) > 1 else "" for each in compared}
    for each in compared:
        sections += [part(each, of[each.name]) for part in (score_section, difference_section)]
    trainings = [(one.label, one.run.summary) for one in trained if one.run.summary]
    for each in compared:
        sections.append(curve_section(each.trained, each.stages, f"Learning curves{of[each.name]}"))
    which = f": {', '.join(one.label for one in given)}" if compared else ""
    sections.append(curve_section(given, title=f"Learning curves{which}"))
    sections += [_guarded(judge_section, run) for run in by_command.get("judge", []) if run.summary]
    sections += [_guarded(diagnosis_section, run) for run in by_command.get("diagnose", []) if run.summary]
    sections += [_guarded(calibration_section, run) for run in by_command.get("calibrate", []) if run.summary]
    sections += [position_section(texts), rollout_section(texts)]
    sections += [answer_section(each, of[each.name]) for each in compared]
    sections += [_guarded(distance_section, run) for run in scored]
    if trainings:
        sections.append(Section("Trainings", [training_table(trainings)]))
    sections.append(data_section([*(run for run in everything if run.command != "evaluate"), *scored]))
    sections += [config_section(everything), version_section(everything)]
    shown = [section for section in sections if section is not None]
    return Page(
        title=f"switchkd: {', '.join(run.name for run in runs)}" if len(runs) <= 4 else f"switchkd: {len(runs)} runs",
        subtitle="; ".join(f"{run.path} (switchkd {run.command})" for run in runs),
        cards=_first_screen(compared, runs, texts),
        sections=shown,
        missing=_missing(everything, compared, texts, {section.title for section in shown}),
    )


def _first_screen(compared: Sequence[Compared], runs: Sequence[Run], texts: Sequence[Texts]) -> Cards:
    ranked = next((each for each in compared if each.competitors > 1), None)
    if ranked is not None:
        return cards(ranked)
    found: Cards = []
    for run in runs:
        summary = run.summary
        said: list[str] = []
        if run.command == "train":
            said = [f"{summary['method']}, {summary['steps']} steps"] if {"method", "steps"} <= summary.keys() else []
            said += [f"loss {summary['loss_first']:.3f} to {summary['loss_last']:.3f} nats per token"] if (
                summary.get("loss_first") is not None and summary.get("loss_last") is not None) else []  # fmt: skip
            said += [f"the teacher wrote {share:.0%}"] if (share := summary.get("teacher_share")) is not None else []
        elif run.command == "evaluate":
            said = [line for each in evaluations(run) for line in _score(each)]
        elif run.command == "judge" and run.summary:
            said = [f"{name}: {one['said']}" for name, one in summary["test_sets"].items()]
        elif run.command == "calibrate":
            said = [str(summary["note"])] if "note" in summary else []
        elif run.command == "diagnose":
            said = [str(summary["advice"]["sentence"])] if "advice" in summary else []
        elif run.command == "rollout" and "teacher_share" in summary:
            said = [
                f"the teacher wrote {summary['teacher_share']:.0%} of {summary['completion_tokens']:,} tokens",
                f"policy {summary['policy']}, {summary['completions']} completions",
            ]
        found.append((f"{run.name} ({run.command})", said or ["this run has not ended"]))
    if len([run for run in runs if run.command == "train"]) > 1:
        found.append(("What won", ["not scored: switchkd evaluate or compare says how good the answers are"]))
    return found[:8]


def _score(run: Run) -> list[str]:
    summary = run.summary
    if "rouge_l" not in summary:
        return []
    low, high = summary.get("intervals", {}).get("rouge_l") or (None, None)
    ends = "" if low is None else f" (95% interval {low:.1f} to {high:.1f})"
    return [f"{run.test_set}, {summary['examples']} prompts: ROUGE-L {summary['rouge_l']:.1f}{ends}"]


def _texts(trained: Sequence[Trained], rollouts: Sequence[Run]) -> list[Texts]:
    """Of trainings the first seed of each label that logged completions."""
    found = {run.name: Texts(run.name, run.rollouts) for run in rollouts if run.rollouts}
    for one in trained:
        if one.label not in found and one.run.rollouts:
            found[one.label] = Texts(one.label, one.run.rollouts)
    return list(found.values())


def _missing(runs: Sequence[Run], compared: Sequence[Compared], texts: Sequence[Texts], titles: set[str]) -> list[str]:
    trained = [run for run in runs if run.command == "train"]
    found = [f"{run.path}: summary.json; the run has not ended" for run in runs
             if not run.summary and run.command not in ("compare",)]  # fmt: skip
    if not compared:
        found.append("scores of answers: give a folder of switchkd evaluate or compare")
    if trained and not any("step" in row for one in texts for row in one.rows[:1]):
        found.append("rollouts of the training: train with --log_completions true")
    if texts and not any(row.get("top_tokens") for one in texts for row in one.rows):
        found.append(
            "the likeliest tokens of both models: switchkd rollout --top_tokens 5, switchkd train --log_top_tokens 5"
        )
    if not any(run.prepared for run in runs):
        found.append("sources and hashes of the data (prepared.json)")
    if trained and not any("first_prompt" in run.summary for run in trained):
        found.append("the first prompt as the student reads it")
    if compared and not any(title.startswith("Differences") for title in titles):
        found.append("differences with intervals: they need two runs that were scored on the same prompts")
    return found


def _guarded(part: Callable[[Given], Found], given: Given) -> Found:
    """A file that lacks what its command writes ends in one line, not in a traceback."""
    try:
        return part(given)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        where = ", ".join(str(run.path) for run in ([given] if isinstance(given, Run) else given))
        raise UserError(f"{where}: a file is not what this version of switchkd writes ({error!r})") from error
