"""What two models predict along one text: entropy, divergences and agreement at every position; harmful tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from switchkd.data.batches import Rows, padded_batch
from switchkd.divergences import forward_kl, generalized_jsd, reverse_kl
from switchkd.evaluation.guidance import Pair, Quality, Text
from switchkd.evaluation.metrics import Mean, Share, mean_with_interval, share_of
from switchkd.models.forward import device_of, eval_mode
from switchkd.models.vocabulary import model_vocabulary_size
from switchkd.objective import Objective
from switchkd.objective.chunked import chunk_sizes
from switchkd.objective.predictions import Predictions
from switchkd.objective.step import StepLoss
from switchkd.policies import SwitchPolicy
from switchkd.sampling import Warping

#: What is measured at every token of a text; nats, and 0 or 1 for the agreement.
MEASURES = ("teacher_entropy", "jsd", "forward_kl", "reverse_kl", "top1_agreement")


@dataclass(frozen=True)
class Reading:
    """Two models on R texts of up to C tokens, float32 on the CPU; 0 where a text has ended.

    Attributes:
        mask: True at tokens, `[R, C]`.
        values: One of `MEASURES` -> `[R, C]`, of the distributions at temperature 1 that predict each token.
        teacher_log_prob: ln of the teacher's probability of the token that stands there, `[R, C]`.
        compared: What SWITCH compares there: the JSD of the distributions as they are sampled, `[R, C]`.
    """

    mask: Tensor
    values: dict[str, Tensor]
    teacher_log_prob: Tensor
    compared: Tensor


@torch.no_grad()
def read(pair: Pair, texts: Sequence[Text]) -> Reading:
    """Return what both models predict along texts, one per row of the data; logits exist for one chunk at a time."""
    columns = [name for name in ("prompt_ids", "teacher_prompt_ids") if name in pair.data.column_names]
    data = list(pair.data.select_columns(columns))
    width = max(max(len(text.ids) for text in texts), 1)
    names = (*MEASURES, "teacher_log_prob", "compared")
    found = {name: torch.zeros(len(texts), width) for name in names}
    mask = torch.arange(width) < torch.tensor([len(text.ids) for text in texts]).unsqueeze(1)
    order = sorted(range(len(texts)), key=lambda row: -len(data[row]["prompt_ids"]) - len(texts[row].ids))
    reading = StepLoss(Objective("generalized_jsd"))
    device = device_of(pair.student)
    with eval_mode(pair.student, pair.teacher):
        for start in range(0, len(order), pair.batch_size):
            batch = order[start : start + pair.batch_size]
            rows = Rows([{**data[row], "completion_ids": texts[row].ids} for row in batch])
            inputs = {name: value.to(device) for name, value in padded_batch(rows, pair.pad).items()}
            student, teacher = reading.predictions(pair.student, pair.teacher, inputs)
            assert teacher is not None
            inside = inputs["completion_mask"]
            labels = inputs["input_ids"][:, -inside.shape[1] :][inside]
            for name, values in _compared(pair, student, teacher, inside, labels).items():
                of_batch = torch.zeros(inside.shape)
                of_batch[inside.cpu()] = values.float().cpu()
                found[name][batch, : of_batch.shape[1]] = of_batch
    return Reading(mask, {name: found[name] for name in MEASURES}, found["teacher_log_prob"], found["compared"])


def by_position(values: Tensor, mask: Tensor, positions: Sequence[int]) -> list[Mean | None]:
    """Return the mean of values of tokens from each position to before the next, with its 95% interval over rows.

    Args:
        values: `[R, C]`.
        mask: True at tokens, `[R, C]`.
        positions: First positions, increasing.

    Returns:
        One mean per position; None where no text has a token.
    """
    found: list[Mean | None] = []
    for start, stop in zip(positions, [*positions[1:], values.shape[1]], strict=True):
        inside = mask[:, start:stop]
        counts = inside.sum(1).numpy().astype(np.float64)
        totals = torch.where(inside, values[:, start:stop], 0.0).double().sum(1).numpy()
        reached = counts > 0
        found.append(mean_with_interval(totals[reached], counts[reached]) if reached.any() else None)
    return found


def first_harmful(reading: Reading, harm_probability: float) -> list[int | None]:
    """Return the position of the first token of each text that the teacher finds too unlikely, None without one.

    Args:
        reading: Of R texts.
        harm_probability: A token is harmful where the teacher gives it less than this.
    """
    low = (reading.teacher_log_prob.exp() < harm_probability) & reading.mask
    return [int(row.nonzero()[0]) if bool(row.any()) else None for row in low]


@dataclass(frozen=True)
class Caught:
    """What a threshold would have done with texts that the student wrote.

    Attributes:
        initial_threshold: The threshold at position 0, nats.
        share: Share of the first harmful tokens at whose position the teacher would have written; None without one.
        teacher_share: Share of all tokens at whose position it would have: what a rule that ignores the models catches.
    """

    initial_threshold: float
    share: Share | None
    teacher_share: float


def caught(reading: Reading, first: Sequence[int | None], policy: SwitchPolicy) -> Caught:
    """Return what a threshold would have caught.

    The divergence at a position rests on the text before it, so that up to the first harmful token this is what the
    policy does with the text as it stands, apart from what it would have changed before.

    Args:
        reading: Of R texts.
        first: Of `first_harmful`.
        policy: The threshold and its schedule.
    """
    threshold = policy.threshold(torch.arange(reading.mask.shape[1]))
    teacher_writes = (reading.compared > threshold) & reading.mask
    hits = [bool(teacher_writes[row, place]) for row, place in enumerate(first) if place is not None]
    overall = float(teacher_writes.sum() / reading.mask.sum())
    return Caught(policy.initial_threshold, share_of(sum(hits), len(hits)), overall)


def around(
    pair: Pair, texts: Sequence[Text], first: Sequence[int | None], quality: Quality
) -> tuple[np.ndarray, np.ndarray]:
    """Return the quality of the teacher's continuation just before and just after the first harmful tokens.

    Both are scored after the harmful token's position, so that the token itself counts in neither. For a token that
    the teacher itself draws, the expected difference is 0.

    Returns:
        Scores before and after, `[texts with a harmful token]`; those that end with it, or whose answer has ended, are
        left out.
    """
    places = [
        (row, place)
        for row, place in enumerate(first)
        if place is not None and place + 1 < len(texts[row].ids) and quality.is_defined(row, place + 1)
    ]
    starts = [(row, tuple(texts[row].ids[: place + more])) for row, place in places for more in (0, 1)]
    written = pair.continuations(starts)
    before, after = [], []
    for row, place in places:
        whole = [*texts[row].ids[:place], *written[row, tuple(texts[row].ids[:place])]]
        before.append(quality(row, whole[: place + 1], whole[place + 1 :]))
        given = tuple(texts[row].ids[: place + 1])
        after.append(quality(row, given, written[row, given]))
    return np.array(before), np.array(after)


def _compared(
    pair: Pair, student: Predictions, teacher: Predictions, mask: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Every measure at the masked positions, `[N]` each."""
    shared = min(model_vocabulary_size(pair.student), model_vocabulary_size(pair.teacher))
    excluded = tuple(pair.excluded_ids)
    plain = Warping(1.0, 0, 1.0, shared, excluded)
    sampled = Warping(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | dict(pair.sampling)),
                      vocabulary_size=shared, excluded_ids=excluded)  # fmt: skip
    own, taught = student.values[mask], teacher.values[mask.to(teacher.values.device)]
    rows = chunk_sizes(shared, cached=own.device.type == "cpu").block
    parts: list[dict[str, Tensor]] = []
    for start in range(0, max(len(labels), 1), rows):
        chunk = slice(start, start + rows)
        own_logits = _logits(student, own[chunk])
        logits = own_logits, _logits(teacher, taught[chunk]).to(own_logits.device)
        student_log_probs, teacher_log_probs = map(plain, logits)
        compared = generalized_jsd(student_log_probs, teacher_log_probs)
        probs = teacher_log_probs.exp()
        parts.append(
            {
                "teacher_entropy": -torch.where(probs > 0, probs * teacher_log_probs, 0.0).sum(-1),
                "jsd": compared,
                "forward_kl": forward_kl(student_log_probs, teacher_log_probs),
                "reverse_kl": reverse_kl(student_log_probs, teacher_log_probs),
                "top1_agreement": (student_log_probs.argmax(-1) == teacher_log_probs.argmax(-1)).float(),
                "teacher_log_prob": teacher_log_probs.gather(-1, labels[chunk].unsqueeze(-1)).squeeze(-1),
                "compared": compared if sampled == plain else generalized_jsd(*map(sampled, logits)),
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _logits(predictions: Predictions, values: Tensor) -> Tensor:
    return Predictions(values, predictions.head).logits().float()
