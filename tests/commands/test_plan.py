"""`switchkd plan`: from configurations alone to what fits."""

import json
import shlex

import pytest
import yaml


@pytest.fixture
def configs(models, tmp_path):
    """Folders that hold nothing but a configuration."""
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((models / name / "config.json").read_bytes())
    return tmp_path


def words(configs, *more):
    return ["plan", "--student", configs / "student", "--teacher", configs / "teacher", *more]


def test_a_plan_needs_configurations_only_and_says_that_it_fits(configs, run):
    code, out, err = run(*words(configs, "--batch", 4, "--length", 32, "--max_prompt_length", 16))
    assert code == 0, err
    assert "fits: 0.0 of 80 GB" in out and "teacher weights" in out and "a step takes about" in out
    assert "arithmetic" in out


def test_json_holds_every_part_and_the_long_names_say_the_same(configs, run):
    short = words(configs, "--batch", 4, "--length", 32, "--json")
    long = ["plan", "--model_name_or_path", configs / "student", "--teacher_model_name_or_path", configs / "teacher"]
    long += ["--per_device_train_batch_size", 4, "--max_completion_length", 32, "--json"]
    first, second = (json.loads(run(*call)[1].splitlines()[-1]) for call in (short, long))
    assert first == second
    parts = first["phases"][first["largest_phase"]]
    assert sum(parts.values()) == first["peak_bytes"] and first["fits"]
    assert first["parameters"]["student"] == first["parameters"]["trained"] > 0
    assert sum(first["seconds"].values()) == pytest.approx(first["step_seconds"])


def test_what_does_not_fit_comes_with_the_option_to_change(configs, run):
    # Some megabytes of memory, as if the models were large.
    call = words(configs, "--batch", 64, "--length", 64, "--json", "--memory")
    peak = json.loads(run(*call, 1)[1].splitlines()[-1])["peak_bytes"] / 1e9
    code, out, err = run(*call, 0.8 * peak)
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and not found["fits"] and "does not fit" in err
    assert found["changes"][-1]["peak"] <= 0.8 * peak * 1e9
    assert found["changes"][0]["option"] in err


@pytest.mark.parametrize("share", [0.9, 0.35])
def test_what_is_advised_can_be_given_and_takes_what_was_promised(configs, run, share):
    call = words(configs, "--batch", 16, "--gradient_accumulation_steps", 2, "--length", 64, "--gpus", 2, "--json")
    peak = json.loads(run(*call)[1].splitlines()[-1])["peak_bytes"]
    changes = json.loads(run(*call, "--memory", share * peak / 1e9)[1].splitlines()[-1])["changes"]
    given = [word for change in changes for word in shlex.split(change["option"])]
    found = json.loads(run(*call, *given)[1].splitlines()[-1])
    assert changes and found["peak_bytes"] == changes[-1]["peak"], given


def test_the_config_of_a_training_is_one_of_a_plan_and_flags_win(configs, run, tmp_path):
    settings = {
        "model_name_or_path": str(configs / "student"),
        "teacher_model_name_or_path": str(configs / "teacher"),
        "dataset_name": "nowhere.jsonl",
        "method": "kd",
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
        "learning_rate": 1e-4,
        "bf16": True,
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(settings))
    found = json.loads(run("plan", "--config", path, "--batch", 3, "--json")[1].splitlines()[-1])
    assert found["launch"]["rows"] == 3 and found["launch"]["checkpointing"] and found["launch"]["bf16"]
    assert "rollout" not in found["phases"] and "teacher pass" in found["phases"]


def test_room_that_is_left_goes_to_rows_decoded_at_once(configs, run):
    call = words(configs, "--batch", 1, "--gradient_accumulation_steps", 8, "--rollout_batch_size", 1, "--json")
    code, out, err = run(*call)
    assert code == 0 and json.loads(out.splitlines()[-1])["faster"] == {"rollout_batch_size": 8}
    assert "room for --rollout_batch_size 8" in err


def test_several_gpus_and_adapters(configs, run):
    call = words(configs, "--gpus", 4, "--sharding", "fsdp2", "--use_peft", "--lora_r", 4, "--json")
    found = json.loads(run(*call)[1].splitlines()[-1])
    assert found["parameters"]["trained"] < found["parameters"]["student"]
    assert found["launch"]["copy_dtype"] == "float32" and found["seconds"]["communication"] > 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--gpus", 0], "gpus must be >= 1"),
        (["--sharding", "fsdp3", "--gpus", 2], "sharding must be one of"),
        (["--sharding", "fsdp2"], "does not go with gpus=1"),
        (["--card", "h1000"], "nearest is 'h100'"),
        (["--optim", "galore_adamw"], "not known here"),
        (["--method", "swich"], "swich"),
        (["--student", "nowhere/at/all"], "does not exist"),
        (["--memory", -3], "memory must be > 0"),
        (["--lora_target_modules", "nothing", "--use_peft"], "nothing"),
    ],
)
def test_a_mistake_is_one_line(configs, run, more, says):
    code, _, err = run(*words(configs, *more))
    assert code == 2 and says in err and err.count("\n") == 1, err


def test_the_help_lists_what_decides_and_names_the_rest(run):
    code, out, _ = run("plan", "--help")
    assert code == 0 and "--gpus" in out and "--gradient_checkpointing" in out and "--learning_rate" not in out
