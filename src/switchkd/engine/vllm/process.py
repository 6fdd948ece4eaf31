"""The process in which vLLM runs: `python -m switchkd.engine.vllm.process FD`, started and asked by `child.py`.

It answers one line of JSON with one line of JSON on the socket it was given, until that is closed. Nothing of vLLM is
imported before its version was checked.
"""

import contextlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from switchkd.engine.vllm.private import check_version, found_version
from switchkd.errors import UserError

#: What vLLM reads from the environment where the user has not said otherwise.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # On a CPU: GiB for keys and values, and no pinning, which would fight with the trainer for cores.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Workers of tensor parallelism meet on this machine; vLLM would ask the network for its address.
    "VLLM_HOST_IP": "127.0.0.1",
}


class LocalHost:
    """vLLM's `LLM` in this process, as `drive` asks it.

    Args:
        options: Keyword arguments of `vllm.LLM`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**options)

    def call(self, method: str, *arguments: str) -> Any:
        return self.llm.collective_rpc(method, args=arguments)[0]

    def generate(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": request["prompt_token_ids"]} for request in requests]
        params = [
            SamplingParams(
                max_tokens=request["max_tokens"],
                stop_token_ids=request["stop_token_ids"],
                extra_args=request["extra_args"],
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        found = self.llm.generate(prompts, params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]


class Answers:
    """What can be asked, one method each."""

    host: LocalHost
    alone = False

    def start(self, options: dict[str, Any]) -> dict[str, Any]:
        """Start vLLM; return what its configuration came to."""
        check_version(found_version(), sys.executable)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is the engine's own already
        self._choose_runner()
        self.host, self.alone = LocalHost(options), "speculative_config" not in options
        return {"version": found_version(), **self.host.call("switch_facts")}

    def _choose_runner(self) -> None:
        """V2 runs on Triton kernels, so V1 is the one for a CPU; elsewhere vLLM chooses."""
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

    def roll_out(self, job: dict[str, Any], prompts: list[list[int]], eos: list[int]) -> dict[str, Any]:
        """Return the packed record of a rollout and its counts."""
        from switchkd.engine.vllm.described import packed
        from switchkd.engine.vllm.driver import drive, drive_alone

        columns, counts = (drive_alone if self.alone else drive)(self.host, job, prompts, eos)
        return {"columns": packed(columns), "counts": counts}

    def load_student(self, file: str) -> int:
        """Load the student's weights; what the cache of prefixes holds was computed with the old ones."""
        loaded: int = self.host.call("switch_load_student", file)
        self.host.llm.reset_prefix_cache()
        return loaded

    def sleep(self) -> None:
        """Give the memory of weights and cache back until `wake_up`."""
        self.host.llm.sleep(level=1)

    def wake_up(self) -> None:
        """Take it again."""
        self.host.llm.wake_up()


def serve(connection: socket.socket, answers: Any) -> None:
    """Answer until the other side closes the connection.

    Args:
        connection: Lines of JSON: `{"do": name of a method, ...its arguments}`.
        answers: Has those methods.
    """
    with connection.makefile("r", encoding="utf-8") as asked:
        for line in asked:
            question = json.loads(line)
            method: Callable[..., Any] = getattr(answers, question.pop("do"))
            try:
                answer = {"result": method(**question)}
            except UserError as error:
                answer = {"refused": str(error)}
            except Exception as error:  # whatever vLLM raises: the log has it whole, the other side gets one line
                traceback.print_exc()
                reason = next((text for text in str(error).splitlines() if text.strip()), "")
                answer = {"failed": f"{type(error).__name__}: {reason.strip()}"}
            connection.sendall(json.dumps(answer).encode() + b"\n")


def main() -> None:
    """Serve on the file descriptor that the command line names."""
    with contextlib.suppress(BrokenPipeError), socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, Answers())


if __name__ == "__main__":
    main()
