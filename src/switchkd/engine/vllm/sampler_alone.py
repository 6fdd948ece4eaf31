"""The samplers of vLLM's model runners where a student writes alone: the draw is ours, and all else is vLLM's.

No draft, no teacher and no record: a request carries its `row` in `extra_args`, and what it writes is vLLM's output.
One attribute is replaced: `runner.sampler`. Between rollouts it does what vLLM's own does.
"""

from typing import Any

import torch
from torch import Tensor

from switchkd.engine.vllm.writing import Writing


class _Alone:
    """Stands in for `runner.sampler`.

    Args:
        runner: vLLM's model runner.
    """

    def __init__(self, runner: Any) -> None:
        self.runner, self.original = runner, runner.sampler
        self.writing: Writing | None = None
        runner.sampler = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def begin(self, writing: Writing | None) -> None:
        """Start a rollout, or with None give vLLM its own sampling back."""
        self.writing = writing

    def draw(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the next token of every request, int64 `[B]`."""
        assert self.writing is not None
        self.writing.counts["rounds"] += 1
        return self.writing.draw(self.writing.warping(logits), rows, positions)


class AloneV1(_Alone):
    """Of the V1 runner, which calls it with the logits `[B, V]` of requests it knows by name."""

    def __call__(self, *, logits: Tensor, sampling_metadata: Any, **named: Any) -> Any:
        if self.writing is None:
            return self.original(logits=logits, sampling_metadata=sampling_metadata, **named)
        from vllm.v1.outputs import SamplerOutput

        requests = [self.runner.requests[name] for name in self.runner.input_batch.req_ids[: len(logits)]]
        rows = torch.tensor([request.sampling_params.extra_args["row"] for request in requests], device=logits.device)
        # One entry for each token that was written, also where the host does not know yet which one it is.
        positions = torch.tensor([len(request.output_token_ids) for request in requests], device=logits.device)
        ids = self.draw(logits, rows, positions)
        return SamplerOutput(sampled_token_ids=ids.int().unsqueeze(1), logprobs_tensors=None)


class AloneV2(_Alone):
    """Of the V2 runner, which keeps requests in slots."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        slots = runner.req_states.max_num_reqs
        # A pass that reads position p of a request predicts completion position p + shift.
        self.row, self.shift = torch.zeros(2, slots, dtype=torch.int64, device=runner.device)

    def add_request(self, slot: int, sampling_params: Any) -> None:
        """Take a new or resumed request into a slot."""
        if self.writing is not None:
            self.row[slot].fill_(sampling_params.extra_args["row"])
            self.shift[slot].fill_(1 - int(self.runner.req_states.prompt_len.np[slot]))
        self.original.add_request(slot, sampling_params)

    def __call__(self, logits: Tensor, batch: Any) -> Any:
        if self.writing is None:
            return self.original(logits, batch)
        from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        slots = batch.idx_mapping.long()
        positions = batch.positions[batch.logits_indices].long() + self.shift[slots]
        ids = self.draw(logits, self.row[slots], positions)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            torch.ones_like(ids).int(),
            batch.seq_lens,
            batch.cu_num_logits,
            batch.idx_mapping,
            self.runner.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=ids.unsqueeze(1),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
