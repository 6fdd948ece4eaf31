"""A rollout that was asked for, checked: what both decoders take."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from switchkd.policies import Policy
from switchkd.rollout import Prompts
from switchkd.sampling import Warping


@dataclass(frozen=True)
class Request:
    """The checked arguments of one rollout.

    Attributes:
        student: Model that drafts.
        teacher: Model that checks, or None for a policy that needs no teacher.
        prompts: The student's prompts, on its device.
        teacher_prompts: The teacher's, on its own; None where there is no teacher.
        policy: Who writes.
        warping: How logits become the log-probabilities that are sampled from and compared.
        max_new_tokens: Length limit of a completion, >= 1.
        seed: Seed of the counter-based randomness.
        row_ids: Identity of each row for the randomness, int64 `[B]`.
        eos: End-of-sequence ids, possibly none.
        pad_token_id: Fills completions after their end; the models can read it.
        return_teacher_hidden: Keep the teacher's state that predicted each emitted token.
        return_drafted_ids: Keep the student's draft at each position.
    """

    student: nn.Module
    teacher: nn.Module | None
    prompts: Prompts
    teacher_prompts: Prompts | None
    policy: Policy
    warping: Warping
    max_new_tokens: int
    seed: int
    row_ids: Tensor
    eos: list[int]
    pad_token_id: int
    return_teacher_hidden: bool = False
    return_drafted_ids: bool = False

    def __len__(self) -> int:
        return len(self.row_ids)

    def readers(self) -> Iterator[tuple[str, nn.Module, Prompts]]:
        """Role, model and prompts of each model that reads."""
        yield "student", self.student, self.prompts
        if self.teacher is not None and self.teacher_prompts is not None:
            yield "teacher", self.teacher, self.teacher_prompts

    def split(self, rows: int | None) -> list["Request"]:
        """Return requests of at most that many rows, in order; None does not split."""
        if rows is None or rows >= len(self):
            return [self]
        parts = [slice(first, first + rows) for first in range(0, len(self), rows)]
        return [
            replace(
                self,
                prompts=self.prompts[part],
                teacher_prompts=None if self.teacher_prompts is None else self.teacher_prompts[part],
                row_ids=self.row_ids[part],
            )
            for part in parts
        ]
