"""The teacher's guidance on other writers' text: equal where nothing was written, whole where the teacher wrote."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers.guidance import diagnosed
from helpers.pairs import make_pair
from helpers.tiny import EOS_ID, RAGGED_ROWS

from switchkd.errors import UserError
from switchkd.evaluation.guidance import Quality, Text, guidance, kept, positions_below, tokens_from
from switchkd.evaluation.scorers import Scorer
from switchkd.policies import RandomPolicy, StudentPolicy, SwitchPolicy, TeacherPolicy

POLICIES = {
    "student": StudentPolicy(),
    "random": RandomPolicy(0.5),
    "switch": SwitchPolicy(0.1, horizon=12),
    "teacher": TeacherPolicy(),
}
#: Random models know no words: a score that any two texts have.
LETTERS = Scorer("letters", lambda prompt, answer, references: len(set(answer) & set(references[0])) / 100)


def texts_of(pair):
    return {"dataset": pair.answers()} | {name: pair.write(policy) for name, policy in POLICIES.items()}


def test_after_no_tokens_all_writers_have_the_same_guidance(make_model):
    pair = diagnosed((make_model(seed=1), make_model(seed=2)))
    scores = guidance(pair, texts_of(pair), [0, 3], Quality(pair, LETTERS))
    first = {tuple(values[:, 0]) for values in scores.values()}
    assert len(first) == 1 and np.isfinite(list(first)).all() and len(set(*first)) > 1
    assert len({tuple(np.nan_to_num(values[:, 1])) for values in scores.values()}) > 1


def test_a_student_equal_to_its_teacher_loses_nothing():
    teacher = make_pair("gpt2")[1]
    pair = diagnosed((copy.deepcopy(teacher), teacher))
    texts = texts_of(pair)
    scores = guidance(pair, texts, [0, 2, 5], Quality(pair, LETTERS))
    for name in POLICIES:
        assert [text.ids for text in texts[name]] == [text.ids for text in texts["teacher"]]
        found = kept(scores[name], scores["teacher"])
        assert found is not None and found.share is not None
        assert found.share.value == 1.0 and found.share.interval == (1.0, 1.0)


@pytest.mark.parametrize("position", [0, 1, 4, 7])
def test_a_greedy_teacher_goes_on_from_its_own_text_as_it_did(make_model, position):
    pair = diagnosed((make_model(seed=1), make_model(seed=2)), temperature=0.0)
    texts = pair.write(TeacherPolicy())
    starts = [(row, tuple(text.ids[:position])) for row, text in enumerate(texts) if len(text.ids) > position]
    written = pair.continuations(starts)
    assert starts and all([*ids, *written[row, ids]] == texts[row].ids for row, ids in starts)


def test_continued_text_of_the_teacher_is_distributed_as_its_text():
    """Two statistics of the token that follows against their expectation given the first token, which was written.

    With the noise of the text used again in its continuation, the second token equals the first too often.
    """
    rows = 1200
    pair = diagnosed(rows=[{"prompt": "ab", "completion": "x"}] * rows, length=2, batch_size=400)
    texts = pair.write(TeacherPolicy())
    starts = [(row, tuple(text.ids[:1])) for row, text in enumerate(texts) if text.ids[0] != EOS_ID]
    written = pair.continuations(starts)
    assert len(starts) > rows / 2
    inputs = torch.tensor([[*pair.data[row]["prompt_ids"], *ids] for row, ids in starts])
    with torch.no_grad():
        log_probs = pair.teacher.eval()(inputs).logits[:, -1].double().log_softmax(-1)
    second = torch.tensor([written[start][0] for start in starts])
    repeats = torch.nn.functional.one_hot(inputs[:, -1], log_probs.shape[-1]).double()
    for value in (-log_probs, repeats):
        expected = (log_probs.exp() * value).sum(-1)
        variance = (log_probs.exp() * value.square()).sum(-1) - expected.square()
        found = value.gather(1, second.unsqueeze(1)).squeeze(1)
        assert abs(float((found - expected).sum())) < 4 * math.sqrt(float(variance.sum()))


def test_what_follows_a_start_depends_on_nothing_that_is_written_beside_it():
    pair = diagnosed(length=40)
    starts = [(row, tuple(text.ids[:n])) for row, text in enumerate(pair.write(StudentPolicy())) for n in (0, 1, 2, 9)]
    together = pair.continuations(starts)
    assert all(len(ids) + len(following) <= 40 for (_, ids), following in together.items())
    for start in starts[::3]:
        assert pair.continuations([start])[start] == together[start]


def test_starts_of_several_lengths_fit_a_context_that_only_just_holds_each_of_them():
    student, teacher = make_pair("llama")
    pair = diagnosed((student, teacher), length=40)
    texts = pair.write(StudentPolicy())
    starts = [(row, tuple(text.ids[:n])) for row, text in enumerate(texts) for n in (0, 1, 4, 5)]
    roomy = pair.continuations(starts)
    for model in (student, teacher):
        model.config.max_position_embeddings = max(map(len, pair.data["prompt_ids"])) + 40
    assert pair.continuations(starts) == roomy


def test_a_teacher_with_its_prompt_goes_on_under_it():
    rows = [{**row, "teacher_prompt": row["prompt"] + " hint"} for row in RAGGED_ROWS]
    hinted, plain = diagnosed(rows=rows, temperature=0.0), diagnosed(temperature=0.0)
    starts = [(row, tuple(text.ids[:2])) for row, text in enumerate(plain.write(StudentPolicy()))]
    long_prompts = diagnosed(rows=[{**row, "prompt": row["prompt"] + " hint"} for row in RAGGED_ROWS], temperature=0.0)
    assert hinted.continuations(starts) == long_prompts.continuations(starts) != plain.continuations(starts)


def test_rouge_l_is_of_what_follows_against_what_is_left_of_the_best_answer():
    answers = [["one two three", "one two four five"], ["red."]]
    rows = [{"prompt": "p", "completion": accepted} for accepted in answers]
    pair = diagnosed(rows=rows, length=30)
    quality, encode = Quality(pair), lambda text: pair.tokenizer(text)["input_ids"]
    assert quality(0, encode("xxx xxx"), encode(" four five")) == 100.0
    assert quality(0, encode("xxx xxx"), [*encode(" three"), EOS_ID]) == 100.0
    assert quality(0, encode("xxx xxx"), encode("one two")) == 0.0
    assert quality.is_defined(1, 2) and not quality.is_defined(1, 3), "a full stop is no word"
    assert not quality.is_defined(1, 99)


def test_a_scorer_sees_the_whole_text():
    seen = []

    def spy(prompt, answer, references):
        seen.append((prompt, answer, references))
        return 0.25

    pair = diagnosed()
    encode = pair.tokenizer
    assert Quality(pair, Scorer("spy", spy))(1, encode("he")["input_ids"], [*encode("llo")["input_ids"], EOS_ID]) == 25
    assert seen == [("Say hello:", "hello", ["hello"])]


def test_only_texts_and_answers_that_go_on_are_scored():
    pair = diagnosed()
    texts = texts_of(pair)
    positions = [0, 4, 8]
    quality = Quality(pair)
    for name, scores in guidance(pair, texts, positions, quality).items():
        for row, text in enumerate(texts[name]):
            goes_on = [len(text.ids) > n and quality.is_defined(row, n) for n in positions]
            assert (~np.isnan(scores[row])).tolist() == goes_on


def test_guidance_kept_is_a_ratio_over_rows_and_positions_that_both_have():
    nan = np.nan
    scores = np.array([[50.0, nan, 10.0], [20.0, 40.0, nan], [nan, nan, nan]])
    clean = np.array([[100.0, 90.0, 40.0], [80.0, nan, 70.0], [10.0, 10.0, 10.0]])
    weights = np.array([[1.0, 5.0, 2.0], [3.0, 7.0, 7.0], [1.0, 1.0, 1.0]])
    found = kept(scores, clean, weights)
    assert found is not None and found.share is not None and found.rows == 2
    assert found.score == pytest.approx((50 + 2 * 10 + 3 * 20) / 6)
    assert found.share.value == pytest.approx((50 + 2 * 10 + 3 * 20) / (100 + 2 * 40 + 3 * 80))
    assert kept(scores[2:], clean[2:]) is None
    nothing = kept(scores, 0 * clean)
    assert nothing is not None and nothing.share is None


@pytest.mark.parametrize(
    ("limit", "positions"),
    [(1, [0]), (5, [0]), (6, [0, 5]), (20, [0, 5, 10]), (56, [0, 5, 10, 20, 40]), (81, [0, 5, 10, 20, 40, 80])],
)
def test_texts_are_cut_below_the_length_limit(limit, positions):
    assert positions_below(limit) == positions


def test_every_token_stands_behind_one_position():
    texts = [Text([1] * length) for length in (0, 3, 5, 11)]
    assert tokens_from(texts, [0, 5, 10]).tolist() == [[0, 0, 0], [3, 0, 0], [5, 0, 0], [5, 5, 1]]


def test_prompts_without_answers_are_refused():
    with pytest.raises(UserError, match="row 1 of the prepared data set has no answer"):
        diagnosed(rows=[{"prompt": "a"}, {"prompt": "b"}])
