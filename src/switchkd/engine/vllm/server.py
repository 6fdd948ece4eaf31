"""A vLLM server that somebody else has started, on this machine or another, asked through vLLM's own API.

    VLLM_SERVER_DEV_MODE=1 vllm serve TEACHER --enable-scale-out --enforce-eager --no-enable-prefix-caching \
      --worker-extension-cls switchkd.engine.vllm.worker.SwitchWorker \
      --speculative-config '{"method": "draft_model", "model": "STUDENT", "num_speculative_tokens": 4}'

Its environment needs this package too. It serves one training at a time, and nobody else meanwhile.
"""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from switchkd.engine.vllm.described import packed
from switchkd.engine.vllm.driver import drive
from switchkd.engine.vllm.engine import Engine
from switchkd.engine.vllm.private import check_version
from switchkd.engine.vllm.self_test import require_reference_text
from switchkd.errors import UserError
from switchkd.models.forward import device_of
from switchkd.models.vocabulary import model_vocabulary_size

#: Requests under way at once; more than that wait here instead of there.
MOST_AT_ONCE = 256
# To connect and to answer anything but a request for text, which takes as long as it takes.
SECONDS = 300


class Server:
    """A server as `drive` asks it, and the questions that `process.Answers` has.

    Args:
        url: Such as http://localhost:8000.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def ask(self, do: str, **arguments: Any) -> Any:
        """Return what a method below returns."""
        return getattr(self, do)(**arguments)

    def start(self) -> dict[str, Any]:
        """Return what the server is, after its version was checked and its samplers were replaced."""
        version = str(self._get("/version")["version"])
        check_version(version, self.url)
        return {"version": version, **self.call("switch_facts")}

    def roll_out(self, job: dict[str, Any], prompts: list[list[int]], eos: list[int]) -> dict[str, Any]:
        """Return the packed record of a rollout and its counts."""
        columns, counts = drive(self, job, prompts, eos)
        return {"columns": packed(columns), "counts": counts}

    def load_student(self, file: str) -> Any:
        """Load the student's weights from a file that the server can read too."""
        loaded = self.call("switch_load_student", file)
        self._post("/reset_prefix_cache", {})
        return loaded

    def call(self, method: str, *arguments: str) -> Any:
        """Return what a method of `SwitchWorker` returns in the first worker."""
        answer = self._post("/collective_rpc", {"method": method, "args": list(arguments)})
        return answer["results"][0] if answer else None

    def generate(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        """Run requests to their ends, each a call of its own: vLLM batches them."""
        with ThreadPoolExecutor(min(len(requests), MOST_AT_ONCE)) as pool:
            return list(pool.map(self._generate, requests))

    def close(self) -> None:
        """Leave the server as it is."""

    def _generate(self, request: dict[str, Any]) -> list[int]:
        params = {name: request[name] for name in ("max_tokens", "stop_token_ids", "extra_args")}
        body = {"token_ids": request["prompt_token_ids"]}
        body["sampling_params"] = {**params, "ignore_eos": True, "detokenize": False}
        ids: list[int] = self._post("/inference/v1/generate", body, seconds=None)["choices"][0]["token_ids"]
        return ids

    def _get(self, path: str) -> Any:
        return self._answer(urllib.request.Request(self.url + path), SECONDS)

    def _post(self, path: str, body: dict[str, Any], seconds: float | None = SECONDS) -> Any:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return self._answer(urllib.request.Request(self.url + path, data, kind), seconds)

    def _answer(self, request: urllib.request.Request, seconds: float | None) -> Any:
        path = request.selector
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:200]
            hint = f"; {_MISSING[path]}" if error.code == 404 and path in _MISSING else ""
            raise UserError(f"vllm: {self.url}{path} answers {error.code}{hint}: {said}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"vllm: the server at {self.url} does not answer ({reason}); what was saved before is still there"
            ) from error
        return json.loads(text) if text else None


#: Path -> what a server without it was started without.
_MISSING = {
    "/collective_rpc": "start it with VLLM_SERVER_DEV_MODE=1",
    "/inference/v1/generate": "start it with --enable-scale-out",
}


class ServedEngine(Engine):
    """An `Engine` on a server; its draft length, precision and memory are the server's.

    Args:
        student: The model whose weights the server's draft model gets; one of transformers or peft.
        teacher: The model that the server has as its target.
        url: Such as http://localhost:8000.
        sync_folder: A folder that the server reads under the same path: the student's weights go through it.
        self_test: Compare two rows with `roll_out` at the start.

    Raises:
        UserError: No server there, another version, other vocabularies, or another text than the reference's.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, url: str, sync_folder: Path, self_test: bool = True
    ) -> None:
        self._child = Server(url)
        self.facts = self._child.ask("start")
        widths = [model_vocabulary_size(model) for model in (student, teacher)]
        served = self.facts["vocabulary_size"]
        if {*widths} != {served}:
            raise UserError(
                f"vllm: the student scores {widths[0]} ids, the teacher {widths[1]} and the server's teacher {served}; "
                "vLLM needs models of one size of vocabulary"
            )
        self.vocabulary_size, self.draft_length, self.dtype = served, self.facts["draft_length"], self.facts["dtype"]
        self.device: torch.device = device_of(student)
        self.alone, self._sleeps, self._weights_folder = False, False, sync_folder
        sync_folder.mkdir(parents=True, exist_ok=True)
        self.load_student(student)
        if self_test:
            require_reference_text(self, student, teacher, {})
