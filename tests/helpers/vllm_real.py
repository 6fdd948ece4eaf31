"""What the laws on the real vLLM share; `make test-vllm` builds its environment and sets SWITCHKD_VLLM_PYTHON."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import switchkd
from helpers.pairs import assert_same, make_pair
from helpers.tiny import build_tokenizer
from helpers.vllm_policy import EveryNth
from switchkd import SwitchPolicy
from switchkd.engine.vllm.child import alone
from switchkd.engine.vllm.private import WANTED
from switchkd.engine.vllm.process import ENVIRONMENT
from switchkd.engine.vllm.worker import EXTENSION

PYTHON = os.environ.get("SWITCHKD_VLLM_PYTHON", "")
MARKS = [pytest.mark.vllm, pytest.mark.skipif(not PYTHON, reason="needs SWITCHKD_VLLM_PYTHON; make test-vllm")]

# vLLM's CPU attention knows heads of 32 and more.
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
OPTIONS = {"python": PYTHON, "max_num_seqs": 16}
#: Too few blocks of keys and values for a batch: requests are preempted.
TIGHT = {"block_size": 32, "num_gpu_blocks_override": 14, "max_model_len": 128}
SWITCH = SwitchPolicy(initial_threshold=0.3, horizon=40)

SETTINGS: dict[str, dict[str, Any]] = {
    "exponential": {},
    "constant": {"policy": SwitchPolicy(initial_threshold=0.2, schedule="constant")},
    "minimum leg, drift clock": {
        "policy": SwitchPolicy.of(initial_threshold=0.3, horizon=10, minimum_leg=3, clock="since_teacher")
    },
    "temperature and top-p": {"temperature": 0.7, "top_p": 0.9},
    "top-k": {"top_k": 20},
    "greedy": {"temperature": 0.0},
    "ln 2": {"policy": SwitchPolicy(initial_threshold=math.log(2), schedule="constant")},
    "0": {"policy": SwitchPolicy(initial_threshold=0.0, schedule="constant")},
    "teacher": {"policy": switchkd.TeacherPolicy()},
    "blend": {"policy": switchkd.BlendPolicy(0.2)},
    "end of sequence inside": {"eos_token_id": list(range(3, 13))},
    "skd": {"policy": switchkd.SkdPolicy(teacher_top_k=5)},
    "random": {"policy": switchkd.RandomPolicy(0.5)},
    "a user's own, with a state": {"policy": EveryNth(4)},
    "excluded ids": {"excluded_ids": [5, 6, 7]},
}


def pair() -> Any:
    return make_pair("llama", noise=0.4, **SHAPE)


def both(engine: Any, models: Any, prompts: Any, **options: Any) -> Any:
    """The engine's rollout, after it was compared with that of `roll_out`."""
    options = {"policy": SWITCH, "max_new_tokens": 40, "seed": 7, "return_drafted_ids": True, **options}
    found, wanted = engine.roll_out(*prompts, **options), switchkd.roll_out(*models, *prompts, **options)
    assert_same(found, wanted)
    assert torch.equal(found.drafted_ids, wanted.drafted_ids)
    return found


def learn(student: Any, teacher: Any) -> None:
    """Move the student's weights towards the teacher's, as training would."""
    with torch.no_grad():
        for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
            mine.lerp_(its, 0.3)


@contextlib.contextmanager
def serving(folder: Path, student: Any, teacher: Any) -> Iterator[int]:
    """Run vLLM's own server of a pair, and give its port."""
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    # The CPU build is distributed under another name than the one that vLLM's command asks for.
    facts = alone(folder / "site") / f"vllm-{WANTED}.0+cpu.dist-info"
    facts.mkdir()
    facts.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {WANTED}.0+cpu\n")
    environment = {**os.environ, **ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    speculative = {"method": "draft_model", "model": str(folder / "student"), "num_speculative_tokens": 3}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [
                *(PYTHON, "-m", "vllm.entrypoints.cli.main", "serve", folder / "teacher", "--port", str(port)),
                *("--enable-scale-out", "--enforce-eager", "--no-enable-prefix-caching", "--dtype", "float32"),
                *("--worker-extension-cls", EXTENSION, "--speculative-config", json.dumps(speculative)),
            ],
            env={**environment, "PYTHONPATH": str(folder / "site")},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 150
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
                time.sleep(1)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
