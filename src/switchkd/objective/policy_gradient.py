"""MiniLLM's objective: the reverse KL of whole texts, by policy gradient on text sampled from a blend.

At each token the blend that wrote the text gives the probability blend = (1 - w) student + w teacher, with w the
teacher's weight. MiniLLM minimises KL(student, teacher) over whole texts; the gradient sums two terms over tokens:

    weight * grad(reverse KL of the two next-token distributions)  -  weight * return * grad(ln student).

The weight, student / blend of the sampled token, corrects for the blend. The first term is exact over the vocabulary.
The return of a token is the mean of the rewards ln teacher - ln student of all later tokens. The functions here give
losses with that gradient, one per token.
"""

import math

import torch
from torch import Tensor

from switchkd.errors import UserError
from switchkd.objective.loss import at_least_float32


def future_returns(rewards: Tensor, mask: Tensor, *, normalize_length: bool = True) -> Tensor:
    """Return at each position the sum, or the mean, of the rewards of all later tokens of the text.

    Args:
        rewards: `[B, C]`.
        mask: True at tokens of the text, `[B, C]`, a prefix of each row.
        normalize_length: Divide by the number of later tokens, against the preference for short texts.

    Returns:
        `[B, C]`; 0 at the last token of a text and outside it.
    """
    kept = torch.where(mask, rewards, 0.0)
    later = kept.flip(-1).cumsum(-1).flip(-1) - kept
    if normalize_length:
        count = mask.to(rewards.dtype).flip(-1).cumsum(-1).flip(-1) - 1.0
        later = later / count.clamp_min(1.0)
    return torch.where(mask, later, 0.0)


def policy_gradient_losses(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor,
    *,
    teacher_weight: float = 0.2,
    clip_range: float = 0.2,
    normalize_length: bool = True,
) -> Tensor:
    """Return the long-term loss of every token: -return * weight, clipped as in PPO.

    Its gradient is -weight * return * grad(ln student) wherever the clipping does not act: the rewards and the blend
    are constants.

    Args:
        student_log_probs: ln student of each sampled token, of the student that is trained, `[B, C]`, with a gradient.
        teacher_log_probs: ln teacher of each sampled token, `[B, C]`.
        mask: True at tokens of the text, `[B, C]`.
        teacher_weight: Weight of the teacher in the blend that wrote the text, in [0, 1); 0 where the student wrote it.
        clip_range: The weight is clipped to [1 - x, 1 + x] where that makes the loss larger; 0: off.
        normalize_length: Divide each return by the number of tokens it sums.

    Returns:
        `[B, C]`, nats, at least float32; 0 outside the text.

    Raises:
        UserError: An option outside its range.

    Reference:
        Gu et al., "MiniLLM", arXiv 2306.08543, equations 3 to 8. The released code differs: its return starts at the
        token itself, which the single-step term counts already, and is whitened over the batch.
    """
    if not 0.0 <= teacher_weight < 1.0:
        raise UserError(f"teacher_weight of the sampling blend must lie in [0, 1), got {teacher_weight}")
    if not clip_range >= 0.0:
        raise UserError(f"clip_range must be >= 0, got {clip_range}")
    student = at_least_float32(student_log_probs)
    teacher = at_least_float32(teacher_log_probs.detach())
    wrote = student.detach()
    returns = future_returns(_rewards(wrote, teacher, mask), mask, normalize_length=normalize_length)
    ratio = torch.where(mask, student - _blend(wrote, teacher, teacher_weight), 0.0).exp()
    losses = -returns * ratio
    if clip_range > 0.0:
        losses = torch.maximum(losses, -returns * ratio.clamp(1.0 - clip_range, 1.0 + clip_range))
    return torch.where(mask, losses, 0.0)


def importance_weights(
    student_log_probs: Tensor, teacher_log_probs: Tensor, mask: Tensor, *, teacher_weight: float = 0.2
) -> Tensor:
    """Return student / blend of every sampled token, without a gradient: the weights of the single-step term.

    Args:
        student_log_probs: ln student of each sampled token, of the student that wrote the text, `[B, C]`.
        teacher_log_probs: ln teacher of it, `[B, C]`.
        mask: True at tokens of the text, `[B, C]`.
        teacher_weight: Weight of the teacher in the blend, in [0, 1).

    Returns:
        `[B, C]` in (0, 1 / (1 - w)], at least float32; 1 outside the text. Its mean under the blend is 1.
    """
    student, teacher = at_least_float32(student_log_probs.detach()), at_least_float32(teacher_log_probs.detach())
    return torch.where(mask, student - _blend(student, teacher, teacher_weight), 0.0).exp()


def _rewards(student_log_probs: Tensor, teacher_log_probs: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, teacher_log_probs - student_log_probs, 0.0)


def _blend(student_log_probs: Tensor, teacher_log_probs: Tensor, teacher_weight: float) -> Tensor:
    if teacher_weight == 0.0:
        return student_log_probs
    return torch.logaddexp(
        student_log_probs + math.log1p(-teacher_weight), teacher_log_probs + math.log(teacher_weight)
    )
