"""Laws of the vocabulary check: tokenizers decide, not config.vocab_size; every EOS of every model counts."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS_ID, EOS_TOKEN, TINY_VOCABULARY, build_gpt2, build_tokenizer, build_trainer

from switchkd.errors import UserError
from switchkd.vocabulary import (
    check_tokenizers,
    eos_union,
    model_vocabulary_size,
    normalize_eos,
    require_eos,
    shared_vocabulary_size,
)


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
        assert shared_vocabulary_size(128, 98, warn=False) == 98


def test_width_is_that_of_the_logits_not_of_the_config(make_model):
    model = make_model(vocab_size=98)
    model.resize_token_embeddings(104, mean_resizing=False)
    model.config.vocab_size = 98
    assert model_vocabulary_size(model) == 104


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


def test_no_eos_anywhere_is_refused():
    silent = SimpleNamespace(eos_token_id=None)
    assert eos_union(silent, None) == []
    with pytest.raises(UserError, match="no end-of-sequence token anywhere"):
        require_eos(silent, None)
