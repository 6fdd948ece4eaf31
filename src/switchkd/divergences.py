"""Divergences between two next-token distributions: `[..., V] -> [...]`, in nats, in log space.

Every function takes the student's and the teacher's log-probabilities, in this order, and knows nothing of masks,
labels or models. Half precision is raised to float32 first; float64 stays. Each is zero where the two agree, and its
gradient is finite for logits of +-1e4 and for ids that both models exclude with -inf.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from switchkd.chunks import rows_at_once
from switchkd.fusing import fusible

LN_2 = math.log(2.0)
#: ln 2 as float32 holds it, a little larger: the largest divergence that is ever recorded or compared.
LARGEST_JSD = float(torch.tensor(LN_2, dtype=torch.float32))
# How many of the teacher's likeliest ids are tried first for the head of the adaptive KL.
HEAD_GUESS = 64


def forward_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return KL(teacher, student) = sum_v teacher_v (ln teacher_v - ln student_v): mass-covering.

    Args:
        student_log_probs: `[..., V]`, normalised.
        teacher_log_probs: `[..., V]`, normalised.

    Returns:
        `[...]`, nats, in [0, inf].
    """
    student, teacher = _promote(student_log_probs, teacher_log_probs)
    return _kl(teacher, student)


def reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return KL(student, teacher) = sum_v student_v (ln student_v - ln teacher_v): mode-seeking.

    Args:
        student_log_probs: `[..., V]`, normalised.
        teacher_log_probs: `[..., V]`, normalised.

    Returns:
        `[...]`, nats, in [0, inf].
    """
    student, teacher = _promote(student_log_probs, teacher_log_probs)
    return _kl(student, teacher)


def generalized_jsd(student_log_probs: Tensor, teacher_log_probs: Tensor, *, teacher_weight: float = 0.5) -> Tensor:
    """Return the generalised Jensen-Shannon divergence w KL(teacher, m) + (1 - w) KL(student, m).

    m = w teacher + (1 - w) student with w = `teacher_weight`. At w = 0.5 it is symmetric and at most ln 2: this is
    what SWITCH compares with its threshold.

    Args:
        student_log_probs: `[..., V]`, normalised.
        teacher_log_probs: `[..., V]`, normalised.
        teacher_weight: w in (0, 1), TRL's `beta`.

    Returns:
        `[...]`, nats, in [0, -w ln w - (1 - w) ln(1 - w)].

    Raises:
        ValueError: `teacher_weight` is outside (0, 1).

    Reference:
        Agarwal et al., "On-Policy Distillation of Language Models", arXiv 2306.13649, eq. 1.
    """
    _check_open_interval("teacher_weight", teacher_weight)
    student, teacher = _promote(student_log_probs, teacher_log_probs)
    largest = -teacher_weight * math.log(teacher_weight) - (1 - teacher_weight) * math.log1p(-teacher_weight)
    if not (torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)):
        return _jsd_value(student, teacher, teacher_weight).clamp_(0.0, largest)
    mixture = _mix(teacher, student, teacher_weight)
    value = teacher_weight * _kl(teacher, mixture) + (1 - teacher_weight) * _kl(student, mixture)
    # Rounding may leave the exact range by an ulp; only the value is brought back, the gradient is not cut.
    return value + (value.detach().clamp(0.0, largest) - value.detach())


def skewed_forward_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, *, skew: float = 0.1) -> Tensor:
    """Return KL(teacher, a teacher + (1 - a) student) with a = `skew`.

    Args:
        student_log_probs: `[..., V]`, normalised.
        teacher_log_probs: `[..., V]`, normalised.
        skew: a in [0, 1); 0 is the forward KL.

    Returns:
        `[...]`, nats, in [0, -ln a].

    Raises:
        ValueError: `skew` is outside [0, 1).

    Reference:
        Ko et al., "DistiLLM", arXiv 2402.03898, section 3.1.
    """
    _check_skew(skew)
    student, teacher = _promote(student_log_probs, teacher_log_probs)
    return _kl(teacher, _mix(teacher, student, skew) if skew else student)


def skewed_reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, *, skew: float = 0.1) -> Tensor:
    """Return KL(student, (1 - a) teacher + a student) with a = `skew`.

    Args:
        student_log_probs: `[..., V]`, normalised.
        teacher_log_probs: `[..., V]`, normalised.
        skew: a in [0, 1); 0 is the reverse KL.

    Returns:
        `[...]`, nats, in [0, -ln a].

    Raises:
        ValueError: `skew` is outside [0, 1).

    Reference:
        Ko et al., "DistiLLM", arXiv 2402.03898, section 3.1.
    """
    _check_skew(skew)
    student, teacher = _promote(student_log_probs, teacher_log_probs)
    return _kl(student, _mix(student, teacher, skew) if skew else teacher)


def total_variation(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return the total variation distance 1/2 sum_v |student_v - teacher_v|.

    Args:
        student_log_probs: `[..., V]`, normalised.
        teacher_log_probs: `[..., V]`, normalised.

    Returns:
        `[...]`, a probability in [0, 1]: the least share of draws on which the two must differ.
    """
    student, teacher = _promote(student_log_probs, teacher_log_probs)
    return 0.5 * (student.exp() - teacher.exp()).abs().sum(-1)


def adaptive_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, *, head_mass: float = 0.5) -> Tensor:
    """Return (g_head KL(teacher, student) + g_tail KL(student, teacher)) / (g_head + g_tail).

    The head is the smallest set of the teacher's likeliest ids that holds at least `head_mass`, the tail the other
    ids; g = sum |student - teacher| over each. So the forward KL counts where the two differ on the likely ids, the
    reverse KL where they differ on the rest. The weights are constants: no gradient runs through g.

    Args:
        student_log_probs: `[..., V]`, normalised.
        teacher_log_probs: `[..., V]`, normalised.
        head_mass: The teacher's mass that makes the head, in (0, 1).

    Returns:
        `[...]`, nats, in [0, inf], between the two KLs.

    Raises:
        ValueError: `head_mass` is outside (0, 1).

    Reference:
        Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models", arXiv
        2404.02657, section 4.
    """
    if not 0.0 < head_mass < 1.0:
        raise ValueError(f"head_mass must lie in (0, 1), got {head_mass}; its end points are the two KLs")
    student, teacher = _promote(student_log_probs, teacher_log_probs)
    head_share = _head_share(student.detach(), teacher.detach(), head_mass)
    # A direction without weight must not count, not even as 0 * inf.
    return torch.where(head_share > 0, head_share * _kl(teacher, student), 0.0) + torch.where(
        head_share < 1, (1 - head_share) * _kl(student, teacher), 0.0
    )


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        generalized_jsd,
        skewed_forward_kl,
        skewed_reverse_kl,
        total_variation,
        adaptive_kl,
    )
}


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first, second); an id with no mass under `first` adds exactly zero, -inf or not."""
    difference = torch.where(first == -math.inf, 0.0, first - second)
    value = (first.exp() * difference).sum(-1)
    # Rounding may leave the range by some 1e-7; only the value is brought back, the gradient is not cut.
    return value - value.detach().clamp_max(0.0)


def _jsd_value(student: Tensor, teacher: Tensor, teacher_weight: float) -> Tensor:
    """The generalised JSD without a graph, some rows at a time."""
    size = student.shape[-1]
    students, teachers = student.reshape(-1, size), teacher.reshape(-1, size)
    chunk = rows_at_once(students)
    pairs = zip(students.split(chunk), teachers.split(chunk), strict=True)
    parts = [_jsd_rows(*pair, teacher_weight) for pair in pairs]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(student.shape[:-1])


@fusible
def _jsd_rows(student: Tensor, teacher: Tensor, teacher_weight: float) -> Tensor:
    # With d = ln teacher - ln student: ln m - ln student = softplus(d + ln(w / (1-w))) + ln(1-w), and that minus d is
    # ln m - ln teacher. Beyond |d| = 30 the mixture is one of the two to all digits; ids that both exclude add 0.
    difference = torch.nan_to_num(teacher - student, nan=0.0, posinf=30.0, neginf=-30.0).clamp_(-30.0, 30.0)
    shift = math.log(teacher_weight) - math.log1p(-teacher_weight)
    above = functional.softplus(difference + shift if shift else difference, threshold=40.0)
    above.add_(math.log1p(-teacher_weight))
    difference.sub_(above).mul_(teacher.exp())
    difference.addcmul_(above, student.exp(), value=-(1 - teacher_weight) / teacher_weight)
    return difference.sum(-1).mul_(teacher_weight)


def _head_share(student: Tensor, teacher: Tensor, head_mass: float) -> Tensor:
    """g_head / (g_head + g_tail) of the adaptive KL, `[...]`; 0 where the two agree everywhere."""
    difference = teacher.exp().sub_(student.exp()).abs_()
    count = min(HEAD_GUESS, teacher.shape[-1])
    while True:
        likeliest, ids = teacher.topk(count, dim=-1)
        probs = likeliest.exp()
        mass_before = probs.cumsum(-1) - probs
        # A sorted vocabulary costs many times a few largest ids, which hold the mass nearly always.
        if count == teacher.shape[-1] or bool((mass_before[..., -1] >= head_mass).all()):
            break
        count = min(8 * count, teacher.shape[-1])
    head = torch.where(mass_before < head_mass, difference.gather(-1, ids), 0.0).sum(-1)
    return head / difference.sum(-1).clamp_min(torch.finfo(difference.dtype).tiny)


def _mix(first: Tensor, second: Tensor, first_weight: float) -> Tensor:
    """ln(w first + (1 - w) second). The floor keeps logaddexp's gradient finite where both are -inf."""
    floor = torch.finfo(first.dtype).min / 4
    return torch.logaddexp(
        first.clamp_min(floor) + math.log(first_weight), second.clamp_min(floor) + math.log1p(-first_weight)
    )


def _promote(student_log_probs: Tensor, teacher_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student_log_probs.dtype, teacher_log_probs.dtype), torch.float32)
    return student_log_probs.to(dtype), teacher_log_probs.to(dtype)


def _check_open_interval(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie in (0, 1), got {value}; its end points are forward_kl and reverse_kl")


def _check_skew(value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"skew must lie in [0, 1), got {value}")
