"""Micro-batches: prompts padded on the left and completions on the right, side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from switchkd.data.prompts import pad_prompts
from switchkd.errors import UserError
from switchkd.models.forward import context_length
from switchkd.models.vocabulary import model_vocabulary_size
from switchkd.rollout import Author, Rollout


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Return one micro-batch of prepared rows as the data set has them.

    Args:
        rows: Dicts with `prompt_ids` and `completion_ids`, the latter possibly empty, and where the teacher sees
            another prompt `teacher_prompt_ids`.
        pad_token_id: Any id the models can read; masks, never ids, say what is padding.

    Returns:
        As `model_inputs`.
    """
    completions = [torch.tensor(row["completion_ids"], dtype=torch.int64) for row in rows]
    completion_ids = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(completion) for completion in completions])
    completion_mask = torch.arange(completion_ids.shape[1]) < lengths.unsqueeze(1)
    has_teacher_prompts = "teacher_prompt_ids" in rows[0]
    return model_inputs(
        *pad_prompts([row["prompt_ids"] for row in rows], pad_token_id),
        completion_ids,
        completion_mask,
        torch.where(completion_mask, int(Author.DATASET), int(Author.NONE)).to(torch.uint8),
        teacher_prompts=(
            pad_prompts([row["teacher_prompt_ids"] for row in rows], pad_token_id) if has_teacher_prompts else None
        ),
    )


def model_inputs(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    author: Tensor,
    *,
    teacher_prompts: tuple[Tensor, Tensor] | None = None,
    teacher_hidden: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return prompt and completion side by side, without columns in which no row has a token.

    Args:
        prompt_ids: `[B, P]`, left-padded.
        prompt_mask: `[B, P]`.
        completion_ids: `[B, C]`, right-padded.
        completion_mask: `[B, C]`.
        author: `Author` values, `[B, C]`.
        teacher_prompts: Ids and mask of the teacher's prompts where they differ, left-padded `[B, P"]` each.
        teacher_hidden: The teacher's state that predicted each token, `[B, C, H]`, if it is known.

    Returns:
        `input_ids` and `attention_mask` `[B, P' + C']`, `completion_mask` and `author` `[B, C']`, C' >= 1; where given
        `teacher_input_ids` and `teacher_attention_mask` `[B, P" + C']`, and `teacher_hidden` `[B, C', H]`.
    """
    length = max(int(completion_mask.sum(-1).max()) if completion_mask.numel() else 0, 1)
    if completion_ids.shape[1] == 0:
        # Prompt-only rows still need one column; it is masked out and replaced by the rollout.
        completion_ids = prompt_ids[:, -1:]
        completion_mask = torch.zeros_like(completion_ids, dtype=torch.bool)
        author = torch.zeros_like(completion_ids, dtype=torch.uint8)
    completion_ids, completion_mask = completion_ids[:, :length], completion_mask[:, :length]
    ids, mask = _side_by_side(prompt_ids, prompt_mask, completion_ids, completion_mask)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": completion_mask,
        "author": author[:, :length],
    }
    if teacher_prompts is not None:
        ids, mask = _side_by_side(*teacher_prompts, completion_ids, completion_mask)
        inputs |= {"teacher_input_ids": ids, "teacher_attention_mask": mask}
    if teacher_hidden is not None:
        inputs["teacher_hidden"] = teacher_hidden[:, :length]
    return inputs


def _side_by_side(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor]:
    length = max(int(prompt_mask.sum(-1).max()), 1)
    ids = torch.cat([prompt_ids[:, -length:], completion_ids], dim=1)
    mask = torch.cat([prompt_mask[:, -length:], completion_mask], dim=1)
    return ids, mask.to(torch.int64)


def prompts_of(batches: Sequence[dict[str, Tensor]], prefix: str = "") -> list[list[int]]:
    """Return the prompt ids of every row of some micro-batches, without padding.

    Args:
        batches: Made by `collate`.
        prefix: `teacher_` for the teacher's prompts.
    """
    prompts = []
    for batch in batches:
        ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"].bool()
        length = ids.shape[1] - batch["completion_mask"].shape[1]
        prompts += _unpadded(ids[:, :length], mask[:, :length])
    return prompts


def rollout_batches(
    rollout: Rollout, sizes: Sequence[int], teacher_prompts: tuple[Tensor, Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """Return a rollout as micro-batches of the given sizes, rows of similar length together.

    The loss is a sum over rows divided by a count of the whole optimizer step, so that it does not matter which rows
    share a micro-batch: grouping them by length only saves padding.

    Args:
        rollout: With as many rows as the sizes sum up to.
        sizes: Rows of each micro-batch.
        teacher_prompts: Ids and mask, left-padded `[B, P"]`, where the teacher has other prompts.
    """
    order = torch.arange(len(rollout), device=rollout.completion_ids.device)
    hidden = rollout.teacher_hidden
    if len(sizes) > 1:
        order = rollout.completion_mask.sum(-1).argsort(stable=True)
    return [
        model_inputs(
            rollout.prompt_ids[rows],
            rollout.prompt_mask[rows],
            rollout.completion_ids[rows],
            rollout.completion_mask[rows],
            rollout.author[rows],
            teacher_prompts=teacher_prompts and (teacher_prompts[0][rows], teacher_prompts[1][rows]),
            # States may lie in main memory.
            teacher_hidden=None if hidden is None else hidden[rows.to(hidden.device)],
        )
        for rows in order.split(list(sizes))
    ]


def regrouped(batches: Sequence[dict[str, Tensor]], pad_token_id: int) -> list[dict[str, Tensor]]:
    """Return micro-batches of the data set with the same rows, those of similar length together."""
    if len(batches) < 2:
        return list(batches)
    columns = {"prompt_ids": prompts_of(batches), "completion_ids": _completions_of(batches)}
    if "teacher_input_ids" in batches[0]:
        columns["teacher_prompt_ids"] = prompts_of(batches, "teacher_")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows.sort(key=lambda row: len(row["completion_ids"]))
    result, first = [], 0
    for batch in batches:
        result.append(collate(rows[first : first + len(batch["input_ids"])], pad_token_id))
        first += len(batch["input_ids"])
    return result


def _completions_of(batches: Sequence[dict[str, Tensor]]) -> list[list[int]]:
    completions = []
    for batch in batches:
        mask = batch["completion_mask"]
        completions += _unpadded(batch["input_ids"][:, -mask.shape[1] :], mask)
    return completions


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


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
