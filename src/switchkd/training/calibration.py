"""The threshold that gives a wanted teacher share: found once on given prompts, and kept during training.

A threshold in nats means something else for every pair of models; the share of tokens that the teacher writes is what
one wants to set. Changing the threshold changes the text, and the text changes the divergences, so the share is
measured by rolling out.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from switchkd.engine import roll_out
from switchkd.engine.arguments import IdsLike
from switchkd.errors import UserError, check_count, check_range
from switchkd.policies import SwitchPolicy, ThresholdPolicy
from switchkd.policy_options import DEFAULT_TEACHER_SHARE
from switchkd.rollout import Author, Rollout, unit_of

#: Below this many nats a divergence is rounding: it must not distinguish two models that agree.
SMALLEST_THRESHOLD = 1e-6


@dataclass(frozen=True)
class ShareBin:
    """The teacher's share of the tokens at positions start .. stop - 1."""

    start: int
    stop: int
    tokens: int
    teacher_share: float


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        policy: The policy with the threshold found.
        target_teacher_share: What was wanted.
        teacher_share: What the teacher wrote of all tokens at that threshold, in [0, 1].
        standard_error: Of that share, from the differences between prompts; nan for a single prompt.
        reached: Whether the share lies within the tolerance of the target.
        note: One line on how it went; where the target was not reached, why, and the way out.
        share_by_position: The share in bins of positions; bins without tokens are left out.
        lengths: Tokens of every completion at that threshold; `from_share` of the other strategies takes them.
        rounds: How many times the prompts were rolled out.
        seconds: How long it took.
        history: `(threshold, share)` of every round.
    """

    policy: ThresholdPolicy
    target_teacher_share: float
    teacher_share: float
    standard_error: float
    reached: bool
    note: str
    share_by_position: list[ShareBin]
    lengths: list[int]
    rounds: int
    seconds: float
    history: list[tuple[float, float]]

    @property
    def initial_threshold(self) -> float:
        """The threshold found, nats."""
        return self.policy.initial_threshold


def calibrate(
    student: nn.Module,
    teacher: nn.Module,
    prompt_ids: IdsLike,
    prompt_mask: IdsLike | None = None,
    *,
    policy: ThresholdPolicy,
    target_teacher_share: float = DEFAULT_TEACHER_SHARE,
    max_new_tokens: int = 256,
    tolerance: float = 0.02,
    max_rounds: int = 8,
    bins: int = 8,
    writer: Callable[..., Rollout] = roll_out,
    **rollout_options: Any,
) -> Calibration:
    """Return the initial threshold at which the teacher writes a wanted share of the tokens on these prompts.

    Every round rolls the prompts out with the same noise. The divergences it recorded, divided by the schedule, tell
    what share other thresholds would have given on that text; the threshold predicted so is tried next, or the one
    on the straight line through two rounds while all lie on one side. Once the target lies between two rounds and
    predictions have had their chance, the interval is halved.

    Args:
        student: As `roll_out` takes it.
        teacher: As `roll_out` takes it.
        prompt_ids: Prompts as `roll_out` takes them; 64 of the training prompts are enough.
        prompt_mask: Likewise.
        policy: The schedule and all other options; its own threshold is where the search begins.
        target_teacher_share: In [0, 1]; half by default, as in training; 0.53 is reported for SWITCH.
        max_new_tokens: Length limit of completions; take that of the training.
        tolerance: How far from the target is near enough, in (0, 1).
        max_rounds: At most this many rollouts.
        bins: Number of equal parts of the length limit for the share by position.
        writer: Called in place of `roll_out`, with the same arguments; `write` of a `switchkd.vllm.Engine`.
        rollout_options: Passed on to it: seed, temperature, eos_token_id, teacher_prompt_ids, ...

    Raises:
        UserError: An option outside its range, or one of `roll_out`'s.
    """
    check_range("target_teacher_share", target_teacher_share, 0.0, 1.0)
    if not 0.0 < tolerance < 1.0:
        raise UserError(f"tolerance must lie in (0, 1), got {tolerance}")
    check_count("max_rounds", max_rounds, 1)
    check_count("bins", bins, 1)
    started = time.perf_counter()
    search = _Search(policy, target_teacher_share)
    tried: list[tuple[float, Rollout]] = []
    while len(tried) < max_rounds:
        threshold = search.next(tried)
        if threshold is None:
            break
        rollout = writer(
            student,
            teacher,
            prompt_ids,
            prompt_mask,
            policy=policy.at_threshold(threshold),
            max_new_tokens=max_new_tokens,
            **rollout_options,
        )
        tried.append((threshold, rollout))
        if abs(rollout.teacher_share - target_teacher_share) <= tolerance:
            break
    history = [(threshold, rollout.teacher_share) for threshold, rollout in tried]
    threshold, best = min(tried, key=lambda pair: abs(pair[1].teacher_share - target_teacher_share))
    reached = abs(best.teacher_share - target_teacher_share) <= tolerance
    return Calibration(
        policy=policy.at_threshold(threshold),
        target_teacher_share=target_teacher_share,
        teacher_share=best.teacher_share,
        standard_error=_standard_error(best),
        reached=reached,
        note=_note(search, history, threshold, best.teacher_share, reached),
        share_by_position=share_by_position(best, max_new_tokens, bins),
        lengths=best.completion_mask.sum(-1).tolist(),
        rounds=len(tried),
        seconds=time.perf_counter() - started,
        history=history,
    )


def share_by_position(rollout: Rollout, max_new_tokens: int, bins: int = 8) -> list[ShareBin]:
    """Return the teacher's share in equal parts of the length limit; parts in which no text has a token are left out.

    Args:
        rollout: Any rollout.
        max_new_tokens: The limit, tokens.
        bins: Number of parts.
    """
    edges = [round(index * max_new_tokens / bins) for index in range(bins + 1)]
    result = []
    for start, stop in itertools.pairwise(edges):
        tokens = int(rollout.completion_mask[:, start:stop].sum())
        by_teacher = int((rollout.author[:, start:stop] == Author.TEACHER).sum())
        if tokens:
            result.append(ShareBin(start, stop, tokens, by_teacher / tokens))
    return result


class _Search:
    """Which threshold to try next; the share falls (almost) always as the threshold grows."""

    def __init__(self, policy: ThresholdPolicy, target: float) -> None:
        self.policy = policy
        self.target = target
        self.smallest = SMALLEST_THRESHOLD
        self.largest = policy.largest_threshold[0]

    def next(self, tried: Sequence[tuple[float, Rollout]]) -> float | None:
        """Return the next threshold, nats, or None where the bracket cannot be narrowed."""
        if not tried:
            return max(min(self.policy.initial_threshold, self.largest), self.smallest)
        shares = [(threshold, rollout.teacher_share) for threshold, rollout in tried]
        low = max((threshold for threshold, share in shares if share > self.target), default=None)
        high = min((threshold for threshold, share in shares if share <= self.target), default=None)
        if low == self.largest or high == self.smallest:
            return None  # an end of the range still lies on the wrong side
        if low is not None and high is not None and low >= high:
            return None  # the share is not monotone here
        threshold, rollout = min(tried, key=lambda pair: abs(pair[1].teacher_share - self.target))
        scaled = scaled_divergences(rollout, threshold)
        predicted = threshold_for_share(scaled, rollout.teacher_share, threshold, self.target)
        if low is None or high is None:
            proposed = self._extrapolated(shares) or predicted
            known = [threshold for threshold, _ in shares]
            moves = proposed > max(known) if high is None else proposed < min(known)
            if moves and len(tried) < 4:
                return max(min(proposed, self.largest), self.smallest)
            end = self.largest if high is None else self.smallest
            return end if math.isfinite(end) else 8.0 * max(known)
        if len(tried) < 5 and low < predicted < high:
            return predicted
        middle = math.sqrt(low * high)
        return middle if low < middle < high else None

    def _extrapolated(self, shares: Sequence[tuple[float, float]]) -> float | None:
        """The last two rounds' straight line in ln(threshold), where it falls; it knows how the text answers."""
        if len(shares) < 2:
            return None
        (first, share_of_first), (last, share_of_last) = shares[-2:]
        slope = (share_of_last - share_of_first) / math.log(last / first)
        if not slope < -1e-3:
            return None
        return last * math.exp(max(min((self.target - share_of_last) / slope, 5.0), -5.0))


def scaled_divergences(rollout: Rollout, initial_threshold: float) -> Tensor:
    """Return divergence over schedule of every token: the initial threshold above which its position is the student's.

    Args:
        rollout: Written by a policy with a threshold.
        initial_threshold: The one it was written with, nats.

    Returns:
        float64 `[tokens]`, nats.
    """
    return (rollout.divergence / (rollout.threshold / initial_threshold))[rollout.completion_mask].double()


def threshold_for_share(scaled: Tensor, teacher_share: float, threshold: float, target: float) -> float:
    """Return the initial threshold that would have given a teacher share on a text that was written with another.

    Args:
        scaled: Of `scaled_divergences`, `[tokens]`, at least one.
        teacher_share: What the teacher wrote of that text, in [0, 1].
        threshold: The initial threshold it was written with, nats.
        target: The share that is wanted, in [0, 1].
    """
    # A minimum leg lets others write than the threshold asks for; take the same difference in log odds at the target.
    asked = float((scaled > threshold).double().mean())
    wanted = target
    if asked != teacher_share and 0.0 < target < 1.0:
        least = 0.5 / len(scaled)
        wanted = _from_log_odds(_log_odds(target, 0.0) + _log_odds(asked, least) - _log_odds(teacher_share, least))
    ordered = scaled.sort().values
    index = min(math.ceil((1.0 - wanted) * len(ordered)), len(ordered) - 1)
    # Halfway between two neighbours, so that a tie at the threshold does not decide.
    return float((ordered[index] + ordered[max(index - 1, 0)]) / 2.0)


def _log_odds(share: float, least: float) -> float:
    share = min(max(share, least), 1.0 - least)
    return math.log(share / (1.0 - share))


def _from_log_odds(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def _standard_error(rollout: Rollout) -> float:
    """Of a ratio of sums over rows: tokens of one text are not independent, texts are."""
    rows = len(rollout)
    if rows < 2:
        return math.nan
    tokens = rollout.completion_mask.sum(-1).double()
    by_teacher = (rollout.author == Author.TEACHER).sum(-1).double()
    residual = by_teacher - rollout.teacher_share * tokens
    return float((residual.square().sum() * rows / (rows - 1)).sqrt() / tokens.sum())


def _note(
    search: _Search, history: Sequence[tuple[float, float]], threshold: float, share: float, reached: bool
) -> str:
    unit = unit_of(search.policy.measured)
    if reached:
        return f"the teacher writes {share:.1%} of the tokens at an initial threshold of {threshold:.4g} {unit}"
    start = f"a teacher share of {search.target:.0%} was not reached: "
    ends = dict(history)
    if ends.get(search.smallest, 1.0) < search.target:
        most = ends[search.smallest]
        return (
            start
            + f"even at a threshold of {search.smallest:.0e} {unit} the teacher writes {most:.1%}; the models agree"
        )
    if ends.get(search.largest, 0.0) > search.target:
        return (
            start + f"even at the largest threshold, {search.policy.largest_threshold[1]}, the teacher writes "
            f"{ends[search.largest]:.1%}; raise final_ratio or take schedule constant"
        )
    return (
        start + f"the nearest of {len(history)} rounds is {share:.1%} at {threshold:.4g} {unit}; take more prompts or "
        "rounds, or a larger tolerance"
    )


class ShareController:
    """Keeps the teacher's share where it is wanted while the student changes.

    Each rollout says which threshold would have given the share on its own text (`threshold_for_share`). ln(threshold)
    goes there by a gain that falls from 1 with the root of the rollouts seen, to a floor: at first one rollout is all
    that is known, later the noise of one is averaged out. What errors of one sign leave over is the student's pace, by
    which the threshold moves on without being behind.

    Args:
        target_teacher_share: In (0, 1).
        initial_threshold: Where to begin, nats; best calibrated.
        largest: The threshold is kept in [`SMALLEST_THRESHOLD`, this], nats. A share out of reach leaves it at that
            end; the first rollout that can be moved again moves it.

    Raises:
        UserError: The share is outside its range.
    """

    #: The smallest gain, the gain of the pace, and the error in ln(threshold) that it counts at most; chosen here, by
    #: runs on the demo's pair and by simulation.
    FLOOR, PACE_GAIN, JUMP = 0.5, 0.08, 0.3

    def __init__(
        self,
        target_teacher_share: float,
        initial_threshold: float,
        *,
        largest: float = SwitchPolicy.largest_threshold[0],
    ) -> None:
        if not 0.0 < target_teacher_share < 1.0:
            raise UserError(f"target_teacher_share must lie in (0, 1), got {target_teacher_share}")
        self.target_teacher_share = target_teacher_share
        self.largest = largest
        self.threshold = self._kept(initial_threshold)
        self._pace = 0.0
        self._seen = 0

    def observe(self, scaled: Tensor, teacher_share: float) -> float:
        """Return the threshold for the next rollout, nats.

        Args:
            scaled: `scaled_divergences` of the last rollout, over all ranks, `[tokens]`; none changes nothing.
            teacher_share: Of that rollout, in [0, 1].
        """
        scaled = scaled[~scaled.isnan()]  # of models whose logits are nan, a step that is skipped
        if len(scaled):
            self._seen += 1
            wanted = threshold_for_share(scaled, teacher_share, self.threshold, self.target_teacher_share)
            error = math.log(self._kept(wanted) / self.threshold)
            # A larger error is a jump, such as the first from a poor start: it says nothing about the pace.
            self._pace += self.PACE_GAIN * min(max(error, -self.JUMP), self.JUMP)
            step = max(self._seen**-0.5, self.FLOOR) * error + self._pace
            moved = self.threshold * math.exp(step)
            self.threshold = self._kept(moved)
            if self.threshold != moved:
                self._pace = 0.0  # at an end of the range nothing moves on
        return self.threshold

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint must keep."""
        return {"threshold": self.threshold, "pace": self._pace, "seen": self._seen}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of a checkpoint."""
        self.threshold = float(state["threshold"])
        self._pace = float(state["pace"])
        self._seen = int(state["seen"])

    def _kept(self, threshold: float) -> float:
        return min(max(threshold, SMALLEST_THRESHOLD), self.largest)
