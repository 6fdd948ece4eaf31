"""Micro-batches: rows as lists of ids until their text is known, then prompts and completions side by side."""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from switchkd.errors import UserError
from switchkd.models.forward import context_length
from switchkd.models.vocabulary import model_vocabulary_size
from switchkd.rollout import Prompts, Rollout


class Rows(Sequence[dict[str, Any]]):
    """Rows of a prepared data set whose text is not known yet: the collator of training, which changes nothing.

    It is not a list, because accelerate walks through lists down to the last id in search of tensors to move.

    Args:
        rows: Dicts with `prompt_ids` and `completion_ids`, the latter possibly empty, and where the teacher sees
            another prompt `teacher_prompt_ids`; lists of ids. `earlier_answers`: see `switchkd.data.prepare`.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def prompts(self) -> list[list[int]]:
        """Return the prompt of every row."""
        return [row["prompt_ids"] for row in self._rows]

    def teacher_prompts(self) -> list[list[int]] | None:
        """Return the teacher's prompt of every row, None where it reads the student's."""
        if "teacher_prompt_ids" not in self._rows[0]:
            return None
        return [row["teacher_prompt_ids"] for row in self._rows]


def padded_batch(rows: Rows, pad_token_id: int) -> dict[str, Tensor]:
    """Return one micro-batch of the data set's own text, on the CPU.

    Args:
        rows: At least one.
        pad_token_id: Any id the models can read; masks, never ids, say what is padding.

    Returns:
        `input_ids` and `attention_mask` `[B, P + C]`, `completion_mask` `[B, C]`, C >= 1, True at the tokens that are
        supervised; where the teacher has other prompts, of length P', `teacher_input_ids` and
        `teacher_attention_mask` `[B, P' + C]`.
    """
    prompts, completions, supervised = zip(*map(_supervised, rows), strict=True)
    lengths = torch.tensor([len(ids) for ids in completions])
    width = max(int(lengths.max()), 1)
    read = torch.arange(width) < lengths.unsqueeze(1)
    completion_ids = torch.full(read.shape, pad_token_id, dtype=torch.int64)
    completion_ids[read] = torch.tensor(list(chain.from_iterable(completions)), dtype=torch.int64)
    completion_mask = read.clone()
    completion_mask[read] = torch.tensor(list(chain.from_iterable(supervised)), dtype=torch.bool)
    teacher_prompts = rows.teacher_prompts()
    inputs = _model_inputs(
        Prompts.of(prompts, pad_token_id),
        None if teacher_prompts is None else Prompts.of(teacher_prompts, pad_token_id),
        completion_ids,
        read,
    )
    return {**inputs, "completion_mask": completion_mask}


def _supervised(row: dict[str, Any]) -> tuple[list[int], list[int], list[bool]]:
    """A row's tokens up to the first that is supervised, those from there on, and which of these are supervised."""
    prompt, completion, places = row["prompt_ids"], row["completion_ids"], row.get("earlier_answers")
    if not places:
        return prompt, completion, [True] * len(completion)
    first = places[0]
    mask = [False] * (len(prompt) - first) + [True] * len(completion)
    for start, end in zip(places[::2], places[1::2], strict=True):
        mask[start - first : end - first] = [True] * (end - start)
    return prompt[:first], prompt[first:] + completion, mask


def dataset_batches(batches: Sequence[Rows], pad_token_id: int) -> list[dict[str, Tensor]]:
    """Return the data set's text as micro-batches of the given sizes, rows of similar length together.

    Args:
        batches: Rows of the micro-batches of one optimizer step.
        pad_token_id: As `padded_batch` takes it.
    """
    if len(batches) == 1:
        return [padded_batch(batches[0], pad_token_id)]
    rows = sorted(chain.from_iterable(batches), key=lambda row: len(row["completion_ids"]))
    ends = accumulate(map(len, batches))
    return [
        padded_batch(Rows(rows[end - len(batch) : end]), pad_token_id) for batch, end in zip(batches, ends, strict=True)
    ]


def rollout_batches(
    rollout: Rollout, sizes: Sequence[int], teacher_prompts: Prompts | None = None
) -> list[dict[str, Tensor]]:
    """Return a rollout as micro-batches of the given sizes, rows of similar length together, where the rollout lies.

    The loss is a sum over rows divided by a count of the whole optimizer step, so that it does not matter which rows
    share a micro-batch: grouping them by length only saves padding.

    Args:
        rollout: With as many rows as the sizes sum up to.
        sizes: Rows of each micro-batch.
        teacher_prompts: `[B, P']`, where the teacher has other prompts.

    Returns:
        As `padded_batch`, and `author` `[B, C]`; where the rollout has them `teacher_hidden` `[B, C, H]`.
    """
    prompts = Prompts(rollout.prompt_ids, rollout.prompt_mask)
    masks = [rollout.completion_mask, prompts.mask, *([teacher_prompts.mask] if teacher_prompts is not None else [])]
    # One transfer says how long every row is; what follows asks the device nothing.
    lengths, *widths = torch.stack([mask.sum(-1) for mask in masks]).tolist()
    order = list(range(len(rollout)))
    if len(sizes) > 1:
        order.sort(key=lengths.__getitem__)
    result = []
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        rows = order[end - size : end]
        index = torch.tensor(rows, device=rollout.completion_ids.device)
        width = max(lengths[row] for row in rows)
        cut = [max(column[row] for row in rows) for column in widths]
        result.append(
            _model_inputs(
                prompts[index].last(cut[0]),
                None if teacher_prompts is None else teacher_prompts[index].last(cut[1]),
                rollout.completion_ids[index, :width],
                rollout.completion_mask[index, :width],
            )
            | {"author": rollout.author[index, :width]}
        )
        if rollout.teacher_hidden is not None:
            # States may lie in main memory.
            on_its_device = index.to(rollout.teacher_hidden.device)
            result[-1]["teacher_hidden"] = rollout.teacher_hidden[on_its_device, :width]
    return result


def _model_inputs(
    prompts: Prompts, teacher_prompts: Prompts | None, completion_ids: Tensor, completion_mask: Tensor
) -> dict[str, Tensor]:
    """Prompt and completion side by side, as each model reads them."""
    inputs = {"completion_mask": completion_mask}
    for prefix, read in (("", prompts), ("teacher_", teacher_prompts)):
        if read is not None:
            inputs[f"{prefix}input_ids"] = torch.cat([read.ids, completion_ids], dim=1)
            inputs[f"{prefix}attention_mask"] = torch.cat([read.mask, completion_mask], dim=1).to(torch.int64)
    return inputs


def check_readable(data: Dataset, models: dict[str, nn.Module | None], *, answers: bool, new_tokens: int) -> None:
    """Refuse prepared rows that a model cannot read, before any time is spent on them.

    Args:
        data: Made by `switchkd.data.prepare`.
        models: Role, named in errors, to model; None is skipped.
        answers: Whether the data set's own answers are read.
        new_tokens: Length limit of rollouts on these prompts, 0 if there are none.

    Raises:
        UserError: The longest text exceeds a model's context, or an id exceeds its vocabulary.
    """
    completions = list(data["completion_ids"]) if answers else []
    for role, model in models.items():
        if model is None:
            continue
        other = role == "teacher" and "teacher_prompt_ids" in data.column_names
        prompts = list(data["teacher_prompt_ids" if other else "prompt_ids"])
        longest_prompt = max((len(ids) for ids in prompts), default=0)
        longest_text = max((len(p) + len(ids) for p, ids in zip(prompts, completions, strict=False)), default=0)
        largest = max((max(ids, default=0) for ids in [*prompts, *completions]), default=0)
        limit, width = context_length(model), model_vocabulary_size(model)
        if limit is not None and new_tokens and longest_prompt + new_tokens > limit:
            raise UserError(
                f"longest prompt {longest_prompt} + max_completion_length {new_tokens} exceed the {role}'s context of "
                f"{limit} tokens; lower max_completion_length or max_prompt_length"
            )
        if limit is not None and longest_text > limit:
            raise UserError(
                f"longest prompt + answer, {longest_text} tokens, exceed the {role}'s context of {limit}; lower "
                "max_completion_length or max_prompt_length"
            )
        if largest >= width:
            raise UserError(
                f"the data hold token id {largest}, but the {role} knows only ids below {width}; its tokenizer and its "
                "weights do not match"
            )
