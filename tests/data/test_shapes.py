"""Data as people have it: every usual shape trains at the first try, or says in one line why it cannot."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from helpers.command_line import one_line_error
from helpers.tiny import build_gpt2, build_tokenizer

from switchkd.data import alpaca_prompt, load_records, prepare
from switchkd.errors import UserError

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A student and a teacher with a chat template, and room for an Alpaca prompt of letters."""
    folder = tmp_path_factory.mktemp("pair")
    for name, seed in (("student", 1), ("teacher", 2)):
        build_gpt2(seed=seed, n_positions=512).save_pretrained(folder / name)
        chat_tokenizer().save_pretrained(folder / name)
    return folder


def jsonl(folder, rows):
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def message(role, content):
    return {"role": role, "content": content}


HELLO = [message("user", "Hi?"), message("assistant", "Ho.")]
ANSWERS = [{"prompt": "Say no:", "completion": " no"}, {"prompt": "1 + 1 =", "completion": " 2"}]
INSTRUCTIONS = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Go.", "output": "no"}]
DOLLY = [{"instruction": "When?", "context": "In 1932.", "response": "1932", "category": "closed_qa"}]
SHARE_GPT = [{"id": "a", "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]}]


def csv_file(folder):
    path = folder / "train.csv"
    path.write_text('question,answer\n"How many, in all?",2\nWhat is not there?,NA\n')
    return path


def saved(folder, data):
    data.save_to_disk(folder / "saved")
    return folder / "saved"


def written(folder, name, write):
    write(folder / name)
    return folder / name


#: Shape -> what writes it into a folder, the method that it is trained with, and the first answer, None for none.
SHAPES = {
    "prompt only": (lambda f: jsonl(f, [{"prompt": "Once"}, {"prompt": "A day"}]), "switch", None),
    "prompt and completion": (lambda f: jsonl(f, ANSWERS), "kd", " no"),
    "messages": (lambda f: jsonl(f, [{"messages": HELLO}]), "kd", "Ho."),
    "messages with system": (lambda f: jsonl(f, [{"messages": [message("system", "Be."), *HELLO]}]), "kd", "Ho."),
    "several turns": (lambda f: jsonl(f, [{"messages": [*HELLO, HELLO[0], message("assistant", "B.")]}]), "kd", "B."),
    "Alpaca": (lambda f: jsonl(f, INSTRUCTIONS), "kd", "3"),
    "Dolly": (lambda f: jsonl(f, DOLLY), "kd", "1932"),
    "instruction only": (lambda f: jsonl(f, [{"instruction": "Name a fish."}]), "switch", None),
    "ShareGPT": (lambda f: jsonl(f, SHARE_GPT), "kd", "Ho."),
    "question and answer": (lambda f: jsonl(f, [{"question": "1 + 1?", "answer": "2"}]), "kd", "2"),
    "text": (lambda f: jsonl(f, [{"text": "Only a text."}]), "sft", "Only a text."),
    "CSV": (csv_file, "kd", "2"),
    "Parquet": (lambda f: written(f, "a.parquet", Dataset.from_list(ANSWERS).to_parquet), "kd", " no"),
    "JSON list": (lambda f: written(f, "a.json", lambda p: p.write_text(json.dumps(ANSWERS))), "kd", " no"),
    "saved data set": (lambda f: saved(f, Dataset.from_list(ANSWERS)), "kd", " no"),
    "saved splits": (lambda f: saved(f, DatasetDict(train=Dataset.from_list(ANSWERS))), "kd", " no"),
}


def train(pair, data, output_dir, method, *more):
    return [
        *("train", "--model_name_or_path", pair / "student", "--teacher_model_name_or_path", pair / "teacher"),
        *("--dataset_name", data, "--output_dir", output_dir, "--method", method, "--use_cpu", "--max_steps", 2),
        *("--max_completion_length", 16, "--per_device_train_batch_size", 2, "--report_to", "none", *more),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_usual_shape_trains_two_steps_at_the_first_try(run, pair, tmp_path, shape):
    write, method, answer = SHAPES[shape]
    path = write(tmp_path)
    code, out, err = run(*train(pair, path, tmp_path / "run", method, "--save_strategy", "no"))
    assert (code, err.count("Traceback")) == (0, 0), err
    assert "2 steps in" in out
    data, _ = prepare(load_records(str(path)), chat_tokenizer(), plain_text=True)
    assert data[0]["references"] == ([] if answer is None else [answer])
    assert f"first prompt, {len(data[0]['prompt_ids'])} tokens (" in out


@pytest.mark.parametrize(
    ("rows", "method", "options", "message"),
    [
        ([{"text": "Only a text."}], "switch", (), "only a column text, which has no prompt to write from"),
        ([{"text": "Only a text."}], "gkd", (), "train on it with sft or kd"),
        ([{"text": "Only a text."}], "sft", ("--template", "chat"), "template=chat does nothing: a column text has no"),
        ([{"instruction": "Name a fish."}], "kd", (), "method 'kd' reads dataset answers, but row 0"),
        ([{"query": "x", "reply": "y"}], "kd", (), "unknown columns (query, reply)"),
        ([{"query": "x"}], "kd", ("--columns", "prompt=question"), "prompt=question, but the data set has no such"),
        (ANSWERS, "kd", ("--columns", "promt=prompt"), "nothing is read as 'promt', the nearest name is 'prompt'"),
        (ANSWERS, "kd", ("--columns", "prompt"), "columns must be name=column pairs"),
        (ANSWERS, "kd", ("--columns", "completion=prompt,messages=completion"), "make no record"),
        (ANSWERS, "kd", ("--template", "chatml"), "template must be one of auto, none, alpaca, chat, got 'chatml'"),
        ([{"messages": HELLO}], "kd", ("--template", "alpaca"), "template=alpaca does nothing to chat messages"),
        (ANSWERS, "switch", ("--supervise", "all"), "supervise=all does nothing: method 'switch' trains on no answers"),
        (ANSWERS, "kd", ("--supervise", "every"), "supervise must be one of last, all, got 'every'"),
        (
            [{"conversations": [{"from": "moderator", "value": "x"}]}],
            "kd",
            (),
            "`from` is 'moderator' in `conve",
        ),
        ([{"prompt": "x", "tools": [{"name": "f"}]}], "switch", (), "row 1 has tools, which only a chat can show"),
        (
            [{"messages": HELLO, "tools": [{"name": "f"}]}],
            "kd",
            (),
            "which the tokenizer's chat template does not show",
        ),
        ([{"messages": HELLO, "tools": "[{"}], "kd", (), "row 1: `tools` is not JSON"),
    ],
)
def test_data_that_cannot_serve_are_refused_in_one_line(run, pair, tmp_path, rows, method, options, message):
    result = run(*train(pair, jsonl(tmp_path, rows), tmp_path / "run", method, *options))
    assert message in one_line_error(*result)


def test_every_record_that_the_page_shows_is_understood():
    document = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = re.search(r"```json\n(.*?)```", document, flags=re.DOTALL)[1].splitlines()
    shapes = set()
    for line in lines:
        _, report = prepare(Dataset.from_list([json.loads(line)]), chat_tokenizer(), plain_text=True)
        shapes.add(report.columns)
        assert report.kept == 1
    assert shapes == {
        *("prompt", "prompt + completion", "messages", "instruction + output", "instruction + response"),
        *("instruction", "conversations", "question + answer", "text"),
    }


# ---- names of columns


def test_named_columns_are_read_as_if_they_had_these_names():
    renamed = [{"q": row["prompt"], "a": row["completion"], "prompt": "not this"} for row in ANSWERS]
    expected, _ = prepare(Dataset.from_list(ANSWERS), chat_tokenizer())
    for columns in ("prompt=q,completion=a", {"prompt": "q", "completion": "a"}, '{"prompt": "q", "completion": "a"}'):
        data, report = prepare(Dataset.from_list(renamed), chat_tokenizer(), columns=columns)
        assert data.to_list() == expected.to_list()
        assert report.columns == "q + a"


def test_a_named_column_takes_the_set_it_belongs_to():
    both = Dataset.from_list([{"instruction": "i", "output": "o", "question": "q", "answer": "a"}])
    assert prepare(both, chat_tokenizer())[0]["references"] == [["o"]]
    data, _ = prepare(both, chat_tokenizer(), columns="prompt=question,completion=answer")
    assert (data["prompt"][0], data["references"][0]) == ("q", ["a"])
    hinted, _ = prepare(both, chat_tokenizer(), columns="teacher_prompt=question")
    assert chat_tokenizer().decode(hinted["teacher_prompt_ids"][0]) == "q"


def test_dolly_of_the_hub_is_the_alpaca_template_with_its_context_as_input():
    data, report = prepare(Dataset.from_list(DOLLY), chat_tokenizer())
    assert data["prompt"][0] == alpaca_prompt("When?", "In 1932.")
    assert report.columns == "instruction + response"


def test_instructions_go_through_the_chat_template_where_it_is_asked_for():
    data, _ = prepare(Dataset.from_list(INSTRUCTIONS), chat_tokenizer(), template="chat")
    assert data["prompt"] == ["<user>Add.\n\n1 2\n<assistant>", "<user>Go.\n<assistant>"]
    assert chat_tokenizer().decode(data["completion_ids"][0]) == "3<eos>"
    plain, _ = prepare(Dataset.from_list(INSTRUCTIONS), chat_tokenizer(), template="none")
    assert plain["prompt"] == ["Add.\n\n1 2", "Go."]
    hinted = Dataset.from_list([{"prompt": "a", "teacher_prompt": "hint"}])
    teacher = prepare(hinted, chat_tokenizer(), template="chat")[0]["teacher_prompt_ids"][0]
    assert chat_tokenizer().decode(teacher) == "<user>hint\n<assistant>"


def test_plain_text_follows_the_token_that_begins_a_text():
    tokenizer = chat_tokenizer()
    data, _ = prepare(Dataset.from_list([{"text": "ab"}, {"text": "a" * 30}]), tokenizer, plain_text=True)
    assert data["prompt_ids"] == [[tokenizer.eos_token_id]] * 2  # it has no other
    assert tokenizer.decode(data["completion_ids"][0]) == "ab<eos>"
    with pytest.raises(UserError, match="no prompt to write from"):
        prepare(Dataset.from_list([{"text": "ab"}]), tokenizer)


def test_csv_values_are_text_and_stay_what_they_are(tmp_path):
    assert load_records(str(csv_file(tmp_path)))["answer"][:] == ["2", "NA"]
    path = tmp_path / "a.tsv"
    path.write_text('\ufeffprompt\tcompletion\na, b\t"c"\n')
    assert load_records(str(path)).to_list() == [{"prompt": "a, b", "completion": "c"}]


# ---- what is said about it


def test_more_than_a_tenth_dropped_is_one_warning(run, pair, tmp_path):
    rows = [{"prompt": "x" * (20 if n == 0 else 3)} for n in range(9)]
    path = jsonl(tmp_path, rows)
    limits = ("--max_prompt_length", 10, "--max_steps", 1, "--save_strategy", "no", "--initial_threshold", 0.3)
    _, out, err = run(*train(pair, path, tmp_path / "run", "switch", *limits))
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "1 of 9 records (11%) are dropped: their prompts are longer than max_prompt_length=10" in warnings[0]
    assert "8 of 9 records kept (prompt), 1 over-long prompts dropped\n" in out  # no completions are read, none are cut
    jsonl(tmp_path, [*rows, {"prompt": "xxx"}])
    _, _, err = run(*train(pair, path, tmp_path / "other", "switch", *limits))
    assert "warning" not in err


def test_from_python_the_report_goes_to_the_log(make_trainer, caplog):
    with caplog.at_level("INFO", logger="switchkd"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", train_dataset=ANSWERS)
    said = [record.getMessage() for record in caplog.records if record.name == "switchkd"]
    assert said == [
        "train data: 2 of 2 records kept (prompt + completion), 0 over-long prompts dropped, 0 completions cut"
    ]


def test_first_prompt_shows_its_special_tokens_and_stays_off_the_standard_output_of_json(run, pair, tmp_path):
    path = jsonl(tmp_path, [{"messages": [*HELLO, message("user", "x" * 440)]}])
    more = ("--max_prompt_length", 500, "--max_completion_length", 4, "--save_strategy", "no")
    _, out, err = run(*train(pair, path, tmp_path / "run", "switch", *more, "--json"))
    assert out.count("\n") == 1 and json.loads(out)["steps"] == 2
    shown = next(line for line in err.splitlines() if line.startswith("first prompt"))
    assert (
        "tokens (1 special): <user>Hi?\\n<assistant>Ho.<eos>\\n<user>xxx" in shown
        and " ... " in shown
        and len(shown) < 450
    )
    assert shown.endswith("xxx\\n<assistant>")
