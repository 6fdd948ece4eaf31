"""The sampler of vLLM's V2 model runner, replaced; V2 is the one that GPUs run.

What V1 keeps in dicts of requests are tensors on the device here, an entry for each slot of the batch, and nothing is
read back between a draft and what is written: V2 prepares the next step meanwhile. Three attributes are replaced:
`runner.sampler`, `runner.rejection_sampler` and `runner.speculator.sample_draft`.
"""

from typing import Any

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
        self.facts[:, slot] = torch.tensor(values, device=self.facts.device)
        self.starts[slot], self.ended[slot] = -1, False

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

        assert self.writing is not None
        device, slots = logits.device, batch.idx_mapping.long()
        edges = torch.from_numpy(batch.cu_num_logits_np).long()
        counts = (edges.diff() - 1).tolist()  # drafted tokens of each request, known to the host
        done = batch.positions[batch.logits_indices].long()[edges[:-1].to(device)] + self.shift[slots]
        forced = done < self.offset[slots]
        real = torch.tensor([count > 0 for count in counts], device=device) & (self.starts[slots] == done) & ~forced
        undrafted = ~real & ~forced
        self.ended[slots] |= undrafted
        width = max(self.length if any(counts) else 0, 0) + 1
        sampled = torch.zeros(len(slots), width, dtype=torch.int64, device=device)
        sampled[:, 0] = torch.where(forced, self.first[slots], self.stop[slots])
        emitted = torch.ones(len(slots), dtype=torch.int64, device=device)
        tokens = batch.input_ids[batch.logits_indices].long()
        for length in sorted(set(counts) - {0}):
            places = torch.tensor([place for place, count in enumerate(counts) if count == length])
            flat = (edges[places].unsqueeze(1) + torch.arange(length)).to(device)  # rows of logits
            places = places.to(device)
            mine, good, steps = slots[places], real[places], torch.arange(length, device=device)
            checked = self.writing.check(
                tokens[flat + 1],
                self.log_probs[mine, :length].flatten(0, 1),
                logits[flat.flatten()],
                self.row[mine],
                done[places].unsqueeze(1) + steps,
                good & ~self.ended[mine],  # a step can be in flight when its request has ended
            )
            stands = steps < checked.count.unsqueeze(1)
            # Where a text ends by an id that vLLM does not stop at, the id after it stops it.
            ends = ((checked.tokens == self.end[mine].unsqueeze(1)) & stands).int()
            at, any_end = ends.argmax(-1) + 1, ends.any(-1)
            whole = torch.cat([checked.tokens, self.stop[mine].unsqueeze(1)], dim=1)
            after = torch.where(any_end, self.stop[mine], whole.gather(1, at.unsqueeze(1)).squeeze(1))
            whole.scatter_(1, at.unsqueeze(1), after.unsqueeze(1))
            before = sampled[places, : length + 1]
            sampled[places, : length + 1] = torch.where(good.unsqueeze(1), whole, before)
            emitted[places] = torch.where(good, torch.where(any_end, at + 1, checked.count), 1)
        self.writing.counts["rounds"] += 1
        self.writing.count("forced", forced)
        self.writing.count("undrafted", undrafted)
        self.step = 0
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
