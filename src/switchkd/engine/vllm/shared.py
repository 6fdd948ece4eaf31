"""vLLM under several training processes: an engine in each, or one that the first of them asks, with all rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from switchkd.engine.vllm.engine import Engine
from switchkd.errors import UserError
from switchkd.models.forward import device_of
from switchkd.rollout import TOKEN_COLUMNS, Prompts, Rollout


def started_everywhere(start: Callable[[], Engine]) -> Engine:
    """Return this process's own engine, after those of all processes have started.

    Args:
        start: Makes it; called in every process.

    Raises:
        UserError: That of the first process in which it does not start; in every process, so that none waits.
    """
    engine, refused = None, None
    try:
        engine = start()
    except UserError as error:
        refused = str(error)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, refused)
    reason = next((one for one in everybody if one is not None), None)
    if engine is not None and reason is None:
        return engine
    if engine is not None:
        engine.close()
    raise UserError(reason)


class SharedEngine:
    """An `Engine` for all processes of a training, which must call together.

    Rows keep the ids that their processes give them, so that it changes no text how many processes there are. Weights
    go out once, from the first process. What the engine refuses is refused in every process.

    Args:
        start: Makes the engine; called in the first process.
    """

    def __init__(self, start: Callable[[], Engine]) -> None:
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._engine: Any = self._in_first(start)

    def load_student(self, student: nn.Module) -> None:
        """Give the engine the student's present weights, those of the first process; the others wait."""
        self._in_first(lambda: self._engine.load_student(student))

    def write(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        prompt_ids: Sequence[Sequence[int]],
        prompt_mask: None = None,
        *,
        row_ids: Tensor | None = None,
        max_active_rows: int | None = None,
        **options: Any,
    ) -> Rollout:
        """Return the rollout of this process's rows; `stats` are those of all rows.

        Args:
            student: Not read but for the place of the result: the engine has a student of its own.
            teacher: Not read.
            prompt_ids: One list of ids for each row of this process.
            prompt_mask: Lists need none.
            row_ids: Global identity of each row, int64 `[B]`; 0 .. B-1 if None.
            max_active_rows: Not read: the engine has its own bound.
            options: Of `Engine.roll_out`, the same in all processes.

        Raises:
            UserError: What the engine cannot do, or that it has ended; in every process.
        """
        ids = list(range(len(prompt_ids))) if row_ids is None else row_ids.tolist()
        asked: list[Any] = [None] * self._ranks
        dist.gather_object(([list(row) for row in prompt_ids], ids), asked if self._rank == 0 else None)

        def written() -> list[Rollout]:
            prompts = [row for rows, _ in asked for row in rows]
            whole = self._engine.roll_out(prompts, row_ids=[one for _, some in asked for one in some], **options)
            ends = accumulate((len(rows) for rows, _ in asked), initial=0)
            return [_part(whole, slice(first, end)) for first, end in pairwise(ends)]

        own: list[Any] = [None]
        dist.scatter_object_list(own, self._in_first(written))
        return _on(device_of(student), own[0])

    def close(self) -> None:
        """End what the first process started."""
        if self._engine is not None:
            self._engine.close()

    def _in_first(self, do: Callable[[], Any]) -> Any:
        """Return what a function returns in the first process and None in the others, after all know that it did."""
        result: Any = None
        refused: list[str | None] = [None]
        if self._rank == 0:
            try:
                result = do()
            except UserError as error:
                refused = [str(error)]
        dist.broadcast_object_list(refused)
        if refused[0] is not None:
            raise UserError(refused[0])
        return result


def _part(whole: Rollout, rows: slice) -> Rollout:
    """Some rows of a rollout, no wider than they need, in main memory."""
    part = whole.part(rows)
    prompts = Prompts(part.prompt_ids, part.prompt_mask).last(int(part.prompt_mask.sum(-1).max()))
    length = int(part.completion_mask.sum(-1).max())
    # Copies: a view would take the whole rollout along on its way to another process.
    columns = {name: value[:, :length].clone() for name in TOKEN_COLUMNS if (value := getattr(part, name)) is not None}
    part = replace(part, prompt_ids=prompts.ids.clone(), prompt_mask=prompts.mask.clone(), **columns)
    return _on(torch.device("cpu"), part)


def _on(device: torch.device, rollout: Rollout) -> Rollout:
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(rollout).items() if isinstance(value, Tensor)
    }
    return replace(rollout, **tensors)
