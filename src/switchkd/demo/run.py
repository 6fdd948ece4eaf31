"""The demo: a small comparison on a task of its own, from random weights to what SWITCH changes."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from switchkd.cli.display import plot_summary, position_curves
from switchkd.cli.rollouts import rollout_text
from switchkd.cli.run_folder import RunFolder
from switchkd.compare.findings import Comparison, by_length, find, sentences
from switchkd.compare.report import all_tables, as_text
from switchkd.compare.tasks import ONE_SET, WARM_START, Task, execute
from switchkd.demo.settings import MODELS, DemoSettings, demo_tasks
from switchkd.demo.task import generate, save_splits, train_tokenizer
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.evaluation.metrics import bucket_names, length_bucket, mean_and_std
from switchkd.models.loading import load_model, load_tokenizer
from switchkd.policies import SwitchPolicy, ThresholdPolicy
from switchkd.rollout import Author
from switchkd.training.calibration import calibrate

Say = Callable[[str], None]

#: Prompts of the rollout that is drawn and shown.
SHOWN_PROMPTS = 64


def run_demo(
    output_dir: Path, *, seed: int = 0, say: Say = print, settings: DemoSettings | None = None
) -> dict[str, Any]:
    """Make data, tokenizer, teacher and student, distil with and without the teacher in the text, and compare.

    `output_dir` ends up with the data, the tokenizer and five models that every other command can use, the folders of
    the runs, `summary.json` and `summary.png`.

    Args:
        output_dir: Folder to write.
        seed: Seed of data, weights and sampling.
        say: Prints a line for people.
        settings: Sizes; the defaults if None.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: A run failed.
    """
    settings = settings or DemoSettings()
    started = time.perf_counter()
    folder = RunFolder(str(output_dir), "demo")
    folder.make()
    with _one_thread():
        long_share = _write_task(folder.path, seed, settings, say)
        tasks = demo_tasks(folder.path, seed, settings)
        results = [_finished(task, folder.path, say) for task in tasks]
        rows = {task.label: task.rows(ONE_SET) for task in tasks}
        comparison = Comparison(results, {("", label, seed): scored for label, scored in rows.items()})
        policy, curves, example = _rollout(folder.path, seed, settings)
    for task in tasks[1:]:
        shutil.move(task.folder / "train", folder.path / MODELS[task.label])
    summary = {
        **_scores(comparison, tasks, seed),
        "initial_threshold": policy.initial_threshold,
        "long_answers_share": long_share,
        "seed": seed,
        "settings": asdict(settings),
        "stage_seconds": {result["run"]: result["seconds"] for result in results},
        "seconds": time.perf_counter() - started,
    }
    bars = {label: _by_length(scored) for label, scored in rows.items() if label != "teacher"}
    plot_summary(folder.path / "summary.png", **curves, scores=bars)
    folder.write_json("summary.json", summary)
    _say_findings(folder.path, comparison, summary, example, say)
    return summary


def _write_task(folder: Path, seed: int, settings: DemoSettings, say: Say) -> float:
    """Write data and tokenizer; return the share of test answers that are longer than 40 tokens."""
    splits = generate(seed, train=settings.records, test=settings.test_records)
    save_splits(splits, folder / "data")
    tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in splits["train"]])
    tokenizer.save_pretrained(folder / "tokenizer")
    lengths = [len(ids) for ids in tokenizer(list(splits["test"]["completion"]))["input_ids"]]
    long_share = sum(length >= 40 for length in lengths) / len(lengths)
    say(
        f"data: {len(splits['train'])} training and {len(lengths)} test instructions of "
        f"{len(set(splits['train']['kind']))} kinds, {long_share:.0%} of the answers longer than 40 tokens; "
        f"{len(tokenizer)} token ids"
    )
    return long_share


def _finished(task: Task, folder: Path, say: Say) -> dict[str, Any]:
    """Run one task and say how it went; the teacher goes where the others look for it."""
    result = execute(task, threads=None)
    if "error" in result:
        raise UserError(f"the demo's run {task.name!r} failed: {result['error']}")
    if task.label == "teacher":
        shutil.move(task.folder / "train", folder / MODELS["teacher"])
    trained, scored = result["train"], result["evaluate"][ONE_SET]
    share = trained.get("teacher_share")
    wrote = f", the teacher wrote {share:.0%} of the text" if share else ""
    say(
        f"{task.label}: {trained['steps']} steps of {trained['method']}{wrote}, ROUGE-L {scored['rouge_l']:.1f}, "
        f"{result['seconds']:.0f} s"
    )
    # Comparisons know one test set at a time.
    return {**result, "evaluate": scored, "cell": {}}


def _rollout(
    folder: Path, seed: int, settings: DemoSettings
) -> tuple[ThresholdPolicy, dict[str, list[float]], dict[str, Any]]:
    """How SWITCH runs along the text where its training begins: its policy, curves, and one rollout to look at."""
    student = load_model(str(folder / "runs" / "warm-start" / f"seed-{seed}" / "train"))
    teacher = load_model(str(folder / MODELS["teacher"]))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    with (folder / "data" / "train.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["prompt"] for _, line in zip(range(SHOWN_PROMPTS), file, strict=False)]
    prompts = tokenizer(texts)["input_ids"]
    options = {"seed": seed, "eos_token_id": tokenizer.eos_token_id, "draft_length": 4}
    policy = calibrate(
        student,
        teacher,
        prompts,
        policy=SwitchPolicy(horizon=settings.max_completion_length),
        target_teacher_share=settings.teacher_share,
        max_new_tokens=settings.max_completion_length,
        **options,
    ).policy
    rollout = roll_out(
        student, teacher, prompts, policy=policy, max_new_tokens=settings.max_completion_length, **options
    )
    shares = (rollout.author == Author.TEACHER).sum(1) / rollout.completion_mask.sum(1)
    example = int((shares - settings.teacher_share).abs().argmin())
    rows = rollout.to_dicts(tokenizer)
    return policy, position_curves([rollout], min_rows=max(len(rows) // 8, 1)), rows[example]


def _scores(comparison: Comparison, tasks: Sequence[Task], seed: int) -> dict[str, Any]:
    found = {task.label: comparison.of("", task.label)[0] for task in tasks}
    scored = {label: result["evaluate"] for label, result in found.items()}
    rouge_l = {label: values["rouge_l"] for label, values in scored.items()}
    against = {other: comparison.difference("", "SWITCH", other) for other in ("student only", "SFT", WARM_START)}
    return {
        "rouge_l": rouge_l,
        "rouge_l_std": {label: values["rouge_l_std"] for label, values in scored.items()},
        "by_length": {label: values["by_length"] for label, values in scored.items()},
        "exact_match": {label: values["exact_match"] for label, values in scored.items()},
        "teacher_share": found["SWITCH"]["train"]["teacher_share"],
        "switch_against": {other: asdict(difference) for other, difference in against.items() if difference},
        "claims": {
            "teacher_rouge_l_at_least_90": rouge_l["teacher"] >= 90,
            "switch_5_points_ahead_of_student_only": rouge_l["SWITCH"] - rouge_l["student only"] >= 5,
            "switch_gains_over_warm_start": rouge_l["SWITCH"] > rouge_l[WARM_START],
        },
    }


def _by_length(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over the decoding seeds for each length of answer."""
    scores: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        by_seed = scores.setdefault(length_bucket(row["reference_tokens"]), {})
        by_seed.setdefault(row["seed"], []).append(row["rouge_l"])
    return {
        bucket: mean_and_std([sum(values) / len(values) for values in scores[bucket].values()])
        for bucket in bucket_names()
        if bucket in scores
    }


def _say_findings(
    folder: Path, comparison: Comparison, summary: Mapping[str, Any], example: dict[str, Any], say: Say
) -> None:
    say("\nA rollout before distillation, the teacher's tokens in [brackets]:")
    say(rollout_text(example))
    comparisons, pairs = {ONE_SET: comparison}, [("SWITCH", "student only"), ("SWITCH", "SFT")]
    findings = find(comparisons, pairs)
    lengths = by_length(comparisons, pairs)
    say("\n" + as_text(all_tables(comparisons, findings, lengths), sentences(comparisons, findings, pairs)))
    rouge_l = summary["rouge_l"]
    say(
        f"\nUnder one objective (forward KL), the student's text alone takes the warm start from "
        f"{rouge_l[WARM_START]:.1f} to {rouge_l['student only']:.1f}; with {summary['teacher_share']:.0%} of the "
        f"tokens by the teacher it reaches {rouge_l['SWITCH']:.1f}."
    )
    if rouge_l["SFT"] >= rouge_l["SWITCH"]:
        answers = f"SFT on the dataset's answers reaches {rouge_l['SFT']:.1f}"
        say(f"{answers}: good answers, where they exist, do as well or better.")
    for claim, holds in summary["claims"].items():
        if not holds:
            say(f"DOES NOT HOLD in this run: {claim.replace('_', ' ')}")
    say(f"{summary['seconds']:.0f} s; models, data, runs, summary.json and summary.png in {folder}")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: on models this small a second one costs more waiting than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
