"""Laws of the vocabulary check: tokenizers decide, not config.vocab_size; every EOS of every model counts."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.pairs import make_prompts
from helpers.tiny import EOS_ID, EOS_TOKEN, RAGGED_ROWS, TINY_VOCABULARY, build_gpt2, build_tokenizer, build_trainer

from switchkd.__main__ import main
from switchkd.data import prepare
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.evaluation import evaluate, reference_losses
from switchkd.models.loading import load_model
from switchkd.models.vocabulary import (
    check_tokenizers,
    eos_union,
    model_vocabulary_size,
    normalize_eos,
    require_eos,
    shared_vocabulary_size,
)
from switchkd.policies import SwitchPolicy


def test_equal_tokenizers_pass(tiny_tokenizer):
    assert check_tokenizers(tiny_tokenizer, build_tokenizer()) == []


def test_different_tokenizers_are_refused_naming_the_first_ids(tiny_tokenizer):
    other = build_tokenizer(["<unk>", *reversed(TINY_VOCABULARY[1:-1]), EOS_TOKEN])
    with pytest.raises(UserError) as caught:
        check_tokenizers(tiny_tokenizer, other)
    message = str(caught.value)
    assert "96 ids differ" in message
    assert r"first 1 ('\n' against '~'), 2 (' ' against '}'), 3 ('!' against '|')" in message
    assert "\n" not in message


@pytest.mark.parametrize("larger", ["student", "teacher"])
@pytest.mark.parametrize("special", [True, False])
def test_an_extra_special_or_added_token_is_set_aside_with_one_warning(tiny_tokenizer, larger, special):
    """A model resized for [PAD], or with words of its own: everything else is the same."""
    extended = build_tokenizer()
    extended.add_tokens(["[PAD]", "<tool>"], special_tokens=special)
    pair = (extended, tiny_tokenizer) if larger == "student" else (tiny_tokenizer, extended)
    with pytest.warns(UserWarning, match=r"2 known to one side only, never written nor compared: 98 \(") as caught:
        assert check_tokenizers(*pair) == [98, 99]
    assert len(caught) == 1


def test_ordinary_ids_that_only_one_tokenizer_knows_are_refused(tiny_tokenizer):
    with pytest.raises(UserError, match=r"1 ids differ, first 98 \(None against 'ab'\)"):
        check_tokenizers(tiny_tokenizer, build_tokenizer([*TINY_VOCABULARY, "ab"]))


def test_reserved_slots_are_set_aside_though_nothing_marks_them_as_special(tiny_tokenizer):
    with pytest.warns(UserWarning, match="2 known to one side only"):
        assert check_tokenizers(tiny_tokenizer, build_tokenizer([*TINY_VOCABULARY, "<unused0>", "<unused1>"])) == [
            98,
            99,
        ]


def test_a_reserved_slot_put_to_use_is_compared_by_id_under_either_name():
    """A teacher may end its turns with it: taken out, it could not end any."""
    first, second = build_tokenizer(), build_tokenizer()
    first.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_5|>", "<a>"]})
    second.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<a>"]})
    for pair in ((first, second), (second, first)):
        with pytest.warns(UserWarning, match="1 reserved on one side, compared by id: 98"):
            assert check_tokenizers(*pair) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (["<a>", "<b>"], ["<b>", "<a>"], "2 ids differ, first 98"),  # both know both, elsewhere
        (["<a>"], ["<b>"], r"1 ids differ, first 98 \('<a>' against '<b>'\)"),  # two meanings, both in use
        (["<a>", "<unused>"], ["<unused>", "<a>"], "2 ids differ"),
    ],
)
def test_special_tokens_of_another_meaning_are_refused(ours, theirs, message):
    pair = build_tokenizer(), build_tokenizer()
    for tokenizer, tokens in zip(pair, (ours, theirs), strict=True):
        tokenizer.add_tokens(tokens, special_tokens=True)
    with pytest.raises(UserError, match=message):
        check_tokenizers(*pair)


def test_an_end_of_sequence_that_the_teacher_does_not_know_is_refused(tiny_tokenizer):
    """The student could never learn to end a text."""
    student = build_tokenizer()
    student.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(UserError, match=r"the student ends its texts with id 98 \('<end>'\)"):
        check_tokenizers(student, tiny_tokenizer)


@pytest.mark.parametrize("teacher_rows", [98, 99])
@pytest.mark.parametrize("method", ["switch", "minillm", "kd"])
def test_a_student_resized_for_pad_trains_as_one_that_was_not(tmp_path, method, teacher_rows):
    """Whatever the models' rows at the extra id: the loss and the texts are those of the pair before the resize."""
    losses = []
    for resized in (False, True):
        student, teacher = build_gpt2(seed=1), build_gpt2(seed=2)
        tokenizer = build_tokenizer()
        folder = tmp_path / str(resized)
        teacher.save_pretrained(folder / "teacher")
        tokenizer.save_pretrained(folder / "teacher")
        if resized:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            for model, size in ((student, 99), (teacher, teacher_rows)):
                model.resize_token_embeddings(size, mean_resizing=False)
                with torch.no_grad():
                    model.transformer.wte.weight[98:] = 3.0 * model.transformer.wte.weight[10]
            teacher.save_pretrained(folder / "teacher")
        student.save_pretrained(folder / "student")
        tokenizer.save_pretrained(folder / "student")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            trainer = build_trainer(
                folder / "run", str(folder / "student"), str(folder / "teacher"), processing_class=tokenizer,
                method=method, max_steps=1, disable_dropout=True, learning_rate=0.0,
            )  # fmt: skip
            trainer.train()
        told = [str(warning.message) for warning in caught if " ids" in str(warning.message)]
        assert len(told) == int(resized), told
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_swapped_ids_at_equal_size_are_refused(tiny_tokenizer):
    swapped = [*TINY_VOCABULARY]
    swapped[10], swapped[11] = swapped[11], swapped[10]
    with pytest.raises(UserError, match="2 ids differ, first 10"):
        check_tokenizers(tiny_tokenizer, build_tokenizer(swapped))


def test_padded_widths_are_compared_on_the_shared_ids_with_one_warning():
    with pytest.warns(UserWarning, match="98 and 128 ids; comparing the shared first 98") as caught:
        assert shared_vocabulary_size(98, 128) == 98
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shared_vocabulary_size(98, 98) == 98


def test_width_is_that_of_the_logits_not_of_the_config(make_model):
    model = make_model(vocab_size=98)
    model.resize_token_embeddings(104, mean_resizing=False)
    model.config.vocab_size = 98
    assert model_vocabulary_size(model) == 104


# ---- a padding token that is newer than the models


@pytest.fixture
def newer_pad():
    """A tokenizer with `<pad>` at id 98, which no model was resized for."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 98
    return tokenizer


@pytest.mark.parametrize("no_repeat_ngram_size", [0, 3])
def test_an_unreadable_padding_token_changes_no_score(newer_pad, tiny_tokenizer, make_model, no_repeat_ngram_size):
    """Was an IndexError in the embedding."""
    model, teacher = make_model(), make_model(seed=1)
    found = []
    for tokenizer in (newer_pad, tiny_tokenizer):
        data, _ = prepare(Dataset.from_list(RAGGED_ROWS), tokenizer)
        options = {"decoding_seeds": (1,), "max_completion_length": 12, "progress": False}
        result = evaluate(model, tokenizer, data, no_repeat_ngram_size=no_repeat_ngram_size, **options)
        losses = reference_losses(model, tokenizer, data, teacher=teacher)
        found.append((result.rows, losses["jsd"], losses["cross_entropy"]))
    assert found[0][0] == found[1][0]
    assert found[0][1:] == pytest.approx(found[1][1:], abs=1e-6)


@pytest.mark.parametrize("pad", [98, 10**6, -100])
@pytest.mark.parametrize("draft_length", [1, 4])
def test_an_unreadable_padding_id_fills_completions_and_changes_no_token(make_model, pad, draft_length):
    student, teacher = make_model(), make_model(seed=1)
    ids, mask = make_prompts(4)
    options = {"policy": SwitchPolicy(), "max_new_tokens": 24, "eos_token_id": [5, 9, 40, EOS_ID]}
    plain = roll_out(student, teacher, ids, mask, **options, draft_length=draft_length)
    padded_ids = ids.masked_fill(~mask, pad)
    padded = roll_out(student, teacher, padded_ids, mask, **options, draft_length=draft_length, pad_token_id=pad)
    for name in ("completion_mask", "author", "divergence", "threshold"):
        torch.testing.assert_close(getattr(plain, name), getattr(padded, name), equal_nan=True)
    assert torch.equal(padded.completion_ids, plain.completion_ids.masked_fill(~plain.completion_mask, pad))
    assert torch.equal(padded.prompt_ids, padded_ids)
    assert not plain.completion_mask.all()


def test_calibrate_takes_an_unreadable_padding_token(newer_pad, tmp_path, capsys):
    for name, seed in (("student", 1), ("teacher", 2)):
        build_gpt2(seed=seed).save_pretrained(tmp_path / name)
        newer_pad.save_pretrained(tmp_path / name)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RAGGED_ROWS))
    options = ["calibrate", "--dataset_name", tmp_path / "data.jsonl", "--max_completion_length", 8]
    for role in ("", "teacher_"):
        options += [f"--{role}model_name_or_path", tmp_path / (role[:-1] or "student")]
    assert main([str(option) for option in options]) == 0, capsys.readouterr().err


def test_a_student_trained_with_an_unreadable_padding_token_can_be_loaded_again(newer_pad, tmp_path, make_model):
    """The Trainer copies the tokenizer's padding id into the configs; Llama's embedding then refuses to be built."""
    student = make_model()
    student.config.pad_token_id = newer_pad.pad_token_id
    trainer = build_trainer(
        tmp_path / "run", student, make_model(seed=1), processing_class=newer_pad,
        eval_dataset=Dataset.from_list(RAGGED_ROWS), eval_rouge_l_samples=2, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        again = load_model(str(folder))
        assert again.config.pad_token_id is None and again.generation_config.pad_token_id is None
        ids = torch.arange(1, 9).unsqueeze(0)
        assert torch.equal(again(ids).logits, student.eval()(ids).logits)


def test_eos_ids_become_a_sorted_list():
    assert normalize_eos(None) == []
    assert normalize_eos(3) == [3]
    assert normalize_eos([7, 3, 7]) == [3, 7]


def test_eos_is_the_union_over_tokenizer_and_both_models(tiny_tokenizer, make_gpt2):
    student, teacher = make_gpt2(), make_gpt2(seed=1)
    student.generation_config.eos_token_id = [5, EOS_ID]
    teacher.generation_config.eos_token_id = 7
    assert eos_union(tiny_tokenizer, student, teacher) == [5, 7, EOS_ID]
    assert eos_union(tiny_tokenizer, None) == [EOS_ID]


def test_an_end_of_sequence_that_no_model_scores_ends_nothing(make_gpt2):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert eos_union(tokenizer) == [98]
    assert eos_union(tokenizer, make_gpt2()) == [EOS_ID]
    assert eos_union(tokenizer, make_gpt2(), make_gpt2(vocab_size=99)) == [EOS_ID, 98]


def test_no_eos_anywhere_is_refused():
    silent = SimpleNamespace(eos_token_id=None)
    assert eos_union(silent, None) == []
    with pytest.raises(UserError, match="no end-of-sequence token anywhere"):
        require_eos(silent, None)
