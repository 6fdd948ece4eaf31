"""Laws of the vocabulary check: tokenizers decide, not config.vocab_size; every EOS of every model counts."""

import warnings
from types import SimpleNamespace

import pytest
from conftest import EOS_ID, EOS_TOKEN, TINY_VOCABULARY, build_tokenizer

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
    assert check_tokenizers(tiny_tokenizer, build_tokenizer()) is None


def test_different_tokenizers_are_refused_naming_the_first_ids(tiny_tokenizer):
    other = build_tokenizer(["<unk>", *reversed(TINY_VOCABULARY[1:-1]), EOS_TOKEN])
    with pytest.raises(UserError) as caught:
        check_tokenizers(tiny_tokenizer, other)
    message = str(caught.value)
    assert "96 ids differ" in message
    assert r"first 1 ('\n' against '~'), 2 (' ' against '}'), 3 ('!' against '|')" in message
    assert "\n" not in message


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_an_id_that_only_one_tokenizer_knows_is_refused(tiny_tokenizer, larger):
    """One side must never write an id the other cannot read."""
    extended = build_tokenizer()
    extended.add_tokens(["<extra>"])
    pair = (extended, tiny_tokenizer) if larger == "student" else (tiny_tokenizer, extended)
    with pytest.raises(UserError, match=r"1 ids differ, first 98 \("):
        check_tokenizers(*pair)


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
