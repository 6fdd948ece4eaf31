"""Training with rollouts from vLLM, on a stub of it; tests/vllm has the real one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import vllm_stub
from helpers.pairs import make_pair
from helpers.tiny import RAGGED_ROWS
from helpers.vllm_stub import StubChild

from switchkd import UserError
from switchkd.engine.vllm import engine as engine_module
from switchkd.engine.vllm import shared
from switchkd.training.vllm_engine import make_engine

ROWS = RAGGED_ROWS[1:]  # the first prompt has one token
SETTINGS = {"train_dataset": ROWS, "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.5}
SETTINGS |= {"max_completion_length": 8, "seed": 3}


@pytest.fixture
def children(monkeypatch):
    """Every stub process that was started."""
    started = []

    class Watched(StubChild):
        def __init__(self, python, environment=None):
            super().__init__(python, environment)
            self.python, self.environment = python, environment
            started.append(self)

    vllm_stub.install(monkeypatch)
    monkeypatch.setattr(engine_module, "Child", Watched)
    return started


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options", [{"initial_threshold": 0.05}, {"target_teacher_share": 0.6, "schedule": "constant"}]
)
def test_four_steps_have_the_losses_of_the_transformers_engine(make_trainer, children, options):
    options = {**SETTINGS, **options}
    plain = losses(make_trainer(*make_pair("llama", noise=0.4), **options, reuse_teacher_hidden=False))
    trainer = make_trainer(*make_pair("llama", noise=0.4), **options, rollout_engine="vllm")
    found = losses(trainer)
    assert found == pytest.approx(plain, rel=1e-4) and len(found) == 4
    # Once for each optimizer step, and once for the search for a threshold.
    assert children[0].loads == 4 + trainer.plan.finds_threshold
    assert trainer.state.log_history[0]["rollout/teacher_passes"] > 0


def test_the_next_rollout_uses_the_weights_of_the_last_step(make_trainer, children):
    trainer = make_trainer(*make_pair("llama", noise=0.4), **SETTINGS, rollout_engine="vllm", initial_threshold=0.05)
    engine, seen = trainer.text.engine, []
    write = engine.write

    def watched(student, teacher, *args, **options):
        mine = student.lm_head.weight.detach()
        seen.append((mine.clone(), torch.equal(mine, children[0].host.student.lm_head.weight)))
        return write(student, teacher, *args, **options)

    engine.write = watched
    trainer.train()
    assert [same for _, same in seen] == [True] * 4
    assert not torch.equal(seen[0][0], seen[1][0])


def test_the_text_of_seqkd_is_that_of_the_transformers_engine_and_its_engine_ends(make_trainer, children, tmp_path):
    options = {**SETTINGS, "method": "seqkd", "max_steps": 1}
    texts = []
    for engine in ("transformers", "vllm"):
        path = tmp_path / f"{engine}.jsonl"
        make_trainer(
            *make_pair("llama", noise=0.4), **options, teacher_text_file=str(path), rollout_engine=engine
        ).train()
        texts.append(path.read_text(encoding="utf-8"))
    assert texts[0] == texts[1] and len(children) == 1 and children[0].closed


def test_options_reach_vllm(make_trainer, children):
    options = {"vllm_python": "/env/python", "vllm_tensor_parallel_size": 2, "rollout_batch_size": 3}
    trainer = make_trainer(
        *make_pair("llama"), **SETTINGS, **options, rollout_engine="vllm", draft_length="2", initial_threshold=0.1
    )
    child = children[0]
    assert child.python == "/env/python" and child.options["tensor_parallel_size"] == 2
    assert child.options["speculative_config"]["num_speculative_tokens"] == 2
    assert child.options["max_num_seqs"] == 3 and child.options["dtype"] == "float32"
    trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_dataset": RAGGED_ROWS}, "prompt 0 of the training data has one token, and vLLM needs two"),
        (
            {"train_dataset": [{**row, "teacher_prompt": "Well: " + row["prompt"]} for row in ROWS]},
            "the teacher cannot read prompts of its own",
        ),
        ({"rollout_engine": "transformer"}, "rollout_engine must be one of transformers, vllm, got 'transformer'"),
        ({"method": "kd"}, "rollout_engine=vllm does nothing: method 'kd' rolls nothing out; remove it"),
        ({"rollout_engine": "transformers", "vllm_python": "python"}, "vllm_python=python does nothing"),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode=True does nothing: training runs on the CPU"),
        ({"vllm_gpu_memory_utilization": 0.5}, "vllm_gpu_memory_utilization=0.5 does nothing: training runs on the"),
        ({"vllm_mode": "sever"}, "vllm_mode must be one of colocate, server, got 'sever'"),
        ({"vllm_server_host": "other"}, "vllm_server_host=other does nothing: vllm_mode is colocate"),
        ({"vllm_mode": "server", "draft_length": "2"}, "draft_length=2 does nothing: the server has its own"),
        ({"vllm_mode": "server", "vllm_python": "python"}, "vllm_python=python does nothing: the server has its own"),
        ({"vllm_mode": "server", "vllm_server_port": 9}, "the server at http://localhost:9 does not answer"),
        ({"vllm_gpu_memory_utilization": 0.0}, "vllm_gpu_memory_utilization must lie in"),
        ({"reuse_teacher_hidden": False}, "reuse_teacher_hidden=False does nothing: vLLM keeps the teacher's states"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_done_is_refused_at_the_door(make_trainer, children, options, message):
    with pytest.raises(UserError, match=message):
        make_trainer(*make_pair("llama"), **{**SETTINGS, "rollout_engine": "vllm", **options})


def test_an_engine_that_does_not_start_in_one_process_ends_all_of_them_in_its_line(monkeypatch):
    said = [None, "vllm: no memory left"]
    monkeypatch.setattr(shared.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        shared.dist, "all_gather_object", lambda found, own: found.__setitem__(slice(2), [own, said[1]])
    )
    engine = StubChild("python")
    with pytest.raises(UserError, match="vllm: no memory left"):
        shared.started_everywhere(lambda: engine)
    assert engine.closed
    said[1], other = None, StubChild("python")
    assert shared.started_everywhere(lambda: other) is other and not other.closed

    def refused():
        raise UserError("vllm: no vLLM here")

    with pytest.raises(UserError, match="no vLLM here"):
        shared.started_everywhere(refused)


def test_seqkd_on_a_server_takes_one_process(children):
    args = SimpleNamespace(rollout_engine="vllm", vllm_mode="server", world_size=2, method="seqkd", output_dir="run")
    args.vllm_server_host, args.vllm_server_port = "localhost", 9
    data = Dataset.from_list([{"prompt_ids": [3, 4]}])
    with pytest.raises(UserError, match="method 'seqkd' with vllm_mode=server takes one process"):
        make_engine(*make_pair("llama"), data, args, given=None)


def test_a_method_without_a_teacher_is_refused(make_trainer, children):
    options = {**SETTINGS, "method": "sft", "on_policy_fraction": 0.0}
    with pytest.raises(UserError, match="rollout_engine=vllm does nothing"):
        make_trainer(make_pair("llama")[0], **options, rollout_engine="vllm")


def test_a_dead_engine_stops_the_training_in_one_line_and_the_last_checkpoint_is_whole(make_trainer, children):
    from switchkd.training.checkpoints import newest_whole

    options = {**SETTINGS, "save_strategy": "steps", "save_steps": 1, "initial_threshold": 0.05}
    trainer = make_trainer(*make_pair("llama"), **options, rollout_engine="vllm")
    child, ask = children[0], children[0].ask

    def dying(do, **arguments):
        if do == "roll_out" and child.loads == 3:
            raise UserError("vllm: the engine's process ended by SIGKILL: it said nothing")
        return ask(do, **arguments)

    child.ask = dying
    with pytest.raises(UserError, match="ended by SIGKILL"):
        trainer.train()
    folder, passed_over = newest_whole(Path(trainer.args.output_dir))
    assert folder.name == "checkpoint-2" and passed_over == []
