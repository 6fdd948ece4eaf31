"""What both of vLLM's model runners share: draw the student's draft, decide who writes, keep the record.

Nothing of vLLM is imported here. The rows of a step are addressed by their number in the rollout, whatever slot or
request holds them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switchkd.engine.verification import Verified, verify_once
from switchkd.engine.vllm.described import COLUMNS, Columns, policy_of
from switchkd.sampling import NoiseTable, Stream, Warping, exponential_race

#: Counts of a rollout. rounds: steps in which the teacher read; forced: requests that began, each with the prompt's
#: last token; undrafted: requests that ended early because a step came without a draft, and were asked on.
COUNTS = ("rounds", "drafted", "kept", "forced", "undrafted")


@dataclass
class Checked:
    """What became of the drafts of some rows."""

    tokens: Tensor  # [A, G]
    count: Tensor  # [A], leading tokens that are written; the rest of the draft is thrown away


class Writing:
    """One rollout inside a vLLM worker: policy, noise, the policy's state of every row, and the record.

    Args:
        job: `policy` (as `described` gives it), `temperature`, `top_k`, `top_p`, `vocabulary_size`, `excluded_ids`,
            `seed`, `row_ids` (one for each row) and `max_new_tokens`.
        device: Where the worker's models are.
    """

    def __init__(self, job: dict[str, Any], device: torch.device) -> None:
        self.policy = policy_of(job["policy"])
        self.warping = Warping(
            job["temperature"], job["top_k"], job["top_p"], job["vocabulary_size"], tuple(job["excluded_ids"])
        )
        row_ids = torch.tensor(job["row_ids"], dtype=torch.int64, device=device)
        self.noise = NoiseTable(job["seed"], row_ids, job["max_new_tokens"])
        self.state = self.policy.initial_state(len(row_ids), device)
        self.counts = dict.fromkeys(COUNTS, 0)
        self._record: list[tuple[Tensor, ...]] = []
        self._counted: list[tuple[str, Tensor]] = []

    def draw(self, log_probs: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the student's next drafted token of some rows, int64 `[A]`.

        Args:
            log_probs: The student's, warped, `[A, V]`.
            rows: int64 `[A]`.
            positions: Completion positions, int64 `[A]`; a row that does not write yet may be before its first.
        """
        cells = self.noise.index(rows, positions.clamp(min=0))
        return exponential_race(log_probs, self.noise.keys(Stream.DRAFT, cells))

    def check(
        self,
        drafted: Tensor,
        student_rows: Tensor,
        logits: Tensor,
        rows: Tensor,
        position: Tensor,
        lengths: Tensor,
        live: Tensor,
    ) -> Checked:
        """Return what becomes of drafts, and note it; the device is asked for nothing.

        Args:
            drafted: int64 `[A, G]`.
            student_rows: The student's log-probabilities, warped, `[A * G, V]`.
            logits: The teacher's on the same prefixes, `[A * G, >= V]`.
            rows: int64 `[A]`, all different.
            position: Completion position of each drafted token, int64 `[A, G]`.
            lengths: How many tokens of each row were drafted, int64 `[A]`, at most G; what stands after them is not
                looked at.
            live: Where False the row has ended: nothing is noted and the policy's state stays, bool `[A]`.
        """
        steps = torch.arange(drafted.shape[1], device=drafted.device)
        verified, count = verify_once(
            self.policy,
            drafted,
            student_rows,
            self.warping(logits) if self.policy.needs_teacher else None,
            position,
            None if self.state is None else self.state[rows],
            self.noise,
            self.noise.index(rows.unsqueeze(1), position.clamp(min=0)),
        )
        # No bonus token: its distribution is the teacher's alone, not the policy's.
        count = torch.minimum(count, lengths)
        if self.state is not None:
            self._advance(verified, count, rows, live)
        stands = (steps < count.unsqueeze(1)) & live.unsqueeze(1)
        everywhere = rows.unsqueeze(1).expand_as(position)
        seen = (verified.tokens, drafted, verified.author, verified.divergence, verified.threshold)
        # Whole tensors: picking the entries that stand would wait for the device in every round.
        self._record.append((everywhere, position, *seen, stands))
        self.count("kept", torch.where(live, torch.minimum(verified.kept, lengths), 0))
        self.count("drafted", torch.where(live, lengths, 0))
        return Checked(verified.tokens, count)

    def count(self, name: str, amounts: Tensor) -> None:
        """Add the sum of a tensor to one of `COUNTS`; the device is not waited for."""
        self._counted.append((name, amounts.sum()))

    def _advance(self, verified: Verified, count: Tensor, rows: Tensor, live: Tensor) -> None:
        assert self.state is not None
        states = torch.stack([state for state in verified.states if state is not None])
        after = states[count, torch.arange(len(rows), device=rows.device)]
        mine = live.view(-1, *[1] * (after.dim() - 1))
        self.state[rows] = torch.where(mine, after, self.state[rows])

    def take(self) -> tuple[Columns, dict[str, int]]:
        """Return the record since it was last taken, in the order of writing, and the counts of the whole rollout."""
        if self._counted:
            amounts = torch.stack([amount for _, amount in self._counted]).tolist()
            for (name, _), amount in zip(self._counted, amounts, strict=True):
                self.counts[name] += amount
        if self._record:
            whole = [torch.cat([part.flatten() for part in parts]).cpu() for parts in zip(*self._record, strict=True)]
            columns = [column[whole[-1]].numpy() for column in whole[:-1]]
        else:
            columns = [torch.empty(0).numpy()] * len(COLUMNS)
        self._record, self._counted = [], []
        found = {name: values.astype(kind) for (name, kind), values in zip(COLUMNS.items(), columns, strict=True)}
        return found, self.counts
