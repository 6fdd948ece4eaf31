"""Micro-batches: prompts padded on the left and completions on the right, side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from switchkd.data import pad_prompts
from switchkd.engine import context_length
from switchkd.errors import UserError
from switchkd.vocabulary import model_vocabulary_size


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Return one micro-batch of prepared rows as the data set has them.

    Args:
        rows: Dicts with `prompt_ids` and `completion_ids`, the latter possibly empty.
        pad_token_id: Any id the models can read; masks, never ids, say what is padding.

    Returns:
        As `model_inputs`.
    """
    prompt_ids, prompt_mask = pad_prompts([row["prompt_ids"] for row in rows], pad_token_id)
    completions = [torch.tensor(row["completion_ids"], dtype=torch.int64) for row in rows]
    completion_ids = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(completion) for completion in completions])
    completion_mask = torch.arange(completion_ids.shape[1]) < lengths.unsqueeze(1)
    return model_inputs(prompt_ids, prompt_mask, completion_ids, completion_mask)


def model_inputs(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> dict[str, Tensor]:
    """Return prompt and completion side by side, without columns in which no row has a token.

    Args:
        prompt_ids: `[B, P]`, left-padded.
        prompt_mask: `[B, P]`.
        completion_ids: `[B, C]`, right-padded.
        completion_mask: `[B, C]`.

    Returns:
        `input_ids` and `attention_mask` `[B, P' + C']` and `completion_mask` `[B, C']`, C' >= 1.
    """
    prompt_length = max(int(prompt_mask.sum(-1).max()), 1)
    completion_length = max(int(completion_mask.sum(-1).max()) if completion_mask.numel() else 0, 1)
    if completion_ids.shape[1] == 0:
        # Prompt-only rows still need one column; it is masked out and replaced by the rollout.
        completion_ids = prompt_ids[:, -1:]
        completion_mask = torch.zeros_like(completion_ids, dtype=torch.bool)
    ids = torch.cat([prompt_ids[:, -prompt_length:], completion_ids[:, :completion_length]], dim=1)
    mask = torch.cat([prompt_mask[:, -prompt_length:], completion_mask[:, :completion_length]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": mask.to(torch.int64),
        "completion_mask": completion_mask[:, :completion_length],
    }


def prompts_of(batch: dict[str, Tensor]) -> list[list[int]]:
    """Return the prompt ids of every row of a micro-batch, without padding."""
    prompt_length = batch["input_ids"].shape[1] - batch["completion_mask"].shape[1]
    ids, mask = batch["input_ids"][:, :prompt_length], batch["attention_mask"][:, :prompt_length].bool()
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
    prompts, completions = list(data["prompt_ids"]), list(data["completion_ids"]) if answers else []
    longest_prompt = max((len(ids) for ids in prompts), default=0)
    longest_text = max((len(prompt) + len(ids) for prompt, ids in zip(prompts, completions, strict=False)), default=0)
    largest = max((max(ids, default=0) for ids in [*prompts, *completions]), default=0)
    for role, model in models.items():
        if model is None:
            continue
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
                "weights do not belong together"
            )
