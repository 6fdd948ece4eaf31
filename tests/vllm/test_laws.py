"""The laws of rollouts on the real vLLM; `make test-vllm` builds its environment and sets SWITCHKD_VLLM_PYTHON.

Every trap of vLLM that tests/engine/test_vllm_adapter.py names on a stub is met here by the real scheduler and runner.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers.command_line import write_rows
from helpers.pairs import assert_same, make_pair, make_prompts
from helpers.tiny import RAGGED_ROWS, build_tokenizer
from helpers.vllm_policy import EveryNth

import switchkd
from switchkd import SwitchPolicy, UserError
from switchkd.engine.vllm.child import alone
from switchkd.engine.vllm.private import WANTED
from switchkd.engine.vllm.process import ENVIRONMENT
from switchkd.engine.vllm.server import ServedEngine
from switchkd.engine.vllm.worker import EXTENSION
from switchkd.vllm import Engine

PYTHON = os.environ.get("SWITCHKD_VLLM_PYTHON", "")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not PYTHON, reason="needs SWITCHKD_VLLM_PYTHON; make test-vllm")]

# vLLM's CPU attention knows heads of 32 and more.
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
OPTIONS = {"python": PYTHON, "max_num_seqs": 16}
SWITCH = SwitchPolicy(initial_threshold=0.3, horizon=40)


def pair():
    return make_pair("llama", noise=0.4, **SHAPE)


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.fixture(scope="module")
def engine(models):
    with Engine(*models, **OPTIONS) as found:
        yield found


def both(engine, models, prompts, **options):
    options = {"policy": SWITCH, "max_new_tokens": 40, "seed": 7, "return_drafted_ids": True, **options}
    found, wanted = engine.roll_out(*prompts, **options), switchkd.roll_out(*models, *prompts, **options)
    assert_same(found, wanted)
    assert torch.equal(found.drafted_ids, wanted.drafted_ids)
    return found


SETTINGS = {
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


@pytest.mark.parametrize("name", SETTINGS)
def test_text_authors_and_divergences_are_those_of_roll_out(engine, models, name):
    found = both(engine, models, make_prompts(20, longest=30, shortest=2), **SETTINGS[name])
    assert found.stats["kept"] <= found.stats["drafted"]


def test_the_version_and_the_runner_are_those_that_are_wanted(engine):
    assert engine.facts["version"].startswith(WANTED) and engine.facts["runner"] == "v1"


def test_divergences_and_authors_are_those_of_plain_transformers(engine, models):
    policy = SwitchPolicy(initial_threshold=0.3, final_ratio=0.5, horizon=60)
    prompts = make_prompts(12, seed=1, longest=30, shortest=2)
    found = engine.roll_out(*prompts, policy=policy, max_new_tokens=60, seed=3)
    for row, text in enumerate(found.completions()):
        prompt = prompts[0][row][prompts[1][row]].tolist()
        ids = torch.tensor([prompt + text])
        with torch.no_grad():
            student, teacher = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models)
        middle = torch.logaddexp(student, teacher) - math.log(2)
        jsd = 0.5 * ((student.exp() * (student - middle)).sum(-1) + (teacher.exp() * (teacher - middle)).sum(-1))
        assert torch.allclose(jsd, found.divergence[row], atol=1e-5)
        threshold = 0.3 * 0.5 ** (torch.arange(60) / 60)
        clear = (jsd - threshold).abs() > 1e-5
        assert torch.equal(found.author[row][clear] == 2, (jsd > threshold)[clear])


def test_rows_keep_their_text_however_they_are_split(engine):
    """Row ids are global: two ranks that send half of the rows each get the text of one that sends all."""
    ids, mask = make_prompts(8, longest=30, shortest=2)
    whole = engine.roll_out(ids, mask, policy=SWITCH, max_new_tokens=20, seed=2)
    half = engine.roll_out(ids[4:], mask[4:], policy=SWITCH, max_new_tokens=20, seed=2, row_ids=range(4, 8))
    assert torch.equal(half.completion_ids, whole.completion_ids[4:, : half.completion_ids.shape[1]])


def test_trap_6_a_prompt_that_ends_with_an_end_of_sequence_is_continued(engine, models):
    eos = list(range(20, 45))
    both(engine, models, ([[5, 6, 20], [7, 21], [8, 9, 10]],), eos_token_id=eos)


def test_four_steps_of_training_have_the_losses_of_the_transformers_engine(make_trainer):
    """The tokens of a step are those of the other engine, and the next rollout uses the weights of the last step."""
    options = {"train_dataset": RAGGED_ROWS[1:], "per_device_train_batch_size": 7, "max_steps": 4}
    options |= {"learning_rate": 0.1, "initial_threshold": 0.3, "seed": 3}
    losses = []
    for engine in ({"reuse_teacher_hidden": False}, {"rollout_engine": "vllm", "vllm_python": PYTHON}):
        trainer = make_trainer(*pair(), **options, **engine)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        if trainer.text.engine is not None:
            trainer.text.engine.close()
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_traps_3_5_7_and_8_preemption_small_budgets_a_kept_cache_and_new_weights(models):
    """Too few blocks for the batch: requests are preempted, and their texts asked on. With a cache of prefixes."""
    student, teacher = pair()
    tight = {"block_size": 32, "num_gpu_blocks_override": 14, "enable_prefix_caching": True, "max_model_len": 128}
    prompts = make_prompts(16, longest=40, shortest=2)
    options = {"policy": SwitchPolicy.of(initial_threshold=0.3, minimum_leg=2), "max_new_tokens": 60}
    with Engine(student, teacher, **OPTIONS, **tight, max_num_batched_tokens=128) as engine:
        for eos in (None, [7, 40]):
            found = both(engine, (student, teacher), prompts, eos_token_id=eos, **options)
            if eos is None:
                assert found.stats["undrafted"] > 0
        with torch.no_grad():
            for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
                mine.lerp_(its, 0.3)
        engine.load_student(student)
        after = both(engine, (student, teacher), prompts, **options)
        assert not torch.equal(found.completion_ids, after.completion_ids)
        with pytest.raises(UserError, match="40 tokens, 100 new ones and 10 of slack exceed max_model_len 128"):
            engine.roll_out([list(range(40))], policy=SWITCH, max_new_tokens=100)
        engine._child.process.kill()
        with pytest.raises(UserError, match="the engine's process ended by SIGKILL") as caught:
            engine.roll_out(*prompts, **options)
        assert "\n" not in str(caught.value)


def test_the_v2_runner_writes_the_same_text_preempted_too(models, tmp_path, monkeypatch):
    """V2 is the runner of GPUs; here its kernels run in Triton's interpreter."""
    helper = Path(__file__).parents[1] / "helpers" / "triton_interpreted.py"
    (tmp_path / "sitecustomize.py").write_text(helper.read_text())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tight = {"block_size": 32, "num_gpu_blocks_override": 14, "max_model_len": 128}
    with Engine(*models, **OPTIONS, **tight, environment={"VLLM_USE_V2_MODEL_RUNNER": "1"}) as engine:
        assert engine.facts["runner"] == "v2"
        prompts = make_prompts(10, longest=40, shortest=2)
        policy = SwitchPolicy.of(initial_threshold=0.3, minimum_leg=2)
        found = both(engine, models, prompts, policy=policy, max_new_tokens=50)
        assert found.stats["undrafted"] > 0
        for name in ("temperature and top-p", "end of sequence inside", "skd", "a user's own, with a state"):
            both(engine, models, prompts, **{**SETTINGS[name], "max_new_tokens": 12})


def test_the_command_line_trains_with_it(run, tmp_path):
    for name, model in zip(("student", "teacher"), pair(), strict=True):
        model.save_pretrained(tmp_path / name)
        build_tokenizer().save_pretrained(tmp_path / name)
    write_rows(tmp_path / "train.jsonl", RAGGED_ROWS[1:])
    code, out, err = run(
        *("train", "--model_name_or_path", tmp_path / "student", "--teacher_model_name_or_path", tmp_path / "teacher"),
        *("--dataset_name", tmp_path / "train.jsonl", "--output_dir", tmp_path / "run", "--method", "switch"),
        *("--max_steps", 2, "--use_cpu", "--rollout_engine", "vllm", "--vllm_python", PYTHON),
        *("--max_completion_length", 8, "--max_prompt_length", 32, "--report_to", "none", "--json"),
    )
    assert code == 0, err
    assert json.loads(out)["steps"] == 2


def test_a_server_writes_the_same_text_and_is_missed_in_one_line(tmp_path):
    """vLLM's own server, its engine in another process of its own."""
    student, teacher = pair()
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        build_tokenizer().save_pretrained(tmp_path / name)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # The CPU build is distributed under another name than the one that vLLM's command asks for.
    facts = alone(tmp_path / "site") / f"vllm-{WANTED}.0+cpu.dist-info"
    facts.mkdir()
    facts.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {WANTED}.0+cpu\n")
    environment = {**os.environ, **ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    speculative = {"method": "draft_model", "model": str(tmp_path / "student"), "num_speculative_tokens": 3}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [
                *(PYTHON, "-m", "vllm.entrypoints.cli.main", "serve", tmp_path / "teacher", "--port", str(port)),
                *("--enable-scale-out", "--enforce-eager", "--no-enable-prefix-caching", "--dtype", "float32"),
                *("--worker-extension-cls", EXTENSION, "--speculative-config", json.dumps(speculative)),
            ],
            env={**environment, "PYTHONPATH": str(tmp_path / "site")},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 150
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-3000:]
                time.sleep(1)
        engine = ServedEngine(student, teacher, url=url, sync_folder=tmp_path / "sync")
        assert engine.draft_length == 3
        both(engine, (student, teacher), make_prompts(12, longest=30, shortest=2), eos_token_id=[7, 40])
        with torch.no_grad():
            for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
                mine.lerp_(its, 0.3)
        engine.load_student(student)
        both(engine, (student, teacher), make_prompts(12, longest=30, shortest=2))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    with pytest.raises(UserError, match="does not answer"):
        engine.roll_out([[3, 4]], policy=SWITCH, max_new_tokens=4)
