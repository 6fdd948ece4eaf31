"""Past rollouts for reuse: a bounded first-in-first-out store, and DistiLLM's rule of when to reuse them."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.rollout import Author, Rollout

#: What a row keeps of its completion, and what fills it up to the longest row of a sample; ids are padded otherwise.
_FILL: dict[str, float] = {
    "completion_ids": 0,
    "author": int(Author.NONE),
    "divergence": math.nan,
    "threshold": math.nan,
}
_COLUMNS = ("prompt_ids", *_FILL)


class ReplayStore:
    """The last rows that were rolled out, on the CPU; the oldest leave first.

    Args:
        capacity: How many rows it holds, >= 0; DistiLLM's is 1,000. With 0 it stays empty.

    Raises:
        UserError: The capacity is negative.
    """

    def __init__(self, capacity: int = 1000) -> None:
        if capacity < 0:
            raise UserError(f"replay capacity must be >= 0 rows, got {capacity}")
        self.capacity = capacity
        self._rows: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def full(self) -> bool:
        """Whether the next row will push one out."""
        return len(self._rows) >= self.capacity

    def add(self, rollout: Rollout) -> None:
        """Store the rows of a rollout, without padding and without the teacher's hidden states."""
        for row in range(len(rollout)):
            prompt = rollout.prompt_mask[row].bool()
            keep = rollout.completion_mask[row]
            values = {name: getattr(rollout, name)[row] for name in _COLUMNS}
            self._rows.append(
                {
                    name: value[prompt if name == "prompt_ids" else keep].to("cpu", copy=True)
                    for name, value in values.items()
                }
            )
        del self._rows[: max(len(self._rows) - self.capacity, 0)]

    def sample(self, rows: int, generator: torch.Generator, *, pad_token_id: int = 0) -> Rollout:
        """Return stored rows drawn uniformly as one rollout on the CPU, without replacement while they last.

        Args:
            rows: How many, >= 1.
            generator: Where the randomness comes from; seed it from the step, and a resumed run draws the same rows.
            pad_token_id: Pads prompts on the left and completions on the right.

        Raises:
            UserError: The store is empty.
        """
        if not self._rows:
            raise UserError("the replay store is empty; roll out first")
        chosen: list[int] = []
        while len(chosen) < rows:
            chosen += torch.randperm(len(self._rows), generator=generator).tolist()
        picked = [self._rows[index] for index in chosen[:rows]]
        prompts = [row["prompt_ids"] for row in picked]
        prompt_ids = _padded(prompts, pad_token_id, left=True)
        width = prompt_ids.shape[1]
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
        fills = _FILL | {"completion_ids": pad_token_id}
        columns: dict[str, Any] = {name: _padded([row[name] for row in picked], fill) for name, fill in fills.items()}
        lengths = torch.tensor([len(row["completion_ids"]) for row in picked]).unsqueeze(1)
        return Rollout(
            prompt_ids=prompt_ids,
            prompt_mask=torch.arange(width) >= width - prompt_lengths,
            completion_mask=torch.arange(columns["completion_ids"].shape[1]) < lengths,
            **columns,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the rows end to end, as a checkpoint keeps them: a few tensors, whatever the number of rows."""
        lengths: dict[str, Any] = {
            "prompt_lengths": torch.tensor([len(row["prompt_ids"]) for row in self._rows], dtype=torch.int64),
            "completion_lengths": torch.tensor([len(row["completion_ids"]) for row in self._rows], dtype=torch.int64),
        }
        if not self._rows:
            return lengths
        return lengths | {name: torch.cat([row[name] for row in self._rows]) for name in _COLUMNS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the rows by those of a checkpoint; the oldest are dropped where the capacity has shrunk."""
        self._rows = [{} for _ in range(len(state["prompt_lengths"]))]
        for name in _COLUMNS if self._rows else ():
            lengths = state["prompt_lengths" if name == "prompt_ids" else "completion_lengths"].tolist()
            for row, value in zip(self._rows, state[name].split(lengths), strict=True):
                row[name] = value.clone()
        del self._rows[: max(len(self._rows) - self.capacity, 0)]


#: How much DistiLLM's fraction grows at once, and by how much the loss must have risen, nats.
GROWTH, MARGIN = 0.1, 0.1


class AdaptiveFraction:
    """DistiLLM's share of steps that train on the student's text: it grows while the validation loss gets worse.

    The share phi starts at 0 and grows by `GROWTH` each time the validation loss lies `MARGIN` or more above its
    reference, which is then set anew; the first evaluation sets it, so make one before the first step. A step trains
    on rolled-out text with probability phi: fresh text with probability phi (1 - progress), and always until the
    store is full, stored text otherwise.

    Args:
        initial: phi at the start, in [0, 1].

    Raises:
        UserError: An option outside its range.

    Reference:
        Ko et al., "DistiLLM", arXiv 2402.03898, section 3.2, as its released code does it.
    """

    def __init__(self, initial: float = 0.0) -> None:
        if not 0.0 <= initial <= 1.0:
            raise UserError(f"the initial adaptive fraction must lie in [0, 1], got {initial}")
        self.value = initial
        self._reference: float | None = None

    def observe(self, validation_loss: float) -> float:
        """Return phi after an evaluation."""
        if self._reference is None:
            self._reference = validation_loss
        elif validation_loss >= self._reference + MARGIN:
            self.value = min(self.value + GROWTH, 1.0)
            self._reference = validation_loss
        return self.value

    def source(self, uniform: float, progress: float, store: ReplayStore) -> Literal["dataset", "fresh", "replay"]:
        """Return where a step's text comes from.

        Args:
            uniform: The step's random number in (0, 1).
            progress: Share of the training that is done, in [0, 1].
            store: The stored rollouts.
        """
        if uniform >= self.value:
            return "dataset"
        if uniform < self.value * (1.0 - progress) or not store.full or not len(store):
            return "fresh"
        return "replay"

    def state_dict(self) -> dict[str, float | None]:
        """Return what a checkpoint must keep."""
        return {"value": self.value, "reference": self._reference}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore the state of a checkpoint."""
        self.value = float(state["value"] or 0.0)
        self._reference = state["reference"]


def _padded(rows: list[Tensor], fill: float, *, left: bool = False) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=fill, padding_side="left" if left else "right"
    )
