"""The reference decoder: both models, one token at a time, with the caches transformers gives them."""

import math
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from switchkd import sampling
from switchkd.models.forward import device_of, output_layer_input, prompt_positions, takes_argument
from switchkd.policies import Policy
from switchkd.rollout import Author, Rollout
from switchkd.sampling import Stream, Warping
from switchkd.verification import write

# Models that predict something else with their cache than without; `switchkd.readable` finds out.
REREAD: WeakSet[nn.Module] = WeakSet()


def decode_sequentially(
    student: nn.Module,
    teacher: nn.Module | None,
    *,
    prompts: tuple[Tensor, Tensor],
    teacher_prompts: tuple[Tensor, Tensor] | None,
    policy: Policy,
    warping: Warping,
    max_new_tokens: int,
    seed: int,
    row_ids: Tensor,
    eos: list[int],
    pad_token_id: int,
    return_teacher_hidden: bool,
) -> Rollout:
    """Return the rollout, written one token at a time; the arguments are those of `block.BlockDecoder`."""
    rows, device = len(row_ids), row_ids.device
    student_reader = TokenReader(student, *prompts)
    teacher_reader = (
        TokenReader(teacher, *teacher_prompts, keep_hidden=return_teacher_hidden)
        if teacher is not None and teacher_prompts is not None
        else None
    )
    hidden: list[Tensor] = []
    eos_ids = torch.tensor(eos, dtype=torch.int64, device=device)
    state = policy.initial_state(rows, device)
    active = torch.ones(rows, dtype=torch.bool, device=device)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    drafted_count = kept_count = 0
    for step in range(max_new_tokens):
        position = torch.full((rows,), step, dtype=torch.int64, device=device)
        student_log_probs = warping(student_reader.logits)
        teacher_log_probs = warping(teacher_reader.logits.to(device)) if teacher_reader else None
        drafted = sampling.exponential_race(
            student_log_probs, sampling.noise_keys(seed, row_ids, position, Stream.DRAFT)
        )
        written = write(policy, student_log_probs, teacher_log_probs, drafted, position, state, seed, row_ids)
        state = written.state
        columns.append((written.tokens, active, written.author, written.divergence, written.threshold))
        if teacher_reader is not None and teacher_reader.hidden is not None:
            hidden.append(teacher_reader.hidden.to(device))
        drafted_count += int(active.sum())
        kept_count += int((written.kept & active).sum())
        active = active & ~torch.isin(written.tokens, eos_ids)
        if step + 1 == max_new_tokens or not bool(active.any()):
            break
        tokens = written.tokens.masked_fill(~active, pad_token_id)
        student_reader.append(tokens)
        if teacher_reader:
            teacher_reader.append(tokens)
    ids, mask, author, divergence, threshold = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    return Rollout(
        prompt_ids=prompts[0],
        prompt_mask=prompts[1],
        completion_ids=ids.masked_fill(~mask, pad_token_id),
        completion_mask=mask,
        author=author.masked_fill(~mask, int(Author.NONE)),
        divergence=divergence.masked_fill(~mask, math.nan),
        threshold=threshold.masked_fill(~mask, math.nan),
        teacher_hidden=torch.stack(hidden, dim=1).masked_fill(~mask.unsqueeze(-1), 0.0) if hidden else None,
        unit=policy.unit,
        stats={
            "student_passes": student_reader.passes,
            "teacher_passes": teacher_reader.passes if teacher_reader else 0,
            "drafted": drafted_count,
            "kept": kept_count,
        },
    )


class TokenReader:
    """A model and its transformers cache, fed one column of tokens at a time; `logits` predict the next column.

    Works for every causal language model of transformers: it uses the public forward with a 2-D attention mask and
    explicit position ids, which count real tokens from 0 whatever padding stands on the left. A model that takes no
    `past_key_values` (state-space models name their state otherwise), or whose cache gives other logits, reads
    everything anew each time.
    """

    def __init__(self, model: Any, prompt_ids: Tensor, prompt_mask: Tensor, *, keep_hidden: bool = False) -> None:
        self.model = model
        self.keep_hidden = keep_hidden
        self.hidden: Tensor | None = None
        self.device = device_of(model)
        self.caches = model not in REREAD and takes_argument(model, "past_key_values")
        self.ids = prompt_ids.to(self.device)
        self.mask = prompt_mask.to(self.device, torch.int64)
        self.next_position = self.mask.sum(-1, keepdim=True)
        self.cache: Any = None
        self.passes = 0
        self.logits = self._forward(self.ids, prompt_positions(self.mask))

    def append(self, tokens: Tensor) -> None:
        """Read one token per row, int64 `[B]`."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        column = tokens.to(self.device).unsqueeze(1)
        if self.caches:
            self.logits = self._forward(column, self.next_position)
        else:
            self.ids = torch.cat([self.ids, column], dim=1)
            self.logits = self._forward(self.ids, prompt_positions(self.mask))
        self.next_position = self.next_position + 1

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        extra = {"past_key_values": self.cache} if self.caches else {}
        with output_layer_input(self.model, enabled=self.keep_hidden) as hidden:
            output = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                use_cache=self.caches,
                logits_to_keep=1,
                **extra,
            )
        if hidden:
            self.hidden = hidden[0][:, -1]
        if self.caches:
            self.cache = output.past_key_values
        self.passes += 1
        return output.logits[:, -1]
