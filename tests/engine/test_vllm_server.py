"""A vLLM server on a stub: what goes over HTTP, and what is said where nobody answers."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import vllm_ranks, vllm_stub
from helpers.pairs import assert_same, make_pair, make_prompts
from helpers.tiny import RAGGED_ROWS
from helpers.vllm_stub import StubHost
from safetensors.torch import load_file
from training.test_distributed import both_end, started

import switchkd
from switchkd import UserError
from switchkd.engine.vllm import shared
from switchkd.engine.vllm.server import ServedEngine

SWITCH = switchkd.SwitchPolicy(initial_threshold=0.05, horizon=16)


class StubServer:
    """vLLM's API over a `StubHost`; requests run one after the other."""

    def __init__(self, student, teacher, version="0.32.1"):
        self.host, self.version, self.paths, self.loads = StubHost(student, teacher), version, [], 0
        self.host.switch_load_student = self._load
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(None)

            def do_POST(self):
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body):
                with outer.lock:
                    outer.paths.append(self.path)
                    answer = outer.answer(self.path, body)
                self.send_response(200 if answer is not None else 404)
                self.end_headers()
                self.wfile.write(json.dumps(answer if answer is not None else {"detail": "Not Found"}).encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _load(self, file):
        self.loads += 1
        self.host.student.load_state_dict(load_file(file), strict=False)
        return 1

    def answer(self, path, body):
        if path == "/version":
            return {"version": self.version}
        if path == "/collective_rpc":
            return {"results": [self.host.call(body["method"], *body["args"])]}
        if path == "/inference/v1/generate":
            texts = self.host.generate([{"prompt_token_ids": body["token_ids"], **body["sampling_params"]}])
            return {"choices": [{"token_ids": texts[0]}]}
        return {} if path == "/reset_prefix_cache" else None

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def served(monkeypatch, tmp_path):
    """`served(**options)` -> the stub server, and a pair whose student the server does not have yet."""
    vllm_stub.install(monkeypatch)
    running = []

    def start(**options):
        student, teacher = make_pair("llama", noise=0.4)
        running.append(StubServer(make_pair("llama", noise=0.9)[0], teacher, **options))
        return running[-1], (student, teacher), {"url": running[-1].url, "sync_folder": tmp_path / "sync"}

    yield start
    for server in running:
        server.stop()


def test_a_server_writes_the_text_of_roll_out_with_the_trainers_student(served):
    server, pair, options = served()
    engine = ServedEngine(*pair, **options)  # its self-test passes only with the weights of this student
    prompts = make_prompts(3, shortest=2)
    found = engine.roll_out(*prompts, policy=SWITCH, max_new_tokens=10, seed=7)
    assert_same(found, switchkd.roll_out(*pair, *prompts, policy=SWITCH, max_new_tokens=10, seed=7))
    assert {"/version", "/collective_rpc", "/inference/v1/generate", "/reset_prefix_cache"} == set(server.paths)
    with torch.no_grad():
        pair[0].lm_head.weight.mul_(1.5)
    engine.load_student(pair[0])
    found = engine.roll_out(*prompts, policy=SWITCH, max_new_tokens=10, seed=7)
    assert_same(found, switchkd.roll_out(*pair, *prompts, policy=SWITCH, max_new_tokens=10, seed=7))


def test_a_server_of_another_version_is_refused_and_a_lost_one_ends_in_one_line(served):
    server, pair, options = served(version="0.31.0")
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+ has vLLM 0\.31\.0, wanted is 0\.32"):
        ServedEngine(*pair, **options)
    server.version = "0.32.0"
    engine = ServedEngine(*pair, **options, self_test=False)
    server.answer, answer = lambda path, body: None, server.answer
    with pytest.raises(UserError, match="/collective_rpc answers 404; start it with VLLM_SERVER_DEV_MODE=1"):
        engine.roll_out([[3, 4]], policy=SWITCH, max_new_tokens=4)
    server.answer = answer
    server.stop()
    with pytest.raises(UserError, match=r"does not answer .*; what was saved before is still there") as caught:
        engine.roll_out([[3, 4]], policy=SWITCH, max_new_tokens=4)
    assert "\n" not in str(caught.value)


def test_training_on_a_server_has_the_losses_of_the_transformers_engine(served, make_trainer):
    _, _, options = served()
    settings = {
        "train_dataset": RAGGED_ROWS[1:5],
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.1,
    }
    settings |= {"max_completion_length": 6, "initial_threshold": 0.05}
    port = int(options["url"].rpartition(":")[2])
    of_server = {"rollout_engine": "vllm", "vllm_mode": "server", "vllm_server_port": port}
    losses = []
    for engine in ({"reuse_teacher_hidden": False}, of_server):
        trainer = make_trainer(*make_pair("llama", noise=0.4), **settings, **engine)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)


class Threads:
    """The collectives of torch.distributed for threads in place of processes."""

    def __init__(self, ranks):
        self.ranks, self.barrier, self.own, self.box = ranks, threading.Barrier(ranks), threading.local(), {}

    def run(self, function):
        """What a function of the rank gives in every thread, or the refusal that it ended with."""

        def one(rank):
            self.own.rank = rank
            try:
                return function(rank)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(one, range(self.ranks)))

    def exchange(self, value):
        self.box[self.own.rank] = value
        self.barrier.wait(30)
        everybody = [self.box[rank] for rank in range(self.ranks)]
        self.barrier.wait(30)
        return everybody

    def get_rank(self):
        return self.own.rank

    def get_world_size(self):
        return self.ranks

    def gather_object(self, own, found):
        everybody = self.exchange(own)
        if found is not None:
            found[:] = everybody

    def broadcast_object_list(self, values):
        values[:] = self.exchange(list(values))[0]

    def scatter_object_list(self, own, parts):
        own[:] = [self.exchange(parts)[0][self.own.rank]]


def test_rows_of_several_processes_get_the_text_of_one_and_weights_go_out_once(served, monkeypatch):
    server, pair, options = served()
    threads, split = Threads(3), [0, 1, 4, 7]
    monkeypatch.setattr(shared, "dist", threads)
    prompts, ids = make_prompts(7, shortest=2)[0].tolist(), torch.arange(20, 27)
    settings = {"policy": SWITCH, "max_new_tokens": 10, "seed": 7, "eos_token_id": [20, 21], "pad_token_id": 1}

    def trained(rank):
        engine = shared.SharedEngine(lambda: ServedEngine(*pair, **options))
        engine.load_student(pair[0])
        mine = slice(split[rank], split[rank + 1])
        found = engine.write(*pair, prompts[mine], row_ids=ids[mine], max_active_rows=2, **settings)
        threads.barrier.wait(30)
        if rank == 0:
            server.stop()
        with pytest.raises(UserError, match="does not answer") as lost:
            engine.write(*pair, prompts[mine], **settings)
        engine.close()
        return found, str(lost.value)

    results = threads.run(trained)
    assert server.loads == 2  # at the start, and once for all
    for rank, (found, lost) in enumerate(results):
        mine = slice(split[rank], split[rank + 1])
        assert_same(found, switchkd.roll_out(*pair, prompts[mine], row_ids=ids[mine], **settings))
        assert lost == results[0][1] and "\n" not in lost


@pytest.mark.long  # two processes
def test_two_processes_on_one_server_train_as_one_does_on_transformers(served, tmp_path):
    """Row ids are global: the split changes no text, and weights go out once for each step."""
    server, _, options = served()
    port = int(options["url"].rpartition(":")[2])
    of_server = {"rollout_engine": "vllm", "vllm_mode": "server", "vllm_server_port": port}
    running = started(vllm_ranks.__file__, tmp_path, json.dumps(of_server))
    wanted = vllm_ranks.main(tmp_path / "one", 1, reuse_teacher_hidden=False)
    both_end(running)
    vllm_ranks.assert_trained_alike(torch.load(tmp_path / "result.pt"), wanted, rel=1e-4, atol=1e-5)
    assert server.loads == 1 + 2  # at the start, and before each step


@pytest.mark.long  # two processes once more
def test_a_server_that_is_not_there_ends_both_processes_in_one_line(served, tmp_path):
    server, _, options = served()
    server.stop()
    port = int(options["url"].rpartition(":")[2])
    of_server = {"rollout_engine": "vllm", "vllm_mode": "server", "vllm_server_port": port}
    running = started(vllm_ranks.__file__, tmp_path, json.dumps(of_server))
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0 and "does not answer" in output
