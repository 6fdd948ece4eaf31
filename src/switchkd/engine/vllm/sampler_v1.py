"""The sampler of vLLM's V1 model runner, replaced: what the student drafts and what becomes of it are ours.

Two attributes of two objects are replaced, and nothing else of vLLM is touched: `model_runner.rejection_sampler` and
`model_runner.drafter._sample_draft_tokens`. Between rollouts both do what vLLM's own do.
"""

from typing import Any

import torch
from torch import Tensor, nn

from switchkd.engine.vllm.writing import Writing


class SamplerV1(nn.Module):
    """Stands in for vLLM's `RejectionSampler`.

    A request carries in `extra_args` what its steps need: `row` (its place in the rollout), `offset` (completion tokens
    that its prompt holds already), `first` (the last token of the text so far, which the request writes first, because
    vLLM samples a token after the prefill before anything is drafted), `stop` (an id that ends the request) and `end`
    (an end-of-sequence id that equals `first`, at which vLLM must not stop by itself; -2 for none).

    Args:
        runner: vLLM's V1 model runner.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.runner, self.original = runner, runner.rejection_sampler
        self.original_draft = runner.drafter._sample_draft_tokens
        self.writing: Writing | None = None
        runner.rejection_sampler, runner.drafter._sample_draft_tokens = self, self.draft

    def begin(self, writing: Writing | None) -> None:
        """Start a rollout, or with None give vLLM its own sampling back."""
        self.writing = writing
        self.ended: set[str] = set()
        self._forget_drafts({})
        self.rows = self.starts = torch.empty(0, dtype=torch.int64)

    def _forget_drafts(self, order: dict[str, int]) -> None:
        # The student's log-probabilities [B, V], a tensor for each drafted token; vLLM's own store of them is dropped
        # for the whole batch as soon as one request has a single token left.
        self.drafts: list[Tensor] = []
        self.order = order  # request -> its place in them

    def draft(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        """Return the student's next tokens `[B]`; called once for each drafted position, in the order of the batch."""
        if self.writing is None:
            return self.original_draft(hidden_states, sampling_metadata)
        log_probs = self.writing.warping(self.runner.drafter.model.compute_logits(hidden_states))
        ids = self.writing.draw(log_probs, self.rows, self.starts + len(self.drafts))
        self.drafts.append(log_probs)
        return ids, None

    def forward(self, metadata: Any, draft_probs: Any, logits: Tensor, sampling_metadata: Any) -> Any:
        """Return vLLM's `SamplerOutput`: for each request the ids `[k + 1]` it writes in this step, -1 after them."""
        if self.writing is None:
            return self.original(metadata, draft_probs, logits, sampling_metadata)
        from vllm.v1.outputs import SamplerOutput

        counts: list[int] = metadata.num_draft_tokens
        device = logits.device
        names = self.runner.input_batch.req_ids[: len(counts)]
        requests = [self.runner.requests[name] for name in names]
        extra = [request.sampling_params.extra_args for request in requests]
        rows = torch.tensor([one["row"] for one in extra])
        # The first output of a request is the last token of its text so far, so the count is one too many.
        done = torch.tensor(
            [one["offset"] + len(req.output_token_ids) - 1 for one, req in zip(extra, requests, strict=True)]
        )
        first_draft = torch.tensor([0, *counts]).cumsum(0)
        written = torch.full((len(counts), metadata.max_spec_len + 1), -1, dtype=torch.int32, device=device)
        emitted = torch.ones(len(counts), dtype=torch.int64)
        drafted_ids = metadata.draft_token_ids.tolist()
        groups: dict[int, list[int]] = {}  # requests by the length of their drafts
        for place, (count, name, request, one) in enumerate(zip(counts, names, requests, extra, strict=True)):
            if self._has_draft(name, count, int(done[place])) and drafted_ids[first_draft[place]] >= 0:
                groups.setdefault(count, []).append(place)
            elif not request.output_token_ids:
                written[place, 0] = one["first"]
                self.writing.counts["forced"] += 1
            else:  # resumed after a preemption, or near a limit of vLLM's: nothing was drafted that could be checked
                self.ended.add(name)
                written[place, 0] = one["stop"]
                self.writing.counts["undrafted"] += 1
        teacher = logits[metadata.target_logits_indices]
        for length, group in sorted(groups.items()):
            places, steps = torch.tensor(group), torch.arange(length)
            flat = (first_draft[places].unsqueeze(1) + steps).flatten()
            student = torch.stack(self.drafts[:length], dim=1)[[self.order[names[place]] for place in group]]
            checked = self.writing.check(
                metadata.draft_token_ids[flat].view(-1, length).long(),
                student.flatten(0, 1),
                teacher[flat],
                rows[places].to(device),
                (done[places].unsqueeze(1) + steps).to(device),
                torch.full((len(group),), length, device=device),
                torch.tensor([names[place] not in self.ended for place in group], device=device),
            )
            stands = steps.to(device) < checked.count.unsqueeze(1)
            written[places.unsqueeze(1), steps] = torch.where(stands, checked.tokens, -1).int()
            emitted[places] = checked.count.cpu()
            for place in group:
                ends = (written[place] == extra[place]["end"]).nonzero()
                if len(ends):  # the text ends here by an id that vLLM does not stop at; the id after it stops it
                    written[place, ends[0, 0] + 1 :] = -1
                    written[place, ends[0, 0] + 1] = extra[place]["stop"]
        self.writing.counts["rounds"] += 1
        self._forget_drafts({name: place for place, name in enumerate(names)})
        self.rows, self.starts = rows.to(device), (done + emitted).to(device)
        return SamplerOutput(sampled_token_ids=written, logprobs_tensors=None)

    def _has_draft(self, name: str, count: int, done: int) -> bool:
        """Whether the last drafts are those of this request at this place of its text."""
        place = self.order.get(name)
        return count > 0 and place is not None and len(self.drafts) >= count and int(self.starts[place]) == done
