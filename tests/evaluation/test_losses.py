"""How far a model is from its teacher as a writer: against the sum over all texts, and where two are one."""

import copy
import itertools
import math

import pytest
import torch
from datasets import Dataset
from helpers.tiny import EOS_ID, RAGGED_ROWS

from switchkd.data import prepare
from switchkd.errors import UserError
from switchkd.evaluation import evaluate, reference_losses, sequence_divergences
from switchkd.evaluation.losses import samples_the_model

SIZES = {"max_completion_length": 12, "batch_size": 4}


@pytest.fixture(scope="module")
def data(tiny_tokenizer):
    return prepare(Dataset.from_list(RAGGED_ROWS[:6]), tiny_tokenizer)[0]


def compared(model, teacher, tokenizer, data, *, length=12, batch_size=4, decoding_seeds=(1,), **decoding):
    result = evaluate(
        model,
        tokenizer,
        data,
        decoding_seeds=decoding_seeds,
        max_completion_length=length,
        batch_size=batch_size,
        progress=False,
        **decoding,
    )
    texts = [(row["index"], ids) for row, ids in zip(result.rows, result.completion_ids, strict=True)]
    found = sequence_divergences(
        model, teacher, tokenizer, data, texts, max_completion_length=length, batch_size=batch_size
    )
    return found, texts


def log_probs_of_all_texts(model, prompt, length):
    """Text -> its log-probability, for every text that ends at the end of sequence or at the length limit."""
    finished, open_texts = {}, {(): 0.0}
    for _ in range(length):
        ids = torch.tensor([[*prompt, *text] for text in open_texts])
        with torch.no_grad():
            next_log_probs = model(ids).logits[:, -1].double().log_softmax(-1)
        extended = {}
        for (text, log_prob), row in zip(open_texts.items(), next_log_probs.tolist(), strict=True):
            for token, value in enumerate(row):
                (finished if token == EOS_ID else extended)[(*text, token)] = log_prob + value
        open_texts = extended
    return finished | open_texts


@pytest.mark.slow
def test_both_directions_estimate_the_divergence_summed_over_all_texts(make_gpt2, tiny_tokenizer):
    """KL(model, teacher) = sum over texts of model(y) (ln model(y) - ln teacher(y)), and the other way round."""
    model, teacher = make_gpt2().eval(), make_gpt2(seed=1).eval()
    prompts, length = 1500, 2
    data = prepare(Dataset.from_list([{"prompt": "ab", "completion": "x"}] * prompts), tiny_tokenizer)[0]
    found, texts = compared(model, teacher, tiny_tokenizer, data, length=length, batch_size=500)
    one, other = (log_probs_of_all_texts(m, data[0]["prompt_ids"], length) for m in (model, teacher))
    assert sum(map(math.exp, one.values())) == pytest.approx(1.0, abs=1e-6)
    for name, writer, reader in (("reverse_sequence_kl", one, other), ("forward_sequence_kl", other, one)):
        exact = sum(math.exp(writer[text]) * (writer[text] - reader[text]) for text in writer)
        low, high = found[name]["per_sequence_interval"]
        error = (high - low) / 2 / 1.96
        assert abs(found[name]["per_sequence"] - exact) < 4 * error
        assert error < 0.02 * exact  # or the line above says nothing
    nll = -sum(math.exp(one[text]) * other[text] for text in one)
    assert found["teacher_cross_entropy"]["per_sequence"] == pytest.approx(nll, rel=0.02)
    # The plain mean of ln model - ln teacher on the same texts has the same expectation.
    ratios = torch.tensor([one[tuple(ids)] - other[tuple(ids)] for _, ids in texts])
    gap = abs(float(ratios.mean()) - found["reverse_sequence_kl"]["per_sequence"])
    assert gap < 4 * float(ratios.std()) / math.sqrt(prompts)


def test_a_model_is_no_distance_from_itself_and_writes_what_it_expects(make_model, tiny_tokenizer, data):
    model = make_model()
    found, _ = compared(model, copy.deepcopy(model), tiny_tokenizer, data)
    for name in ("reverse_sequence_kl", "forward_sequence_kl"):
        assert found[name]["per_token"] == pytest.approx(0.0, abs=1e-6)
    assert found["teacher_cross_entropy"]["per_token"] > 0.5


def test_batches_and_positions_only_group_what_is_summed(make_gpt2, tiny_tokenizer, data):
    pair = make_gpt2(), make_gpt2(seed=1)
    found, texts = compared(*pair, tiny_tokenizer, data, length=15, decoding_seeds=(1, 2))
    alone, _ = compared(*pair, tiny_tokenizer, data, length=15, batch_size=1, decoding_seeds=(1, 2))
    assert found["reverse_sequence_kl"]["texts"] == 12 and found["forward_sequence_kl"]["texts"] == 6
    assert found["reverse_sequence_kl"]["tokens"] == sum(len(ids) for _, ids in texts)
    of_answers = found["reverse_sequence_kl"]["of_answers"]
    assert sum(of_answers) / len(texts) == pytest.approx(found["reverse_sequence_kl"]["per_sequence"])
    for name, values in found.items():
        assert values["per_token"] == pytest.approx(alone[name]["per_token"], rel=1e-4)
        parts = values["by_position"].values()
        assert set(values["by_position"]) == {"0-9", "10-39"}
        assert sum(part["tokens"] for part in parts) == values["tokens"]
        total = sum(part["tokens"] * part["per_token"] for part in parts)
        assert total == pytest.approx(values["per_token"] * values["tokens"])
        assert total == pytest.approx(values["per_sequence"] * values["texts"])


def test_the_teachers_cross_entropy_is_that_of_the_tokens_that_were_written(make_gpt2, tiny_tokenizer, data):
    model, teacher = make_gpt2().eval(), make_gpt2(seed=1).eval()
    found, texts = compared(model, teacher, tiny_tokenizer, data)
    total = 0.0
    for index, ids in texts:
        prompt = data[index]["prompt_ids"]
        with torch.no_grad():
            log_probs = teacher(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(log_probs[range(len(ids)), ids].sum())
    assert found["teacher_cross_entropy"]["per_token"] * found["teacher_cross_entropy"]["tokens"] == pytest.approx(
        total, rel=1e-4
    )


def test_text_is_read_up_to_the_first_token_that_only_one_model_knows(make_gpt2, tiny_tokenizer, data):
    model, teacher = make_gpt2(), make_gpt2(seed=1)
    texts = [(0, [5, 6, 7, 8]), (1, [7, 5]), (2, [9, 9, 9])]
    found = sequence_divergences(model, teacher, tiny_tokenizer, data, texts, excluded_ids=[7], **SIZES)
    assert found["reverse_sequence_kl"]["tokens"] == 2 + 0 + 3
    assert all(math.isfinite(values["per_token"]) for values in found.values())


def test_a_teacher_with_its_prompt_reads_and_writes_under_it(make_gpt2, tiny_tokenizer):
    rows = [{**row, "teacher_prompt": row["prompt"] + " hint"} for row in RAGGED_ROWS[:4]]
    hinted = prepare(Dataset.from_list(rows), tiny_tokenizer)[0]
    plain = prepare(Dataset.from_list(RAGGED_ROWS[:4]), tiny_tokenizer)[0]
    model = make_gpt2()
    with_hint, without = (compared(model, copy.deepcopy(model), tiny_tokenizer, data)[0] for data in (hinted, plain))
    assert without["reverse_sequence_kl"]["per_token"] < 1e-6 < with_hint["reverse_sequence_kl"]["per_token"]


@pytest.mark.parametrize(
    ("decoding", "sampled"),
    [({}, True), ({"temperature": 0.7}, False), ({"top_k": 5}, False), ({"top_p": 0.9}, False),
     ({"no_repeat_ngram_size": 3}, False), ({"temperature": 0.0}, False)],
)  # fmt: skip
def test_only_plain_sampling_is_said_to_sample_the_model(make_gpt2, tiny_tokenizer, data, decoding, sampled):
    result = evaluate(
        make_gpt2(), tiny_tokenizer, data, decoding_seeds=(1,), max_completion_length=4, progress=False, **decoding
    )
    assert samples_the_model(result.decoding) is sampled


def test_a_context_too_short_for_the_teachers_text_is_refused(make_gpt2, tiny_tokenizer, data):
    with pytest.raises(UserError, match="more than the teacher's context"):
        sequence_divergences(
            make_gpt2(), make_gpt2(), tiny_tokenizer, data, [(0, [5])], max_completion_length=10_000, batch_size=2
        )


def test_losses_of_all_lengths_together_are_the_loss(make_gpt2, tiny_tokenizer):
    rows = [{"prompt": "p", "completion": "ab" * (1 + 3 * i)} for i in range(9)]
    data = prepare(Dataset.from_list(rows), tiny_tokenizer)[0]
    losses = reference_losses(make_gpt2(), tiny_tokenizer, data, teacher=make_gpt2(seed=1))
    parts = losses["by_length"]
    assert list(parts) == ["0-10", "11-40", "41-100"] and sum(part["examples"] for part in parts.values()) == 9
    for name in ("cross_entropy", "forward_kl", "jsd"):
        total = sum(part[name] * part["tokens"] for part in parts.values())
        assert total == pytest.approx(losses[name] * losses["tokens"])
        low, high = losses["intervals"][name]
        assert low < losses[name] < high
    assert all(low < high for part in parts.values() for low, high in itertools.chain([part["intervals"]["jsd"]]))
