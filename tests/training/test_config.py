"""Laws of the configuration: every option does something or is refused, and bad set-ups stop at the door."""

import dataclasses
import json
import math
import types
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.tiny import EOS_ID, RAGGED_ROWS, TINY_VOCABULARY, build_gpt2, build_llama, build_tokenizer
from helpers.training import watch_batches
from transformers import TrainingArguments

from switchkd.data import prepare
from switchkd.errors import UserError
from switchkd.methods import METHODS
from switchkd.models.known import known
from switchkd.training.config import SwitchConfig
from switchkd.training.guards import refuse_launch
from switchkd.training.options import own_fields
from switchkd.training.ranges import RANGES
from switchkd.training.resolve import resolve, written_out
from switchkd.training.trainer import SwitchTrainer

MIDDLE = {"initial_threshold": 0.42, "schedule": "constant"}


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- no dead option


def _weights(trainer):
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]).tolist()


def _thresholds(trainer):
    trainer.train()
    return trainer.state.log_history[0]["rollout/threshold_nats"]


def _kept_rows(trainer):
    return len(trainer.train_dataset)


def _prompt_ids(trainer):
    return trainer.train_dataset["prompt_ids"][:]


def _supervised_tokens(trainer):
    seen = watch_batches(trainer)
    trainer.train()
    return [int(inputs["completion_mask"].sum()) for inputs, _ in seen]


TWO_TURNS = [{"messages": [{"role": role, "content": "Hi."} for role in ("user", "assistant") * 2]}]
CHAT_TOKENIZER = build_tokenizer()
CHAT_TOKENIZER.chat_template = (
    "{% for message in messages %}{{ message.content + eos_token if message.role == 'assistant' else message.content }}"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def _teacher_passes(trainer):
    trainer.train()
    return trainer.state.log_history[0]["rollout/teacher_passes"]


def _rollout_keys(trainer):
    trainer.train()
    return {key: value for key, value in trainer.state.log_history[0].items() if key in ROLLOUT_KEYS}


ROLLOUT_KEYS = {"rollout/teacher_share", "rollout/threshold_nats", "rollout/initial_threshold_nats"}


def _text(trainer):
    """The ids that the steps trained on."""
    seen = []
    get = trainer.get_batch_samples

    def watched(*args):
        batches, count = get(*args)
        seen.extend(batch["input_ids"].tolist() for batch in batches)
        return batches, count

    trainer.get_batch_samples = watched
    trainer.train()
    return seen


def _all_teacher_passes(trainer):
    trainer.train()
    return trainer.teacher_passes


def _writer_is_the_student(trainer):
    with trainer.writer.of(trainer.model) as writer:
        return writer is trainer.model


def _writer_dtype(trainer):
    with trainer.writer.of(trainer.model) as writer:
        return next(writer.parameters()).dtype


def _kept_dtype(trainer):
    dtypes = []
    loss = trainer.step_loss.loss
    watched = lambda student, teacher, inputs, count: (  # noqa: E731
        dtypes.append(inputs["teacher_hidden"].dtype),
        loss(student, teacher, inputs, count),
    )[1]
    trainer.step_loss = types.SimpleNamespace(**vars(trainer.step_loss), loss=watched, needs_teacher_pass=lambda _: 0)
    trainer.step_loss.reads_teacher = True
    trainer.train()
    return dtypes


def _stored_rows(trainer):
    trainer.train()
    return [entry["rollout/stored_rows"] for entry in trainer.state.log_history if "loss" in entry]


def _teacher_text_files(trainer):
    trainer.train()
    return sorted(path.name for path in Path(trainer.args.output_dir).parent.rglob("*.jsonl"))


def _evaluation_keys(trainer):
    return sorted(trainer.evaluate())


def _logged_keys(trainer):
    trainer.train()
    return sorted(trainer.logged_completions[0])


def _completion_lines(trainer):
    trainer.train()
    path = f"{trainer.args.output_dir}/completions.jsonl"
    try:
        with open(path, encoding="utf-8") as file:
            return len(file.readlines())
    except FileNotFoundError:
        return 0


def _student_dtype(trainer):
    return next(trainer.model.parameters()).dtype


def _teacher_dtype(trainer):
    return next(trainer.teacher_model.parameters()).dtype


def _teacher_sum(trainer):
    return float(sum(parameter.sum() for parameter in trainer.teacher_model.parameters()))


def _student_rounds(trainer):
    trainer.train()
    return trainer.teacher_passes


def _keeps_a_session(trainer):
    trainer.train()
    return known(trainer.model).session is not None


# option -> (two values, what must differ, options both runs share)
EFFECTS = {
    "method": (("kd", "switch"), _weights, {}),
    "divergence": (("forward_kl", "reverse_kl"), _weights, {"method": "kd"}),
    "teacher_weight": ((0.1, 0.9), _weights, {"method": "kd", "divergence": "generalized_jsd"}),
    "skew": ((0.1, 0.5), _weights, {"method": "kd", "divergence": "skewed_forward_kl"}),
    "loss_temperature": ((1.0, 2.0), _weights, {"method": "kd"}),
    "on_policy_fraction": ((0.0, 1.0), _weights, {"method": "gkd"}),
    "initial_threshold": ((0.1, 0.5), _thresholds, {}),
    "final_ratio": ((0.1, 0.5), _thresholds, {}),
    "horizon": ((10.0, 100.0), _thresholds, {}),
    "schedule": (("exponential", "increasing"), _thresholds, {"final_ratio": 0.01}),
    "minimum_leg": ((1, 4), _text, MIDDLE),
    "clock": (("position", "since_teacher"), _thresholds, {"final_ratio": 0.01}),
    "target_teacher_share": ((0.2, 0.8), _rollout_keys, {"schedule": "constant"}),
    "policy": (("student", "teacher"), _text, {}),
    "policy_kwargs": (({"teacher_probability": 0.0}, '{"teacher_probability": 1.0}'), _text, {"policy": "random"}),
    "mixture_weight": ((0.0, 0.9), _text, {"method": "minillm"}),
    "clip_range": ((0.01, 0.0), _weights, {"method": "minillm"}),
    "teacher_top_k": ((1, 90), _text, {"method": "skd"}),
    "divergence_multiple": ((0.1, 9.0), _text, {"method": "adaswitch", "divergence_window": 2}),
    "divergence_window": ((1, 10), _text, {"method": "adaswitch", "divergence_multiple": 0.1}),
    "trigger_threshold": ((0.0, 0.69), _text, {"method": "relay"}),
    "leg_length": ((1, 12), _text, {"method": "relay", "trigger_threshold": 0.0, "leg_budget": 1}),
    "leg_budget": ((0, 12), _text, {"method": "relay", "trigger_threshold": 0.0}),
    "kl_budget": ((0.0, 5.0), _text, {"method": "trb"}),
    "kl_budget_warmup": ((0.01, 1.0), _text, {"method": "trb", "kl_budget": 5.0, "max_steps": 2}),
    "teacher_probability": ((0.0, 1.0), _text, {"method": "random"}),
    "teacher_tokens": ((0, 12), _text, {"method": "teacher_first"}),
    "prefix_decay": ((0.1, 1.0), _text, {"method": "teacher_prefix", "max_steps": 2}),
    "truncation_start": ((0.1, 1.0), _text, {"method": "opd"}),
    "truncation_warmup": ((0.1, 1.0), _text, {"method": "truncated", "max_steps": 2}),
    "switch_position": ((0, 12), _text, {"method": "student_first"}),
    "replay_capacity": (
        (2, 5),
        _stored_rows,
        {"method": "distillm", "on_policy_fraction": 1.0, "eval_strategy": "steps", "eval_steps": 5},
    ),
    "teacher_text_file": ((None, "{folder}/named.jsonl"), _teacher_text_files, {"method": "seqkd"}),
    "ce_weight": ((0.0, 1.0), _weights, {"method": "kd"}),
    "student_token_weight": ((1.0, 0.0), _weights, MIDDLE),
    "teacher_token_weight": ((1.0, 0.0), _weights, MIDDLE),
    "reuse_teacher_hidden": ((True, False), _all_teacher_passes, {"draft_length": "4"}),
    "rollout_copy": (("never", "always"), _writer_is_the_student, {}),
    "rollout_dtype": (("float32", "bfloat16"), _writer_dtype, {}),
    "teacher_hidden_dtype": (("float32", "bfloat16"), _kept_dtype, {}),
    "eval_rouge_l_samples": ((0, 2), _evaluation_keys, {"method": "kd"}),
    "head_mass": ((0.1, 0.9), _weights, {"method": "kd", "divergence": "adaptive_kl"}),
    "max_prompt_length": ((5, 50), _kept_rows, {}),
    "columns": ((None, "prompt=completion,completion=prompt"), _prompt_ids, {"method": "kd"}),
    "template": (("none", "chat"), _prompt_ids, {"processing_class": CHAT_TOKENIZER}),
    "split_special_tokens": ((True, False), _prompt_ids, {"train_dataset": [{"prompt": "a<eos>b"}]}),
    "supervise": (
        ("last", "all"),
        _supervised_tokens,
        {"method": "kd", "train_dataset": TWO_TURNS, "processing_class": CHAT_TOKENIZER},
    ),
    "max_completion_length": ((4, 12), _weights, {"method": "kd"}),
    "temperature": ((1.0, 0.5), _weights, {}),
    "top_k": ((0, 3), _weights, {}),
    "top_p": ((1.0, 0.5), _weights, {}),
    "cuda_graphs": ((False, True), _keeps_a_session, {}),
    "draft_length": (("1", "6"), _teacher_passes, {"initial_threshold": 0.69, "schedule": "constant"}),
    "disable_dropout": ((True, False), _weights, {"method": "kd"}),
    "log_completions": ((False, True), _completion_lines, {}),
    "num_completions_to_log": ((1, 3), _completion_lines, {"log_completions": True}),
    "log_top_tokens": ((0, 2), _logged_keys, {"log_completions": True}),
    "teacher_model_name_or_path": (("{folder}/teacher", "{folder}/other"), _teacher_sum, {"method": "kd"}),
    "rollout_batch_size": ((1, 8), _student_rounds, {"per_device_train_batch_size": 8}),
    "model_init_kwargs": ((None, {"dtype": "bfloat16"}), _student_dtype, {"method": "kd"}),
    "teacher_model_init_kwargs": ((None, '{"dtype": "bfloat16"}'), _teacher_dtype, {"method": "kd"}),
}


# Options whose effect needs more than two values is shown in test_step.py; those of a GPU are refused without one
# and run with one there. What is loaded is shown in test_loading_options.py.
ELSEWHERE = {"lm_weight", "offload_teacher", "offload_teacher_hidden", "offload_rollout_copy"}
ELSEWHERE |= {"teacher_model_revision", "trust_remote_code", "allow_pickled_weights", "tokenizer_kwargs"}
ELSEWHERE |= {"chat_template_path", "chat_template_kwargs"}
ELSEWHERE |= {"teacher_sharding"}  # test_distributed.py
ELSEWHERE |= {"allow_other_inputs", "max_skipped_steps"}  # test_checkpoints.py, test_skipping.py
ELSEWHERE |= {"rollout_engine", "vllm_python", "vllm_tensor_parallel_size"}  # test_vllm_engine.py, as the next
ELSEWHERE |= {"vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"}
ELSEWHERE |= {"vllm_mode", "vllm_server_host", "vllm_server_port"}


def test_every_option_of_the_project_has_a_stated_effect():
    inherited = {option.name for option in dataclasses.fields(TrainingArguments)}
    own = {option.name for option in dataclasses.fields(SwitchConfig)} - inherited
    assert own == EFFECTS.keys() | ELSEWHERE


def test_every_option_has_help():
    own = own_fields()
    missing = [
        f.name for f in dataclasses.fields(SwitchConfig) if f.name in own and len(f.metadata.get("help", "")) < 10
    ]
    assert missing == []


@pytest.mark.parametrize("name", list(EFFECTS))
def test_option_changes_something(make_trainer, tmp_path, name):
    values, observe, shared = EFFECTS[name]
    seen = []
    for place, value in enumerate(values):
        student, teacher = build_gpt2(train=True), build_gpt2(seed=1)
        if name.endswith("init_kwargs"):
            for model, folder in ((student, "student"), (teacher, "teacher")):
                model.save_pretrained(tmp_path / folder)
                build_tokenizer().save_pretrained(tmp_path / folder)
            student, teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
        if name == "teacher_model_name_or_path":
            teacher = None
            build_gpt2(seed=1 + place).save_pretrained(value.format(folder=tmp_path))
            build_tokenizer().save_pretrained(value.format(folder=tmp_path))
        options = shared | {name: value, "output_dir": str(tmp_path / str(place))}
        if isinstance(value, str) and "{folder}" in value:
            options[name] = value.format(folder=tmp_path)
        if "eval_strategy" in options or name.startswith("eval_"):
            options["eval_dataset"] = Dataset.from_list(RAGGED_ROWS[:4])
        torch.manual_seed(0)
        seen.append(observe(make_trainer(student, teacher, **options)))
    assert seen[0] != seen[1]


def test_remove_unused_columns_and_logging_steps_keep_their_own_defaults():
    assert SwitchConfig(use_cpu=True).logging_steps == 10
    assert SwitchConfig(use_cpu=True).remove_unused_columns is False
    assert "remove_unused_columns must stay False" in refusal(lambda: SwitchConfig(remove_unused_columns=True))


# ---- values outside their range


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_temperature": 0.0}, "loss_temperature must be a finite number > 0, got 0.0"),
        ({"max_prompt_length": 0}, "max_prompt_length must be >= 1, got 0"),
        ({"max_completion_length": -1}, "max_completion_length must be >= 1, got -1"),
        ({"num_completions_to_log": 0, "log_completions": True}, "num_completions_to_log must be >= 1, got 0"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction must lie in [0, 1], got 1.5"),
        ({"draft_length": "many"}, "draft_length must be \"auto\" or an integer >= 1, got 'many'"),
        ({"draft_length": 2.5}, "draft_length must be \"auto\" or an integer >= 1, got '2.5'"),
        ({"draft_length": "0"}, "draft_length must be \"auto\" or an integer >= 1, got '0'"),
        ({"temperature": -1.0}, "temperature must be >= 0 (0 is greedy), got -1.0"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1], got 0.0"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter must stay False"),
        ({"ce_weight": float("inf")}, "ce_weight must be a finite number >= 0, got inf"),
        ({"loss_temperature": float("inf")}, "loss_temperature must be a finite number > 0, got inf"),
        ({"rollout_batch_size": 0}, "rollout_batch_size must be >= 1, got 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 does nothing here"),
        (
            {"model_init_kwargs": "{dtype: bfloat16}"},
            "model_init_kwargs must be a JSON object, got '{dtype: bfloat16}'",
        ),
        ({"teacher_model_init_kwargs": "[1]"}, "teacher_model_init_kwargs must be a JSON object, got [1]"),
    ],
)
def test_values_outside_their_range_are_refused_when_the_config_is_made(options, message):
    assert message in refusal(lambda: SwitchConfig(use_cpu=True, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "swich"}, "unknown method 'swich'; did you mean 'switch'?"),
        ({"divergence": "kl"}, "unknown divergence 'kl'; choose one of"),
        ({"initial_threshold": 0.7}, "initial_threshold must lie in [0, ln 2 nats], got 0.7"),
        ({"initial_threshold": -0.1}, "initial_threshold must lie in [0, ln 2 nats], got -0.1"),
        ({"final_ratio": 0.0}, "final_ratio must lie in (0, 1], got 0.0"),
        ({"horizon": 0.0}, "horizon must be > 0 tokens, got 0.0"),
        ({"schedule": "cosine"}, "schedule must be one of exponential, linear, constant, increasing, got 'cosine'"),
    ],
)
def test_values_outside_their_range_are_refused_before_training(make_trainer, options, message):
    assert message in refusal(lambda: make_trainer(build_gpt2(), build_gpt2(seed=1), **options))


# ---- options that would do nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "kd", "initial_threshold": 0.3}, "initial_threshold=0.3 does nothing with method 'kd'"),
        ({"method": "gkd", "schedule": "linear"}, "schedule=linear does nothing with method 'gkd'"),
        ({"method": "sft", "on_policy_fraction": 0.5}, "on_policy_fraction=0.5 does nothing with method 'sft'"),
        ({"method": "kd", "temperature": 0.7}, "temperature=0.7 does nothing: method 'kd' rolls nothing out"),
        ({"method": "sft", "top_k": 5}, "top_k=5 does nothing: method 'sft' rolls nothing out"),
        ({"method": "kd", "top_p": 0.9}, "top_p=0.9 does nothing"),
        ({"method": "kd", "draft_length": "4"}, "draft_length=4 does nothing"),
        ({"method": "kd", "log_completions": True}, "log_completions=True does nothing"),
        ({"log_top_tokens": 2}, "log_top_tokens=2 does nothing: log_completions is off"),
        ({"num_completions_to_log": 2}, "num_completions_to_log=2 does nothing: log_completions is off"),
        ({"method": "gkd", "draft_length": "4"}, "draft_length=4 does nothing: no teacher checks the rollouts"),
        (
            {"method": "gkd", "on_policy_fraction": 0.0, "temperature": 0.5},
            "temperature=0.5 does nothing: method 'gkd' rolls nothing out at on_policy_fraction 0",
        ),
        ({"on_policy_fraction": 0.0, "initial_threshold": 0.2}, "initial_threshold=0.2 does nothing"),
        ({"schedule": "constant", "final_ratio": 0.5}, "final_ratio=0.5 does nothing: schedule is constant"),
        ({"schedule": "constant", "horizon": 50}, "horizon=50 does nothing: schedule is constant"),
        ({"method": "sft", "loss_temperature": 2.0}, "loss_temperature=2.0 does nothing with cross_entropy"),
        ({"skew": 0.2}, "skew=0.2 does nothing with reverse_kl"),
        ({"teacher_weight": 0.2}, "teacher_weight=0.2 does nothing with reverse_kl"),
        (
            {"method": "sft", "teacher_model_init_kwargs": {"dtype": "float32"}},
            "teacher_model_init_kwargs={'dtype': 'float32'} does nothing: no teacher is used",
        ),
        (
            {"teacher_model_init_kwargs": {"dtype": "float32"}},
            "does nothing: the teacher is given as an object",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(make_trainer, options, message):
    assert message in refusal(lambda: make_trainer(build_gpt2(), build_gpt2(seed=1), **options))


def test_the_values_a_method_takes_anyway_may_be_written_out(make_trainer):
    """A run's resolved config names every value that holds; the next run must be able to read it."""
    constant = {"schedule": "constant", "final_ratio": 0.1, "horizon": 12, "initial_threshold": 0.3}
    make_trainer(build_gpt2(), build_gpt2(seed=1), **constant)
    make_trainer(build_gpt2(), build_gpt2(seed=1), on_policy_fraction=0.0, initial_threshold=0.3, final_ratio=0.1)
    make_trainer(build_gpt2(), build_gpt2(seed=1), method="gkd", teacher_weight=0.5, on_policy_fraction=0.5)
    make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", divergence="forward_kl", on_policy_fraction=0.0)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.may_roll_out])
def test_a_runs_own_resolved_options_are_not_refused_by_the_next_run(name):
    """At on_policy_fraction 0 the written-out policy options were called idle for 10 of the 16 rolling methods."""
    for fraction in (0.0, 1.0):
        options = {"use_cpu": True, "method": name, "on_policy_fraction": fraction}
        plan = resolve(SwitchConfig(**options))
        written = {**options, **written_out(plan)}
        assert resolve(SwitchConfig(**written)) == plan


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics", "compute_loss_func", "model_init"])
def test_arguments_of_the_trainer_that_would_do_nothing_are_refused(make_trainer, name):
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd")
    arguments = {"args": trainer.args, "processing_class": build_tokenizer(), name: lambda *_: None}
    message = refusal(lambda: SwitchTrainer(build_gpt2(), build_gpt2(seed=1), **arguments))
    assert message.startswith(f"{name} is not supported: ")


def test_plain_training_arguments_are_refused_in_one_line():
    args = TrainingArguments(use_cpu=True)
    message = refusal(lambda: SwitchTrainer(build_gpt2(), build_gpt2(seed=1), args=args))
    assert "args must be a SwitchConfig, got a TrainingArguments" in message


# ---- data in the shapes that people hold


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(RAGGED_ROWS)

    def __getitem__(self, index):
        return RAGGED_ROWS[index]


def _frame(rows):
    return pytest.importorskip("pandas").DataFrame(rows)


@pytest.mark.parametrize("shape", [list, lambda rows: _Rows(), _frame], ids=["list", "torch", "pandas"])
def test_lists_torch_and_pandas_data_train_as_a_dataset_does(make_trainer, shape):
    expected = make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd").train_dataset.to_list()
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", train_dataset=shape(RAGGED_ROWS))
    assert trainer.train_dataset.to_list() == expected


def test_data_that_are_no_records_are_refused_in_one_line(make_trainer):
    rows = Dataset.from_list(RAGGED_ROWS)
    for data, message in (
        (DatasetDict(train=rows, test=rows), "train_dataset holds several splits (train, test)"),
        ([1, 2], "train_dataset: record 0 is a int, not a dict"),
        ("rows.jsonl", "train_dataset is a str, not records"),
    ):
        make = lambda data=data: make_trainer(build_gpt2(), build_gpt2(seed=1), train_dataset=data)  # noqa: E731
        assert message in refusal(make)


# ---- models and data that do not fit together


def _save(folder, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_different_tokenizers_are_refused_naming_the_first_ids(make_trainer, tmp_path):
    swapped = [*TINY_VOCABULARY]
    swapped[10], swapped[11] = swapped[11], swapped[10]
    student = _save(tmp_path / "student", build_gpt2(), build_tokenizer())
    teacher = _save(tmp_path / "teacher", build_gpt2(seed=1), build_tokenizer(swapped))
    message = refusal(lambda: make_trainer(student, teacher, processing_class=None))
    assert "different tokenizers: 2 ids differ, first 10 ('(' against ')')" in message


def test_models_by_folder_load_with_the_students_tokenizer_in_float32(make_trainer, tmp_path):
    student = _save(tmp_path / "student", build_gpt2().to(torch.bfloat16), build_tokenizer())
    teacher = _save(tmp_path / "teacher", build_gpt2(seed=1).to(torch.bfloat16), build_tokenizer())
    trainer = make_trainer(student, teacher, processing_class=None, method="kd")
    assert _student_dtype(trainer) == torch.float32
    assert _teacher_dtype(trainer) == torch.bfloat16
    assert trainer.processing_class.eos_token_id == EOS_ID
    trainer.train()


def test_a_method_without_a_teacher_does_not_load_the_one_that_is_named(make_trainer):
    assert make_trainer(build_gpt2(), "no/such/teacher/folder", method="sft").teacher_model is None


def test_missing_or_doubled_models_are_refused(make_trainer):
    assert "method 'switch' needs a teacher; give teacher_model" in refusal(lambda: make_trainer(build_gpt2()))
    assert "give processing_class, the tokenizer" in refusal(
        lambda: make_trainer(build_gpt2(), build_gpt2(seed=1), processing_class=None)
    )
    model = build_gpt2()
    assert "model and teacher_model are the same object" in refusal(lambda: make_trainer(model, model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    message = refusal(lambda: make_trainer("./no/such/model", build_gpt2(), processing_class=build_tokenizer()))
    assert message == "student folder ./no/such/model does not exist; give a model folder or a hub id"


def test_rows_longer_than_a_context_are_refused_before_training(make_trainer):
    short = build_llama(seed=1, max_position_embeddings=20)
    message = refusal(lambda: make_trainer(build_gpt2(), short))
    assert "longest prompt 15 + max_completion_length 12 exceed the teacher's context of 20 tokens" in message
    # Text of the data set needs its own length only: at most 13 + 6 tokens here.
    make_trainer(build_gpt2(), short, method="kd", train_dataset=Dataset.from_list(RAGGED_ROWS[4:6]))
    message = refusal(lambda: make_trainer(build_gpt2(), short, method="kd"))
    assert "longest prompt + answer, 23 tokens, exceed the teacher's context of 20" in message


def test_ids_beyond_a_models_vocabulary_are_refused_not_an_index_error(make_trainer):
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 79)
    message = refusal(lambda: make_trainer(build_gpt2(), build_gpt2(seed=1, vocab_size=80, **ends)))
    assert "the data hold token id 92, but the teacher knows only ids below 80" in message


def test_padding_token_newer_than_the_model_does_not_reach_it(make_trainer):
    """Adding a padding token without resizing the model is common; masks, not ids, say what is padding."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == len(TINY_VOCABULARY)
    steady = {**MIDDLE, "draft_length": "4"}
    padded = make_trainer(build_gpt2(), build_gpt2(seed=1), **steady, processing_class=tokenizer)
    plain = make_trainer(build_gpt2(), build_gpt2(seed=1), **steady)
    assert _weights(padded) == _weights(plain)


def test_rows_without_answers_are_refused_only_where_answers_are_read(make_trainer):
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in RAGGED_ROWS])
    for options in ({"method": "kd"}, {"method": "gkd"}, {"method": "sft"}):
        message = refusal(
            lambda options=options: make_trainer(build_gpt2(), build_gpt2(seed=1), train_dataset=prompts, **options)
        )
        assert f"method '{options['method']}' reads dataset answers, but row 0 of the train data has none" in message
    message = refusal(lambda: make_trainer(build_gpt2(), build_gpt2(seed=1), eval_dataset=prompts))
    assert message == "evaluation reads dataset answers, but row 0 of the eval data has none"
    make_trainer(build_gpt2(), build_gpt2(seed=1), train_dataset=prompts).train()


def test_the_replay_store_refuses_teacher_prompts_it_would_forget(make_trainer):
    rows = Dataset.from_list([{**row, "teacher_prompt": "Hint: " + row["prompt"]} for row in RAGGED_ROWS])
    options = {"method": "distillm", "eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 1}
    message = refusal(lambda: make_trainer(build_gpt2(), build_gpt2(seed=1), train_dataset=rows, **options))
    assert "the train data have a teacher_prompt, which the store of method 'distillm' does not keep" in message


def test_self_distillation_without_privileged_prompts_is_refused(make_trainer):
    assert "needs a column teacher_prompt" in refusal(lambda: make_trainer(build_gpt2(), method="ssd"))


def test_prepared_and_raw_data_train_alike(make_trainer):
    raw = Dataset.from_list(RAGGED_ROWS)
    prepared, _ = prepare(raw, build_tokenizer(), max_prompt_length=256, max_completion_length=12)
    first = make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", train_dataset=raw)
    second = make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", train_dataset=prepared)
    assert _weights(first) == _weights(second)
    assert first.prepare_reports["train"].truncated_completions == 1


# ---- launches


def launch(trainer):
    refuse_launch(gpus=trainer.args.n_gpu, writes_text=trainer.plan.writes_text, flat=trainer.has_flat_parameters)


@pytest.mark.parametrize(("method", "flat"), [("switch", True), ("switch", False), ("kd", True)])
def test_flat_parameters_of_fsdp1_are_refused_where_rollouts_are_written(make_trainer, monkeypatch, method, flat):
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), method=method)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    plugin = type("Plugin", (), {"use_orig_params": not flat})()
    monkeypatch.setattr(type(trainer.accelerator.state), "fsdp_plugin", plugin, raising=False)
    if method == "switch" and flat:
        assert "rollouts under FSDP1 need fsdp_use_orig_params true" in refusal(lambda: launch(trainer))
    else:
        launch(trainer)


def test_a_model_that_was_sharded_while_it_was_loaded_is_refused(make_trainer):
    """The engine would read empty tensors: ZeRO-3 leaves them in the place of weights."""
    teacher = build_gpt2(seed=1)
    teacher.lm_head.weight.ds_id = 1
    assert "teacher_model was loaded under ZeRO-3" in refusal(lambda: make_trainer(build_gpt2(), teacher))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_sharding": "fsdp2"}, "teacher_sharding=fsdp2 does nothing: there is one process"),
        ({"teacher_sharding": "fsdp2", "method": "sft"}, "teacher_sharding=fsdp2 does nothing: no teacher is used"),
        ({"teacher_sharding": "zero3"}, "teacher_sharding must be one of none, fsdp2, got 'zero3'"),
    ],
)
def test_sharding_of_the_teacher_is_refused_where_it_would_do_nothing(make_trainer, options, message):
    assert message in refusal(lambda: make_trainer(build_gpt2(), build_gpt2(seed=1), **options))


def test_a_tensor_parallel_teacher_is_refused_because_its_processes_would_wait_for_each_other_for_ever():
    message = refusal(lambda: SwitchConfig(teacher_model_init_kwargs={"tp_plan": "auto"}))
    assert "teacher_model_init_kwargs: tp_plan splits a model over processes that read the same text" in message


def test_the_gpus_over_which_a_teacher_is_spread_do_not_split_the_batch(tmp_path):
    def trainer(teacher):
        args = SwitchConfig(output_dir=str(tmp_path), use_cpu=True, initial_threshold=0.3, max_completion_length=8)
        args._n_gpu = 2  # what transformers finds on a machine with two
        rows = Dataset.from_list(RAGGED_ROWS)
        return SwitchTrainer(build_gpt2(), teacher, args, train_dataset=rows, processing_class=build_tokenizer())

    assert "2 GPUs in one process would split every rollout" in refusal(lambda: trainer(build_gpt2(seed=1)))
    teacher = build_gpt2(seed=1)
    teacher.hf_device_map = {"transformer.wte": 0, "transformer.h": 1}
    assert trainer(teacher).args.n_gpu == 1


def test_weights_on_the_first_process_only_are_refused_because_the_teacher_would_have_none(make_trainer, monkeypatch):
    """`fsdp_cpu_ram_efficient_loading` leaves both models empty elsewhere, and nobody fills the teacher."""
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1))
    plugin = type("Plugin", (), {"cpu_ram_efficient_loading": True, "activation_checkpointing": False})()
    plugin.state_dict_type, plugin.fsdp_version = "FULL_STATE_DICT", 2
    monkeypatch.setattr(type(trainer.accelerator.state), "fsdp_plugin", plugin, raising=False)
    assert "fsdp_cpu_ram_efficient_loading leaves the teacher" in refusal(trainer.create_accelerator_and_postprocess)


def test_several_processes_on_cpus_need_not_be_told_so(monkeypatch):
    """`accelerate launch` without --use_cpu ended in "Default process group has not been initialized"."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(SwitchConfig, "_setup_devices", torch.device("cpu"), raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert SwitchConfig().use_cpu


def test_several_gpus_in_one_process_are_refused(make_trainer, monkeypatch):
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1))
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    assert "2 GPUs in one process would split every rollout" in refusal(lambda: launch(trainer))


def test_trainer_without_a_config_uses_the_defaults():
    assert "give teacher_model" in refusal(lambda: SwitchTrainer(build_gpt2(), processing_class=build_tokenizer()))


def test_config_survives_json(tmp_path):
    """Checkpoints and run folders keep it as JSON."""
    config = SwitchConfig(use_cpu=True, output_dir=str(tmp_path), model_init_kwargs='{"dtype": "float32"}', skew=0.2)
    values = json.loads(config.to_json_string())
    assert values["skew"] == 0.2
    assert values["model_init_kwargs"] == {"dtype": "float32"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -2.0, 1e24])
@pytest.mark.parametrize("name", RANGES)
def test_numbers_of_transformers_that_cannot_be_are_refused_at_the_door(name, value):
    """`learning_rate nan` ended in a traceback, `max_grad_norm -1` in nothing at all."""
    assert f"{name} must be a finite number >" in refusal(lambda: SwitchConfig(use_cpu=True, **{name: value}))


def test_numbers_that_transformers_takes_are_taken(tmp_path):
    taken = {"warmup_steps": 0.1, "max_grad_norm": 0.0, "logging_steps": 0.5, "adam_beta1": 0.0, "learning_rate": 0.0}
    config = SwitchConfig(output_dir=str(tmp_path), use_cpu=True, save_total_limit=None, **taken)
    assert {name: getattr(config, name) for name in taken} == taken
    assert "adam_beta1 must be a finite number >= 0 and < 1, got 1.0" in refusal(lambda: SwitchConfig(adam_beta1=1.0))
    assert "lr_scheduler_kwargs must be a JSON object" in refusal(lambda: SwitchConfig(lr_scheduler_kwargs="x"))
