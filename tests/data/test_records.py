"""Laws of reading records: files, folders and hub ids, and every refusal with file and line."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from switchkd.data import load_records, prepare
from switchkd.errors import UserError


def rows(*records: dict) -> Dataset:
    return Dataset.from_list(list(records))


def write_jsonl(path: Path, records: list[dict]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


RECORDS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(5)]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "a.parquet.gz", "lines.json"]
)
def test_one_record_set_reads_the_same_from_every_format(tmp_path, name):
    path = tmp_path / name
    plain = tmp_path / name.removesuffix(".gz")
    if ".parquet" in name:
        rows(*RECORDS).to_parquet(plain)
    elif ".jsonl" in name or name.startswith("lines"):
        write_jsonl(plain, RECORDS)
    else:
        plain.write_text(json.dumps(RECORDS, indent=2))
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_records(str(path)).to_list() == RECORDS


def test_reading_and_preparing_say_nothing_and_leave_no_files(tmp_path, tiny_tokenizer, capfd):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    prepare(load_records(str(path)), tiny_tokenizer)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_blank_lines_and_byte_order_mark_are_no_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\n\n{"prompt": "y"}\r\n')
    assert load_records(str(path))["prompt"] == ["x", "y"]


def test_folder_of_files_gives_the_split_in_their_names(tmp_path):
    write_jsonl(tmp_path / "train-00000.jsonl", RECORDS[:2])
    write_jsonl(tmp_path / "train-00001.jsonl.gz", RECORDS[2:3])
    write_jsonl(tmp_path / "dev.jsonl", RECORDS[3:4])
    write_jsonl(tmp_path / "sub" / "test.jsonl", RECORDS[4:])
    assert load_records(str(tmp_path)).to_list() == RECORDS[:3]
    assert load_records(str(tmp_path), split="validation").to_list() == RECORDS[3:4]
    assert load_records(str(tmp_path), split="test").to_list() == RECORDS[4:]
    assert len(load_records(str(tmp_path), split=None)) == 5
    assert "no file for split 'holdout'" in refusal(load_records, str(tmp_path), split="holdout")


def test_folder_with_two_candidates_for_a_split_is_not_guessed(tmp_path):
    write_jsonl(tmp_path / "dev.jsonl", RECORDS[:1])
    write_jsonl(tmp_path / "valid.jsonl", RECORDS[1:])
    message = refusal(load_records, str(tmp_path), split="validation")
    assert "dev.jsonl" in message and "valid.jsonl" in message
    assert load_records(str(tmp_path), split="valid").to_list() == RECORDS[1:]


def test_saved_datasets_load_with_and_without_splits(tmp_path):
    rows(*RECORDS).save_to_disk(tmp_path / "one")
    DatasetDict(train=rows(*RECORDS[:3]), test=rows(*RECORDS[3:])).save_to_disk(tmp_path / "two")
    assert load_records(str(tmp_path / "one")).to_list() == RECORDS
    assert load_records(str(tmp_path / "two"), split="test").to_list() == RECORDS[3:]
    assert "has no split 'validation'; it has train, test" in refusal(
        load_records, str(tmp_path / "two"), split="validation"
    )


def test_text_and_list_references_may_mix_in_one_file(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"instruction": "i", "output": "a"}, {"instruction": "j", "output": ["b", "c"]}]
    )
    assert load_records(str(path))["output"] == [["a"], ["b", "c"]]


def test_a_column_nobody_reads_may_hold_anything(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x", "meta": 1}, {"prompt": "y", "meta": {"a": []}}])
    assert load_records(str(path)).column_names == ["prompt"]


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "../missing/folder", "missing.csv", "a/b/c"])
def test_missing_path_is_named(name):
    assert f"no file or folder {name}" in refusal(load_records, name)


def test_hub_id_that_cannot_be_loaded_says_what_was_tried(monkeypatch):
    seen = []

    def unreachable(*arguments, **options):
        seen.append((arguments, options))
        raise ConnectionError("Couldn't reach it\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refusal(load_records, "owner/name:config", split="test")
    assert (
        "not a local file or folder" in message
        and "hub data set 'owner/name'" in message
        and "cannot be reached" in message
    )
    assert seen == [(("owner/name", "config"), {"split": "test"})]
    assert "or a hub id" in refusal(load_records, "two words")
    assert len(seen) == 1


def test_a_configuration_and_streaming_reach_the_hub(monkeypatch):
    seen = []

    def load(*arguments, **options):
        seen.append((arguments, options))
        return rows(*RECORDS).to_iterable_dataset() if options.get("streaming") else rows(*RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_records("owner/name", configuration="en").to_list() == RECORDS
    assert list(load_records("owner/name:en", split="test", streaming=True)) == RECORDS
    assert seen == [
        (("owner/name", "en"), {"split": "train"}),
        (("owner/name", "en"), {"split": "test", "streaming": True}),
    ]
    assert "name two configurations" in refusal(load_records, "owner/name:de", configuration="en")


def test_parquet_is_mapped_from_disk_and_not_held_in_memory(tmp_path):
    rows(*RECORDS).to_parquet(tmp_path / "a.parquet")
    assert load_records(str(tmp_path / "a.parquet")).cache_files != []


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"prompt": "x"}\n\n{"prompt": \n', "line 3: malformed JSON"),
        (b'{"prompt": "x"}\n["prompt"]\n', "line 2: expected a JSON object, found \"['prompt']\""),
        (b'{"prompt": "x"}\n{"prompt": "\xff"}\n', "line 2: malformed JSON"),
        (b'{"prompt": "x"} {"prompt": "y"}\n', "line 1: malformed JSON"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"prompt": "x"}\n{"prompt": 1}\n', "column `prompt` mixes values (int, str)"),
    ],
)
def test_bad_lines_are_named_with_file_and_number(tmp_path, content, where):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    message = refusal(load_records, str(path))
    assert where in message and str(path) in message


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("bad.json", b'[{"prompt": "x"},\n{"prompt" "y"}]', "line 2: malformed JSON"),
        ("bad.json", b'[{"prompt": "x"},\n3]', "record 2: expected a JSON object"),
        ("bad.json", b'{"prompt": "x"}\n{"prompt"\n', "line 2: malformed JSON"),
        ("bad.json", b"[]", "is empty"),
        ("bad.json", b"", "is empty"),
        ("bad.jsonl.gz", b"not gzip", "cannot read"),
        ("bad.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 50, mtime=0)[:30], "cannot read"),
        ("bad.parquet", b"not parquet", "cannot read"),
        ("bad.txt", b"prompt\nx\n", "give a .jsonl, .json, .csv, .tsv or .parquet file"),
        ("bad.csv", b'prompt,completion\n"a, b",2\nNA,x,y\n', "Expected 2 fields in line 3, saw 3"),
        ("bad.csv", b"", "the first line must name the columns, each once"),
        ("bad.csv", b"prompt,prompt\n1,2\n", "the first line must name the columns, each once"),
        ("bad.csv", b"prompt\n\xff\xff\n", "cannot read"),
        ("bad.csv.gz", b"not gzip", "cannot read"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, name, content, where):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(load_records, str(path))
    assert where in message and str(path) in message


def test_folder_without_data_is_refused(tmp_path):
    assert "holds no data: it needs a .jsonl, .json, .csv" in refusal(load_records, str(tmp_path))
