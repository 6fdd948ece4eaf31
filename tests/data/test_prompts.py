"""Laws of preparing data: what becomes a prompt and an answer, what is dropped, and every refusal in one line."""

import json
import time

import pytest
from datasets import Dataset
from helpers.tiny import build_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from switchkd.data import PrepareReport, alpaca_prompt, encode_prompt, load_records, prepare
from switchkd.errors import UserError

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(template: str = "$A", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes, one merge ("\\n\\n"), and the special tokens that `template` puts around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def rows(*records: dict) -> Dataset:
    return Dataset.from_list(list(records))


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------- preparing


def test_alpaca_template_word_for_word():
    assert alpaca_prompt("Name a fish.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a fish.\n\n### Response:\n"
    )
    assert alpaca_prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


def test_instruction_records_go_through_the_template(tokenizer):
    records = rows(
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say no.", "input": "", "output": "no"},
        {"instruction": "Say so.", "input": None, "output": "so"},
    )
    data, report = prepare(records, tokenizer)
    assert data["prompt"] == [alpaca_prompt("Add.", "1 2"), alpaca_prompt("Say no."), alpaca_prompt("Say so.")]
    assert [tokenizer.decode(ids) for ids in data["completion_ids"]] == ["3</s>", "no</s>", "so</s>"]
    assert report == PrepareReport("instruction + output", kept=3, dropped_over_long=0, truncated_completions=0)


def test_filled_prompt_that_contradicts_its_instruction_is_refused(tokenizer):
    good = {"instruction": "Add.", "output": "3", "prompt": alpaca_prompt("Add.")}
    assert len(prepare(rows(good), tokenizer)[0]) == 1
    message = refusal(prepare, rows(good, {**good, "prompt": "Q: Add."}), tokenizer)
    assert message.startswith("row 2: `prompt` is not the Alpaca template")


def test_all_references_are_kept_and_the_first_is_trained_on(tokenizer):
    data, _ = prepare(rows({"instruction": "i", "output": ["one", "two"]}), tokenizer)
    assert data["references"] == [["one", "two"]]
    assert tokenizer.decode(data["completion_ids"][0]) == "one</s>"


def test_prompt_only_has_no_answer(tokenizer):
    data, report = prepare(rows({"prompt": "x"}), tokenizer)
    assert (data["completion_ids"], data["references"], report.columns) == ([[]], [[]], "prompt")
    empty_list, _ = prepare(rows({"prompt": "x", "completion": ["y"]}, {"prompt": "z", "completion": []}), tokenizer)
    assert empty_list["references"] == [["y"], []]
    assert empty_list["completion_ids"][1] == []


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "</s> $A"])
def test_prompt_ids_are_those_of_encode_prompt_and_never_end_with_an_added_eos(template):
    tokenizer = byte_tokenizer(template)
    texts = [f"text {i}" * (i % 7 + 1) for i in range(2500)]
    data, _ = prepare(rows(*({"prompt": text, "completion": "c"} for text in texts)), tokenizer)
    start = {"<": [1] if template.startswith("<s>") else [2], "$": []}[template[0]]
    bare = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert data["prompt_ids"] == [start + ids for ids in bare]
    for i in range(0, 2500, 100):
        assert data["prompt_ids"][i] == encode_prompt(texts[i], tokenizer)
    assert {tuple(ids) for ids in data["completion_ids"]} == {
        (*tokenizer("c", add_special_tokens=False)["input_ids"], 2)
    }


@pytest.mark.parametrize("template", ["$A", "$A </s>", "</s> $A"])
def test_eos_that_the_text_itself_spells_stays(template):
    tokenizer = byte_tokenizer(template)
    ids = encode_prompt("first</s>", tokenizer, split_special_tokens=False)
    assert ids[-1] == 2 and ids[-2] != 2
    # As text it is five letters, between the special tokens that the tokenizer adds in front.
    plain = encode_prompt("first</s>", tokenizer)
    start = [] if template.startswith("$A") else [2]
    assert plain[: len(start)] == start and 2 not in plain[len(start) :]
    assert tokenizer.decode(plain[len(start) :]) == "first</s>"


def test_answer_gets_exactly_one_eos_and_ends_at_the_first(tokenizer):
    records = rows(*({"prompt": "p", "completion": text} for text in ["a", "a</s>", "a</s>b</s>", ""]))
    data, _ = prepare(records, tokenizer, split_special_tokens=False)
    assert [tokenizer.decode(ids) for ids in data["completion_ids"]] == ["a</s>", "a</s>", "a</s>", "</s>"]
    assert data["references"][3] == [""]


def test_answer_is_what_follows_the_prompt_and_is_encoded_alone_where_the_border_merges(tokenizer):
    data, _ = prepare(rows({"prompt": "p\n", "completion": "\na"}, {"prompt": "p\n", "completion": "a"}), tokenizer)
    merged, clean = data["completion_ids"]
    assert data["prompt_ids"][0] == data["prompt_ids"][1]
    assert tokenizer.decode(merged) == "\na</s>"
    assert data["prompt_ids"][1] + clean[:-1] == tokenizer("p\na")["input_ids"]


# ---- the border between prompt and answer

BORDER_PROMPTS = [
    "colour: ",
    "colour:",
    "colour:  ",
    "Q?\n",
    "Q?\n\n",
    "re",
    "one two ",
    "\ttab\t",
    "caf\u00e9 ",
    "\u4e2d",
]
BORDER_ANSWERS = ["red", " red", "  red", "\nred", "\n\nred", "d one", "\u00e9 two", "\u6587 red", ".", " ", "0 a|\n"]
CORPUS = ["colour: red", "one two red", "read the colour", "tab re", "a red one, two red ones.", "0 1 0 a | b"] * 3


def sentencepiece_like(model: str, scheme: str, split: bool, prefix_as_normalizer: bool = False):
    """A trained tokenizer with "\u2581" for blanks: as LlamaTokenizer, as T5's, or as the file of Llama 2 has it."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    if model == "bpe":
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    else:
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=330, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    backend.pre_tokenizer = metaspace if model == "unigram" else pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.train_from_iterator(CORPUS, trainer)
    pieces = json.loads(backend.to_str())["model"]
    if model == "bpe":
        merges = [tuple(pair) for pair in pieces["merges"]]
        backend.model = models.BPE(
            vocab=pieces["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    else:
        backend.model = models.Unigram([(p, score) for p, score in pieces["vocab"]], unk_id=0, byte_fallback=True)
    backend.pre_tokenizer = metaspace
    if prefix_as_normalizer:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def llama_tokenizer():
    """The class of transformers with the trained pieces."""
    pieces = json.loads(sentencepiece_like("bpe", "first", False).backend_tokenizer.to_str())["model"]
    return LlamaTokenizer(vocab=pieces["vocab"], merges=[tuple(pair) for pair in pieces["merges"]])


BORDER_TOKENIZERS = {
    "llama": llama_tokenizer,
    "bpe first": lambda: sentencepiece_like("bpe", "first", False),
    "bpe always": lambda: sentencepiece_like("bpe", "always", False),
    "bpe split": lambda: sentencepiece_like("bpe", "always", True),
    "bpe of a llama 2 file": lambda: sentencepiece_like("bpe", "first", False, prefix_as_normalizer=True),
    "unigram first": lambda: sentencepiece_like("unigram", "first", True),
    "unigram always": lambda: sentencepiece_like("unigram", "always", True),
    "bytes": byte_tokenizer,
    "characters": build_tokenizer,
}


def assert_the_border_keeps_the_text(tokenizer):
    for prompt in BORDER_PROMPTS:
        prompt_ids = encode_prompt(prompt, tokenizer)
        data, _ = prepare(rows(*({"prompt": prompt, "completion": answer} for answer in BORDER_ANSWERS)), tokenizer)
        for answer, ids, completion in zip(BORDER_ANSWERS, data["prompt_ids"], data["completion_ids"], strict=True):
            assert ids == prompt_ids, "the prompt's ids must not depend on the answer"
            assert completion[-1] == tokenizer.eos_token_id
            whole = tokenizer(prompt + answer)["input_ids"]
            assert tokenizer.decode(ids + completion[:-1]) == tokenizer.decode(whole), (prompt, answer)
            if whole[: len(ids)] == ids:
                assert ids + completion[:-1] == whole


@pytest.mark.parametrize("name", BORDER_TOKENIZERS)
def test_no_second_blank_is_trained_where_a_prompt_ends_in_one(name):
    """ "colour: " + "red" was trained as "colour:  red" by tokenizers that put a blank before every text."""
    tokenizer = BORDER_TOKENIZERS[name]()
    assert_the_border_keeps_the_text(tokenizer)
    data, _ = prepare(rows({"prompt": "colour: ", "completion": "red"}), tokenizer)
    ids = data["prompt_ids"][0] + data["completion_ids"][0][:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "colour: red"


@pytest.mark.parametrize("name", ["data/tokenizers/gpt2", "data/tokenizers/opt", "models/tinystories-char-student"])
def test_the_border_of_published_tokenizers_keeps_the_text(shared_dir, name):
    assert_the_border_keeps_the_text(AutoTokenizer.from_pretrained(shared_dir / name))


def test_over_long_prompts_are_dropped_and_counted_never_cut(tokenizer):
    records = rows(*({"prompt": "x" * length, "completion": "y"} for length in (3, 8, 9, 20)))
    with pytest.warns(UserWarning, match="2 of 4 records .50%. are dropped"):
        data, report = prepare(records, tokenizer, max_prompt_length=8)
    assert data["prompt"] == ["xxx", "x" * 8]
    assert (report.kept, report.dropped_over_long) == (2, 2)
    message = refusal(prepare, records, tokenizer, max_prompt_length=2)
    assert "all 4 prompts are longer than max_prompt_length=2" in message and "shortest has 3" in message


def test_long_completions_are_cut_without_eos_and_counted(tokenizer):
    records = rows(*({"prompt": "x", "completion": "y" * length} for length in (4, 5, 9)))
    data, report = prepare(records, tokenizer, max_completion_length=5)
    assert [tokenizer.decode(ids) for ids in data["completion_ids"]] == ["yyyy</s>", "yyyyy", "yyyyy"]
    assert report.truncated_completions == 2
    assert data["references"][2] == ["y" * 9]
    assert str(report) == ("3 of 3 records kept (prompt + completion), 0 over-long prompts dropped, 2 completions cut")


def test_teacher_prompt_is_encoded_like_a_prompt():
    tokenizer = byte_tokenizer("<s> $A </s>")
    records = rows(*({"prompt": "x" * n, "teacher_prompt": "document " * n} for n in (9, 1, 2)))
    with pytest.warns(UserWarning, match="1 of 3 records"):
        data, _ = prepare(records, tokenizer, max_prompt_length=5)
    assert data["teacher_prompt_ids"] == [encode_prompt("document " * n, tokenizer) for n in (1, 2)]
    message = refusal(
        prepare, rows({"prompt": "x", "teacher_prompt": "y"}, {"prompt": "x", "teacher_prompt": " "}), tokenizer
    )
    assert message.startswith("row 2: the prompt is empty")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"question": "x", "answers": "y"}], "unknown columns (question, answers)"),
        ([{"query": "x", "response": "y"}], "unknown columns (query, response)"),
        ([{"prompt": "x"}, {"prompt": " \n"}], "row 2: the prompt is empty"),
        ([{"prompt": "x"}, {"prompt": None}], "row 2: `prompt` must be text, found null"),
        ([{"prompt": "x", "completion": "a"}, {"prompt": "y", "completion": None}], "row 2: `completion` must be text"),
        ([{"prompt": "x", "completion": ["a", None]}], "row 1: `completion` must be text, found null"),
        ([{"prompt": 3}], "row 1: `prompt` must be text or a list of messages, found '3'"),
        ([{"instruction": "", "output": "y"}], "row 1: `instruction` is empty"),
        ([{"instruction": None, "output": "y"}], "row 1: `instruction` must be text, found null"),
        ([{"instruction": "x", "output": None}], "row 1: `output` must be text, found null"),
        ([{"messages": []}], "row 1: `messages` must be text or a list of messages"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "row 1: the prompt is empty"),
        ([{"messages": [{"role": "user", "content": None}]}], "row 1: `messages.content` must be text, found null"),
        ([{"prompt": [{"role": "assistant", "content": "x"}]}], "row 1: the prompt ends with the assistant's message"),
        (
            [{"prompt": "x", "completion": [{"role": "user", "content": "x"}]}],
            "row 1: `completion` must be one message by the assistant, found user",
        ),
        ([{"messages": [{"role": "user", "content": "x"}]}], "no chat template"),
    ],
)
def test_bad_records_are_named_by_row(tokenizer, records, message):
    assert message in refusal(prepare, rows(*records), tokenizer)


def test_row_numbers_count_over_batches(tokenizer):
    records = [{"prompt": "x"}] * 2300 + [{"prompt": ""}]
    assert refusal(prepare, rows(*records), tokenizer).startswith("row 2301: ")


def test_accepted_column_sets_are_listed(tokenizer):
    message = refusal(prepare, rows({"body": "x"}), tokenizer)
    accepted = "instruction + output; prompt + completion; messages; prompt; instruction + response; conversations; "
    assert f"{accepted}question + answer; instruction; text" in message


def test_no_records_and_no_eos_are_refused(tokenizer):
    assert "holds no records" in refusal(prepare, rows({"prompt": "x"}).select([]), tokenizer)
    without = byte_tokenizer()
    without.eos_token = None
    assert "no end-of-sequence token anywhere" in refusal(prepare, rows({"prompt": "x"}), without)


# --------------------------------------------------------------------------------------------------- chat


USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}


@pytest.fixture(scope="module")
def chat_tokenizer():
    return byte_tokenizer("<s> $A", CHAT_TEMPLATE)


def test_every_way_to_write_a_conversation_gives_the_same_ids(chat_tokenizer):
    ways = [
        {"messages": [USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "Ho."},
    ]
    prepared = [prepare(rows(way), chat_tokenizer)[0].to_list() for way in ways]
    assert prepared[0] == prepared[1] == prepared[2]
    record = prepared[0][0]
    assert record["prompt"] == "<user>Hi?\n<assistant>"
    assert record["references"] == ["Ho."]
    # The template writes its own special tokens: no <s> in front, and the answer ends at its first </s>.
    whole = "<user>Hi?\n<assistant>Ho.</s>"
    assert (
        record["prompt_ids"] + record["completion_ids"] == chat_tokenizer(whole, add_special_tokens=False)["input_ids"]
    )
    assert record["prompt_ids"] == encode_prompt([USER], chat_tokenizer)


def test_last_answer_of_a_longer_chat_is_the_completion(chat_tokenizer):
    data, _ = prepare(rows({"messages": [USER, ASSISTANT, USER, {**ASSISTANT, "content": "Bye."}]}), chat_tokenizer)
    assert data["prompt"] == ["<user>Hi?\n<assistant>Ho.</s>\n<user>Hi?\n<assistant>"]
    assert chat_tokenizer.decode(data["completion_ids"][0]) == "Bye.</s>"


def test_chat_that_waits_for_an_answer_is_a_prompt(chat_tokenizer):
    data, _ = prepare(rows({"messages": [USER]}, {"messages": [USER, ASSISTANT]}), chat_tokenizer)
    assert data["references"] == [[], ["Ho."]]
    assert data["completion_ids"][0] == []
    assert data["prompt_ids"][0] == data["prompt_ids"][1]


def test_keys_that_only_some_messages_have_do_not_reach_the_template():
    template = "{% for message in messages %}{{ message | tojson }}{% endfor %}"
    records = rows({"messages": [{**USER, "name": "Ann"}]}, {"messages": [USER]})
    data, _ = prepare(records, byte_tokenizer(chat_template=template))
    assert "Ann" in data["prompt"][0]
    assert "name" not in data["prompt"][1]


def test_template_that_rewrites_the_prompt_still_yields_the_answer():
    template = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = byte_tokenizer(chat_template=template)
    data, _ = prepare(rows({"messages": [USER, ASSISTANT]}), tokenizer)
    assert tokenizer.decode(data["completion_ids"][0]) == "Ho.</s>"


def test_template_that_refuses_the_messages_is_reported_in_one_line():
    tokenizer = byte_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    message = refusal(prepare, rows({"messages": [USER, USER]}), tokenizer)
    assert message.startswith("row 1: ") and "roles must alternate" in message


# ---------------------------------------------------------------------------------------------- real records


@pytest.mark.parametrize("name", ["dolly/dev", "dolly/valid", "self-inst/valid", "vicuna/valid"])
def test_filled_prompts_of_the_published_files_equal_our_template(shared_dir, name):
    records = load_records(str(shared_dir / "data" / f"{name}.jsonl"))
    filled = [alpaca_prompt(record["instruction"], record.get("input") or "") for record in records]
    assert filled == list(records["prompt"])


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_published_training_file_is_read_and_prepared_in_full(shared_dir, name):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "data" / "tokenizers" / name)
    records = load_records(str(shared_dir / "data" / "dolly" / "train.jsonl.gz"))
    assert len(records) == 11_435
    data, report = prepare(records.select(range(2000)), tokenizer)
    assert report.kept + report.dropped_over_long == 2000
    for record in data.select(range(0, len(data), 97)):
        assert record["prompt_ids"] == encode_prompt(record["prompt"], tokenizer)
        text = record["references"][0]
        ending = tokenizer.eos_token if len(record["completion_ids"]) < 256 else ""
        assert (text + ending).startswith(tokenizer.decode(record["completion_ids"]))


def test_a_line_of_megabytes_is_dropped_without_reading_all_of_it(tiny_tokenizer):
    """50 MB on one line took 106 s and 12 GB before the prompt was dropped for its length."""
    started = time.process_time()
    long = Dataset.from_list([{"prompt": "ab " * 2_000_000, "completion": "c"}, {"prompt": "a", "completion": "b"}])
    prepared, report = prepare(long, tiny_tokenizer, max_prompt_length=64, max_completion_length=8)
    assert len(prepared) == 1 and report.dropped_over_long == 1
    assert time.process_time() - started < 5.0
