"""One plain pass of each model over the finished text says again what the rollout compared."""

import pytest
import torch
from helpers.tiny import build_gpt2, build_tokenizer

from switchkd.engine import roll_out
from switchkd.evaluation.top_tokens import top_tokens
from switchkd.policies import StudentPolicy, SwitchPolicy

TOKENIZER = build_tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("Hello", "1 + 1 =")]


@pytest.fixture(scope="module")
def pair():
    return build_gpt2(seed=1), build_gpt2(seed=2, n_layer=3)


def rolled_out(pair, policy=None, **options):
    policy = policy or SwitchPolicy(initial_threshold=0.45, horizon=20)
    return roll_out(*pair, PROMPTS, policy=policy, max_new_tokens=20, eos_token_id=TOKENIZER.eos_token_id, **options)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}])
def test_the_divergences_and_writers_are_those_of_the_rollout(pair, sampling):
    rollout = rolled_out(pair, draft_length=4, **sampling)
    found = top_tokens(*pair, rollout, TOKENIZER, count=3, **sampling)
    for row, seen in zip(rollout.to_dicts(), found, strict=True):
        assert [one["jsd_nats"] for one in seen] == pytest.approx(row["divergence"], abs=1e-5)
        above = [one["jsd_nats"] > threshold for one, threshold in zip(seen, row["threshold"], strict=True)]
        assert above == [author == "teacher" for author in row["author"]]


def test_the_likeliest_tokens_are_those_of_each_model_alone(pair):
    rollout = rolled_out(pair)
    found = top_tokens(*pair, rollout, TOKENIZER, count=4)
    for prompt, completion, seen in zip(PROMPTS, rollout.completions(), found, strict=True):
        for name, model in zip(("student", "teacher"), pair, strict=True):
            for place, one in enumerate(seen):
                with torch.no_grad():
                    probabilities = model(torch.tensor([prompt + completion[:place]])).logits[0, -1].softmax(-1)
                values, ids = probabilities.topk(4)
                assert [top["id"] for top in one[name]] == ids.tolist()
                assert [top["probability"] for top in one[name]] == pytest.approx(values.tolist(), rel=1e-4)
                assert [top["token"] for top in one[name]] == [TOKENIZER.decode([index]) for index in ids.tolist()]


def test_tokens_that_sampling_excludes_are_not_listed(pair):
    found = top_tokens(*pair, rolled_out(pair, top_k=2), TOKENIZER, count=5, top_k=2)
    assert all(len(one[name]) == 2 for seen in found for one in seen for name in ("student", "teacher"))
    assert sum(top["probability"] for top in found[0][0]["teacher"]) == pytest.approx(1.0)
    excluded = top_tokens(*pair, rolled_out(pair), TOKENIZER, count=5, excluded_ids=[5, 6])
    assert not {5, 6} & {top["id"] for seen in excluded for one in seen for top in one["student"]}


def test_without_a_teacher_there_is_nothing_to_compare(pair):
    rollout = rolled_out((pair[0], None), StudentPolicy())
    found = top_tokens(pair[0], None, rollout, TOKENIZER, count=2)
    assert all(one.keys() == {"student"} for seen in found for one in seen)
    assert [len(seen) for seen in found] == rollout.completion_mask.sum(1).tolist()


def test_the_modes_of_the_models_are_left_as_they_were(pair):
    student, teacher = build_gpt2(seed=1, train=True), pair[1]
    top_tokens(student, teacher, rolled_out(pair), TOKENIZER, count=1)
    assert student.training and not teacher.training
