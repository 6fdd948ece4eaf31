"""Forty mistakes of a first day: each ends in one line that says what is wrong, with which value, and the way out."""

import json

import pytest
from helpers.command_line import one_line_error, train_options, write_rows
from helpers.tiny import build_gpt2

#: What is typed after a whole and right `switchkd train` -> what the line says.
TRAINING = {
    "--method switsch": "unknown method 'switsch'; did you mean 'switch'?",
    "--method gkd --lmbda 0.5": "unknown option --lmbda; use on_policy_fraction",
    "--learning_rat 1e-4": "unknown option --learning_rat; did you mean 'learning_rate'?",
    "--learning_rate fast": "--learning_rate: invalid float value: 'fast'",
    "--initial_threshold 0.9": "initial_threshold must lie in [0, ln 2 nats], got 0.9",
    "--initial_threshold -1": "initial_threshold must lie in [0, ln 2 nats], got -1.0",
    "--schedule exponentional": "schedule must be one of exponential, linear, constant, increasing",
    "--method kd --initial_threshold 0.1": "initial_threshold=0.1 does nothing with method 'kd'",
    "--method kd --temperature 0.7": "temperature=0.7 does nothing: method 'kd' rolls nothing out",
    "--method kd --on_policy_fraction 0.5": "on_policy_fraction=0.5 does nothing with method 'kd'",
    "--on_policy_fraction 50": "on_policy_fraction must lie in [0, 1], got 50",
    "--target_teacher_share 53": "target_teacher_share must lie in (0, 1), got 53",
    "--divergence reverse": "unknown divergence 'reverse'",
    "--divergence reverse_kl --skew 0.1": "skew",
    "--top_p 0": "top_p must lie in (0, 1], got 0",
    "--temperature -1": "temperature must be",
    "--max_completion_length 0": "max_completion_length must be >= 1, got 0",
    "--max_completion_length 4000": "exceed the student's context of 128 tokens",
    "--draft_length fast": 'draft_length must be "auto" or an integer >= 1',
    "--per_device_train_batch_size 0": "per_device_train_batch_size must be >= 1, got 0",
    "--lora_r 8": "lora_r does nothing without use_peft",
    "--load_in_4bit": "load_in_4bit trains an adapter only; add --use_peft",
    "--eval_strategy steps": "eval_strategy=steps needs --eval_dataset_name or --dataset_test_split",
    "--eval_strategy sometimes": "--eval_strategy: invalid choice 'sometimes'",
    "--resume_from_checkpoint true": "holds no checkpoint",
    "--resume_from_checkpoint nowhere": "nowhere is not a checkpoint",
    "--columns prompt:question": "columns must be name=column pairs",
    "--columns prompt=question": "question",
    "--template chat": "chat template",
    "--student_layers 0,9": "9",
    '--student_config {"n_layers":2}': "n_layer",
    "--policy mine:Policy": "policy: cannot import mine: ModuleNotFoundError",
    "--lm_weight 1": "lm_weight=1.0 and lm_dataset must be set together",
    "stray.yaml": "give a config file as --config stray.yaml",
}


@pytest.mark.parametrize("typed", TRAINING)
def test_a_wrong_option_of_train_is_one_line(run, models, tmp_path, typed):
    error = one_line_error(*run(*train_options(models, tmp_path / "run", *typed.split())))
    assert TRAINING[typed] in error
    assert not (tmp_path / "run" / "model.safetensors").exists()


def replaced(models, tmp_path, **options):
    words = train_options(models, tmp_path / "run")
    for name, value in options.items():
        at = words.index(f"--{name}")
        words[at : at + 2] = [] if value is None else [f"--{name}", value]
    return words


def test_what_is_missing_or_elsewhere_is_one_line(run, models, tmp_path):
    for options, message in (
        ({"dataset_name": None}, "give --dataset_name, the training data"),
        ({"model_name_or_path": None}, "give --model_name_or_path, the student"),
        ({"teacher_model_name_or_path": None}, "method 'switch' needs a teacher"),
        ({"dataset_name": tmp_path / "none.jsonl"}, "none.jsonl"),
        ({"model_name_or_path": tmp_path / "none"}, "none does not exist; give a model folder or a hub id"),
        ({"output_dir": models / "train.jsonl"}, "is a file; give a folder"),
        ({"output_dir": models}, "is not empty and was not written by switchkd"),
    ):
        assert message in one_line_error(*run(*replaced(models, tmp_path, **options)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", ', "line 2"),
        ('{"question": "a"}\n', "question"),
        ('{"prompt": "", "completion": "b"}\n', "row 1"),
        ('{"prompt": 5, "completion": "b"}\n', "`prompt` must be text"),
        ("", "no records"),
        ('{"prompt": "a", "completion": null}\n', "row 1"),
    ],
)
def test_a_wrong_data_file_is_one_line_with_its_place(run, models, tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    assert message in one_line_error(*run(*replaced(models, tmp_path, dataset_name=path)))


def test_a_data_set_without_answers_is_refused_by_a_method_that_reads_them(run, models, tmp_path):
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    words = [*replaced(models, tmp_path, dataset_name=path), "--method", "sft"]
    assert "method 'sft' reads dataset answers, but row 0 of the train data has none" in one_line_error(*run(*words))


def test_two_tokenizers_and_a_broken_config_are_one_line(run, models, tmp_path):
    build_gpt2(seed=5).save_pretrained(tmp_path / "other")
    words = replaced(models, tmp_path, model_name_or_path=tmp_path / "other")
    assert "student and teacher have different tokenizers: 97 ids differ, first 0" in one_line_error(*run(*words))
    config = tmp_path / "train.yaml"
    config.write_text("method: switch\n  learning_rate: 1\n")
    assert "line 2: malformed YAML" in one_line_error(*run("train", "--config", config))
    config.write_text(json.dumps({"max_steps": "many"}))
    assert "line 1: max_steps: invalid int value: 'many'" in one_line_error(*run("train", "--config", config))
