"""A vLLM of one's own, without vLLM: the steps of its scheduler and V1 runner that rollouts depend on.

Models are read whole, one request at a time; what is under test is the sampler, the record and the driver.
"""

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from switchkd.engine.vllm.process import Answers
from switchkd.engine.vllm.worker import SwitchWorker


@dataclass
class SamplerOutput:
    sampled_token_ids: Any
    logprobs_tensors: Any


def install(monkeypatch: Any) -> None:
    """Let `from vllm.v1.outputs import SamplerOutput` find the one above."""
    for name in ("vllm", "vllm.v1", "vllm.v1.outputs"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm.v1.outputs"].SamplerOutput = SamplerOutput  # type: ignore[attr-defined]


@dataclass
class Request:
    name: str
    prompt: list[int]
    sampling_params: Any
    output_token_ids: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        return self.prompt + self.output_token_ids


class Runner:
    """What `SamplerV1` sees of vLLM's V1 model runner."""

    def __init__(self, student: Any) -> None:
        self.device = torch.device("cpu")
        self.requests: dict[str, Request] = {}
        self.input_batch = SimpleNamespace(req_ids=[])
        self.rejection_sampler = SimpleNamespace(forward=None)
        # Hidden states are logits already here.
        self.drafter = SimpleNamespace(
            model=SimpleNamespace(compute_logits=lambda states: states), _sample_draft_tokens=None
        )
        self.student = student


Runner.__module__ = "vllm.v1.worker.gpu_model_runner"


class StubHost(SwitchWorker):
    """A `Host` that runs requests as vLLM does.

    Args:
        student: Draft model.
        teacher: Target model.
        draft_length: Tokens drafted.
        max_num_seqs: Requests in a batch.
        preempt: Number of a step -> place in the batch of a request that loses its drafts there.
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
        max_model_len: int = 128,
    ) -> None:
        self.student, self.teacher, self.draft_length = student, teacher, draft_length
        self.max_num_seqs, self.preempt, self.max_model_len = max_num_seqs, preempt or {}, max_model_len
        self.model_runner = Runner(student)
        self.vllm_config = SimpleNamespace(
            speculative_config=SimpleNamespace(draft_model_config=None, num_speculative_tokens=draft_length),
            model_config=SimpleNamespace(
                max_model_len=max_model_len, dtype=torch.float32, get_vocab_size=lambda: teacher.config.vocab_size
            ),
        )
        self.steps, self.asked, self.longest_step = 0, 0, 0

    def get_draft_model(self) -> Any:
        return self.student

    def call(self, method: str, *arguments: str) -> Any:
        return getattr(self, method)(*arguments)

    @torch.no_grad()
    def generate(self, requests: list[dict[str, Any]]) -> None:
        runner, queue, active = self.model_runner, [], []
        for one in requests:
            self.asked += 1
            params = SimpleNamespace(**{key: value for key, value in one.items() if key != "prompt_token_ids"})
            queue.append(Request(f"r{self.asked}", list(one["prompt_token_ids"]), params))
        while queue or active:
            while queue and len(active) < self.max_num_seqs:
                active.append(queue.pop(0))
            runner.requests = {request.name: request for request in active}
            runner.input_batch.req_ids = [request.name for request in active]
            if (place := self.preempt.get(self.steps)) is not None and place < len(active):
                active[place].drafts = []
            self._step(active)
            active = [request for request in active if not self._has_ended(request)]

    def _step(self, active: list[Request]) -> None:
        runner, k = self.model_runner, self.draft_length
        self.steps += 1
        for request in active:
            if not request.output_token_ids and len(request.prompt) == 1:
                request.drafts = [-1] * k  # a prefill of one token is padded to the shape of a decode
        counts = [len(request.drafts) for request in active]
        logits, targets = [], []
        for request in active:
            read = [*request.text, *(max(token, 0) for token in request.drafts)]
            rows = self.teacher(torch.tensor([read])).logits[0, -len(request.drafts) - 1 :]
            targets += range(len(logits), len(logits) + len(request.drafts))
            logits += list(rows)
        metadata = SimpleNamespace(
            num_draft_tokens=counts,
            max_spec_len=max([*counts, 1]),
            draft_token_ids=torch.tensor([token for request in active for token in request.drafts], dtype=torch.int32),
            target_logits_indices=torch.tensor(targets, dtype=torch.int64),
        )
        output = runner.rejection_sampler(metadata, None, torch.stack(logits), None).sampled_token_ids
        for request, ids in zip(active, output.tolist(), strict=True):
            written = [token for token in ids if token >= 0]
            self.longest_step = max(self.longest_step, len(written) if request.drafts else 0)
            for token in written:
                request.output_token_ids.append(token)
                if self._has_ended(request):
                    break
        self._draft(active)

    def _draft(self, active: list[Request]) -> None:
        drafts: list[list[int]] = [[] for _ in active]
        for _ in range(self.draft_length):
            states = [
                self.student(torch.tensor([request.text + draft])).logits[0, -1]
                for request, draft in zip(active, drafts, strict=True)
            ]
            ids, _ = self.model_runner.drafter._sample_draft_tokens(torch.stack(states), None)
            for draft, token in zip(drafts, ids.tolist(), strict=True):
                draft.append(token)
        near = any(len(request.text) + self.draft_length + 1 > self.max_model_len for request in active)
        for request, draft in zip(active, drafts, strict=True):
            request.drafts = [] if near else draft

    def _has_ended(self, request: Request) -> bool:
        params, written = request.sampling_params, request.output_token_ids
        return bool(written) and (len(written) >= params.max_tokens or written[-1] in params.stop_token_ids)


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
        self.options, spec = options, options["speculative_config"]
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(name, dtype=options["dtype"]).eval()
            for name in (spec["model"], options["model"])
        )
        longest = options.get("max_model_len", 128)
        self.host = StubHost(  # type: ignore[assignment]
            student, teacher, draft_length=spec["num_speculative_tokens"], max_model_len=longest
        )
        return {"version": "stub", **self.host.call("switch_facts"), "dtype": options["dtype"]}

    def load_student(self, file: str) -> int:
        self.loads += 1
        weights = load_file(Path(file))
        self.host.student.load_state_dict(weights, strict=False)  # type: ignore[attr-defined]
        return len(weights)

    def close(self) -> None:
        self.closed = True
