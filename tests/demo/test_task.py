"""The generated instruction set: every answer is found again from the instruction and the tables, by other means."""

import json
import random
import re

import pytest

from switchkd.demo import task as demo_task
from switchkd.demo.task import KINDS, PEOPLE, SPLITS, WEEKS, generate, save_splits, train_tokenizer

SIZES = {"train": 640, "validation": 80, "test": 160}


@pytest.fixture(scope="module")
def splits():
    return generate(3, **SIZES)


@pytest.fixture(scope="module")
def tokenizer(splits):
    return train_tokenizer([row["prompt"] + row["completion"] for row in splits["train"]])


def rows_of(splits, kind=None):
    return [row for split in SPLITS for row in splits[split] if kind in (None, row["kind"])]


def names_in(text):
    return re.findall(rf"\b({'|'.join(PEOPLE)})\b", text)


def answer_table(instruction):
    lines, factor, first = map(int, re.findall(r"\d+", instruction))
    return ", ".join(f"{n} times {factor} is {sum([factor] * n)}" for n in range(first, first + lines)) + "."


def answer_spell(instruction):
    words = re.findall(r"[a-z]{2,}", instruction.removeprefix("Spell").replace(" and ", " "))
    return " ".join(f"{word.capitalize()} is spelt {' '.join(letter.upper() for letter in word)}." for word in words)


def answer_introduce(instruction):
    first, second = names_in(instruction)
    town = re.search(r"in (\w+)\.$", instruction)[1]
    told = [f"{first} and {second} meet in {town}."]
    for name in (first, second):
        pronoun, trade, home, pet, instrument, fruit = PEOPLE[name]
        told.append(f"{name} is a {trade} from {home}.")
        told.append(f"{pronoun} has a {pet}, plays the {instrument} and loves {fruit}.")
    return " ".join(told)


def answer_week(instruction):
    (name,) = names_in(instruction)
    asked = re.findall(r"\w+day", instruction)
    pronoun = PEOPLE[name].pronoun.lower()
    told = ", ".join(f"on {day} {pronoun} {WEEKS[name][demo_task.DAYS.index(day)]}" for day in asked)
    return f"O{told[1:]}."


def answer_fact(instruction):
    said = {"lives": "lives in {0.town}", "keeps": "keeps a {0.pet}", "plays": "plays the {0.instrument}",
            "loves": "loves {0.fruit}", "has": "is a {0.trade}"}  # fmt: skip
    asked = re.findall(rf"({'|'.join(PEOPLE)}) (\w+)", instruction)
    return " and ".join(f"{name} {said[verb].format(PEOPLE[name])}" for name, verb in asked) + "."


def answer_translate(instruction):
    _, adjective, noun, verb, _, other_adjective, other_noun = instruction.split(": ")[1].rstrip(".").split()
    words = [
        demo_task.NOUNS[noun], demo_task.ADJECTIVES[adjective], demo_task.VERBS[verb],
        demo_task.NOUNS[other_noun], demo_task.ADJECTIVES[other_adjective],
    ]  # fmt: skip
    return f"In Velu: {' '.join(words)}."


def answer_recipe(instruction):
    vegetable, dish, people = re.fullmatch(r"How do I make (\w+) (\w+) for (\d) people\?", instruction).groups()
    liquid, spice, vessel, minutes, topping = demo_task.DISHES[dish]
    return (
        f"For {people} people take {int(people) * 2} pieces of {vegetable}, {people} cups of {liquid} and some {spice}."
        f" Wash the {vegetable} and {demo_task.VEGETABLES[vegetable]}. Put everything into a {vessel}"
        f" and wait {minutes} minutes. Serve the {dish} with {topping} on top."
    )


def answer_letter(instruction):
    sender, receiver = names_in(instruction)
    gift = instruction.rstrip(".").split()[-1]
    writer, reader = PEOPLE[sender], PEOPLE[receiver]
    return (
        f"Dear {receiver}, thank you very much for the {gift}. It is now in my {demo_task.ROOMS[gift]} and my "
        f"{writer.pet} likes it too. Come to {writer.town} soon, bring your {reader.instrument} and we shall eat "
        f"{writer.fruit}. Yours, {sender}."
    )


def test_a_seed_gives_one_data_set_and_another_seed_another(splits):
    again, other = generate(3, **SIZES), generate(4, **SIZES)
    for split in SPLITS:
        assert splits[split].to_list() == again[split].to_list()
        assert splits[split].to_list() != other[split].to_list()


def test_the_draw_leaves_the_global_generator_alone():
    random.seed(0)
    before = random.getstate()
    generate(0, train=8, validation=8, test=8)
    assert random.getstate() == before


def test_no_prompt_stands_in_two_splits():
    splits = generate(0)  # in the sizes of the demo
    prompts = {split: set(splits[split]["prompt"]) for split in SPLITS}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]
    assert len(prompts["test"]) == len(splits["test"])
    assert len(prompts["validation"]) == len(splits["validation"])


def test_kinds_are_balanced_also_in_the_first_records(splits):
    for split in SPLITS:
        kinds = splits[split]["kind"]
        assert {kinds.count(kind) for kind in KINDS} == {len(kinds) // len(KINDS)}
        assert set(kinds[: len(KINDS)]) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_follows_from_its_instruction(splits, kind):
    answer = globals()[f"answer_{kind}"]
    rows = rows_of(splits, kind)
    assert rows
    for row in rows:
        assert row["prompt"].endswith(" Answer:")
        assert row["completion"] == " " + answer(row["prompt"].removesuffix(" Answer:"))


def test_one_prompt_has_one_answer(splits):
    answers = {}
    for row in rows_of(splits):
        assert answers.setdefault(row["prompt"], row["completion"]) == row["completion"]


def test_a_third_of_the_answers_is_longer_than_40_tokens_and_some_are_short(splits, tokenizer):
    for split in SPLITS:
        lengths = [len(tokenizer(text)["input_ids"]) for text in splits[split]["completion"]]
        assert sum(length > 40 for length in lengths) >= len(lengths) / 3
        assert sum(length <= 12 for length in lengths) >= len(lengths) / 5


def test_the_tokenizer_reads_back_what_it_wrote(splits, tokenizer):
    for text in [*(row["prompt"] + row["completion"] for row in rows_of(splits)), "Zürich, 東京 & §7\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_of_the_world_are_single_tokens(tokenizer):
    for word in [*PEOPLE, *demo_task.TOWNS, *demo_task.NOUNS.values(), "people", "times"]:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word


def test_special_tokens_survive_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos_token, again.pad_token) == (demo_task.EOS_TOKEN, demo_task.PAD_TOKEN)
    assert again.eos_token_id != again.pad_token_id
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("Spell river.")["input_ids"] == tokenizer("Spell river.")["input_ids"]


def test_too_few_prompts_are_refused_with_the_kind():
    with pytest.raises(ValueError, match="too few distinct prompts"):
        generate(0, train=8, validation=0, test=40_000)


def test_saved_files_are_records_that_training_reads(splits, tmp_path):
    paths = save_splits(splits, tmp_path / "data")
    assert list(paths) == list(SPLITS)
    for split, path in paths.items():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert lines == splits[split].to_list()
