"""Where the text of an optimizer step comes from: the data set, a fresh rollout, or one of the past."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn

from switchkd import sampling
from switchkd.data.batches import Rows
from switchkd.engine import roll_out
from switchkd.engine.vllm.engine import Engine
from switchkd.engine.vllm.shared import SharedEngine
from switchkd.errors import UserError
from switchkd.policies import Policy, ThresholdPolicy
from switchkd.rollout import Author, Rollout
from switchkd.training.calibration import Calibration, ShareController, calibrate, scaled_divergences
from switchkd.training.replay import AdaptiveFraction, ReplayStore

Source = Literal["dataset", "fresh", "replay"]

#: Number of prompts on which the first threshold is calibrated.
CALIBRATION_PROMPTS = 64


# Row ids of different optimizer steps and ranks must never meet: each step owns this many.
ROWS_PER_STEP = 1 << 24


def row_ids(sizes: Sequence[int], step: int, rank: int, ranks: int, rows: int) -> Tensor:
    """Return the place of every row in the global batch: one process with big batches and many with small ones agree.

    Args:
        sizes: Rows of each micro-batch of the accumulation window; the last may be smaller than `rows`.
        step: The optimizer step, counted from 0.
        rank: The rank of this process.
        ranks: How many there are.
        rows: Rows of a full micro-batch.

    Returns:
        int64 `[sum(sizes)]`.
    """
    ids = [(batch * ranks + rank) * rows + row for batch, size in enumerate(sizes) for row in range(size)]
    return torch.tensor(ids, dtype=torch.int64) + step * ROWS_PER_STEP


class TextSource:
    """Decides for every step where its text comes from and under which policy it is written; part of a checkpoint.

    Args:
        policy: The policy training begins with; None rolls nothing out.
        fraction: Share of steps on rolled-out text, in [0, 1]; with `adaptive` the share at the start.
        seed: Seed of the decisions: they are functions of it and the step, the same on all ranks and after a resume.
        truncation_start: Length limit of rollouts at the start of training, as a share of the full one, in (0, 1].
        truncation_warmup: Share of the training over which that limit grows linearly to the full one; inf: it stays.
        adaptive: Let the share grow as DistiLLM does.
        replay_capacity: Number of rows of past rollouts kept for reuse; None keeps none.
        target_teacher_share: Keep the teacher's share here by moving the policy's threshold; None leaves it.

    Attributes:
        engine: Writes the text instead of `roll_out`; None for `roll_out`.
    """

    engine: Engine | SharedEngine | None = None

    def __init__(
        self,
        policy: Policy | None,
        *,
        fraction: float,
        seed: int,
        truncation_start: float = 1.0,
        truncation_warmup: float = 1.0,
        adaptive: bool = False,
        replay_capacity: int | None = None,
        target_teacher_share: float | None = None,
    ) -> None:
        self.policy = policy
        self.fraction = fraction
        self.seed = seed
        self.truncation_start, self.truncation_warmup = truncation_start, truncation_warmup
        self.adaptive = AdaptiveFraction(fraction) if adaptive else None
        self.store = None if replay_capacity is None else ReplayStore(replay_capacity)
        self.controller: ShareController | None = None
        if target_teacher_share is not None:
            if not isinstance(policy, ThresholdPolicy):
                raise UserError("target_teacher_share needs a policy with a threshold, such as switch")
            largest = policy.largest_threshold[0]
            self.controller = ShareController(target_teacher_share, policy.initial_threshold, largest=largest)

    @property
    def on_policy_fraction(self) -> float:
        """The share of steps on rolled-out text that holds now, in [0, 1]."""
        return self.fraction if self.adaptive is None else self.adaptive.value

    def of_step(self, step: int, progress: float) -> Source:
        """Return where a step's text comes from.

        Args:
            step: The optimizer step, counted from 0.
            progress: Share of the training that is done, in [0, 1].
        """
        if self.policy is None or self.on_policy_fraction == 0:
            return "dataset"
        # One number per step: the step takes the place of the row id, and the position is 0 because there is none.
        key = sampling.noise_keys(self.seed, torch.tensor([step]), torch.tensor([0]), sampling.Stream.SOURCE)
        drawn = float(sampling.uniform(key))
        if self.adaptive is not None and self.store is not None:
            return self.adaptive.source(drawn, progress, self.store)
        return "fresh" if drawn < self.on_policy_fraction else "dataset"

    def policy_at(self, progress: float) -> Policy:
        """Return the policy of a moment of training.

        Args:
            progress: Share of the training that is done, in [0, 1].
        """
        assert self.policy is not None
        policy = self.policy
        if self.controller is not None and isinstance(policy, ThresholdPolicy):
            policy = policy.at_threshold(self.controller.threshold)
        return policy.at_progress(progress)

    def length_limit_at(self, progress: float, full: int) -> int:
        """Return the length limit of rollouts at a moment of training, tokens, from 1 to the full one.

        Args:
            progress: Share of the training that is done, in [0, 1].
            full: The limit that holds in the end, tokens.
        """
        grown = min(progress / self.truncation_warmup, 1.0)
        return max(round(full * (self.truncation_start + (1.0 - self.truncation_start) * grown)), 1)

    def write(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        rows: Rows,
        *,
        progress: float,
        max_new_tokens: int,
        **rollout_options: Any,
    ) -> Rollout:
        """Return a rollout of every row's prompt.

        Args:
            student: As `roll_out` takes it.
            teacher: As `roll_out` takes it.
            rows: Of all micro-batches of the optimizer step.
            progress: Share of the training that is done, in [0, 1].
            max_new_tokens: The full length limit, tokens.
            rollout_options: Passed on to `roll_out`: seed, row_ids, return_teacher_hidden, ...
        """
        rollout = self._writer(student)(
            student,
            teacher,
            rows.prompts(),
            policy=self.policy_at(progress),
            teacher_prompt_ids=rows.teacher_prompts(),
            max_new_tokens=self.length_limit_at(progress, max_new_tokens),
            **rollout_options,
        )
        if self.store is not None:
            self.store.add(rollout)
        return rollout

    def _writer(self, student: nn.Module) -> Callable[..., Rollout]:
        """What writes with the student as it is now, called as `roll_out` is."""
        if self.engine is None:
            return roll_out
        self.engine.load_student(student)
        return self.engine.write

    def calibrate_on(
        self, student: nn.Module, teacher: nn.Module, data: Dataset, *, max_new_tokens: int, **rollout_options: Any
    ) -> Calibration:
        """Begin at the threshold that gives the wanted share on the first prompts of the data; return what was found.

        Args:
            student: As `roll_out` takes it.
            teacher: As `roll_out` takes it.
            data: Made by `switchkd.data.prepare`.
            max_new_tokens: The full length limit, tokens.
            rollout_options: Passed on to `roll_out`.
        """
        assert isinstance(self.policy, ThresholdPolicy) and self.controller is not None
        rows = Rows(list(data.select(range(min(CALIBRATION_PROMPTS, len(data))))))
        found = calibrate(
            student,
            teacher,
            rows.prompts(),
            policy=self.policy,
            target_teacher_share=self.controller.target_teacher_share,
            teacher_prompt_ids=rows.teacher_prompts(),
            max_new_tokens=self.length_limit_at(0.0, max_new_tokens),
            writer=self._writer(student),
            **rollout_options,
        )
        self.controller.threshold = found.initial_threshold
        return found

    def observe_share(self, rollout: Rollout, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take note of a fresh rollout, so that the teacher's share is held in the next.

        Args:
            rollout: Made by `write`.
            gather: Joins the `[tokens]` of all processes; None where there is one.
        """
        if self.controller is None:
            return
        scaled = scaled_divergences(rollout, self.controller.threshold)
        by_teacher = (rollout.author == Author.TEACHER)[rollout.completion_mask].to(scaled)
        if gather is not None:
            scaled, by_teacher = gather(scaled), gather(by_teacher)
        self.controller.observe(scaled, float(by_teacher.mean()))

    def observe_loss(self, evaluation_loss: float) -> None:
        """Take note of an evaluation, nats per token."""
        if self.adaptive is not None:
            self.adaptive.observe(evaluation_loss)

    def stored(self, rows: int, step: int, rank: int, pad_token_id: int) -> Rollout:
        """Return rows of past rollouts, drawn by seed, step and rank."""
        assert self.store is not None
        return self.store.sample(rows, sampling.generator(self.seed, step, rank), pad_token_id=pad_token_id)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        for name, part in self._parts().items():
            if name in state:
                part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"adaptive": self.adaptive, "store": self.store, "controller": self.controller}
        return {name: part for name, part in parts.items() if part is not None}
