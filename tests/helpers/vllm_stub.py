"""A vLLM of one's own, without vLLM: the steps of its scheduler and V1 runner that rollouts depend on.

Models are read whole, one request at a time; what is under test is the sampler, the record and the driver.
"""

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from switchkd.engine.vllm.process import Answers
from switchkd.engine.vllm.worker import SwitchWorker


@dataclass
class SamplerOutput:
    sampled_token_ids: Any
    logprobs_tensors: Any
    num_nans: Any = None
    num_sampled: Any = None
    num_rejected: Any = None


def _sampled_and_rejected(emitted: Any, seq_lens: Any, edges: Any, idx_mapping: Any, prefill_len: Any) -> Any:
    """As vLLM's kernel of this purpose where no prefill is cut in pieces."""
    return emitted, edges.diff() - emitted


def install(monkeypatch: Any) -> None:
    """Let the samplers find what they import of vLLM."""
    folders = ("vllm", "vllm.v1", "vllm.v1.worker", "vllm.v1.worker.gpu", "vllm.v1.worker.gpu.sample")
    found = {
        "vllm.v1.outputs": ("SamplerOutput", SamplerOutput),
        "vllm.v1.worker.gpu.sample.output": ("SamplerOutput", SamplerOutput),
        "vllm.v1.worker.gpu.input_batch": ("get_num_sampled_and_rejected", _sampled_and_rejected),
    }
    for name in (*folders, *found):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, (attribute, value) in found.items():
        setattr(sys.modules[name], attribute, value)


@dataclass
class Request:
    name: str
    prompt: list[int]
    sampling_params: Any
    output_token_ids: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    slot: int = -1
    late: list[int] = field(default_factory=list)  # written after its end: only the device knows of them
    steps_after_end: int = 0

    @property
    def text(self) -> list[int]:
        return self.prompt + self.output_token_ids + self.late


class Runner:
    """What `SamplerV1` sees of vLLM's V1 model runner."""

    def __init__(self, student: Any) -> None:
        self.device = torch.device("cpu")
        self.requests: dict[str, Request] = {}
        self.input_batch = SimpleNamespace(req_ids=[])
        self.rejection_sampler, self.sampler = SimpleNamespace(forward=None), SimpleNamespace()
        # Hidden states are logits already here.
        self.drafter = SimpleNamespace(
            model=SimpleNamespace(compute_logits=lambda states: states), _sample_draft_tokens=None
        )
        self.student = student


Runner.__module__ = "vllm.v1.worker.gpu_model_runner"


class RunnerV2:
    """What `SamplerV2` sees of vLLM's V2 model runner."""

    def __init__(self, slots: int, draft_length: int, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.req_states = SimpleNamespace(
            max_num_reqs=slots,
            prompt_len=SimpleNamespace(np=np.zeros(slots, dtype=np.int64)),
            prefill_len=SimpleNamespace(gpu=torch.zeros(slots, dtype=torch.int64, device=device)),
        )
        self.sampler: Any = SimpleNamespace(add_request=lambda slot, params: None)
        self.rejection_sampler: Any = None
        self.speculator = SimpleNamespace(
            sample_draft=None, compute_draft_logits=lambda states, step: states, num_speculative_steps=draft_length
        )


RunnerV2.__module__ = "vllm.v1.worker.gpu.model_runner"


class StubHost(SwitchWorker):
    """A `Host` that runs requests as vLLM does.

    Args:
        student: Draft model.
        teacher: Target model; None for a student that writes alone.
        draft_length: Tokens drafted.
        max_num_seqs: Requests in a batch.
        preempt: Number of a step -> place in the batch of a request that loses its drafts there.
        shorten: Number of a step -> place in the batch of a request that comes with its first drafted token only.
        max_model_len: Near it nothing is drafted.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        draft_length: int = 4,
        max_num_seqs: int = 16,
        preempt: dict[int, int] | None = None,
        shorten: dict[int, int] | None = None,
        max_model_len: int = 128,
    ) -> None:
        self.alone = teacher is None
        self.student, self.teacher = student, student if teacher is None else teacher
        self.draft_length = 0 if self.alone else draft_length
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.preempt, self.shorten = preempt or {}, shorten or {}
        self.model_runner = self._runner()
        speculative = SimpleNamespace(draft_model_config=None, num_speculative_tokens=draft_length)
        self.vllm_config = SimpleNamespace(
            speculative_config=None if self.alone else speculative,
            model_config=SimpleNamespace(
                max_model_len=max_model_len, dtype=torch.float32, get_vocab_size=lambda: student.config.vocab_size
            ),
        )
        self.steps, self.asked, self.longest_step = 0, 0, 0

    def _runner(self) -> Any:
        return Runner(self.student)

    def get_draft_model(self) -> Any:
        return self.student

    def get_model(self) -> Any:
        return self.teacher

    def call(self, method: str, *arguments: str) -> Any:
        return getattr(self, method)(*arguments)

    @torch.no_grad()
    def generate(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        queue: list[Request] = []
        active: list[Request] = []
        for one in requests:
            self.asked += 1
            params = SimpleNamespace(**{key: value for key, value in one.items() if key != "prompt_token_ids"})
            queue.append(Request(f"r{self.asked}", list(one["prompt_token_ids"]), params))
        asked = [*queue]
        while queue or active:
            while queue and len(active) < self.max_num_seqs:
                active.append(queue.pop(0))
                self._admit(active[-1], active)
            if (place := self.preempt.get(self.steps)) is not None and place < len(active):
                self._preempt(active[place])
            if (place := self.shorten.get(self.steps)) is not None and place < len(active):
                active[place].drafts = active[place].drafts[:1]
            self._step(active)
            active = [request for request in active if not self._leaves(request)]
        return [request.output_token_ids for request in asked]

    def _admit(self, request: Request, active: list[Request]) -> None:
        pass

    def _preempt(self, request: Request) -> None:
        request.drafts = []

    def _leaves(self, request: Request) -> bool:
        return self._has_ended(request)

    def _step(self, active: list[Request]) -> None:
        self.steps += 1
        logits = []
        for request in active:
            if self._pads_prefills and not (self.alone or request.output_token_ids) and len(request.prompt) == 1:
                request.drafts = [-1] * self.draft_length
            read = [*request.text, *(max(token, 0) for token in request.drafts)]
            logits.append(self.teacher(torch.tensor([read])).logits[0, -len(request.drafts) - 1 :])
        for request, written in zip(active, self._sample(active, logits), strict=True):
            self.longest_step = max(self.longest_step, len(written) if request.drafts else 0)
            for token in written:
                (request.late if self._has_ended(request) else request.output_token_ids).append(token)
        self._draft(active)

    # A prefill of one token is padded to the shape of a decode.
    _pads_prefills = True

    def _sample(self, active: list[Request], logits: list[Any]) -> list[list[int]]:
        """What the sampler writes for every request."""
        runner, counts, targets, rows = self.model_runner, [len(request.drafts) for request in active], [], 0
        for count in counts:
            targets += range(rows, rows + count)
            rows += count + 1
        runner.requests = {request.name: request for request in active}
        runner.input_batch.req_ids = [request.name for request in active]
        if self.alone:
            written: list[list[int]] = runner.sampler(
                logits=torch.cat(logits), sampling_metadata=None
            ).sampled_token_ids.tolist()
            return written
        metadata = SimpleNamespace(
            num_draft_tokens=counts,
            max_spec_len=max([*counts, 1]),
            draft_token_ids=torch.tensor([token for request in active for token in request.drafts], dtype=torch.int32),
            target_logits_indices=torch.tensor(targets, dtype=torch.int64),
        )
        output = runner.rejection_sampler(metadata, None, torch.cat(logits), None).sampled_token_ids
        return [[token for token in ids if token >= 0] for ids in output.tolist()]

    def _draft(self, active: list[Request]) -> None:
        drafts: list[list[int]] = [[] for _ in active]
        for _ in range(self.draft_length):
            texts = [request.text + draft for request, draft in zip(active, drafts, strict=True)]
            states = [self.student(torch.tensor([text])).logits[0, -1] for text in texts]
            for draft, token in zip(drafts, self._drawn(active, texts, torch.stack(states)), strict=True):
                draft.append(token)
        near = any(len(request.text) + self.draft_length + 1 > self.max_model_len for request in active)
        for request, draft in zip(active, drafts, strict=True):
            request.drafts = [] if near else draft

    def _drawn(self, active: list[Request], texts: list[list[int]], states: Any) -> list[int]:
        ids: list[int] = self.model_runner.drafter._sample_draft_tokens(states, None)[0].tolist()
        return ids

    def _has_ended(self, request: Request) -> bool:
        params, written = request.sampling_params, request.output_token_ids
        return bool(written) and (len(written) >= params.max_tokens or written[-1] in params.stop_token_ids)


class StubHostV2(StubHost):
    """The same with the V2 runner: every request has a slot, and leaves one step after its end."""

    _pads_prefills = False

    def _runner(self) -> Any:
        return RunnerV2(self.max_num_seqs, self.draft_length)

    def _admit(self, request: Request, active: list[Request]) -> None:
        taken = {other.slot for other in active}
        request.slot = next(slot for slot in reversed(range(self.max_num_seqs)) if slot not in taken)
        self.model_runner.req_states.prompt_len.np[request.slot] = len(request.prompt)
        self.model_runner.sampler.add_request(request.slot, request.sampling_params)

    def _preempt(self, request: Request) -> None:
        request.drafts = []
        self.model_runner.sampler.add_request(request.slot, request.sampling_params)

    def _leaves(self, request: Request) -> bool:
        request.steps_after_end += self._has_ended(request)
        return request.steps_after_end > 1

    def batch(self, active: list[Request]) -> Any:
        """vLLM's `InputBatch`, of which tokens without logits are left out."""
        read = [[request.text[-1], *request.drafts] for request in active]
        starts = [len(request.text) - 1 for request in active]
        edges = np.cumsum([0, *map(len, read)])
        return SimpleNamespace(
            idx_mapping=torch.tensor([request.slot for request in active], dtype=torch.int32),
            cu_num_logits=torch.from_numpy(edges).int(),
            cu_num_logits_np=edges,
            logits_indices=torch.arange(int(edges[-1])),
            input_ids=torch.tensor([token for tokens in read for token in tokens], dtype=torch.int32),
            positions=torch.tensor(
                [start + step for start, tokens in zip(starts, read, strict=True) for step in range(len(tokens))]
            ),
            seq_lens=torch.tensor([len(request.text) + len(request.drafts) for request in active]),
        )

    def _sample(self, active: list[Request], logits: list[Any]) -> list[list[int]]:
        runner = self.model_runner
        sampler = runner.rejection_sampler if any(request.drafts for request in active) else runner.sampler
        output = sampler(torch.cat(logits), self.batch(active))
        counts = output.num_sampled.tolist()
        return [ids[:count] for ids, count in zip(output.sampled_token_ids.tolist(), counts, strict=True)]

    def _drawn(self, active: list[Request], texts: list[list[int]], states: Any) -> list[int]:
        slots = torch.tensor([request.slot for request in active], dtype=torch.int32)
        last = torch.tensor([len(text) - 1 for text in texts])
        ids: list[int] = self.model_runner.speculator.sample_draft(states, last, slots).tolist()
        return ids


class StubChild(Answers):
    """Stands in for `child.Child`: the same questions, answered here.

    Attributes:
        loads: How often weights were loaded.
    """

    def __init__(self, python: str, environment: Any = None) -> None:
        self.closed, self.loads, self.dies_at = False, 0, None

    def ask(self, do: str, **arguments: Any) -> Any:
        return getattr(self, do)(**arguments)

    def start(self, options: dict[str, Any]) -> dict[str, Any]:
        self.options, spec = options, options.get("speculative_config")
        target = AutoModelForCausalLM.from_pretrained(options["model"], dtype=options["dtype"]).eval()
        longest, self.alone = options.get("max_model_len", 128), spec is None
        if spec is None:
            self.host = StubHost(target, None, max_model_len=longest)  # type: ignore[assignment]
        else:
            student = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=options["dtype"]).eval()
            self.host = StubHost(  # type: ignore[assignment]
                student, target, draft_length=spec["num_speculative_tokens"], max_model_len=longest
            )
        return {"version": "stub", **self.host.call("switch_facts"), "dtype": options["dtype"]}

    def load_student(self, file: str) -> int:
        self.loads += 1
        weights = load_file(Path(file))
        self.host.student.load_state_dict(weights, strict=False)  # type: ignore[attr-defined]
        return len(weights)

    def close(self) -> None:
        self.closed = True
