"""Two models along a text: equal to full logits, to what the engine recorded, and to the policy's own decisions."""

import pytest
import torch
from helpers.guidance import diagnosed
from helpers.pairs import make_pair

from switchkd.divergences import LARGEST_JSD
from switchkd.engine import roll_out
from switchkd.evaluation.guidance import Quality, Text
from switchkd.evaluation.positions import MEASURES, around, by_position, caught, first_harmful, read
from switchkd.evaluation.scorers import Scorer
from switchkd.policies import StudentPolicy, SwitchPolicy, TeacherPolicy
from switchkd.rollout import Author


def by_full_logits(pair, row, ids, excluded):
    """Every measure at every token of one text, from the logits of one plain pass in float64."""
    prompt = pair.data[row]["prompt_ids"]
    log_probs = []
    for model in (pair.student, pair.teacher):
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
        logits[:, excluded] = -torch.inf
        log_probs.append(logits.log_softmax(-1))
    student, teacher = log_probs
    keep = [i for i in range(student.shape[-1]) if i not in excluded]
    (s, t), (p, q) = (student[:, keep], teacher[:, keep]), (student[:, keep].exp(), teacher[:, keep].exp())
    m = ((p + q) / 2).log()
    return {
        "teacher_entropy": -(q * t).sum(-1),
        "jsd": ((p * (s - m)).sum(-1) + (q * (t - m)).sum(-1)) / 2,
        "forward_kl": (q * (t - s)).sum(-1),
        "reverse_kl": (p * (s - t)).sum(-1),
        "top1_agreement": (s.argmax(-1) == t.argmax(-1)).double(),
    }, teacher[torch.arange(len(ids)), ids]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_measures_are_those_of_full_logits(family, batch_size):
    excluded = [5, 17]
    pair = diagnosed(make_pair(family), excluded=excluded, batch_size=batch_size)
    texts = [Text(text.ids[: 12 - row]) for row, text in enumerate(pair.write(StudentPolicy()))]
    reading = read(pair, texts)
    for row, text in enumerate(texts):
        expected, of_tokens = by_full_logits(pair, row, text.ids, excluded)
        assert reading.mask[row].sum() == len(text.ids) and reading.mask[row, : len(text.ids)].all()
        for name in MEASURES:
            found = reading.values[name][row, : len(text.ids)].double()
            assert torch.allclose(found, expected[name], atol=2e-5), name
        assert torch.allclose(reading.teacher_log_prob[row, : len(text.ids)].double(), of_tokens, atol=1e-4)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6, "top_k": 7}, {"top_p": 0.8}])
def test_what_is_compared_is_what_switch_compared_when_it_wrote(sampling):
    pair, policy = diagnosed(**sampling), SwitchPolicy(0.05, horizon=12)
    prompts = list(pair.data["prompt_ids"])
    rollout = roll_out(pair.student, pair.teacher, prompts, policy=policy, max_new_tokens=12, eos_token_id=pair.eos,
                       pad_token_id=pair.pad, **sampling)  # fmt: skip
    texts = pair.write(policy)
    reading = read(pair, texts)
    mask = rollout.completion_mask
    assert [text.ids for text in texts] == [ids[keep].tolist() for ids, keep in zip(rollout.completion_ids, mask)]  # noqa: B905
    assert torch.allclose(reading.compared[mask], rollout.divergence[mask], atol=1e-5)
    by_teacher = (rollout.author == Author.TEACHER).sum(1)
    assert [text.teacher_tokens for text in texts] == by_teacher.tolist() and 0 < by_teacher.sum() < mask.sum()
    # On its own text the threshold asks for the tokens that the teacher wrote.
    assert caught(reading, [None] * len(texts), policy).teacher_share == pytest.approx(rollout.teacher_share)


def test_a_higher_threshold_never_catches_more_and_zero_catches_all():
    pair = diagnosed()
    reading = read(pair, pair.write(StudentPolicy()))
    first = first_harmful(reading, 0.02)
    assert sum(place is not None for place in first) >= 4
    found = [
        caught(reading, first, SwitchPolicy(threshold, horizon=12, schedule="constant"))
        for threshold in (0.0, 0.01, 0.05, 0.1, 0.3, LARGEST_JSD)
    ]
    shares = [one.share.value for one in found if one.share is not None]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1.0 and shares[-1] == 0.0
    assert found[0].teacher_share == 1.0 and found[-1].teacher_share == 0.0
    assert 0.0 < shares[2] < 1.0  # or the order says nothing


def test_the_first_harmful_token_is_the_first_below_the_probability():
    pair = diagnosed()
    reading = read(pair, pair.write(StudentPolicy()))
    for probability in (0.0, 0.01, 0.1, 1.0):
        for row, place in enumerate(first_harmful(reading, probability)):
            probs = reading.teacher_log_prob[row][reading.mask[row]].exp()
            below = [index for index, prob in enumerate(probs.tolist()) if prob < probability]
            assert place == (below[0] if below else None)
    assert set(first_harmful(reading, 0.0)) == {None}


def test_a_token_that_the_teacher_would_have_written_does_no_harm(make_model):
    pair = diagnosed((make_model(seed=1), make_model(seed=2)), temperature=0.0)
    texts = pair.write(TeacherPolicy())
    letters = Scorer("letters", lambda prompt, answer, references: (len(answer) + answer.count("a")) / 100)
    before, after = around(pair, texts, [1] * len(texts), Quality(pair, letters))
    assert len(before) > 3 and (before == after).all() and (before > 0).all()


def test_a_harmful_token_changes_what_follows_and_counts_in_neither_score():
    rows = [{"prompt": "a b", "completion": "one two three four"}]
    pair = diagnosed(rows=rows, length=18)
    text = Text(pair.tokenizer("one twx three four")["input_ids"])
    before, after = around(pair, [text], [6], scores := Recorded(pair))
    assert len(before) == len(after) == 1
    (given_before, _), (given_after, _) = scores.seen
    assert len(given_before) == len(given_after) == 7 and given_after == text.ids[:7]
    assert given_before[:6] == text.ids[:6]


class Recorded(Quality):
    def __init__(self, pair):
        super().__init__(pair)
        self.seen = []

    def __call__(self, row, given, following):
        self.seen.append((list(given), list(following)))
        return super().__call__(row, given, following)


def test_positions_only_group_what_is_averaged():
    pair = diagnosed(length=20)
    reading = read(pair, pair.write(StudentPolicy()))
    values, mask = reading.values["forward_kl"], reading.mask
    parts = by_position(values, mask, [0, 5, 10])
    counts = [int(mask[:, start:stop].sum()) for start, stop in ((0, 5), (5, 10), (10, mask.shape[1]))]
    assert all(part is not None for part in parts)
    total = sum(part.value * count for part, count in zip(parts, counts, strict=True) if part is not None)
    assert total == pytest.approx(float(values[mask].double().sum()), rel=1e-5)
    assert by_position(values, mask, [0, 500])[1] is None
