"""The policies of related papers: MiniLLM's blend, SKD, AdaSwitch, relay and trust-region blending.

Speculative self-distillation needs no policy here: it is `SwitchPolicy(schedule="constant")` with another prompt
for the teacher.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from switchkd.divergences import LARGEST_JSD, forward_kl, generalized_jsd
from switchkd.errors import UserError, check_count, check_range, check_share_of_training
from switchkd.policies.base import Decision, Policy, Positions, everywhere, teacher_where
from switchkd.rollout import Author


@dataclass(frozen=True)
class BlendPolicy(Policy):
    """Every token is drawn from w teacher + (1 - w) student.

    Args:
        mixture_weight: w in [0, 1]; 0.2 in MiniLLM.

    Reference:
        Gu et al., "MiniLLM", arXiv 2306.08543, teacher-mixed sampling, eq. 5.
    """

    mixture_weight: float = 0.2
    blends = True

    def __post_init__(self) -> None:
        check_range("mixture_weight", self.mixture_weight, 0.0, 1.0)

    def decide(self, at: Positions) -> Decision:
        return everywhere(Author.TEACHER, at.measure)

    def behaviour(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        of_student, of_teacher = _log_weights(self.mixture_weight)
        return torch.logaddexp(student_log_probs + of_student, teacher_log_probs + of_teacher)


@functools.lru_cache(maxsize=8)
def _log_weights(mixture_weight: float) -> list[float]:
    """ln(1 - w) and ln w in float32; as tensors first, so that the logarithm of 0 is -inf and not an error."""
    return torch.tensor([1.0 - mixture_weight, mixture_weight]).log().tolist()


@dataclass(frozen=True)
class SkdPolicy(Policy):
    """The teacher replaces each drafted token that is not among its own K most likely ones by a sample of its own.

    What is written follows the student's distribution cut to the teacher's top K, the lost mass given to the teacher:
    mu(v) = student(v) [v in top K] + (1 - sum of student over top K) teacher(v). Ids that tie with the K-th belong
    to the top K; an id that the teacher excludes never does. The drafted token's rank is recorded as the measure
    (1 = most likely), K as the threshold.

    Args:
        teacher_top_k: K >= 1; 25 in the paper.

    Raises:
        UserError: K is not positive.

    Reference:
        Xu et al., "Speculative Knowledge Distillation", arXiv 2410.11325, algorithm 1.
    """

    teacher_top_k: int = 25
    redraws = True
    measured = "rank"

    def __post_init__(self) -> None:
        check_count("teacher_top_k", self.teacher_top_k, 1)

    def measure(self, student_log_probs: Tensor, teacher_log_probs: Tensor, drafted: Tensor) -> Tensor:
        of_draft = teacher_log_probs.gather(-1, drafted.unsqueeze(-1))
        rank = 1 + (teacher_log_probs > of_draft).sum(-1)
        # Below every id that the teacher allows, however few those are.
        excluded = of_draft.squeeze(-1) == -math.inf
        return torch.where(excluded, max(teacher_log_probs.shape[-1], self.teacher_top_k) + 1, rank).to(torch.float32)

    def decide(self, at: Positions) -> Decision:
        threshold = torch.full_like(at.measure, float(self.teacher_top_k))
        return Decision(teacher_where(at.measure > threshold), threshold)


@dataclass(frozen=True)
class AdaSwitchPolicy(Policy):
    """The student writes up to the first position that is far harder than those before; the teacher writes the rest.

    Far harder: KL(teacher, student) exceeds K times its mean over the last L positions, the tested one not included.
    The teacher writes the tested position too. Nothing is tested before L positions have been seen.

    Args:
        divergence_multiple: K > 0. The default is chosen here, not from the paper.
        divergence_window: L >= 1, in tokens. Chosen here, too.

    Raises:
        UserError: An option outside its range.

    Reference:
        Peng et al., "AdaSwitch", arXiv 2510.07842.
    """

    divergence_multiple: float = 3.0
    divergence_window: int = 8
    stateful = True
    measured = "kl_nats"

    def __post_init__(self) -> None:
        if not self.divergence_multiple > 0.0:
            raise UserError(f"divergence_multiple must be > 0, got {self.divergence_multiple}")
        check_count("divergence_window", self.divergence_window, 1)

    def initial_state(self, rows: int, device: torch.device) -> Tensor:
        """Return [the last L divergences as a ring, whether the teacher took over], float32 `[rows, L + 1]`."""
        return torch.zeros(rows, self.divergence_window + 1, device=device)

    def measure(self, student_log_probs: Tensor, teacher_log_probs: Tensor, drafted: Tensor) -> Tensor:
        return forward_kl(student_log_probs, teacher_log_probs).to(torch.float32)

    def decide(self, at: Positions) -> Decision:
        assert at.state is not None
        history, taken = at.state[:, :-1], at.state[:, -1] > 0
        tested = (at.position >= self.divergence_window) & ~taken
        threshold = torch.where(tested, self.divergence_multiple * history.mean(-1), math.nan)
        taken = taken | (at.measure > threshold)
        slot = (at.position % self.divergence_window).unsqueeze(-1)
        history = history.scatter(-1, slot, at.measure.unsqueeze(-1))
        state = torch.cat([history, taken.to(history.dtype).unsqueeze(-1)], dim=-1)
        return Decision(teacher_where(taken), threshold, state)


@dataclass(frozen=True)
class RelayPolicy(Policy):
    """The teacher takes over where the divergence is high, writes a few tokens (a leg) and hands back.

    Args:
        trigger_threshold: A leg starts where the Jensen-Shannon divergence exceeds this, nats, in [0, ln 2].
        leg_length: Tokens of a leg, the triggering position included, >= 1.
        leg_budget: Maximum number of legs per completion, >= 0; afterwards the student writes alone.

    Raises:
        UserError: An option outside its range.

    Reference:
        Xu et al., "Pass the Baton: Trajectory-Relayed On-Policy Distillation", arXiv 2607.26057. Its trigger is a
        reflection word that the teacher wants and the student does not, its legs are paragraphs, and the text ends
        with the last leg; divergence, tokens and all defaults are chosen here.
    """

    trigger_threshold: float = 0.3
    leg_length: int = 8
    leg_budget: int = 4
    stateful = True
    measured = "jsd_nats"

    def __post_init__(self) -> None:
        check_range("trigger_threshold", self.trigger_threshold, 0.0, LARGEST_JSD, "ln 2 nats")
        check_count("leg_length", self.leg_length, 1)
        check_count("leg_budget", self.leg_budget, 0)

    def initial_state(self, rows: int, device: torch.device) -> Tensor:
        """Return [tokens left of the current leg, legs started], int64 `[rows, 2]`."""
        return torch.zeros(rows, 2, dtype=torch.int64, device=device)

    def measure(self, student_log_probs: Tensor, teacher_log_probs: Tensor, drafted: Tensor) -> Tensor:
        return generalized_jsd(student_log_probs, teacher_log_probs).to(torch.float32)

    def decide(self, at: Positions) -> Decision:
        assert at.state is not None
        left, legs = at.state.unbind(-1)
        tested = (left == 0) & (legs < self.leg_budget)
        threshold = torch.where(tested, self.trigger_threshold, torch.full_like(at.measure, math.nan))
        starts = at.measure > threshold
        left = torch.where(starts, self.leg_length, left)
        state = torch.stack([(left - 1).clamp_min(0), legs + starts], dim=-1)
        return Decision(teacher_where(left > 0), threshold, state)


@dataclass(frozen=True)
class TrustRegionPolicy(Policy):
    """Every token is drawn from the blend nearest to the teacher that stays within a KL budget of the student.

    mu is proportional to student^(1 - b) teacher^b. At each prefix b is the largest value in [0, 1] with
    KL(mu, student) <= epsilon: 1, the teacher itself, where KL(teacher, student) fits the budget; 0, the student
    itself, where even the student restricted to the ids the teacher allows does not. KL(teacher, student) is recorded
    as the measure and epsilon as the threshold: the teacher alone writes where the first is not above the second.

    Args:
        kl_budget: epsilon, the budget in nats, >= 0; inf is the teacher alone. The default is chosen here.
        kl_budget_warmup: epsilon falls linearly to 0 over this share of the training, in (0, 1]. Chosen here.

    Raises:
        UserError: An option outside its range.

    Reference:
        Plyusov et al., "Trust-Region Behavior Blending for On-Policy Distillation", arXiv 2605.31159.
    """

    kl_budget: float = 0.1
    kl_budget_warmup: float = 0.5
    blends = True
    measured = "kl_nats"

    def __post_init__(self) -> None:
        if not self.kl_budget >= 0.0:
            raise UserError(f"kl_budget must be >= 0 nats, got {self.kl_budget}")
        check_share_of_training("kl_budget_warmup", self.kl_budget_warmup)

    def at_progress(self, progress: float) -> Self:
        """Return the policy with the budget of a moment of training."""
        left = 1.0 - progress / self.kl_budget_warmup
        return replace(self, kl_budget=self.kl_budget * left if left > 0.0 else 0.0)

    def measure(self, student_log_probs: Tensor, teacher_log_probs: Tensor, drafted: Tensor) -> Tensor:
        return forward_kl(student_log_probs, teacher_log_probs).to(torch.float32)

    def decide(self, at: Positions) -> Decision:
        author = everywhere(Author.TEACHER, at.measure).author
        return Decision(author, torch.full_like(at.measure, self.kl_budget))

    def behaviour(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        weight = largest_weight_within(student_log_probs, teacher_log_probs, self.kl_budget)
        blended = _geometric_blend(student_log_probs, teacher_log_probs, weight)
        # At the ends the formula is 0 * -inf for excluded ids; there it is simply one of the two.
        blended = torch.where((weight == 0.0).unsqueeze(-1), student_log_probs, blended)
        return torch.where((weight == 1.0).unsqueeze(-1), teacher_log_probs, blended)


def largest_weight_within(
    student_log_probs: Tensor, teacher_log_probs: Tensor, epsilon: float, *, rounds: int = 24
) -> Tensor:
    """Return the largest teacher weight b whose geometric blend lies within a KL budget of the student.

    With r = ln teacher - ln student on the ids that both allow, mu_b is the student tilted by e^(b r), so that
    f(b) = KL(mu_b, student) = b E[r] - ln E_student[e^(b r)] grows with f'(b) = b Var[r], the moments being those of
    mu_b. sqrt(f) is nearly straight: Newton's steps on it, kept inside the bracket, find sqrt(epsilon) in three or
    four rounds. Rows that are done are dropped, so each row's result is its own.

    Args:
        student_log_probs: `[N, V]`, normalised.
        teacher_log_probs: `[N, V]`, normalised.
        epsilon: The budget in nats, >= 0.
        rounds: At most this many evaluations of the KL, of which the first few mostly suffice.

    Returns:
        `[N]` in [0, 1], where 0 < b < 1 within 0.1% of the budget from below.
    """
    fits = forward_kl(student_log_probs, teacher_log_probs) <= epsilon
    weight = fits.to(student_log_probs.dtype)
    rows = (~fits).nonzero().squeeze(-1)
    if epsilon == 0.0 or not len(rows):
        return weight
    student, teacher = student_log_probs[rows], teacher_log_probs[rows]
    both = (student > -math.inf) & (teacher > -math.inf)
    log_ratio = torch.where(both, teacher - student, 0.0)
    student = torch.where(both, student, -math.inf)
    # Whatever b > 0, an id that the teacher excludes is lost; where that alone costs too much the student writes.
    possible = -student.logsumexp(-1) < epsilon
    rows, student, log_ratio = rows[possible], student[possible], log_ratio[possible]
    low = torch.zeros(len(rows), dtype=student.dtype, device=student.device)
    high = torch.ones_like(low)
    mean = (student.exp() * log_ratio).sum(-1, keepdim=True)
    variance = (student.exp() * (log_ratio - mean).square()).sum(-1)
    # Near b = 0 the KL is b^2 Var / 2.
    guess = (2.0 * epsilon / variance.clamp_min(1e-12)).sqrt().clamp(1e-4, 0.5)
    for _ in range(rounds):
        if not len(rows):
            break
        value, slope = _kl_to_student(student, log_ratio, guess)
        within = value <= epsilon
        low, high = torch.where(within, guess, low), torch.where(within, high, guess)
        weight[rows] = low
        root = value.clamp_min(1e-20).sqrt()
        step = (math.sqrt(epsilon * (1.0 - 5e-4)) - root) * 2.0 * root / slope.clamp_min(1e-20)
        newton = guess + step
        inside = (newton > low) & (newton < high)
        guess = torch.where(inside, newton, (low + high) / 2.0)
        going = ~(within & (value >= epsilon * (1.0 - 1e-3)))
        if not bool(going.all()):
            rows, student, log_ratio = rows[going], student[going], log_ratio[going]
            low, high, guess = low[going], high[going], guess[going]
    return weight


def _kl_to_student(student_log_probs: Tensor, log_ratio: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """KL(mu_b, student) `[N]` and its derivative in b."""
    tilted = student_log_probs + weight.unsqueeze(-1) * log_ratio
    log_total = tilted.logsumexp(-1, keepdim=True)
    probs = (tilted - log_total).exp()
    mean = (probs * log_ratio).sum(-1, keepdim=True)
    variance = (probs * (log_ratio - mean).square()).sum(-1)
    return weight * mean.squeeze(-1) - log_total.squeeze(-1), weight * variance


def _geometric_blend(student_log_probs: Tensor, teacher_log_probs: Tensor, weight: Tensor) -> Tensor:
    weight = weight.unsqueeze(-1)
    return ((1.0 - weight) * student_log_probs + weight * teacher_log_probs).log_softmax(-1)
