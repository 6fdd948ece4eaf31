"""What the trainer logs besides the Trainer's own keys: means since the last log, over all processes."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchkd.rollout import MEASURED, Author, Rollout, unit_of

#: Means over all tokens, rows or steps and all processes since the last log, each explained in docs/metrics.md.
LOGGED_MEANS = (
    "rollout/teacher_share",
    *(f"rollout/{measured}" for measured in MEASURED),
    "rollout/threshold_nats",
    "rollout/completion_tokens",
    "rollout/tokens_per_s",
    "rollout/teacher_passes",
    "time/rollout_s",
    "time/train_s",
)
#: Values that hold at the moment of the log, where the method has them.
LOGGED_STATES = ("rollout/initial_threshold_nats", "rollout/on_policy_fraction", "rollout/stored_rows")


class RunningMeans:
    """Sums and counts since the last log.

    Args:
        measured: What the policy of the rollouts compares; None where there is none, or it compares nothing.
    """

    def __init__(self, measured: str | None = None) -> None:
        compared = () if measured is None else (f"rollout/{measured}", f"rollout/threshold_{unit_of(measured)}")
        self._names = tuple(dict.fromkeys((*LOGGED_MEANS, *compared)))
        self._sums = {name: [0.0, 0.0] for name in self._names}

    def add(self, name: str, total: float, count: float) -> None:
        """Add to the sum and to the count of a key."""
        self._sums[name][0] += total
        self._sums[name][1] += count

    def add_rollout(self, rollout: Rollout, seconds: float) -> None:
        """Add what a rollout shows."""
        tokens = float(rollout.completion_mask.sum())
        self.add("rollout/teacher_share", float((rollout.author == Author.TEACHER).sum()), tokens)
        compared = {rollout.measured: rollout.divergence, f"threshold_{rollout.unit}": rollout.threshold}
        for name, values in compared.items():
            if f"rollout/{name}" in self._sums:
                finite = values[values.isfinite()]
                self.add(f"rollout/{name}", float(finite.sum()), float(finite.numel()))
        self.add("rollout/completion_tokens", tokens, len(rollout))
        self.add("rollout/tokens_per_s", tokens, seconds)
        self.add("rollout/teacher_passes", rollout.stats["teacher_passes"], 1)
        self.add("time/rollout_s", seconds, 1)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the sums and counts."""
        return {name: list(pair) for name, pair in self._sums.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on with the sums and counts of a checkpoint."""
        self._sums |= {name: list(pair) for name, pair in state.items() if name in self._sums}

    def take(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the means and begin anew.

        Args:
            reduce: Sums a tensor over all processes; None where there is one.
        """
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64)
        if reduce is not None:
            sums = reduce(sums)
        self._sums = {name: [0.0, 0.0] for name in self._names}
        pairs = zip(self._names, sums.tolist(), strict=True)
        return {name: total / count for name, (total, count) in pairs if count}


class ShareWatch:
    """Says once that a policy which chooses between two writers has left all tokens to one of them.

    Args:
        way_out: What to do about it, after a colon.
    """

    #: How many rollouts are looked at together, and the shares that count as one writer alone.
    ROLLOUTS, LOW, HIGH = 5, 0.02, 0.98

    def __init__(self, way_out: str) -> None:
        self.way_out = way_out
        self._counts: deque[tuple[int, int]] = deque(maxlen=self.ROLLOUTS)
        self._said = False

    def add(self, rollout: Rollout) -> str | None:
        """Return the warning that a further rollout calls for, or None.

        Args:
            rollout: Of this process.
        """
        tokens, by_teacher = int(rollout.completion_mask.sum()), int((rollout.author == Author.TEACHER).sum())
        self._counts.append((by_teacher, tokens))
        share = sum(count for count, _ in self._counts) / max(sum(count for _, count in self._counts), 1)
        if self._said or len(self._counts) < self.ROLLOUTS or self.LOW <= share <= self.HIGH:
            return None
        self._said = True
        return f"the teacher wrote {share:.1%} of the tokens of the last {self.ROLLOUTS} rollouts: {self.way_out}"


class TextWatch:
    """Says once that all rolled-out text is cut at the length limit, and once that much of it repeats one token.

    Args:
        eos_token_id: Id or ids that end a text.
        full: The length limit, tokens; rollouts with a smaller one are meant to be cut.
    """

    #: How many rollouts are looked at together; in how many of the rows one token makes up how much of the text, and
    #: from how many tokens on.
    ROLLOUTS, ROWS, REPEATED, TOKENS = 5, 0.5, 0.9, 16

    def __init__(self, eos_token_id: int | Sequence[int], full: int) -> None:
        self._eos = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id))
        self._full = full
        self._counts: deque[tuple[int, int, int]] = deque(maxlen=self.ROLLOUTS)
        self._said: set[str] = set()

    def add(self, rollout: Rollout, limit: int) -> str | None:
        """Return the warning that a further rollout calls for, or None.

        Args:
            rollout: Of this process.
            limit: Its length limit, tokens.
        """
        ids, mask = rollout.completion_ids, rollout.completion_mask
        lengths = mask.sum(-1)
        ended = (torch.isin(ids, self._eos.to(ids.device)) & mask).any(-1)
        again = ((ids[:, 1:] == ids[:, :-1]) & mask[:, 1:]).sum(-1)
        repeats = (lengths >= self.TOKENS) & (again >= self.REPEATED * (lengths - 1))
        cut, repeating = torch.stack([(~ended).sum(), repeats.sum()]).tolist()
        self._counts.append((len(rollout), cut if limit == self._full else 0, repeating))
        rows, cut, repeating = (sum(counts) for counts in zip(*self._counts, strict=True))
        of = f"of the last {self.ROLLOUTS} rollouts"
        found = {
            "repeats": f"{repeating / rows:.0%} of the texts {of} are one token again and again: lower learning_rate, "
            "raise temperature, or train on dataset answers first (method sft)",
            "cut": f"all texts {of} were cut at max_completion_length={self._full}: raise it, or train on dataset "
            "answers first (method sft), from which the student learns to end",
        }
        calls = {"repeats": repeating > self.ROWS * rows, "cut": cut == rows}
        for name, text in found.items():
            if calls[name] and name not in self._said and len(self._counts) == self.ROLLOUTS:
                self._said.add(name)
                return text
        return None


class ReferenceTotals:
    """Sums over the reference tokens of an evaluation: the loss is averaged over tokens, not over batches."""

    def __init__(self) -> None:
        self._totals = torch.zeros(3, dtype=torch.float64)

    @staticmethod
    def per_row(losses: Tensor, cross_entropies: Tensor, mask: Tensor) -> Tensor:
        """Return the sums of each row, `[B, 3]`: loss, cross-entropy and tokens, from `[B, C]` each."""
        return torch.stack([torch.where(mask, value, 0.0).sum(-1) for value in (losses, cross_entropies, mask)], 1)

    def add(self, rows: Tensor) -> None:
        """Add the sums of some rows, `[N, 3]`."""
        self._totals += rows.sum(0).double().cpu()

    def means(self) -> dict[str, float]:
        """Return `loss` and `cross_entropy`, nats per reference token; 0 where there was none."""
        loss, cross_entropy, tokens = self._totals.tolist()
        return {"loss": loss / max(tokens, 1.0), "cross_entropy": cross_entropy / max(tokens, 1.0)}


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a file of JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
