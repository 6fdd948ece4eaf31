"""Numbers that are nan or inf: found in their step, which is left out, counted, and its batch kept to be looked at."""

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from switchkd.errors import UserError
from switchkd.rollout import Author
from switchkd.training.config import SwitchConfig
from switchkd.training.guards import check_student
from switchkd.training.log import append_rows

#: In the folder of the run: the rows of every step that was left out.
SKIPPED_FILE = "skipped_steps.jsonl"


class StepGuard:
    """Looks at losses, gradients and new weights of an optimizer step, however many micro-batches it has.

    Attributes:
        batches: The micro-batches of the step.
    """

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self._losses: list[Tensor] = []
        self._before: Tensor | None = None

    def begin(self, total: Tensor) -> None:
        """Begin a step.

        Args:
            total: The losses since the last log, a scalar.
        """
        self._losses, self._before = [], total.clone()

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, a scalar; nothing is looked at yet."""
        self._losses.append(loss.detach().float())

    def problem(
        self, parameters: Sequence[nn.Parameter], reduce: Callable[[Tensor], Tensor] | None = None
    ) -> str | None:
        """Return what is nan or inf in the step, None where all is sound; the device is asked once.

        Args:
            parameters: Those whose gradients are looked at.
            reduce: Sums a tensor over all processes, so that all find the same; None where there is one.
        """
        total = torch.stack(self._losses).sum() if self._losses else torch.zeros(())
        gradients = magnitude([value.grad for value in parameters if value.grad is not None])
        found = torch.stack([total, gradients.to(total.device)])
        loss, gradient = (found if reduce is None else reduce(found)).tolist()
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        return None if math.isfinite(gradient) else f"the gradient is {gradient}"

    def take_back(self, total: Tensor) -> None:
        """Take the losses of the step out of those since the last log."""
        if self._before is not None:
            total.copy_(self._before)

    def rows(self, tokenizer: Any) -> list[dict[str, Any]]:
        """Return the rows of the step as JSON has them, each with the loss of its micro-batch."""
        found = []
        for number, batch in enumerate(self.batches):
            loss = float(self._losses[number]) if number < len(self._losses) else math.nan
            begins = batch["input_ids"].shape[1] - batch["completion_mask"].shape[1]
            for row, (ids, read) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
                prompt, completion = (ids[part][read[part]].tolist() for part in (slice(begins), slice(begins, None)))
                if "author" in batch:
                    wrote = batch["author"][row][read[begins:]].tolist()
                else:
                    wrote = [Author.DATASET] * len(completion)
                found.append(
                    {
                        "micro_batch": number,
                        "loss": loss if math.isfinite(loss) else str(loss),  # JSON has no nan
                        "prompt": tokenizer.decode(prompt),
                        "completion": tokenizer.decode(completion),
                        "prompt_ids": prompt,
                        "completion_ids": completion,
                        "author": [Author(one).name.lower() for one in wrote],
                    }
                )
        return found


class SkippingTrainer(Trainer):
    """A Trainer that leaves out an optimizer step whose loss or gradient is nan or inf; a subclass sets the rest.

    Attributes:
        skipped_steps: How many were left out, those before a resume included.
    """

    args: SwitchConfig
    model: nn.Module
    skipped_steps: int
    _guard: StepGuard
    _skipped_in_a_row = 0

    def _summed(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.float().to(self.args.device), "sum").cpu()

    @property
    def _reduce(self) -> Callable[[Tensor], Tensor] | None:
        return self._summed if self.args.world_size > 1 else None

    def _trained(self) -> list[nn.Parameter]:
        """What one process sees whole of what trains; parts of sharded weights are left to the loss."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return []
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def begin_step(self) -> None:
        """Begin an optimizer step, before its first micro-batch."""
        self._guard.begin(self._tr_loss)

    def check_step(self) -> None:
        """Leave out the update of an optimizer step whose loss or gradient is nan or inf.

        Raises:
            UserError: It was one too many, see `max_skipped_steps`; or the weights are nan or inf already.
        """
        step, scaler = self.state.global_step + 1, self.accelerator.scaler
        # With a scaler of gradients (fp16) their overflow is its daily work.
        problem = self._guard.problem(self._trained() if scaler is None else [], self._reduce)
        if problem is None:
            self._skipped_in_a_row = 0
            return
        self._keep_batch(step)
        check_student(self.model, step - 1, self.args.learning_rate)
        advice = (
            f"the rows are in {SKIPPED_FILE}; look at them and at the weights of the loss, or lower learning_rate (now "
            f"{self.args.learning_rate:g})"
        )
        if self.is_deepspeed_enabled:  # it has made the update with the backward pass
            raise UserError(f"{problem} in step {step}, which DeepSpeed does not let us leave out: {advice}")
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        self._guard.take_back(self._tr_loss)
        self._globalstep_last_logged += 1  # the mean of the log is one over fewer steps
        if self.skipped_steps > (most := self.args.max_skipped_steps):
            count = f"{self.skipped_steps} step{'s' if self.skipped_steps > 1 else ''}"
            raise UserError(
                f"{problem} in step {step}; {count} would not update the student, more than max_skipped_steps={most}: "
                f"{advice}"
            )
        if scaler is not None and not self.args.max_grad_norm > 0:
            for parameter in self.model.parameters():  # the scaler, which has not looked yet, leaves the step out
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
        else:
            self.model.zero_grad()  # without gradients an optimizer changes neither weights nor its own state
        warnings.warn(f"step {step} is skipped: {problem}; {advice}", stacklevel=2)

    def check_update(self) -> None:
        """Refuse weights that the optimizer step has made nan or inf, in the step where it happened.

        Raises:
            UserError: Names the step and the first tensor.
        """
        weights = magnitude([parameter.detach() for parameter in self._trained()])
        if not math.isfinite(float(weights if self._reduce is None else self._reduce(weights))):
            self._keep_batch(self.state.global_step)
            check_student(self.model, self.state.global_step, self.args.learning_rate)
        self._guard.batches = []

    def require_updates(self) -> None:
        """Refuse the end of a training whose last steps, or all of them, were skipped: its student gives no numbers.

        Raises:
            UserError: They were. One bad step at the end is let pass.
        """
        last = self._skipped_in_a_row
        if last > 1 or (last and self.skipped_steps >= self.state.global_step):
            steps = f"the last {last} steps were" if last > 1 else "the only step was"
            raise UserError(
                f"{steps} skipped; the model is not saved: look at the rows in {SKIPPED_FILE} and at the weights of "
                f"the loss, or lower learning_rate (now {self.args.learning_rate:g})"
            )

    def _keep_batch(self, step: int) -> None:
        rows = self._guard.rows(self.processing_class)
        if (ranks := self.args.world_size) > 1:
            parts: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(parts, rows)
            rows = list(chain.from_iterable(parts))
        if self.is_world_process_zero():
            append_rows(Path(str(self.args.output_dir)) / SKIPPED_FILE, [{"step": step, **row} for row in rows])


def magnitude(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of all absolute values, a scalar in float32 at least: nan or inf where one of them is."""
    if not tensors:
        return torch.zeros(())
    widest = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    norms = torch._foreach_norm(list(tensors), 1, dtype=widest)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).sum()
