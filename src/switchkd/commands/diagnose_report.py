"""What `switchkd diagnose` says: the table, the sentence of advice with its figures, the summary and the rows."""

import argparse
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np

from switchkd.cli.display import table
from switchkd.evaluation.diagnosis import Diagnosis, Writer, loss_of
from switchkd.evaluation.guidance import Kept, Pair
from switchkd.evaluation.metrics import Mean
from switchkd.evaluation.positions import MEASURES

#: Writers as they are called in the table and the picture.
TITLES = {
    "dataset": "dataset answers",
    "student": "student",
    "random": "random tokens",
    "switch": "SWITCH",
    "teacher": "teacher",
}
#: A position is quoted in the advice where at least this share of the prompts counts: the last one of them.
QUOTED_ROWS = 0.25
WIDTH = 110


def report(diagnosis: Diagnosis, advice: dict[str, str]) -> str:
    """Return table, harmful tokens and advice."""
    return "\n".join(
        [
            *_guidance_table(diagnosis),
            "",
            *_harm_lines(diagnosis),
            "",
            textwrap.fill(advice["sentence"], WIDTH, break_long_words=False, break_on_hyphens=False),
            *([f"  {advice['command']}"] if advice["command"] else []),
        ]
    )


def advice(diagnosis: Diagnosis, options: argparse.Namespace) -> dict[str, str]:
    """Return `verdict`, its `sentence` with the figures it rests on, and the `command` to copy.

    Args:
        diagnosis: What was measured.
        options: Those of the command, for the line to copy.
    """
    loss, of_switch = (loss_of(diagnosis.writer(name).against_teacher) for name in ("student", "switch"))
    of_random = loss_of(diagnosis.writer("random").against_teacher)
    drop = (
        f"{_drop(diagnosis)}over all tokens of the student's text it loses {_percent(loss)} against the teacher's text"
    )
    prompts = f"{diagnosis.prompts} prompt" + ("s" if diagnosis.prompts > 1 else "")
    threshold = f"SWITCH at {diagnosis.policy.initial_threshold:.3g} nats"
    mixed = (
        f"{_percent(of_switch)} on text of {threshold} and {_percent(of_random)} with as many random "
        f"tokens of the teacher (the choice is worth {_gain(diagnosis.over_random)}){_hits(diagnosis)}"
    )
    if diagnosis.verdict == "switch":
        sentence = (
            f"{drop}, but {mixed}: let SWITCH write and compare it with --method kd, which learns from the answers "
            "without a rollout, or train on the reverse KL (--method opd), under which the writer made no difference "
            "in our runs."
        )
        command = _train(options, "switch", _share_options(options))
    elif diagnosis.verdict == "teacher":
        sentence = (
            f"{drop}, and {mixed}, more than half as much: train on text that the teacher or the data set wrote, or "
            "try SWITCH with a larger --target_teacher_share."
        )
        command = _train(options, "seqkd", {})
    elif diagnosis.verdict == "student":
        sentence = (
            f"{drop}, at most {_ends(loss)[1]}: the teacher goes on from the student's text about as well as from its "
            "own, so let the student write, which is cheapest."
        )
        command = _train(options, "opd", {})
    elif diagnosis.prompts == 0:
        sentence = (
            "No advice: no prompt has texts and an answer that go on after the first position where texts are cut; "
            "take longer answers, a longer --max_completion_length, or earlier --positions."
        )
        command = ""
    elif loss is None:
        sentence = (
            f"No advice: the teacher's continuations of its own texts score 0 {diagnosis.measure} on every prompt; the "
            "measure does not fit this task: give another --scorer, or other data."
        )
        command = ""
    else:
        sentence = (
            f"{drop}: too uncertain with {prompts} to say whose text to train on; take more with --max_samples "
            f"{4 * options.max_samples}, or compare on text of your own with a --scorer."
        )
        command = ""
    return {"verdict": diagnosis.verdict, "sentence": sentence, "command": command}


def summary(diagnosis: Diagnosis, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured, ready for JSON."""
    harm = diagnosis.harm
    return {
        "advice": advice(diagnosis, options),
        "measure": diagnosis.measure,
        "positions": diagnosis.positions,
        "ranking": [writer.name for writer in diagnosis.writers],
        "initial_threshold": diagnosis.policy.initial_threshold,
        "prompts": diagnosis.prompts,
        "over_random": _kept(diagnosis.over_random),
        "writers": {writer.name: _writer(writer) for writer in diagnosis.writers},
        "harm": {
            "probability": harm.probability,
            "texts": None if harm.share is None else vars(harm.share),
            "teacher_texts": None if harm.teacher_share is None else vars(harm.teacher_share),
            "median_position": harm.median_position,
            "before": harm.before,
            "after": harm.after,
            "change": _mean(harm.change),
            "caught": [{**vars(one), "share": None if one.share is None else vars(one.share)} for one in harm.caught],
        },
    }


def rows(diagnosis: Diagnosis, pair: Pair) -> Iterator[dict[str, Any]]:
    """Yield every text with the scores of its continuations."""
    for writer in diagnosis.writers:
        for index, (text, scores) in enumerate(zip(writer.texts, writer.scores, strict=True)):
            yield {
                "writer": writer.name,
                "index": index,
                "prompt": pair.data["prompt"][index],
                "completion": pair.tokenizer.decode(text.ids, skip_special_tokens=True),
                "completion_tokens": len(text.ids),
                "teacher_tokens": text.teacher_tokens,
                "scores": [None if np.isnan(score) else float(score) for score in scores],
                "first_harmful": diagnosis.harm.first[index] if writer.name == "student" else None,
            }


def _guidance_table(diagnosis: Diagnosis) -> list[str]:
    # After 0 tokens all are equal.
    columns = [column for column, position in enumerate(diagnosis.positions) if position > 0]
    cells = [
        (
            TITLES[writer.name],
            None if writer.teacher_share is None else f"{writer.teacher_share:.0%}",
            _share(writer.guidance),
            *(_share(writer.by_position[column], bare=True) for column in columns),
            *(
                None if mean is None else f"{mean.value:.3f}"
                for mean in map(writer.overall.get, ("teacher_entropy", "jsd"))
            ),
            None if (mean := writer.overall["top1_agreement"]) is None else f"{mean.value:.0%}",
        )
        for writer in diagnosis.writers
    ]
    heads = [f"after {diagnosis.positions[column]}" for column in columns]
    clean = diagnosis.writer("dataset").guidance
    level = "" if clean is None else f", which score {clean.score:.1f}"
    return [
        table(cells, ("writer", "teacher share", "guidance kept", *heads, "entropy", "JSD", "top 1")),
        f"guidance kept: {diagnosis.measure} of the teacher's continuations of a text over that of its continuations",
        f"of the answers{level}: over all tokens (95% interval over prompts), and after so many;",
        "entropy of the teacher and JSD in nats; top 1: the two models have the same likeliest token",
    ]


def _harm_lines(diagnosis: Diagnosis) -> list[str]:
    harm = diagnosis.harm
    assert harm.share is not None and harm.teacher_share is not None  # there is at least one text
    lines = [
        f"harmful tokens (the teacher gives them less than {harm.probability:.3g}): in {harm.share.value:.0%} of the "
        f"student's texts, in {harm.teacher_share.value:.0%} of the teacher's own"
        + ("" if harm.median_position is None else f";\nthe first at position {harm.median_position:g} (median)")
    ]
    if harm.change is not None:
        ends = harm.change.interval
        between = "" if ends is None else f" ({ends[0]:+.1f} to {ends[1]:+.1f})"
        lines.append(
            f"the teacher's continuation scores {harm.before:.1f} just before the first one and {harm.after:.1f} just "
            f"after it: {harm.change.value:+.1f}{between}"
        )
    if harm.median_position is not None:
        cells = [
            (
                f"{one.initial_threshold:.4g}"
                + (" *" if one.initial_threshold == diagnosis.policy.initial_threshold else ""),
                None
                if one.share is None
                else f"{one.share.value:.0%} ({one.share.interval[0]:.0%} to {one.share.interval[1]:.0%})",
                f"{one.teacher_share:.0%}",
            )
            for one in harm.caught
        ]
        lines += [
            table(cells, ("threshold, nats", "first harmful tokens caught", "of all tokens")),
            "* as SWITCH wrote",
        ]
    return lines


def _drop(diagnosis: Diagnosis) -> str:
    """What the student's text costs after a number of tokens that many prompts reach, beside the teacher's own."""
    student, teacher = (diagnosis.writer(name).by_position for name in ("student", "teacher"))
    enough = QUOTED_ROWS * len(diagnosis.writer("student").texts)
    for position, own, taught in reversed(list(zip(diagnosis.positions, student, teacher, strict=True))):
        if position and own is not None and own.rows >= enough and loss_of(own) is not None:
            return (
                f"After {position} tokens of the student's text the teacher's continuation loses "
                f"{_percent(loss_of(own))} of its {diagnosis.measure} on the answers, after as many of its own "
                f"{_percent(loss_of(taught))}; "
            )
    return f"By {diagnosis.measure}, "


def _gain(found: Kept | None) -> str:
    if found is None or found.share is None:
        return "an unknown share"
    ends = found.share.interval
    gained = None if ends is None else (ends[0] - 1, ends[1] - 1)
    return _percent(Mean(found.share.value - 1, gained))


def _hits(diagnosis: Diagnosis) -> str:
    """How often SWITCH steps in before a harmful token, where such tokens do measurable harm."""
    change = diagnosis.harm.change
    if change is None or change.interval is None or change.interval[1] >= 0:
        return ""
    used = [one for one in diagnosis.harm.caught if one.initial_threshold == diagnosis.policy.initial_threshold]
    if not used or used[0].share is None:
        return ""
    return f", and it steps in at {used[0].share.value:.0%} of the first harmful tokens"


def _train(options: argparse.Namespace, method: str, more: dict[str, Any]) -> str:
    given = {
        "method": method,
        **more,
        "model_name_or_path": options.model_name_or_path,
        "teacher_model_name_or_path": options.teacher_model_name_or_path,
        "dataset_name": options.dataset_name,
        "max_prompt_length": options.max_prompt_length,
        "max_completion_length": options.max_completion_length,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return shlex.join(["switchkd", "train", *words])


def _share_options(options: argparse.Namespace) -> dict[str, Any]:
    rule = {name: getattr(options, name) for name in ("initial_threshold", "final_ratio", "horizon", "schedule")}
    given = {name: value for name, value in rule.items() if value is not None}
    return given if "initial_threshold" in given else {"target_teacher_share": options.target_teacher_share, **given}


def _writer(writer: Writer) -> dict[str, Any]:
    return {
        "teacher_share": writer.teacher_share,
        "completion_tokens": sum(len(text.ids) for text in writer.texts) / len(writer.texts),
        "guidance": _kept(writer.guidance),
        "against_teacher": _kept(writer.against_teacher),
        "by_position": [_kept(one) for one in writer.by_position],
        "measures": {
            name: {"all": _mean(writer.overall[name]), "by_position": list(map(_mean, writer.measures[name]))}
            for name in MEASURES
        },
    }


def _kept(found: Kept | None) -> dict[str, Any] | None:
    return None if found is None else {**vars(found), "share": _mean(found.share)}


def _mean(found: Mean | None) -> dict[str, Any] | None:
    return None if found is None else vars(found)


def _share(found: Kept | None, *, bare: bool = False) -> str | None:
    if found is None or found.share is None:
        return None
    ends = found.share.interval
    between = "" if bare or ends is None else f" ({ends[0]:.0%} to {ends[1]:.0%})"
    return f"{found.share.value:.0%}" if bare else f"{found.share.value:.1%}{between}"


def _percent(loss: Mean | None) -> str:
    if loss is None:
        return "an unknown share"
    low, high = _ends(loss)
    return _whole(loss.value) + (f" ({low} to {high})" if low else "")


def _ends(loss: Mean | None) -> tuple[str, str]:
    if loss is None or loss.interval is None:
        return "", ""
    return _whole(loss.interval[0]), _whole(loss.interval[1])


def _whole(share: float) -> str:
    """Per cent without decimals; there is no minus zero."""
    return f"{round(100 * share) + 0:d}%"
