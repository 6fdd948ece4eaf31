"""How well the teacher goes on from text that somebody else wrote: the guidance it can give there, before any training.

Texts of several writers for the same prompts are cut after n tokens; the teacher continues them, and its continuations
are scored. Where they get worse than those of clean text, the teacher's predictions on that text teach less.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.evaluation.losses import check_prepared, known_part
from switchkd.evaluation.metrics import Mean, mean_with_interval, rouge_l
from switchkd.evaluation.scorers import Scorer
from switchkd.models.forward import context_length
from switchkd.models.vocabulary import model_vocabulary_size, readable_pad_id, require_eos
from switchkd.policies import Policy, TeacherPolicy
from switchkd.rollout import Author

#: Where texts are cut, tokens; doubled from here on, below the length limit.
FIRST_POSITIONS = (0, 5, 10)


@dataclass(frozen=True)
class Text:
    """One completion.

    Attributes:
        ids: Its tokens, the end of sequence included.
        teacher_tokens: How many of them the policy gave to the teacher.
    """

    ids: list[int]
    teacher_tokens: int = 0


@dataclass(frozen=True)
class Pair:
    """Two models, the prompts, and how text is written for them.

    Attributes:
        student: A causal language model.
        teacher: Likewise.
        tokenizer: The student's.
        data: Made by `switchkd.data.prepare`, with an answer in every row; R rows.
        max_completion_length: Length limit of every text, what it was cut after included; tokens.
        sampling: `temperature`, `top_k`, `top_p` of all writers; `roll_out`'s where left out.
        seed: Of all texts and continuations.
        batch_size: Rows read or written at once; affects only speed.
        excluded_ids: Never written nor compared, see `switchkd.models.vocabulary.check_tokenizers`.
    """

    student: nn.Module
    teacher: nn.Module
    tokenizer: Any
    data: Dataset
    max_completion_length: int
    sampling: Mapping[str, Any]
    seed: int = 0
    batch_size: int = 32
    excluded_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        require_answers(self.data)

    @property
    def eos(self) -> list[int]:
        """Ids that end a text."""
        return require_eos(self.tokenizer, self.student, self.teacher)

    @property
    def pad(self) -> int:
        """An id that both models can read."""
        return readable_pad_id(self.tokenizer.pad_token_id, self.eos, self.student, self.teacher)

    def answers(self) -> list[Text]:
        """Return the answers of the data set, each up to the first token that only one of the models knows."""
        known = min(model_vocabulary_size(self.student), model_vocabulary_size(self.teacher))
        unknown = frozenset(self.excluded_ids)
        return [Text(known_part(ids, known, unknown)) for ids in self.data["completion_ids"]]

    def write(self, policy: Policy) -> list[Text]:
        """Return one text per row under a policy; with the same seed for every policy."""
        starts: list[tuple[int, list[int]]] = [(row, []) for row in range(len(self.data))]
        return self._roll_out(policy, starts, self.max_completion_length)

    def continuations(
        self, starts: Sequence[tuple[int, Sequence[int]]]
    ) -> dict[tuple[int, tuple[int, ...]], list[int]]:
        """Return what the teacher writes after (row, first tokens of a text), up to the length limit of the whole.

        The noise is a function of the row and the number of tokens: two texts of a row that are cut after as many
        tokens are continued with the same noise, so that their difference is less noisy, and equal starts with equal
        tokens.

        Args:
            starts: (row of the data, tokens); repeats are written once.

        Returns:
            (row, tokens) -> the tokens that follow, the end of sequence included.
        """
        unique = sorted({(row, tuple(ids)) for row, ids in starts}, key=lambda start: (len(start[1]), start))
        found: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for group in self._of_like_length(unique):
            lists = [(row, list(ids)) for row, ids in group]
            longest = self.max_completion_length - len(group[0][1])
            texts = self._roll_out(TeacherPolicy(), lists, longest)
            for start, text in zip(group, texts, strict=True):
                found[start] = text.ids[: self.max_completion_length - len(start[1])]
        return found

    def _of_like_length(self, starts: list[tuple[int, tuple[int, ...]]]) -> list[list[tuple[int, tuple[int, ...]]]]:
        """Groups that are continued at once. The shortest start says how far; what others write too much is cut."""
        width = max(self.max_completion_length // 16, 1)
        groups = [list(group) for _, group in itertools.groupby(starts, key=lambda start: len(start[1]) // width)]
        prompts = list(self.data["prompt_ids"])
        teacher_prompts = self.teacher_prompts() or prompts
        limits = [limit for limit in map(context_length, (self.student, self.teacher)) if limit is not None]

        def fits(group: list[tuple[int, tuple[int, ...]]]) -> bool:
            new = self.max_completion_length - len(group[0][1])
            longest = max(max(len(prompts[row]), len(teacher_prompts[row])) + len(ids) for row, ids in group)
            return all(longest + new <= limit for limit in limits)

        return [
            part
            for group in groups
            for part in (
                [group] if fits(group) else [list(one) for _, one in itertools.groupby(group, lambda s: len(s[1]))]
            )
        ]

    def teacher_prompts(self) -> list[list[int]] | None:
        """Return the prompt that the teacher reads in each row, None where it is the student's."""
        return list(self.data["teacher_prompt_ids"]) if "teacher_prompt_ids" in self.data.column_names else None

    def _roll_out(self, policy: Policy, starts: list[tuple[int, list[int]]], limit: int) -> list[Text]:
        prompts, teacher_prompts = list(self.data["prompt_ids"]), self.teacher_prompts()
        rollout = roll_out(
            self.student,
            self.teacher,
            [prompts[row] + ids for row, ids in starts],
            policy=policy,
            max_new_tokens=limit,
            seed=self.seed,
            eos_token_id=self.eos,
            pad_token_id=self.pad,
            # Noise of its own for every length that was given: positions count from the end of the prompt, and with the
            # row alone what follows would be drawn with the noise that chose what stands before.
            row_ids=torch.tensor([row + len(self.data) * len(ids) for row, ids in starts]),
            teacher_prompt_ids=(
                [teacher_prompts[row] + ids for row, ids in starts] if teacher_prompts is not None else None
            ),
            max_active_rows=self.batch_size,
            excluded_ids=self.excluded_ids,
            **self.sampling,
        )
        rows = zip(rollout.completion_ids, rollout.author, rollout.completion_mask, strict=True)
        return [Text(ids[mask].tolist(), int((author == Author.TEACHER).sum())) for ids, author, mask in rows]


def require_answers(data: Dataset) -> None:
    """Refuse a data set with a row that has no answer.

    Args:
        data: Made by `switchkd.data.prepare`.

    Raises:
        UserError: Names the first such row.
    """
    check_prepared(data)
    bare = next((row for row, ids in enumerate(data["completion_ids"], start=1) if not ids), None)
    if bare is not None:
        raise UserError(
            f"row {bare} of the prepared data set has no answer: the teacher's continuations are compared with answers "
            "(`completion`, `output` or a chat that ends with the assistant); give a data set with them"
        )


class Quality:
    """The score of a text of which the first tokens were given.

    ROUGE-L of what follows them against the part of the answer (the best one) after as many tokens; or with a scorer,
    its score of the whole text.

    Args:
        pair: Prompts and answers.
        scorer: The measure, where it is not ROUGE-L.
    """

    def __init__(self, pair: Pair, scorer: Scorer | None = None) -> None:
        self.tokenizer, self.scorer, self.eos = pair.tokenizer, scorer, set(pair.eos)
        self.name = "ROUGE-L" if scorer is None else scorer.name
        self._prompts, self._references = list(pair.data["prompt"]), list(pair.data["references"])
        limit = pair.max_completion_length
        first = [text.ids for text in pair.answers()]
        others = [
            [
                self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:limit]
                for text in accepted[1:]
            ]
            for accepted in self._references
        ]
        self._answers = [[ids, *more] for ids, more in zip(first, others, strict=True)]
        self._rests: dict[tuple[int, int], list[str]] = {}

    def is_defined(self, row: int, position: int) -> bool:
        """Whether the answer of a row goes on after that many tokens, with at least one word for ROUGE-L."""
        if self.scorer is not None:
            return len(self._answers[row][0]) > position
        return bool(self._rest(row, position))

    def __call__(self, row: int, given: Sequence[int], following: Sequence[int]) -> float:
        """Return the score in [0, 100] of tokens that follow given ones, for a row and position where it is defined."""
        if self.scorer is not None:
            return self.scorer(self._prompts[row], self._text([*given, *following]), self._references[row])
        return rouge_l(self._text(following), self._rest(row, len(given)))

    def _rest(self, row: int, position: int) -> list[str]:
        if (row, position) not in self._rests:
            rests = [self._text(ids[position:]) for ids in self._answers[row]]
            # A text without a word for ROUGE-L scores 0 even against itself.
            self._rests[row, position] = [rest for rest in rests if rouge_l(rest, [rest]) > 0]
        return self._rests[row, position]

    def _text(self, ids: Sequence[int]) -> str:
        kept = [token for token in ids if token not in self.eos]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))


def positions_below(limit: int) -> list[int]:
    """Return where texts are cut: 0, 5, 10, 20, 40, ... below the length limit, tokens."""
    found = [position for position in FIRST_POSITIONS if position < limit]
    while found[-1] >= FIRST_POSITIONS[-1] and 2 * found[-1] < limit:
        found.append(2 * found[-1])
    return found


def guidance(
    pair: Pair, texts: Mapping[str, Sequence[Text]], positions: Sequence[int], quality: Quality
) -> dict[str, np.ndarray]:
    """Return the score of the teacher's continuation of every text at every position, writer -> `[rows, positions]`.

    nan where the text has ended before, or where the score is not defined because the answer has.

    Args:
        pair: Who writes.
        texts: Writer -> one text per row.
        positions: Tokens after which texts are cut, increasing.
        quality: How continuations are scored.
    """
    starts = {
        (writer, row, column): tuple(text.ids[:position])
        for writer, of_writer in texts.items()
        for row, text in enumerate(of_writer)
        for column, position in enumerate(positions)
        if len(text.ids) > position and quality.is_defined(row, position)
    }
    written = pair.continuations([(row, ids) for (_, row, _), ids in starts.items()])
    scores = {start: quality(start[0], start[1], following) for start, following in written.items()}
    found = {writer: np.full((len(of_writer), len(positions)), np.nan) for writer, of_writer in texts.items()}
    for (writer, row, column), ids in starts.items():
        found[writer][row, column] = scores[row, ids]
    return found


@dataclass(frozen=True)
class Kept:
    """What is left of the teacher's guidance on a text, compared with clean text of the same rows.

    Attributes:
        score: Mean score of the continuations, in [0, 100].
        clean: That of the continuations of clean text, on the same rows and positions.
        share: Their ratio and its 95% interval over prompts; 1 is as good as clean text. None where `clean` is 0.
        rows: Prompts that count.
    """

    score: float
    clean: float
    share: Mean | None
    rows: int


def kept(scores: np.ndarray, clean: np.ndarray, weights: np.ndarray | None = None) -> Kept | None:
    """Return how much of the guidance on clean text is left on another text; None where no row has both.

    Args:
        scores: Of the continuations of a text, `[rows, positions]`, nan where there is none.
        clean: Likewise, of clean text.
        weights: How much each counts, `[rows, positions]`, such as the tokens that stand there; 1 if None.
    """
    both = ~np.isnan(scores) & ~np.isnan(clean)
    weights = both * (1.0 if weights is None else weights)
    units = weights.sum(1) > 0
    if not units.any():
        return None
    weights = weights[units]
    totals, of_clean = ((np.nan_to_num(values[units]) * weights).sum(1) for values in (scores, clean))
    share = mean_with_interval(totals, of_clean) if of_clean.sum() > 0 else None
    return Kept(float(totals.sum() / weights.sum()), float(of_clean.sum() / weights.sum()), share, int(units.sum()))


def tokens_from(texts: Sequence[Text], positions: Sequence[int]) -> np.ndarray:
    """Return how many tokens of each text stand from each position to before the next one, `[rows, positions]`."""
    lengths = np.array([len(text.ids) for text in texts])[:, None]
    ends = np.array([*positions[1:], np.iinfo(np.int64).max])
    return np.clip(np.minimum(lengths, ends) - np.array(positions), 0, None).astype(np.float64)
