"""Two models on the same text: losses on the references, and how far a model is from its teacher as a writer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from switchkd.data.batches import Rows, padded_batch
from switchkd.engine import roll_out
from switchkd.engine.readable import require_readable
from switchkd.errors import UserError
from switchkd.evaluation.metrics import POSITION_STARTS, bucket_names, length_bucket, mean_with_interval, position_names
from switchkd.models.forward import context_length, device_of, eval_mode
from switchkd.models.vocabulary import model_vocabulary_size, readable_pad_id, require_eos
from switchkd.objective import CROSS_ENTROPY, Objective
from switchkd.objective.step import StepLoss
from switchkd.policies import StudentPolicy

#: Name -> sums of a loss over the tokens of each row and range of positions, `[rows, ranges]`, nats.
Sums = dict[str, np.ndarray]
#: What a pass has found, to be given to a later call that goes on: name of the pass -> number of the row -> values.
Found = Mapping[str, Mapping[int, Any]]
#: Called with the name of a pass and the values of its next rows.
Keep = Callable[[str, Mapping[int, Any]], None]


def reference_losses(
    model: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    *,
    teacher: nn.Module | None = None,
    batch_size: int = 8,
    excluded_ids: Sequence[int] = (),
    progress: bool = False,
    found: Found | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Return losses on the reference completions, means over their tokens, the end of sequence included, in nats.

    Args:
        model: The student, or any causal language model.
        tokenizer: Its tokenizer.
        dataset: Made by `switchkd.data.prepare`, with a completion in every row.
        teacher: Compared with the model at every token, on the ids both have.
        batch_size: Rows read at once; affects only speed.
        excluded_ids: Left out of the comparison, see `switchkd.models.vocabulary.check_tokenizers`.
        progress: Whether to show a progress bar on standard error.
        found: What an earlier call with the same models, data and settings has handed to `keep`: not computed again.
        keep: Called with what was found of each batch as soon as it is there, as JSON has it.

    Returns:
        `cross_entropy`, `tokens` (their number), and with a teacher `forward_kl` = KL(teacher, student) and
        `jsd`, the symmetric Jensen-Shannon divergence, at most ln 2; `intervals`, name -> 95% interval over rows;
        `by_length`, all of this by the tokens of the first reference, with the number of `examples`.

    Raises:
        UserError: A row has no completion, a row exceeds a model's context, or a model cannot read padded rows.
    """
    check_prepared(dataset)
    rows = [{"prompt_ids": row["prompt_ids"], "completion_ids": row["completion_ids"]} for row in _ids(dataset)]
    empty = next((number for number, row in enumerate(rows, start=1) if not row["completion_ids"]), None)
    if empty is not None:
        raise UserError(f"row {empty} of the prepared data set has no reference completion: losses need an answer")
    compared = {} if teacher is None else {"forward_kl": "forward_kl", "jsd": "generalized_jsd"}
    pad = readable_pad_id(tokenizer.pad_token_id, require_eos(tokenizer, model), model, teacher)
    options: dict[str, Any] = {"pad": pad, "batch_size": batch_size, "excluded_ids": excluded_ids}
    part = _Part("references", found, keep, shown=progress)
    sums, counts = _read(model, teacher, rows, compared, **options, part=part)
    kinds = np.array([length_bucket(len(ids)) for ids in reference_ids(tokenizer, dataset)])
    result = _means(sums, counts)
    result["by_length"] = {
        kind: {"examples": int(chosen.sum()), **_means({n: v[chosen] for n, v in sums.items()}, counts[chosen])}
        for kind in bucket_names()
        if (chosen := kinds == kind).any()
    }
    return result


def sequence_divergences(
    model: nn.Module,
    teacher: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    answers: Sequence[tuple[int, Sequence[int]]],
    *,
    max_completion_length: int,
    seed: int = 0,
    batch_size: int = 8,
    excluded_ids: Sequence[int] = (),
    progress: bool = False,
    found: Found | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Return how far a model is from its teacher as a writer, on the model's own text and on the teacher's, in nats.

    With a text y of at most `max_completion_length` tokens, the end of sequence included,

        reverse_sequence_kl = KL(model, teacher) = E_model[ln model(y) - ln teacher(y)]
        forward_sequence_kl = KL(teacher, model) = E_teacher[ln teacher(y) - ln model(y)]

    Each is estimated on texts that its first model wrote: the sum over the positions of KL(next-token distributions).
    Given a prefix, that is the expectation of the written token's log-ratio, so the mean over texts is as unbiased as
    that of ln model - ln teacher, with less variance. It holds where the answers are samples of the model itself:
    temperature 1, top_k 0, top_p 1, no n-gram blocked (`samples_the_model`). Of other text it is the mean divergence on
    that text, nothing more. The teacher writes one text per prompt here, from its own distribution.

    Args:
        model: The student.
        teacher: Its teacher.
        tokenizer: The student's.
        dataset: Made by `switchkd.data.prepare`; the teacher reads `teacher_prompt_ids` where it has them.
        answers: `(index of the row, ids)` of texts that the model wrote, the end of sequence included.
        max_completion_length: Length limit of the answers and of the teacher's texts, tokens.
        seed: Of the teacher's texts.
        batch_size: Rows read or written at once; affects only speed.
        excluded_ids: Left out of the comparison, see `switchkd.models.vocabulary.check_tokenizers`. A text is read up
            to its first token that only one of the models knows.
        progress: Whether to show progress bars on standard error.
        found: As `reference_losses` takes it.
        keep: Likewise.

    Returns:
        `reverse_sequence_kl`, `forward_sequence_kl`, `teacher_cross_entropy` (mean of -ln teacher on the model's text):
        each `per_token` (the sum over all texts over the sum of their lengths), `per_sequence` (mean over texts), and
        with `_interval` their 95% intervals over prompts; `tokens`, `texts`, and `by_position`, range -> `per_token`,
        its interval and `tokens`. `reverse_sequence_kl` has `of_answers` besides, what each answer contributes, nats.

    Raises:
        UserError: A text exceeds a model's context, or a model cannot read padded rows.
    """
    check_prepared(dataset)
    data = _ids(dataset)
    eos = require_eos(tokenizer, model, teacher)
    pad = readable_pad_id(tokenizer.pad_token_id, eos, model, teacher)
    known = min(model_vocabulary_size(model), model_vocabulary_size(teacher))
    unknown = frozenset(excluded_ids)

    def read(texts: Sequence[tuple[int, Sequence[int]]], divergence: str, name: str) -> tuple[Sums, np.ndarray]:
        rows = [{**data[index], "completion_ids": known_part(ids, known, unknown)} for index, ids in texts]
        compared = {divergence: divergence, "teacher_cross_entropy": CROSS_ENTROPY}
        options: dict[str, Any] = {"pad": pad, "batch_size": batch_size, "excluded_ids": excluded_ids}
        return _read(model, teacher, rows, compared, **options, part=_Part(name, found, keep, shown=progress))

    def divergence(values: np.ndarray, counts: np.ndarray, texts: Sequence[tuple[int, Sequence[int]]]) -> Any:
        return _divergence(_by_prompt(values, texts), _by_prompt(counts, texts), texts)

    of_model, own_counts = read(answers, "reverse_kl", "divergences of answers")
    part = _Part("teacher texts", found, keep, shown=False)
    teacher_texts = _teacher_texts(teacher, data, eos, pad, max_completion_length, seed, batch_size, part)
    of_teacher, teacher_counts = read(teacher_texts, "forward_kl", "divergences of teacher texts")
    return {
        "reverse_sequence_kl": {
            **divergence(of_model["reverse_kl"], own_counts, answers),
            "of_answers": of_model["reverse_kl"].sum(1).tolist(),
        },
        "forward_sequence_kl": divergence(of_teacher["forward_kl"], teacher_counts, teacher_texts),
        "teacher_cross_entropy": divergence(of_model["teacher_cross_entropy"], own_counts, answers),
    }


def samples_the_model(decoding: Mapping[str, Any]) -> bool:
    """Return whether answers decoded so are samples of the model's own distribution, as a sequence KL needs."""
    return (decoding["temperature"], decoding["top_k"], decoding["top_p"], decoding["no_repeat_ngram_size"]) == (
        *(1.0, 0, 1.0, 0),
    )


def check_prepared(dataset: Dataset) -> None:
    """Refuse a data set that `switchkd.data.prepare` did not make, or an empty one.

    Raises:
        UserError: Names what is missing.
    """
    missing = {"prompt_ids", "completion_ids", "references", "prompt"} - set(dataset.column_names)
    if missing:
        raise UserError(f"the data set lacks {', '.join(sorted(missing))}: make it with switchkd.data.prepare")
    if len(dataset) == 0:
        raise UserError("the data set holds no records: there is nothing to evaluate")


def reference_ids(tokenizer: Any, dataset: Dataset) -> list[list[int]]:
    """Return the tokens of every row's first reference, not cut, without an end of sequence."""
    first = [accepted[0] for accepted in dataset["references"]]
    ids: list[list[int]] = tokenizer(first, add_special_tokens=False, padding=False, truncation=False, verbose=False)[
        "input_ids"
    ]
    return ids


def _ids(dataset: Dataset) -> list[dict[str, list[int]]]:
    names = [name for name in ("prompt_ids", "completion_ids", "teacher_prompt_ids") if name in dataset.column_names]
    return list(dataset.select_columns(names))


class _Part:
    """A pass over rows that may have been made in part before."""

    def __init__(self, name: str, found: Found | None, keep: Keep | None, *, shown: bool) -> None:
        self.name, self.shown, self._keep = name, shown, keep
        self.found: dict[int, Any] = dict((found or {}).get(name, {}))

    def batches(self, order: Sequence[int], batch_size: int) -> Iterator[list[int]]:
        """The batches of which a row is not there yet, whole: what a row gives may depend on its batch by rounding."""
        batches = [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
        with tqdm(total=len(order), desc=self.name, unit="row", disable=not self.shown, leave=False) as bar:
            for batch in batches:
                if not all(row in self.found for row in batch):
                    yield batch
                bar.update(len(batch))

    def keep(self, rows: Mapping[int, Any]) -> None:
        self.found.update(rows)
        if self._keep is not None:
            self._keep(self.name, rows)


@torch.no_grad()
def _read(
    model: nn.Module,
    teacher: nn.Module | None,
    rows: Sequence[dict[str, list[int]]],
    compared: Mapping[str, str],
    *,
    pad: int,
    batch_size: int,
    excluded_ids: Sequence[int],
    part: _Part,
) -> tuple[Sums, np.ndarray]:
    """Return the sums of losses over the completions of rows, and the tokens counted, both `[rows, ranges]`.

    Args:
        model: The student.
        teacher: May be None where nothing is compared.
        rows: As `Rows` takes them.
        compared: Name -> divergence; `cross_entropy` is the teacher's. The model's own comes as `cross_entropy`.
        pad: Any id the models can read.
        batch_size: Rows read at once.
        excluded_ids: Left out of the divergences.
        part: What was found before, and where what is found now goes.
    """
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    readers = (("model", model), ("teacher", teacher))
    for role, reader in readers:
        limit = context_length(reader) if reader is not None else None
        if limit is not None and max(lengths) > limit:
            raise UserError(
                f"the longest prompt and answer have {max(lengths)} tokens, the {role}'s context is {limit}; "
                "lower max_prompt_length or max_completion_length"
            )
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    names = ["cross_entropy", *compared]
    with eval_mode(model, teacher):
        for role, reader in readers:
            require_readable(reader, role, padded=batch_size > 1)
        for batch in part.batches(order, batch_size):
            losses, mask = _batch_losses(model, teacher, [rows[i] for i in batch], compared, pad, tuple(excluded_ids))
            # Tokens without supervision have a loss of 0.
            ranges = np.searchsorted(POSITION_STARTS, np.arange(mask.shape[1]), side="right") - 1
            member = torch.from_numpy(np.eye(len(POSITION_STARTS))[ranges])
            sums = {name: (torch.where(mask, losses[name], 0.0).double() @ member).tolist() for name in names}
            counts = (mask.double() @ member).tolist()
            part.keep(
                {row: {"tokens": counts[i], **{name: sums[name][i] for name in names}} for i, row in enumerate(batch)}
            )
    found = [part.found[row] for row in range(len(rows))]
    return {name: np.array([row[name] for row in found]) for name in names}, np.array([row["tokens"] for row in found])


def _batch_losses(
    model: nn.Module,
    teacher: nn.Module | None,
    rows: list[dict[str, Any]],
    compared: Mapping[str, str],
    pad: int,
    excluded_ids: tuple[int, ...],
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of every token `[B, C]` on the CPU, by the trainer's own way from states to losses, and their mask."""
    device = device_of(model)
    inputs = {name: value.to(device) for name, value in padded_batch(Rows(rows), pad).items()}
    steps = {name: StepLoss(Objective(objective, excluded_ids=excluded_ids)) for name, objective in compared.items()}
    reading = next(iter(steps.values()), StepLoss(Objective(CROSS_ENTROPY)))
    of_model, of_teacher = reading.predictions(model, teacher, inputs)
    losses = {"cross_entropy": reading.cross_entropy(of_model, inputs)}
    for name, step in steps.items():
        assert of_teacher is not None
        known = (
            step.compare(of_model, of_teacher, inputs) if step.reads_teacher else step.cross_entropy(of_teacher, inputs)
        )
        losses[name] = known
    mask = inputs["completion_mask"].cpu()
    return {name: loss.token_losses.cpu() for name, loss in losses.items()}, mask


def _teacher_texts(
    teacher: nn.Module,
    data: Sequence[dict[str, list[int]]],
    eos: list[int],
    pad: int,
    max_completion_length: int,
    seed: int,
    batch_size: int,
    part: _Part,
) -> list[tuple[int, list[int]]]:
    """One text of the teacher for every row, `(index, ids)`; it depends on the seed and the index only."""
    prompts = [row.get("teacher_prompt_ids", row["prompt_ids"]) for row in data]
    longest, limit = max(len(ids) for ids in prompts), context_length(teacher)
    if limit is not None and longest + max_completion_length > limit:
        raise UserError(
            f"the longest prompt has {longest} tokens and max_completion_length is {max_completion_length}, together "
            f"more than the teacher's context of {limit}: lower max_completion_length or max_prompt_length"
        )
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for batch in part.batches(order, batch_size):
        rollout = roll_out(
            teacher,
            None,
            [prompts[index] for index in batch],
            policy=StudentPolicy(),
            max_new_tokens=max_completion_length,
            seed=seed,
            eos_token_id=eos,
            pad_token_id=pad,
            row_ids=torch.tensor(batch),
        )
        part.keep(dict(zip(batch, rollout.completions(), strict=True)))
    return [(index, part.found[index]) for index in order]


def known_part(ids: Sequence[int], known: int, unknown: frozenset[int]) -> list[int]:
    """Return the tokens before the first that only one of the models knows.

    Args:
        ids: Of a text.
        known: Leading ids that both models score.
        unknown: Ids below that which only one tokenizer knows.
    """
    end = next((place for place, token in enumerate(ids) if token >= known or token in unknown), len(ids))
    return list(ids[:end])


def _by_prompt(values: np.ndarray, texts: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
    """Sums over the texts of one prompt, `[prompts, ranges]`: texts of one prompt are not independent."""
    indices = np.array([index for index, _ in texts])
    total = np.zeros((int(indices.max()) + 1, values.shape[1]))
    np.add.at(total, indices, values)
    return total[np.unique(indices)]


def _means(sums: Sums, counts: np.ndarray) -> dict[str, Any]:
    tokens = counts.sum(1)
    means = {name: mean_with_interval(values.sum(1), tokens) for name, values in sums.items()}
    return {
        **{name: mean.value for name, mean in means.items()},
        "tokens": int(tokens.sum()),
        "intervals": {name: mean.interval for name, mean in means.items()},
    }


def _divergence(sums: np.ndarray, counts: np.ndarray, texts: Sequence[tuple[int, Sequence[int]]]) -> dict[str, Any]:
    tokens = counts.sum(1)
    per_token = mean_with_interval(sums.sum(1), tokens)
    per_sequence = mean_with_interval(sums.sum(1), _by_prompt(np.ones((len(texts), 1)), texts).sum(1))
    by_position = {}
    for place, name in enumerate(position_names()):
        if counts[:, place].any():
            mean = mean_with_interval(sums[:, place], counts[:, place])
            by_position[name] = {
                "per_token": mean.value,
                "per_token_interval": mean.interval,
                "tokens": int(counts[:, place].sum()),
            }
    return {
        "per_token": per_token.value,
        "per_token_interval": per_token.interval,
        "per_sequence": per_sequence.value,
        "per_sequence_interval": per_sequence.interval,
        "tokens": int(tokens.sum()),
        "texts": len(texts),
        "by_position": by_position,
    }
