"""The sampler of vLLM's V2 model runner, replaced; V2 is the one that GPUs run.

What V1 keeps in dicts of requests are tensors on the device here, an entry for each slot of the batch, and nothing is
read back between a draft and what is written: V2 prepares the next step meanwhile. Three attributes are replaced:
`runner.sampler`, `runner.rejection_sampler` and `runner.speculator.sample_draft`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from switchkd.engine.vllm.writing import Writing


class PlainSampler:
    """Stands in for V2's `runner.sampler`, which it asks in steps without any draft and tells of every new request.

    Args:
        switch: Decides.
        original: vLLM's own.
    """

    def __init__(self, switch: "SamplerV2", original: Any) -> None:
        self._switch, self._original = switch, original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def add_request(self, slot: int, sampling_params: Any) -> None:
        """Take a new or resumed request into a slot."""
        self._switch.add(slot, sampling_params.extra_args)
        self._original.add_request(slot, sampling_params)

    def __call__(self, logits: Tensor, batch: Any) -> Any:
        return self._original(logits, batch) if self._switch.writing is None else self._switch.write(logits, batch)


class SamplerV2:
    """Stands in for V2's rejection sampler; requests carry in `extra_args` what `SamplerV1` says.

    Args:
        runner: vLLM's V2 model runner.
    """

    def __init__(self, runner: Any) -> None:
        self.runner, self.original, self.speculator = runner, runner.rejection_sampler, runner.speculator
        self.original_draft = runner.speculator.sample_draft
        self.writing: Writing | None = None
        slots = runner.req_states.max_num_reqs
        self.facts = torch.zeros(6, slots, dtype=torch.int64, device=runner.device)
        # A pass that reads position p of a request predicts completion position p + shift.
        self.row, self.shift, self.offset, self.first, self.stop, self.end = self.facts
        self.length: int = runner.speculator.num_speculative_steps
        runner.sampler, runner.rejection_sampler = PlainSampler(self, runner.sampler), self
        runner.speculator.sample_draft = self.draft

    def begin(self, writing: Writing | None) -> None:
        """Start a rollout, or with None give vLLM its own sampling back."""
        self.writing = writing
        slots, device = self.facts.shape[1], self.facts.device
        self.starts = torch.full((slots,), -1, dtype=torch.int64, device=device)  # of the last draft, -1 for none
        self.ended = torch.zeros(slots, dtype=torch.bool, device=device)
        self.step = 0
        self.log_probs = torch.empty(0, device=device)
        if writing is not None:
            self.log_probs = torch.zeros(slots, self.length, writing.warping.vocabulary_size, device=device)

    def add(self, slot: int, extra: dict[str, int] | None) -> None:
        """Take a request into a slot."""
        if self.writing is None or not extra:
            return
        shift = extra["offset"] - int(self.runner.req_states.prompt_len.np[slot])
        values = [extra["row"], shift, *(extra[name] for name in ("offset", "first", "stop", "end"))]
        for fact, value in zip(self.facts, values, strict=True):
            fact[slot].fill_(value)  # a tensor made from them would wait for the device on its way there
        self.starts[slot].fill_(-1)
        self.ended[slot].fill_(False)

    def draft(self, hidden_states: Tensor, positions: Tensor, idx_mapping: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Return the student's next tokens `[B]`; called once for each drafted position."""
        if self.writing is None:
            return self.original_draft(hidden_states, positions, idx_mapping, *rest, **named)
        slots = idx_mapping.long()
        log_probs = self.writing.warping(self.speculator.compute_draft_logits(hidden_states, 0))
        position = positions + self.shift[slots]
        if self.step == 0:
            self.starts[slots] = position
        self.log_probs[slots, self.step] = log_probs.to(self.log_probs.dtype)
        self.step += 1
        return self.writing.draw(log_probs, self.row[slots], position)

    def __call__(self, logits: Tensor, batch: Any, *rest: Any) -> Any:
        return self.original(logits, batch, *rest) if self.writing is None else self.write(logits, batch)

    def write(self, logits: Tensor, batch: Any) -> Any:
        """Return vLLM's `SamplerOutput`: the ids `[k + 1]` that each request writes in this step, and how many."""
        from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        sampled, emitted = self.decide(logits, batch)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            emitted.int(),
            batch.seq_lens,
            batch.cu_num_logits,
            batch.idx_mapping,
            self.runner.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def decide(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the ids that each request writes in this step, int64 `[B, k + 1]`, and how many, int64 `[B]`.

        The device is asked for nothing and sent nothing: every request is treated as one with the longest draft of the
        step, of which its own is the beginning. A policy that asks the device by itself is waited for.

        Args:
            logits: The teacher's, for each request those after its last token and after each drafted one.
            batch: vLLM's `InputBatch`.
        """
        assert self.writing is not None
        slots, edges = batch.idx_mapping.long(), batch.cu_num_logits.long()
        begin, lengths = edges[:-1], edges.diff() - 1  # drafted tokens of each request
        longest = int(np.diff(batch.cu_num_logits_np).max()) - 1  # the same that the host knows
        done = batch.positions[batch.logits_indices].long()[begin] + self.shift[slots]
        forced = done < self.offset[slots]
        real = (lengths > 0) & (self.starts[slots] == done) & ~forced
        undrafted = ~real & ~forced
        self.ended[slots] |= undrafted
        width = 1 + (self.length if longest else 0)
        sampled = torch.zeros(len(slots), width, dtype=torch.int64, device=logits.device)
        sampled[:, 0] = torch.where(forced, self.first[slots], self.stop[slots])
        emitted = torch.ones_like(lengths)
        if longest:
            whole, count = self._checked(logits, batch, slots, begin, lengths, done, real, longest)
            written = sampled[:, : longest + 1]
            written.copy_(torch.where(real.unsqueeze(1), whole, written))
            emitted = torch.where(real, count, 1)
        self.writing.counts["rounds"] += 1
        self.writing.count("forced", forced)
        self.writing.count("undrafted", undrafted)
        self.step = 0
        return sampled, emitted

    def _checked(
        self,
        logits: Tensor,
        batch: Any,
        slots: Tensor,
        begin: Tensor,
        lengths: Tensor,
        done: Tensor,
        real: Tensor,
        longest: int,
    ) -> tuple[Tensor, Tensor]:
        """What becomes of the drafts `[B, longest + 1]`, and how many ids of each row are written."""
        assert self.writing is not None
        steps = torch.arange(longest, device=logits.device)
        own = torch.minimum(steps, (lengths - 1).clamp(min=0).unsqueeze(1))  # beyond a draft its last token again
        at = begin.unsqueeze(1) + own
        tokens = batch.input_ids[batch.logits_indices].long()
        checked = self.writing.check(
            tokens[(at + 1).clamp(max=len(tokens) - 1)].clamp(min=0),
            self.log_probs[slots, :longest].flatten(0, 1),
            logits[at.flatten()],
            self.row[slots],
            done.unsqueeze(1) + steps,
            lengths,
            real & ~self.ended[slots],  # a step can be in flight when its request has ended
        )
        # Where a text ends by an id that vLLM does not stop at, the id after it stops it.
        stop, stands = self.stop[slots].unsqueeze(1), steps < checked.count.unsqueeze(1)
        ends = ((checked.tokens == self.end[slots].unsqueeze(1)) & stands).int()
        at_end, any_end = ends.argmax(-1) + 1, ends.any(-1)
        whole = torch.cat([checked.tokens, stop], dim=1)
        after = torch.where(any_end, stop.squeeze(1), whole.gather(1, at_end.unsqueeze(1)).squeeze(1))
        whole.scatter_(1, at_end.unsqueeze(1), after.unsqueeze(1))
        return whole, torch.where(any_end, at_end + 1, checked.count)
