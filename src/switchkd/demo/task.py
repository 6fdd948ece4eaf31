"""The instruction set and the tokenizer of the demo, generated from a seed: no download.

A small invented world (people with fixed attributes, a made-up language, a cookery book) and eight kinds of
instruction about it. Every answer follows from the instruction and the tables below, so a teacher can be nearly
perfect; the tables are more than a small student can hold, so there is something to distil.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
VOCABULARY_SIZE = 1152


class Person(NamedTuple):
    """The fixed attributes of one inhabitant; `pronoun` is "She" or "He"."""

    pronoun: str
    trade: str
    town: str
    pet: str
    instrument: str
    fruit: str


TRADES = ("baker", "pilot", "doctor", "farmer", "painter", "miner", "teacher", "sailor", "weaver", "judge")
TOWNS = ("Arden", "Belmar", "Corvo", "Dunlow", "Eastwick", "Farrow", "Gilden", "Harth", "Inver", "Jorvik")
PETS = ("cat", "dog", "parrot", "rabbit", "turtle", "pony", "goose", "ferret", "lizard", "hamster")
INSTRUMENTS = ("flute", "harp", "drum", "violin", "piano", "horn", "guitar", "banjo", "cello", "organ")
FRUITS = ("plums", "apples", "cherries", "figs", "grapes", "lemons", "melons", "pears", "dates", "limes")
NAMES = ("Mira", "Tolo", "Anka", "Bren", "Celia", "Doran", "Elka", "Fenn", "Greta", "Hugo", "Ilsa", "Joren")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ACTIVITIES = (
    "swims", "bakes bread", "mends nets", "paints", "rests", "rides", "plants trees",
    "sings", "reads", "cleans the house", "climbs", "visits friends", "cuts wood", "plays chess",
)  # fmt: skip


def _world() -> tuple[dict[str, Person], dict[str, tuple[str, ...]]]:
    """The people and their weeks, drawn once from a fixed stream: the same world for every data seed."""
    draw = random.Random("switchkd world")
    people: dict[str, Person] = {}
    weeks: dict[str, tuple[str, ...]] = {}
    for index, name in enumerate(NAMES):
        attributes = [draw.choice(column) for column in (TRADES, TOWNS, PETS, INSTRUMENTS, FRUITS)]
        people[name] = Person("She" if index % 2 == 0 else "He", *attributes)
        weeks[name] = tuple(draw.sample(ACTIVITIES, len(DAYS)))
    return people, weeks


PEOPLE, WEEKS = _world()

# The made-up language is called Velu: one word for one word, the adjective after its noun.
ADJECTIVES = {
    "red": "rako", "old": "vemi", "small": "tipu", "happy": "jola", "cold": "siru", "quick": "zeto",
    "green": "graba", "quiet": "humi", "heavy": "dorba", "round": "olbo",
}  # fmt: skip
NOUNS = {
    "fox": "fanu", "boat": "belo", "king": "kadri", "tree": "tarna", "bird": "pivo", "stone": "stulo", "child": "chima",
    "wolf": "ulvo", "lamp": "lumi", "river": "rivna", "house": "hemu", "moon": "munda",
}  # fmt: skip
VERBS = {
    "sees": "sevat", "finds": "finat", "likes": "likat", "follows": "folat", "hides": "hidat", "paints": "pintat",
}  # fmt: skip

SPELLING = (
    "lantern", "river", "pepper", "window", "garden", "silver", "button", "castle", "feather", "jungle",
    "kitten", "market", "orange", "planet", "rocket", "summer", "thunder", "velvet", "winter", "yellow",
)  # fmt: skip

VEGETABLES = {  # how each is prepared
    "leek": "cut it into rings", "carrot": "grate it", "potato": "peel it", "onion": "chop it finely",
    "turnip": "dice it", "pumpkin": "scoop it out", "pepper": "slice it", "cabbage": "shred it",
    "beetroot": "boil it", "tomato": "halve it",
}  # fmt: skip
DISHES = {  # the liquid, the spice, the vessel, the minutes and what goes on top
    "soup": ("stock", "thyme", "pot", 20, "cream"),
    "pie": ("milk", "nutmeg", "dish", 40, "pastry"),
    "curry": ("coconut milk", "turmeric", "pan", 30, "coriander"),
    "stew": ("wine", "pepper", "pot", 60, "parsley"),
    "salad": ("oil", "mustard", "bowl", 5, "nuts"),
    "omelette": ("eggs", "salt", "pan", 10, "cheese"),
}  # fmt: skip

GIFTS = ("lamp", "scarf", "book", "clock", "kite", "basket", "mirror", "whistle")
ROOMS = {
    "lamp": "hall", "scarf": "cupboard", "book": "study", "clock": "kitchen", "kite": "garden", "basket": "cellar",
    "mirror": "bathroom", "whistle": "boat",
}  # fmt: skip


def _upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def table(draw: random.Random) -> tuple[str, str]:
    """Recite four to eight lines of a times table."""
    factor, lines = draw.randint(2, 12), draw.randint(4, 8)
    first = draw.randint(1, 13 - lines)
    told = ", ".join(f"{line} times {factor} is {line * factor}" for line in range(first, first + lines))
    return f"Recite {lines} lines of the table of {factor}, starting at {first}.", told + "."


def spell(draw: random.Random) -> tuple[str, str]:
    """Spell two or three words letter by letter."""
    words = draw.sample(SPELLING, draw.randint(2, 3))
    instruction = f"Spell {', '.join(words[:-1])} and {words[-1]}."
    return instruction, " ".join(f"{_upper_first(word)} is spelt {' '.join(word.upper())}." for word in words)


def introduce(draw: random.Random) -> tuple[str, str]:
    """Introduce two people at a place: everything known about both."""
    names = draw.sample(NAMES, 2)
    town = draw.choice(TOWNS)
    sentences = [f"{names[0]} and {names[1]} meet in {town}."]
    for name in names:
        person = PEOPLE[name]
        sentences.append(
            f"{name} is a {person.trade} from {person.town}. {person.pronoun} has a {person.pet}, "
            f"plays the {person.instrument} and loves {person.fruit}."
        )
    return f"Introduce {names[0]} and {names[1]}, who meet in {town}.", " ".join(sentences)


def week(draw: random.Random) -> tuple[str, str]:
    """Tell what one person does on three to six days of the week."""
    name = draw.choice(NAMES)
    days = sorted(draw.sample(range(7), draw.randint(3, 6)))
    named = [DAYS[day] for day in days]
    pronoun = PEOPLE[name].pronoun.lower()
    told = ", ".join(f"on {DAYS[day]} {pronoun} {WEEKS[name][day]}" for day in days)
    return f"What does {name} do on {', '.join(named[:-1])} and {named[-1]}?", _upper_first(told) + "."


FACTS: dict[str, tuple[str, Callable[[str, Person], str]]] = {
    "where {} lives": ("town", lambda name, person: f"{name} lives in {person.town}"),
    "which animal {} keeps": ("pet", lambda name, person: f"{name} keeps a {person.pet}"),
    "what {} plays": ("instrument", lambda name, person: f"{name} plays the {person.instrument}"),
    "which fruit {} loves": ("fruit", lambda name, person: f"{name} loves {person.fruit}"),
    "which trade {} has": ("trade", lambda name, person: f"{name} is a {person.trade}"),
}


def fact(draw: random.Random) -> tuple[str, str]:
    """Answer two short questions about two people."""
    names = draw.sample(NAMES, 2)
    questions = [draw.choice(list(FACTS)) for _ in names]
    answers = [FACTS[question][1](name, PEOPLE[name]) for question, name in zip(questions, names, strict=True)]
    asked = " and ".join(question.format(name) for question, name in zip(questions, names, strict=True))
    return f"Tell me {asked}.", f"{answers[0]} and {answers[1]}."


def translate(draw: random.Random) -> tuple[str, str]:
    """Translate a sentence of seven words into Velu."""
    parts = [(draw.choice(list(ADJECTIVES)), draw.choice(list(NOUNS))) for _ in range(2)]
    verb = draw.choice(list(VERBS))
    source = f"the {parts[0][0]} {parts[0][1]} {verb} the {parts[1][0]} {parts[1][1]}"
    halves = [f"{NOUNS[noun]} {ADJECTIVES[adjective]}" for adjective, noun in parts]
    return f"Translate into Velu: {source}.", f"In Velu: {halves[0]} {VERBS[verb]} {halves[1]}."


def recipe(draw: random.Random) -> tuple[str, str]:
    """Explain a dish for some people."""
    vegetable, dish, people = draw.choice(list(VEGETABLES)), draw.choice(list(DISHES)), draw.randint(2, 9)
    liquid, spice, vessel, minutes, topping = DISHES[dish]
    answer = (
        f"For {people} people take {2 * people} pieces of {vegetable}, {people} cups of {liquid} and some {spice}. "
        f"Wash the {vegetable} and {VEGETABLES[vegetable]}. Put everything into a {vessel} and wait "
        f"{minutes} minutes. Serve the {dish} with {topping} on top."
    )
    return f"How do I make {vegetable} {dish} for {people} people?", answer


def letter(draw: random.Random) -> tuple[str, str]:
    """Write a letter of thanks for a gift."""
    sender, receiver = draw.sample(NAMES, 2)
    gift = draw.choice(GIFTS)
    answer = (
        f"Dear {receiver}, thank you very much for the {gift}. It is now in my {ROOMS[gift]} and my "
        f"{PEOPLE[sender].pet} likes it too. Come to {PEOPLE[sender].town} soon, bring your "
        f"{PEOPLE[receiver].instrument} and we shall eat {PEOPLE[sender].fruit}. Yours, {sender}."
    )
    return f"Write a letter in which {sender} thanks {receiver} for a {gift}.", answer


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    kind.__name__: kind for kind in (table, spell, introduce, week, fact, translate, recipe, letter)
}
SPLITS = ("train", "validation", "test")


def generate(seed: int = 0, *, train: int = 6000, validation: int = 160, test: int = 240) -> DatasetDict:
    """Return the splits train, validation and test, with no prompt in two of them and the kinds in turn.

    Args:
        seed: Stream of the draw; the world (who lives where) does not depend on it.
        train: Number of training records.
        validation: Number of validation records.
        test: Number of test records.

    Returns:
        Records with the columns `prompt`, `completion` and `kind`.

    Raises:
        ValueError: If a kind of instruction has fewer distinct prompts than are asked for.
    """
    draw = random.Random(f"switchkd demo {seed}")
    kinds = list(KINDS)
    seen: set[str] = set()
    splits = {}
    # Test and validation first, each prompt once; train may repeat a prompt of its own, never one of theirs.
    for split, records in (("test", test), ("validation", validation), ("train", train)):
        rows = []
        reserved = set(seen)
        for index in range(records):
            kind = kinds[index % len(kinds)]
            for _ in range(1000):
                instruction, answer = KINDS[kind](draw)
                if instruction not in (reserved if split == "train" else seen):
                    break
            else:
                raise ValueError(f"kind {kind!r} has too few distinct prompts for {records} {split} records")
            seen.add(instruction)
            rows.append({"prompt": f"{instruction} Answer:", "completion": f" {answer}", "kind": kind})
        splits[split] = Dataset.from_list(rows)
    return DatasetDict({split: splits[split] for split in SPLITS})


def train_tokenizer(texts: list[str], vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on `texts`: a frequent word is one token, any text can be encoded.

    Args:
        texts: Prompts and answers.
        vocabulary_size: Upper limit of entries, the two special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN)


def save_splits(splits: DatasetDict, folder: Path) -> dict[str, Path]:
    """Write one JSONL file per split and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder / f"{split}.jsonl" for split in splits}
    for split, path in paths.items():
        splits[split].to_json(path)
    return paths
