"""The reference decoder: both models, one token at a time, with the caches transformers gives them."""

import math

import torch
from torch import Tensor

from switchkd import sampling
from switchkd.engine.readers import TokenReader
from switchkd.engine.request import Request
from switchkd.engine.verification import write
from switchkd.rollout import Author, Rollout
from switchkd.sampling import Stream


def decode_sequentially(request: Request) -> Rollout:
    """Return the rollout, written one token at a time."""
    policy, warping, seed, row_ids = request.policy, request.warping, request.seed, request.row_ids
    rows, device = len(request), row_ids.device
    student_reader = TokenReader(request.student, request.prompts)
    teacher_reader = None
    if request.teacher is not None and request.teacher_prompts is not None:
        teacher_reader = TokenReader(
            request.teacher, request.teacher_prompts, keep_hidden=request.return_teacher_hidden
        )
    hidden: list[Tensor] = []
    drafts: list[Tensor] = []
    eos_ids = torch.tensor(request.eos, dtype=torch.int64, device=device)
    state = policy.initial_state(rows, device)
    active = torch.ones(rows, dtype=torch.bool, device=device)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    drafted_count = kept_count = 0
    for step in range(request.max_new_tokens):
        position = torch.full((rows,), step, dtype=torch.int64, device=device)
        student_log_probs = warping(student_reader.logits)
        teacher_log_probs = warping(teacher_reader.logits.to(device)) if teacher_reader else None
        drafted = sampling.exponential_race(
            student_log_probs, sampling.noise_keys(seed, row_ids, position, Stream.DRAFT)
        )
        written = write(policy, student_log_probs, teacher_log_probs, drafted, position, state, seed, row_ids)
        state = written.state
        if request.return_drafted_ids:
            drafts.append(drafted)
        columns.append((written.tokens, active, written.author, written.divergence, written.threshold))
        if teacher_reader is not None and teacher_reader.hidden is not None:
            hidden.append(teacher_reader.hidden.to(device))
        drafted_count += int(active.sum())
        kept_count += int((written.kept & active).sum())
        active = active & ~torch.isin(written.tokens, eos_ids)
        if step + 1 == request.max_new_tokens or not bool(active.any()):
            break
        tokens = written.tokens.masked_fill(~active, request.pad_token_id)
        student_reader.append(tokens)
        if teacher_reader:
            teacher_reader.append(tokens)
    ids, mask, author, divergence, threshold = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    return Rollout(
        prompt_ids=request.prompts.ids,
        prompt_mask=request.prompts.mask,
        completion_ids=ids.masked_fill(~mask, request.pad_token_id),
        completion_mask=mask,
        author=author.masked_fill(~mask, int(Author.NONE)),
        divergence=divergence.masked_fill(~mask, math.nan),
        threshold=threshold.masked_fill(~mask, math.nan),
        teacher_hidden=torch.stack(hidden, dim=1).masked_fill(~mask.unsqueeze(-1), 0.0) if hidden else None,
        drafted_ids=torch.stack(drafts, dim=1) if drafts else None,
        measured=policy.measured,
        stats={
            "student_passes": student_reader.passes,
            "teacher_passes": teacher_reader.passes if teacher_reader else 0,
            "drafted": drafted_count,
            "kept": kept_count,
        },
    )
