"""The laws of rollouts on the real vLLM; `make test-vllm` builds its environment and sets SWITCHKD_VLLM_PYTHON.

Every trap of vLLM that tests/engine/test_vllm_adapter.py names on a stub is met here by the real scheduler and runner.
"""

import math

import pytest
import torch
from helpers.pairs import make_prompts
from helpers.vllm_real import MARKS, OPTIONS, SETTINGS, SWITCH, TIGHT, both, learn, pair

from switchkd import StudentPolicy, SwitchPolicy, UserError
from switchkd.engine.vllm.private import WANTED
from switchkd.vllm import Engine

pytestmark = MARKS


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.fixture(scope="module")
def engine(models):
    with Engine(*models, **OPTIONS) as found:
        yield found


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


def test_traps_3_5_7_and_8_preemption_small_budgets_a_kept_cache_and_new_weights(models):
    """Too few blocks for the batch: requests are preempted, and their texts asked on. With a cache of prefixes."""
    student, teacher = pair()
    prompts = make_prompts(16, longest=40, shortest=2)
    options = {"policy": SwitchPolicy.of(initial_threshold=0.3, minimum_leg=2), "max_new_tokens": 60}
    with Engine(student, teacher, **OPTIONS, **TIGHT, enable_prefix_caching=True, max_num_batched_tokens=128) as engine:
        for eos in (None, [7, 40]):
            found = both(engine, (student, teacher), prompts, eos_token_id=eos, **options)
            if eos is None:
                assert found.stats["undrafted"] > 0
        learn(student, teacher)
        engine.load_student(student)
        after = both(engine, (student, teacher), prompts, **options)
        assert not torch.equal(found.completion_ids, after.completion_ids)
        with pytest.raises(UserError, match="40 tokens, 100 new ones and 10 of slack exceed max_model_len 128"):
            engine.roll_out([list(range(40))], policy=SWITCH, max_new_tokens=100)
        engine._child.process.kill()
        with pytest.raises(UserError, match="the engine's process ended by SIGKILL") as caught:
            engine.roll_out(*prompts, **options)
        assert "\n" not in str(caught.value)


def test_a_student_alone_writes_what_roll_out_writes_preempted_too_and_with_new_weights(models):
    student, teacher = pair()
    prompts = make_prompts(16, longest=40)
    assert int(prompts[1].sum(-1).min()) == 1  # no second token is needed here
    with Engine(student, None, **OPTIONS, **TIGHT, max_num_batched_tokens=128) as engine:
        for options in ({}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}, {"eos_token_id": [7, 40]}):
            both(engine, (student, None), prompts, policy=StudentPolicy(), max_new_tokens=60, **options)
        learn(student, teacher)
        engine.load_student(student)
        both(engine, (student, None), prompts, policy=StudentPolicy())
