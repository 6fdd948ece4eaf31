"""Policies and methods of the user's own: from Python, from a file, from an installed package; docs/own_policy.md."""

import json
import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.command_line import one_line_error
from helpers.tiny import RAGGED_ROWS

import switchkd
from switchkd.errors import UserError
from switchkd.methods import METHODS, get_method
from switchkd.policies import POLICIES, SkdPolicy, SwitchPolicy, find_policy

PAGE = Path(__file__).parents[2] / "docs" / "own_policy.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def forks(tmp_path, monkeypatch):
    """`forks.py` of the page, in the working directory."""
    source = (
        blocks("python")[0]
        + "\n\nimport switchkd\n"
        + blocks("python")[3].replace("switchkd.register_method(METHOD)\n", "")
    )
    (tmp_path / "forks.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("forks", None)


@pytest.fixture
def options(models, tmp_path):
    return (
        "--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher",
        "--dataset_name", models / "train.jsonl", "--max_steps", 2, "--per_device_train_batch_size", 2,
        "--max_completion_length", 8, "--logging_steps", 1, "--report_to", "none", "--draft_length", 4,
        "--save_strategy", "no", "--use_cpu",
    )  # fmt: skip


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows[:2]]


def test_the_page_s_policy_is_checked_and_trains_as_the_page_says(forks, make_gpt2, tiny_tokenizer, capsys):
    sys.path.append(str(forks))
    exec(blocks("python")[1], {})
    assert capsys.readouterr().out == blocks("text")[0]
    names = {"student": make_gpt2(seed=1), "teacher": make_gpt2(seed=2), "tokenizer": tiny_tokenizer}
    names["data"] = Dataset.from_list(RAGGED_ROWS)
    exec(blocks("python")[2], names)
    trainer = names["trainer"]
    trainer.train()
    entry = next(row for row in trainer.state.log_history if "rollout/teacher_share" in row)
    assert entry["rollout/teacher_entropy_nats"] > 0
    assert entry["rollout/threshold_nats"] == pytest.approx(0.8)


def test_a_file_a_module_and_the_object_of_a_policy_train_alike(forks, run, options, capsys):
    kwargs = '{"initial_threshold": 3.0}'
    logs = []
    for index, name in enumerate(("forks.py:ForkPolicy", "forks:ForkPolicy")):
        folder = forks / f"run{index}"
        code, out, err = run("train", *options, "--policy", name, "--policy_kwargs", kwargs, "--output_dir", folder)
        assert code == 0, err
        assert "teacher entropy [nats]" in out and "teacher entropy 3." in err
        logs.append(metrics(folder))
    assert logs[0] == logs[1]
    assert 0 < logs[0][0]["rollout/teacher_share"] < 1
    text = (forks / "run0" / "config.yaml").read_text()
    assert "policy: forks.py:ForkPolicy" in text
    # The config of a run is a config file.
    code, _, err = run("train", "--config", forks / "run0" / "config.yaml", "--output_dir", forks / "again")
    assert code == 0, err
    assert metrics(forks / "again") == logs[0]


def test_rollout_and_calibrate_take_a_policy_of_ones_own(forks, run, models):
    pair = ("--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher")
    wanted = (*pair, "--dataset_name", models / "train.jsonl", "--max_completion_length", 8, "--json")
    policy = ("--policy", "forks:ForkPolicy")
    code, out, err = run("calibrate", *wanted, *policy, "--target_teacher_share", 0.5, "--tolerance", 0.1)
    assert code == 0, err
    assert re.search(r"--policy forks:ForkPolicy --policy_kwargs '\{\"initial_threshold\": [\d.]+\}'", err)
    threshold = json.loads(out)["initial_threshold"]
    kwargs = json.dumps({"initial_threshold": threshold})
    code, out, err = run("rollout", *wanted, *policy, "--policy_kwargs", kwargs, "--max_samples", 8)
    assert code == 0, err
    summary = json.loads(out)
    assert 0.2 < summary["teacher_share"] < 0.8
    assert summary["measured"] == "teacher_entropy_nats" and summary["teacher_entropy_nats"] > 0
    assert "mean teacher entropy" in err


def test_a_threshold_of_ones_own_is_controlled(forks, run, options):
    wanted = ("--policy", "forks:ForkPolicy", "--target_teacher_share", 0.5, "--output_dir", forks / "run")
    code, _, err = run("train", *options, *wanted)
    assert code == 0, err
    assert 0.2 < metrics(forks / "run")[0]["rollout/teacher_share"] < 0.8


def test_installed_packages_announce_policies_and_methods(forks, run, options):
    info = forks / "forks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: forks\nVersion: 1.0\n")
    [points] = blocks("toml")
    lines = points.replace('project.entry-points."', "").replace('"]', "]").replace('"', "")
    (info / "entry_points.txt").write_text(lines + "broken = forks:NO_SUCH\nwrong = forks:ForkPolicy\n")
    sys.path.insert(0, str(forks))
    assert find_policy("forks").__name__ == "ForkPolicy"
    assert get_method("forks").policy is find_policy("forks")
    code, _, err = run("train", *options, "--method", "forks", "--policy_kwargs", '{"initial_threshold": 3.0}')
    assert code == 0, err
    assert "teacher entropy" in err
    with pytest.raises(UserError, match=r"entry point switchkd\.methods: broken = forks:NO_SUCH cannot be loaded"):
        get_method("broken")
    with pytest.raises(UserError, match=r"method wrong: expected a switchkd\.Method, got <class"):
        get_method("wrong")


def test_a_registered_method_is_one_of_the_table(forks, monkeypatch, make_trainer, make_gpt2):
    monkeypatch.setattr("switchkd.methods.METHODS", dict(METHODS))
    sys.path.append(str(forks))
    import forks as module

    switchkd.register_method(module.METHOD)
    switchkd.register_method(module.METHOD)  # the same again is no mistake
    trainer = make_trainer(
        make_gpt2(seed=1), make_gpt2(seed=2), method="forks", policy_kwargs={"initial_threshold": 4.2}
    )
    assert trainer.plan.policy == module.ForkPolicy(4.2) and trainer.plan.fraction == 1.0
    with pytest.raises(UserError, match="'forks' exists already"):
        switchkd.register_method(switchkd.Method("forks", "another", "forward_kl", "nowhere"))
    with pytest.raises(UserError, match="objective must be one of cross_entropy"):
        switchkd.register_method(switchkd.Method("other", "another", "reverse", "nowhere"))
    with pytest.raises(UserError, match="rolls text out, but has no policy"):
        switchkd.register_method(switchkd.Method("other", "x", "reverse_kl", "nowhere", on_policy_fraction=0.5))


def test_policy_kwargs_set_options_of_the_methods_own_policy(make_trainer, make_gpt2):
    trainer = make_trainer(
        make_gpt2(seed=1), make_gpt2(seed=2), method="switch", policy_kwargs={"initial_threshold": 0.1}
    )
    assert trainer.plan.policy.initial_threshold == 0.1


@pytest.mark.parametrize(
    ("method", "config", "policy", "message"),
    [
        ("kd", {}, SwitchPolicy(), "method 'kd' has no steps that roll out; use another method, e.g. switch"),
        ("minillm", {"policy": "skd"}, None, "method 'minillm' weighs tokens by its own mixture"),
        ("seqkd", {"policy": "skd"}, None, "method 'seqkd' has no steps that roll out"),
        ("switch", {"policy": "skdd"}, None, "unknown policy 'skdd'; the nearest is 'skd'"),
        ("switch", {"policy": "skd", "policy_kwargs": {"top": 3}}, None, "'skd' has no option 'top'; the nearest is"),
        ("switch", {"policy": "student", "policy_kwargs": {"top": 3}}, None, "'student' takes no options, got 'top'"),
        ("switch", {"policy": "skd"}, SwitchPolicy(), "as an object and in the configuration too"),
        ("switch", {"policy_kwargs": {"horizon": 3}}, SwitchPolicy(), "as an object and in the configuration too"),
        ("switch", {"initial_threshold": 0.1}, SkdPolicy(), "of method 'switch', not to SkdPolicy"),
        ("switch", {"policy": "skd", "teacher_top_k": 2}, None, "not to skd; put it into policy_kwargs"),
        ("switch", {"policy": "math:pi"}, None, "policy math:pi: expected a subclass of switchkd.Policy, got 3.14"),
        ("switch", {"policy": "math:pie"}, None, "policy: math has no 'pie'; the nearest is"),
        ("switch", {"policy": "missing.py:Mine"}, None, "policy: no file missing.py; check the path"),
        ("switch", {"policy": "no_module:Mine"}, None, "policy: cannot import no_module: ModuleNotFoundError"),
        ("switch", {"policy": "skd", "target_teacher_share": 0.5}, None, "policy skd has no threshold to move"),
        ("switch", {"horizon": 5, "policy_kwargs": {"horizon": 6}}, None, "is given as an option of its own too"),
        ("sft", {"policy_kwargs": {"initial_threshold": 0.2}}, None, "does nothing: method 'sft' rolls nothing out"),
        ("switch", {}, SwitchPolicy, "policy must be a switchkd.Policy or, in the configuration, a name"),
        ("switch", {"policy": "skd", "policy_kwargs": {"teacher_top_k": 0}}, None, "teacher_top_k must be"),
        ("switch", {"policy": "skd", "on_policy_fraction": 0.0}, None, "at on_policy_fraction 0"),
    ],
)  # fmt: skip
def test_a_policy_that_cannot_act_is_refused_in_one_line(make_trainer, make_gpt2, method, config, policy, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_trainer(make_gpt2(seed=1), make_gpt2(seed=2), method=method, trainer_kwargs={"policy": policy}, **config)


def test_wrong_policies_on_the_command_line_are_one_line(run, models):
    pair = ("--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher")
    for command, more, message in (
        ("rollout", ("--policy", "swich"), "policy must be one of switch, student"),
        ("rollout", ("--policy", "x:Y", "--horizon", 3), "options of your own policy go into policy_kwargs"),
        ("rollout", ("--policy_kwargs", "[1]"), "policy_kwargs must be a JSON object"),
        ("calibrate", ("--policy", "skd"), "policy 'skd' has no threshold to calibrate; take one of switch"),
    ):
        given = ("--prompt", "a") if command == "rollout" else ("--dataset_name", models / "train.jsonl")
        assert message in one_line_error(*run(command, *pair, *given, *more))


def test_every_name_of_the_registry_is_a_policy_by_name():
    assert all(find_policy(name) is policy for name, policy in POLICIES.items())
