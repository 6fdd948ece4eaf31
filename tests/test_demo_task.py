"""Laws of the generated instruction set and its tokenizer."""

import re

import pytest

from switchkd.demo_task import ADJECTIVES, KINDS, NOUNS, PEOPLE, VERBS, generate, save_splits, train_tokenizer
from switchkd.records import load_records


@pytest.fixture(scope="module")
def splits():
    return generate(0, train=1200, validation=80, test=160)


def test_no_prompt_stands_in_two_splits(splits):
    prompts = {name: set(rows["prompt"]) for name, rows in splits.items()}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]
    assert len(prompts["test"]) == len(splits["test"])


def test_a_seed_gives_the_same_records_and_another_seed_others(splits):
    again, other = (generate(seed, train=1200, validation=80, test=160) for seed in (0, 1))
    assert again["train"].to_list() == splits["train"].to_list()
    assert other["train"].to_list() != splits["train"].to_list()


def test_one_prompt_never_has_two_answers(splits):
    answers: dict[str, str] = {}
    for rows in (*splits.values(), generate(1, train=1200)["train"]):
        for row in rows:
            assert answers.setdefault(row["prompt"], row["completion"]) == row["completion"]


def test_at_least_a_third_of_the_answers_is_longer_than_40_tokens_and_some_are_short(splits):
    tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in splits["train"]])
    lengths = [len(tokenizer(text).input_ids) for text in splits["test"]["completion"]]
    assert sum(length > 40 for length in lengths) / len(lengths) >= 1 / 3
    assert min(lengths) <= 16
    assert set(splits["test"]["kind"]) == set(KINDS)


def test_every_text_survives_the_tokenizer_and_ends_with_its_own_end_token(splits):
    tokenizer = train_tokenizer([row["completion"] for row in splits["train"]])
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for text in [*splits["test"]["completion"], "never seen: é ß 中"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_answers_can_be_derived_from_the_instruction_by_another_way(splits):
    """An oracle of its own for four kinds: arithmetic, spelling, look-ups and a reversed translation."""
    checked = set()
    nouns, adjectives, verbs = ({value: key for key, value in words.items()} for words in (NOUNS, ADJECTIVES, VERBS))
    for row in [*splits["test"], *splits["validation"]]:
        answer = row["completion"].strip()
        if row["kind"] == "table":
            for line, factor, product in re.findall(r"(\d+) times (\d+) is (\d+)", answer):
                assert int(line) * int(factor) == int(product)
        elif row["kind"] == "spell":
            for word, letters in re.findall(r"(\w+) is spelt ([A-Z ]+)\.", answer):
                assert letters.replace(" ", "").lower() == word.lower() and word.lower() in row["prompt"].lower()
        elif row["kind"] == "translate":
            first, second, verb, third, fourth = answer.removeprefix("In Velu: ").removesuffix(".").split()
            source = f"the {adjectives[second]} {nouns[first]} {verbs[verb]} the {adjectives[fourth]} {nouns[third]}"
            assert source in row["prompt"]
        elif row["kind"] == "fact":
            for name, town in re.findall(r"(\w+) lives in (\w+)", answer):
                assert PEOPLE[name].town == town
        else:
            continue
        checked.add(row["kind"])
    assert checked == {"table", "spell", "translate", "fact"}


def test_too_many_records_of_a_kind_are_refused():
    with pytest.raises(ValueError, match="too few distinct prompts"):
        generate(0, train=8, validation=8, test=40_000)


def test_the_splits_are_files_that_every_command_reads(splits, tmp_path):
    paths = save_splits(splits, tmp_path / "data")
    assert load_records(str(paths["test"])).to_list() == splits["test"].to_list()
