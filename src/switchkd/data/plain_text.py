"""Plain text for an auxiliary language-model loss: packed into blocks of one length, without padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from switchkd import sampling
from switchkd.errors import UserError


class PlainText:
    """Blocks of plain text, drawn by step: all are full, so that every step supervises the same number of tokens.

    Args:
        data: Rows with a column `text`.
        tokenizer: A Hugging Face tokenizer with an end of sequence, which separates the texts.
        block_length: Tokens of a block, >= 2.

    Raises:
        UserError: No column `text`, or less text than one block.
    """

    def __init__(self, data: Dataset, tokenizer: Any, block_length: int) -> None:
        if "text" not in data.column_names:
            raise UserError(f"the plain text needs a column text, found {', '.join(data.column_names)}")
        stream: list[int] = []
        for ids in _encoded(data["text"], tokenizer):
            stream += [*ids, tokenizer.eos_token_id]
        blocks = len(stream) // block_length
        if blocks == 0:
            raise UserError(
                f"the plain text has {len(stream)} tokens, less than one block of {block_length} (max_prompt_length + "
                "max_completion_length); give more text"
            )
        self.blocks = torch.tensor(stream[: blocks * block_length]).view(blocks, block_length)

    def rows(self, first: int, count: int, seed: int) -> Tensor:
        """Return blocks `[count, block_length]`: from number `first` on, in passes over the text shuffled by the seed.

        Args:
            first: Number of blocks that all ranks have drawn before.
            count: Number of blocks to return.
            seed: Seed of the order.
        """
        total = len(self.blocks)
        turns = range(first // total, (first + count - 1) // total + 1)
        orders = [torch.randperm(total, generator=sampling.generator(seed, turn)) for turn in turns]
        skipped = first % total
        return self.blocks[torch.cat(orders)[skipped : skipped + count]]

    def add_to(
        self,
        batches: Sequence[dict[str, Tensor]],
        step: int,
        rank: int,
        ranks: int,
        rows: int,
        *,
        window: int,
        seed: int,
    ) -> None:
        """Add blocks of text, and the number of their tokens in the whole optimizer step, to its micro-batches.

        Args:
            batches: The micro-batches of the accumulation window; `lm_input_ids` and `lm_tokens` are added.
            step: The optimizer step, counted from 0.
            rank: The rank of this process.
            ranks: Number of processes.
            rows: Blocks for each micro-batch.
            window: Micro-batches of a full accumulation window; the last one of an epoch may be shorter.
            seed: Seed of the order.
        """
        # Every block is full: the tokens of the whole step are known without asking the other ranks.
        tokens = rows * (self.blocks.shape[1] - 1) * len(batches) * ranks
        for index, batch in enumerate(batches):
            first = ((step * window + index) * ranks + rank) * rows
            batch |= {"lm_input_ids": self.rows(first, rows, seed), "lm_tokens": torch.tensor(tokens)}


def _encoded(texts: Any, tokenizer: Any, rows: int = 1000) -> Iterator[list[int]]:
    for first in range(0, len(texts), rows):
        yield from tokenizer(list(texts[first : first + rows]), add_special_tokens=False, verbose=False)["input_ids"]
