"""Every architecture that transformers can build tiny: its text, its divergences, its losses, or one line why not."""

import re
import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from helpers import architectures
from helpers.architectures import CLASSES, JUDGED, NOT_JUDGED, build, build_pair, documented, way_of
from helpers.tiny import RAGGED_ROWS, TINY_VOCABULARY, build_tokenizer, build_trainer

from switchkd.data import encode_prompt
from switchkd.divergences import DIVERGENCES, generalized_jsd
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.evaluation import evaluate, reference_losses
from switchkd.methods import get_method
from switchkd.policies import SwitchPolicy

# Ragged, the shortest of one token.
PROMPTS = torch.tensor([[0, 0, 0, 0, 6], [3, 4, 5, 6, 7], [0, 9, 8, 7, 6]])
MASK = torch.tensor([[0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
WAYS = documented()
SERVED = [kind for kind in JUDGED if not WAYS.get(kind, "").startswith("refused")]
REFUSED = sorted(set(JUDGED) - set(SERVED))
pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith("5.23."), reason="the table is that of transformers 5.23"
)


def log_probs(model, row):
    """Of every next token after each token of a row, by one plain pass over the row alone, `[T, V]`."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float().log_softmax(-1)


def decode(student, teacher, threshold, draft_length, new_tokens):
    policy = SwitchPolicy(initial_threshold=threshold, schedule="constant")
    options = {"policy": policy, "max_new_tokens": new_tokens, "draft_length": draft_length}
    return roll_out(student, teacher, PROMPTS, MASK, **options)


def prepared_ids(tokenizer, row):
    """Prompt ids and answer ids, the end of sequence included."""
    answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    return list(encode_prompt(row["prompt"], tokenizer)), [*answer, tokenizer.eos_token_id]


def test_the_table_names_every_model_type_of_transformers():
    assert WAYS.keys() == CLASSES.keys()
    assert {kind for kind, way in WAYS.items() if way.startswith("not judged")} == NOT_JUDGED.keys()
    assert len(TINY_VOCABULARY) == architectures.VOCABULARY


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVED)
def test_text_divergences_training_and_evaluation_are_those_of_plain_passes(kind, tmp_path):
    student, teacher = build_pair(kind)
    new_tokens = architectures.BEYOND - PROMPTS.shape[1]
    inside = architectures.INSIDE - PROMPTS.shape[1]
    sample = PROMPTS[1].tolist()
    threshold = float(generalized_jsd(log_probs(student, sample), log_probs(teacher, sample)).mean())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reference = decode(student, teacher, threshold, 1, new_tokens)
        drafted = [decode(student, teacher, threshold, 4, length) for length in (inside, new_tokens)]
        way = way_of(teacher)
    assert way == WAYS[kind], "run `python tests/architectures.py`"
    told = {str(one.message).split()[1] for one in caught if "token by token" in str(one.message)}
    assert told == ({"student", "teacher"} if "token by token" in way else set())
    for rollout, length in zip(drafted, (inside, new_tokens), strict=True):
        assert torch.equal(rollout.completion_ids, reference.completion_ids[:, :length])
        assert torch.equal(rollout.author, reference.author[:, :length])
        assert torch.allclose(rollout.divergence, reference.divergence[:, :length], atol=1e-4)
    assert ("rounds" in drafted[0].stats) == way.startswith("row by row")
    assert ("rounds" in drafted[1].stats) == (way.startswith("row by row") and "token by token" not in way)
    for row in range(len(PROMPTS)):
        ids = PROMPTS[row][MASK[row]].tolist() + reference.completion_ids[row].tolist()
        expected = generalized_jsd(log_probs(student, ids), log_probs(teacher, ids))[-new_tokens - 1 : -1]
        assert torch.allclose(expected, reference.divergence[row], atol=1e-4)

    before = [parameter.clone() for parameter in student.parameters()]
    rows = RAGGED_ROWS[1:3]
    trainer = build_trainer(
        tmp_path,
        student,
        teacher,
        method="switch",
        initial_threshold=max(min(threshold, 0.69), 1e-3),
        max_steps=2,
        max_completion_length=6,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in RAGGED_ROWS[:4]]),
        eval_dataset=Dataset.from_list(rows),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_trainer = {name: value for name, value in trainer.evaluate().items() if name.startswith("eval_")}
        cross_entropies, divergences = [], []
        for row in rows:
            prompt, answer = prepared_ids(build_tokenizer(), row)
            mine, theirs = (log_probs(model, prompt + answer)[len(prompt) - 1 : -1] for model in (student, teacher))
            cross_entropies.append(-mine.gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1))
            divergences.append(DIVERGENCES[get_method("switch").objective](mine, theirs))
        assert by_trainer["eval_cross_entropy"] == pytest.approx(float(torch.cat(cross_entropies).mean()), abs=2e-4)
        assert by_trainer["eval_loss"] == pytest.approx(float(torch.cat(divergences).mean()), abs=2e-4)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    moved = [not torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True)]
    assert any(moved) and all(bool(parameter.isfinite().all()) for parameter in student.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_would_be_read_wrongly_is_refused_in_one_line_everywhere(kind, tmp_path):
    model, teacher = build(kind), build("llama")
    assert way_of(model) == WAYS[kind], "run `python tests/architectures.py`"
    tokenizer = build_tokenizer()
    data = Dataset.from_list(
        [
            {"prompt": row["prompt"], "prompt_ids": prompt, "completion_ids": answer, "references": [row["completion"]]}
            for row in RAGGED_ROWS[:2]
            for prompt, answer in [prepared_ids(tokenizer, row)]
        ]
    )
    for refused in (
        lambda: decode(model, teacher, 0.1, 4, 2),
        lambda: decode(teacher, model, 0.1, 1, 2),
        lambda: build_trainer(tmp_path, model, teacher),
        lambda: build_trainer(tmp_path, teacher, model),
        lambda: reference_losses(model, tokenizer, data),
        lambda: reference_losses(teacher, tokenizer, data, teacher=model),
        lambda: evaluate(model, tokenizer, data, decoding_seeds=[1], max_completion_length=2, progress=False),
    ):
        with pytest.raises(UserError, match=r"cannot be used") as error:
            refused()
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    if WAYS[kind].startswith("refused beside"):
        policy = SwitchPolicy(initial_threshold=0.1, schedule="constant")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rollout = roll_out(model, teacher, PROMPTS[:, -1:], policy=policy, max_new_tokens=6)
        for row in range(len(PROMPTS)):
            ids = PROMPTS[row, -1:].tolist() + rollout.completion_ids[row].tolist()
            expected = generalized_jsd(log_probs(model, ids), log_probs(teacher, ids))[:-1]
            assert torch.allclose(expected, rollout.divergence[row], atol=1e-4)
        assert re.search("give one row at a time", str(error.value))
