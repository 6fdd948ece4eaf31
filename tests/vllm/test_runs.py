"""The real vLLM as commands, the V2 runner and a server use it: what they write is what transformers writes."""

import json
from pathlib import Path

import pytest
from helpers.command_line import write_rows
from helpers.pairs import make_prompts
from helpers.tiny import RAGGED_ROWS, build_tokenizer
from helpers.vllm_real import MARKS, OPTIONS, PYTHON, SETTINGS, SWITCH, TIGHT, both, learn, pair, serving

from switchkd import SwitchPolicy, UserError
from switchkd.engine.vllm import engine as engine_module
from switchkd.engine.vllm.server import ServedEngine
from switchkd.policies import POLICIES
from switchkd.vllm import Engine

pytestmark = MARKS
HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with `student`, `teacher` and data."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in zip(("student", "teacher"), pair(), strict=True):
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    write_rows(folder / "rows.jsonl", RAGGED_ROWS[1:])
    return folder


@pytest.fixture
def interpreted(tmp_path, monkeypatch):
    """V2 is the runner of GPUs; here its kernels run in Triton's interpreter."""
    for source, name in (("triton_interpreted.py", "sitecustomize.py"), ("vllm_watched.py", "vllm_watched.py")):
        (tmp_path / name).write_text((HELPERS / source).read_text())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return {"VLLM_USE_V2_MODEL_RUNNER": "1"}


def test_the_v2_runner_writes_the_same_text_preempted_too_and_asks_the_device_nothing(interpreted):
    models, prompts = pair(), make_prompts(10, longest=40, shortest=2)
    watched = {"worker_extension_cls": "vllm_watched.WatchedWorker", "environment": interpreted}
    with Engine(*models, **OPTIONS, **TIGHT, **watched) as engine:
        assert engine.facts["runner"] == "v2"
        policy = SwitchPolicy.of(initial_threshold=0.3, minimum_leg=2)
        found = both(engine, models, prompts, policy=policy, max_new_tokens=50)
        assert found.stats["undrafted"] > 0
        for name in ("temperature and top-p", "end of sequence inside", "skd", "a user's own, with a state"):
            both(engine, models, prompts, **{**SETTINGS[name], "max_new_tokens": 12})
        with pytest.raises(UserError, match="HostReadError"):  # a policy that asks, so the watch is there
            engine.roll_out(*prompts, policy=POLICIES["trb"](), max_new_tokens=4)


def test_four_steps_of_training_have_the_losses_of_the_transformers_engine(run, folders, tmp_path):
    """The tokens of a step are those of the other engine, and the next rollout uses the weights of the last step."""
    losses = []
    vllm = ("--rollout_engine", "vllm", "--vllm_python", PYTHON)
    for number, engine in enumerate((("--reuse_teacher_hidden", "false"), vllm)):
        code, out, err = run(
            *("train", "--model_name_or_path", folders / "student", "--method", "switch"),
            *("--teacher_model_name_or_path", folders / "teacher", "--dataset_name", folders / "rows.jsonl"),
            *("--output_dir", tmp_path / str(number), "--max_steps", 4, "--use_cpu", "--learning_rate", 0.1),
            *("--per_device_train_batch_size", 7, "--initial_threshold", 0.3, "--seed", 3, "--logging_steps", 1),
            *("--optim", "sgd", "--max_completion_length", 8, "--max_prompt_length", 32, "--report_to", "none"),
            *("--lr_scheduler_type", "constant", "--json", *engine),
        )
        assert code == 0, err
        assert json.loads(out)["steps"] == 4
        lines = (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()
        losses.append([entry["loss"] for entry in map(json.loads, lines) if "loss" in entry])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_evaluate_scores_the_answers_of_the_transformers_engine(run, folders, tmp_path, interpreted, monkeypatch):
    """A student alone, and on the V2 runner."""
    for name, value in interpreted.items():
        monkeypatch.setenv(name, value)
    answers, runners = [], []
    test = engine_module.require_reference_text
    monkeypatch.setattr(
        engine_module,
        "require_reference_text",
        lambda engine, *given: runners.append(engine.facts["runner"]) or test(engine, *given),
    )
    for number, engine in enumerate(((), ("--rollout_engine", "vllm", "--vllm_python", PYTHON))):
        code, _, err = run(
            *("evaluate", "--model_name_or_path", folders / "student", "--dataset_name", folders / "rows.jsonl"),
            *("--output_dir", tmp_path / str(number), "--max_completion_length", 16, "--decoding_seeds", "10,20"),
            *("--batch_size", 3, "--json", *engine),
        )
        assert code == 0, err
        answers.append((tmp_path / str(number) / "rows.jsonl").read_text())
    assert answers[0] == answers[1] and runners == ["v2"]


def test_a_server_writes_the_same_text_and_is_missed_in_one_line(tmp_path):
    """vLLM's own server, its engine in another process of its own."""
    student, teacher = pair()
    with serving(tmp_path, student, teacher) as port:
        engine = ServedEngine(student, teacher, url=f"http://127.0.0.1:{port}", sync_folder=tmp_path / "sync")
        assert engine.draft_length == 3
        both(engine, (student, teacher), make_prompts(12, longest=30, shortest=2), eos_token_id=[7, 40])
        learn(student, teacher)
        engine.load_student(student)
        both(engine, (student, teacher), make_prompts(12, longest=30, shortest=2))
    with pytest.raises(UserError, match="does not answer"):
        engine.roll_out([[3, 4]], policy=SWITCH, max_new_tokens=4)
