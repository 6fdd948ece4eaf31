"""No silence: what a user would want to know is one warning line, in Python and on the command line."""

import warnings

import pytest
import torch
from datasets import Dataset
from helpers.tiny import build_gpt2, build_llama, build_tokenizer

from switchkd.evaluation import evaluate
from switchkd.models.loading import default_device, load_model
from switchkd.models.vocabulary import check_tokenizers

SUBJECTS = ("teacher wrote", "ROUGE", "float16", "chat templates", "ends its texts")


def said(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(one.message) for one in caught if any(word in str(one.message) for word in SUBJECTS)]


PAIR = (build_gpt2(seed=1), build_gpt2(seed=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_threshold": 0.69, "schedule": "constant"}, "0.0% of the tokens of the last 5 rollouts: initial_thr"),
        ({"initial_threshold": 0.0}, "100.0% of the tokens of the last 5 rollouts: initial_threshold 0 does not fit"),
        ({"method": "skd", "teacher_top_k": 98}, "0.0% of the tokens of the last 5 rollouts: the policy leaves every"),
    ],
)
def test_one_writer_alone_is_said_once_with_the_way_out(make_trainer, options, message):
    trainer = make_trainer(*map(torch.nn.Module.float, PAIR), max_steps=7, learning_rate=1e-4, **options)
    [warning] = said(trainer.train)
    assert message in warning


@pytest.mark.parametrize("options", [{}, {"method": "opd"}, {"method": "teacher_first", "teacher_tokens": 99}])
def test_nothing_is_said_of_two_writers_or_of_methods_that_have_one(make_trainer, options):
    trainer = make_trainer(build_llama(seed=1), build_llama(seed=2), max_steps=6, learning_rate=1e-4, **options)
    assert said(trainer.train) == []


def test_models_that_agree_everywhere_are_named_as_the_reason(make_trainer):
    same = build_gpt2(seed=1), build_gpt2(seed=1)
    [warning] = said(make_trainer(*same, max_steps=6, learning_rate=0.0).train)
    assert "no threshold reaches the 50% of target_teacher_share" in warning


# ---- tokenizers, scores, precision


def test_two_chat_templates_or_ends_of_sequence_are_said():
    student, teacher = build_tokenizer(), build_tokenizer()
    assert said(lambda: check_tokenizers(student, teacher)) == []
    student.chat_template, teacher.chat_template = "{{ messages }}", "{{ messages[0] }}"
    [warning] = said(lambda: check_tokenizers(student, teacher))
    assert "conversations are written with the student's" in warning
    teacher.chat_template = None
    teacher.eos_token = "a"
    [warning] = said(lambda: check_tokenizers(student, teacher))
    assert f"(id {teacher.eos_token_id}): a rollout ends at either" in warning


@pytest.mark.parametrize(("texts", "warns"), [(["да", "你好", "a"], True), (["yes", "1", "5"], False)])
def test_references_that_rouge_cannot_see_are_said(tiny_tokenizer, texts, warns):
    data = Dataset.from_dict(
        {"prompt_ids": [[5]] * 3, "completion_ids": [[6]] * 3, "references": [[one] for one in texts]}
    )
    data = data.add_column("prompt", ["p"] * 3)
    found = said(
        lambda: evaluate(
            build_gpt2(), tiny_tokenizer, data, decoding_seeds=[1], max_completion_length=2, progress=False
        )
    )
    assert [one.partition(":")[0] for one in found] == ["2 of 3 references have no letter a-z and no digit"] * warns


def test_float16_on_a_cpu_is_said(tmp_path):
    build_gpt2().half().save_pretrained(tmp_path)
    if default_device().type == "cpu":
        [warning] = said(lambda: load_model(str(tmp_path), role="teacher"))
        assert "teacher is in float16" in warning
