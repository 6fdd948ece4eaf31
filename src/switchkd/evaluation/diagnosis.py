"""Does it matter who writes the training text of this pair? All that `switchkd diagnose` measures, and its verdict."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from switchkd.divergences import LARGEST_JSD
from switchkd.evaluation.guidance import Kept, Pair, Quality, Text, guidance, kept, tokens_from
from switchkd.evaluation.metrics import Mean, Share, mean_with_interval, share_of
from switchkd.evaluation.positions import MEASURES, Caught, around, by_position, caught, first_harmful, read
from switchkd.policies import RandomPolicy, StudentPolicy, SwitchPolicy, TeacherPolicy

#: Thresholds that are tried on the student's text, over that of the policy.
THRESHOLD_FACTORS = (0.25, 1.0, 4.0, 16.0, 64.0)
#: A loss of guidance is material from here on and tolerated up to there, shares; and how many prompts a verdict needs.
MATERIAL_LOSS, TOLERATED_LOSS, FEWEST_PROMPTS = 0.02, 0.05, 8

Verdict = Literal["switch", "teacher", "student", "unclear"]


@dataclass(frozen=True)
class Writer:
    """What was measured on the texts of one writer.

    Attributes:
        name: dataset, student, random, switch or teacher.
        texts: One per prompt.
        teacher_share: Share of the tokens that the teacher wrote; None for the answers of the data set.
        scores: Of the teacher's continuations, `[rows, positions]`, nan where there is none.
        guidance: Compared with the answers of the data set, weighted by tokens: what the table is ordered by.
        against_teacher: Likewise, compared with the teacher's own texts: what the verdict rests on.
        by_position: Compared with the answers, at each position; None where no prompt has both.
        measures: One of `MEASURES` -> its mean from each position to the next; None where there is no token.
        overall: One of `MEASURES` -> its mean over all tokens.
    """

    name: str
    texts: list[Text]
    teacher_share: float | None
    scores: np.ndarray
    guidance: Kept | None
    against_teacher: Kept | None
    by_position: list[Kept | None]
    measures: dict[str, list[Mean | None]]
    overall: dict[str, Mean | None]


@dataclass(frozen=True)
class Harm:
    """Where the first harmful token falls: one that the teacher gives less than a probability.

    Attributes:
        probability: That probability.
        first: Its position in each of the student's texts, None where there is none.
        share: Share of the student's texts with one.
        teacher_share: Share of the teacher's own texts with one: what sampling alone does.
        median_position: Of the first one; None without any.
        before: Mean score of the teacher's continuations just before it; None where nothing could be scored.
        after: Just after it.
        change: After minus before, with its interval over texts.
        caught: What SWITCH would have caught, by threshold.
    """

    probability: float
    first: list[int | None]
    share: Share | None
    teacher_share: Share | None
    median_position: float | None
    before: float | None
    after: float | None
    change: Mean | None
    caught: list[Caught]


@dataclass(frozen=True)
class Diagnosis:
    """The result.

    Attributes:
        positions: Tokens after which texts were cut.
        measure: Name of the score.
        writers: Best guidance first.
        over_random: Guidance on SWITCH's texts, compared with those of random tokens: what its choice is worth.
        harm: Of the student's texts.
        policy: SWITCH as it wrote.
        prompts: On how many the verdict rests.
        verdict: Whose text to train on, see `verdict`.
    """

    positions: list[int]
    measure: str
    writers: list[Writer]
    over_random: Kept | None
    harm: Harm
    policy: SwitchPolicy
    prompts: int
    verdict: Verdict

    def writer(self, name: str) -> Writer:
        """Return what was measured on one writer's texts."""
        return next(writer for writer in self.writers if writer.name == name)


def diagnose(
    pair: Pair,
    policy: SwitchPolicy,
    quality: Quality,
    positions: Sequence[int],
    *,
    harm_probability: float = 0.01,
) -> Diagnosis:
    """Return how good the teacher's guidance is on the texts of five writers, and what follows.

    Args:
        pair: Models, prompts, sampling.
        policy: SWITCH, with the threshold to judge.
        quality: How the teacher's continuations are scored.
        positions: Tokens after which texts are cut, increasing from 0, below the length limit.
        harm_probability: A token is harmful where the teacher gives it less, in [0, 1].
    """
    of_switch = pair.write(policy)
    texts = {
        "dataset": pair.answers(),
        "student": pair.write(StudentPolicy()),
        # As much of the teacher as in SWITCH's text, so that only the choice of the tokens differs.
        "random": pair.write(RandomPolicy(_teacher_share(of_switch))),
        "switch": of_switch,
        "teacher": pair.write(TeacherPolicy()),
    }
    scores = guidance(pair, texts, positions, quality)
    readings = {name: read(pair, of_writer) for name, of_writer in texts.items()}
    writers = []
    for name, of_writer in texts.items():
        reading, weights = readings[name], tokens_from(of_writer, positions)
        measures = {key: by_position(reading.values[key], reading.mask, positions) for key in MEASURES}
        writers.append(
            Writer(
                name=name,
                texts=of_writer,
                teacher_share=None if name == "dataset" else _teacher_share(of_writer),
                scores=scores[name],
                guidance=kept(scores[name], scores["dataset"], weights),
                against_teacher=kept(scores[name], scores["teacher"], weights),
                by_position=[
                    kept(scores[name][:, [column]], scores["dataset"][:, [column]]) for column in range(len(positions))
                ],
                measures=measures,
                overall={key: by_position(reading.values[key], reading.mask, [0])[0] for key in MEASURES},
            )
        )
    by_name = {writer.name: writer for writer in writers}
    compared = ~np.isnan(scores["student"] + scores["teacher"])[:, [position > 0 for position in positions]]
    prompts = int(compared.any(1).sum())
    first = first_harmful(readings["student"], harm_probability)
    of_teacher = first_harmful(readings["teacher"], harm_probability)
    before, after = around(pair, texts["student"], first, quality)
    thresholds = sorted({min(policy.initial_threshold * factor, LARGEST_JSD) for factor in THRESHOLD_FACTORS})
    found = [place for place in first if place is not None]
    harm = Harm(
        probability=harm_probability,
        first=first,
        share=share_of(len(found), len(first)),
        teacher_share=share_of(sum(place is not None for place in of_teacher), len(of_teacher)),
        median_position=statistics.median(found) if found else None,
        before=float(before.mean()) if len(before) else None,
        after=float(after.mean()) if len(after) else None,
        change=mean_with_interval(after - before) if len(before) else None,
        caught=[caught(readings["student"], first, policy.at_threshold(threshold)) for threshold in thresholds],
    )
    return Diagnosis(
        positions=list(positions),
        measure=quality.name,
        writers=sorted(writers, key=_kept_share, reverse=True),
        over_random=kept(scores["switch"], scores["random"], tokens_from(of_switch, positions)),
        harm=harm,
        policy=policy,
        prompts=prompts,
        verdict=verdict(by_name["student"].against_teacher, by_name["switch"].against_teacher, prompts),
    )


def verdict(student: Kept | None, switch: Kept | None, prompts: int) -> Verdict:
    """Return whose text to train on, from the guidance on the student's and on SWITCH's text.

    Both are compared with the teacher's own text, not with the answers: where many answers are good, text that differs
    from the reference scores lower though the teacher goes on as well as ever, and its own text shows by how much.

    With the loss 1 - share of the guidance on the student's text and its 95% interval:

    - `unclear`: fewer than `FEWEST_PROMPTS` prompts could be compared, or the teacher's continuations of its own text
      score 0;
    - `switch`: the loss is at least `MATERIAL_LOSS`, its interval lies above 0, and SWITCH's text loses at most half as
      much;
    - `teacher`: the same, but SWITCH's text loses more than half as much;
    - `student`: otherwise, where the interval ends at `TOLERATED_LOSS` or below;
    - `unclear`: otherwise.

    Args:
        student: Guidance on the student's text over that on the teacher's.
        switch: Likewise for SWITCH's text.
        prompts: How many were compared after at least one token of the text; before it all writers are equal.
    """
    loss, of_switch = loss_of(student), loss_of(switch)
    if loss is None or loss.interval is None or prompts < FEWEST_PROMPTS:
        return "unclear"
    if loss.value >= MATERIAL_LOSS and loss.interval[0] > 0:
        return "switch" if of_switch is not None and of_switch.value <= loss.value / 2 else "teacher"
    return "student" if loss.interval[1] <= TOLERATED_LOSS else "unclear"


def loss_of(found: Kept | None) -> Mean | None:
    """Return 1 minus the share of the guidance that is kept, with its interval."""
    if found is None or found.share is None:
        return None
    ends = found.share.interval
    return Mean(1 - found.share.value, None if ends is None else (1 - ends[1], 1 - ends[0]))


def _teacher_share(texts: Sequence[Text]) -> float:
    return sum(text.teacher_tokens for text in texts) / max(sum(len(text.ids) for text in texts), 1)


def _kept_share(writer: Writer) -> float:
    return -1.0 if writer.guidance is None or writer.guidance.share is None else writer.guidance.share.value
