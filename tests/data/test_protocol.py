"""`switchkd prepare`: the protocol's sources as ready folders, whatever their files look like."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Run, write_rows

from switchkd import prepare
from switchkd.cli.run_folder import read_config
from switchkd.data import alpaca_prompt, load_records
from switchkd.data.prepared import prepared_facts
from switchkd.data.protocol import overlap, prepare_source
from switchkd.errors import UserError
from switchkd.sources import SOURCES

LONG = "one two three four five six seven eight nine ten eleven"


def record(number: int, output: Any = "yes", **more: Any) -> dict[str, Any]:
    return {"instruction": f"do {number}", "input": "" if number % 2 else f"with {number}", "output": output, **more}


def filled(number: int) -> dict[str, Any]:
    """The same record as only its prompt and its answer."""
    one = record(number)
    return {"prompt": alpaca_prompt(one["instruction"], one["input"]), "output": one["output"]}


def test_one_record_in_every_published_form_is_the_same(tmp_path: Path) -> None:
    one, two = record(1), record(2)
    forms = {
        "plain": [one, two],
        "filled": [filled(1), filled(2)],
        "both": [one | filled(1), two | filled(2)],
        "hub": [{"instruction": r["instruction"], "context": r["input"], "response": r["output"]} for r in (one, two)],
        "instances": [
            {"instruction": r["instruction"], "instances": [{"input": r["input"], "output": r["output"]}]}
            for r in (one, two)
        ],
    }
    for name, rows in forms.items():
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        packed = tmp_path / f"{name}.jsonl.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        for file in (path, packed):
            found = prepare_source("self_instruct", dataset_name=str(file))
            assert found.splits == {"test": [one, two]}, name
    mapped = write_rows(
        tmp_path / "mapped.jsonl", [{"q": r["instruction"], "input": r["input"], "a": "yes"} for r in (one, two)]
    )
    found = prepare_source("self_instruct", dataset_name=str(mapped), columns="instruction=q,output=a")
    assert found.splits == {"test": [one, two]}


def test_an_instance_is_a_record(tmp_path: Path) -> None:
    instances = [{"input": "a", "output": "b"}, {"input": "c", "output": ["d", "e"]}]
    path = write_rows(tmp_path / "tasks.jsonl", [{"instruction": "go", "instances": instances}])
    found = prepare_source("self_instruct", dataset_name=str(path))
    assert found.splits["test"] == [{"instruction": "go", **one} for one in instances]
    assert "tasks.jsonl: 2 instances of 1 tasks." in found.facts["notes"]
    natural = tmp_path / "task.json"
    natural.write_text(json.dumps({"Definition": ["go"], "Instances": [{"input": "a", "output": [LONG, "x"]}]}))
    found = prepare_source("sni", dataset_name=str(natural))
    assert found.splits["test"] == [{"instruction": "go", "input": "a", "output": [LONG, "x"]}]


def test_the_first_response_must_have_eleven_words_and_the_first_records_are_kept(tmp_path: Path) -> None:
    outputs = [LONG, LONG.removesuffix(" eleven"), [LONG, "short"], ["short", LONG], f"  {LONG}\n"]
    path = write_rows(tmp_path / "a.jsonl", [record(n, output) for n, output in enumerate(outputs)])
    for name in ("sni", "unni"):
        found = prepare_source(name, dataset_name=str(path))
        assert [one["instruction"] for one in found.splits["test"]] == ["do 0", "do 2", "do 4"]
        counts = found.facts["splits"]["test"]
        assert (counts["read"], counts["shorter_responses"], counts["kept"]) == (5, 2, 3)
    found = prepare_source("unni", dataset_name=str(path), max_samples=2)
    assert [one["instruction"] for one in found.splits["test"]] == ["do 0", "do 2"]
    assert found.facts["splits"]["test"]["over_the_limit"] == 1
    assert len(prepare_source("unni", dataset_name=str(path), min_response_words=0).splits["test"]) == 5
    assert SOURCES["unni"].max_samples == 10_000


def test_a_whole_file_is_split_without_parting_a_prompt_and_in_any_order_alike(tmp_path: Path) -> None:
    rows = [record(n // 2, f"answer {n}") for n in range(60)]
    path, turned = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[::-1])
    options: dict[str, Any] = {"sizes": {"validation": 8, "test": 5}}
    found = prepare_source("dolly", dataset_name=str(path), **options)
    # No prompt has an odd number of records, so that of five places one stays free.
    assert {split: len(records) for split, records in found.splits.items()} == {"train": 48, "validation": 8, "test": 4}
    assert set(found.facts["overlap"].values()) == {0}
    again = prepare_source("dolly", dataset_name=str(turned), **options)
    assert {split: records[::-1] for split, records in again.splits.items()} == found.splits
    other = prepare_source("dolly", dataset_name=str(path), seed=1, **options)
    assert other.splits["test"] != found.splits["test"]


def test_prompts_that_train_shares_are_counted_and_can_be_taken_out(tmp_path: Path, run: Run) -> None:
    files = {
        "train": write_rows(tmp_path / "train.jsonl", [record(n) for n in range(6)]),
        "dev": write_rows(tmp_path / "dev.jsonl", [record(5, "no"), record(7)]),
        "valid": write_rows(tmp_path / "valid.jsonl", [record(4), record(0), record(9)]),
    }
    code, out, err = run("prepare", "--source", "dolly", "--dataset_name", tmp_path, "--output_dir", tmp_path / "out")
    assert code == 0, err
    assert "2 of the 3 test prompts are also in train; --remove_overlap" in out and "the papers have 11,435" in out
    named = [
        f"--{split}_file={files[stem]}"
        for split, stem in (("train", "train"), ("validation", "dev"), ("test", "valid"))
    ]
    code, out, err = run("prepare", "--source", "dolly", *named, "--remove_overlap", "--output_dir", tmp_path / "less")
    assert code == 0 and "3 records were taken out of train" in out, err
    kept = [json.loads(line) for line in (tmp_path / "less" / "train.jsonl").read_text().splitlines()]
    assert kept == [record(n) for n in (1, 2, 3)]
    assert overlap({"train": kept, "test": [record(4)]}) == {"test in train": 0}


def test_the_raw_file_of_minillm_begins_with_validation(tmp_path: Path) -> None:
    write_rows(tmp_path / "raw.jsonl", [record(n) for n in range(1003)])
    write_rows(tmp_path / "valid.jsonl", [record(2000)])
    found = prepare_source("dolly", dataset_name=str(tmp_path))
    assert found.splits["validation"] == [record(n) for n in range(1000)]
    assert found.splits["train"] == [record(n) for n in range(1000, 1003)]
    assert found.splits["test"] == [record(2000)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps(record(1)), json.dumps(record(2))[:-9]], "a.jsonl, line 2: malformed JSON"),
        ([json.dumps(record(1)), "", json.dumps({"instruction": "x", "input": ""})], "a.jsonl, line 3: `output` must"),
        ([json.dumps(record(1, ["a", ""]))], "a.jsonl, line 1: `output` must be a text or a list of texts, none"),
        ([json.dumps(record(1)), json.dumps({"output": "x"})], "a.jsonl, line 2: `instruction` is missing"),
        ([json.dumps(record(1)), '{"prompt": "Hi", "output": "x"}'], "line 2: `prompt` is not the Alpaca template"),
        ([json.dumps(record(1)), "[1, 2]"], "a.jsonl, line 2: expected a JSON object"),
        ([json.dumps(record(1, input=3))], "a.jsonl, line 1: `input` must be text"),
        ([json.dumps({"instruction": "x", "instances": [1]})], "line 1: `instances` must be a list of objects"),
        ([], "is empty"),
    ],
)  # fmt: skip
def test_wrong_records_are_one_line_with_their_place(tmp_path: Path, run: Run, lines: list[str], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    code, out, err = run("prepare", "--source", "vicuna", "--dataset_name", path, "--output_dir", tmp_path / "out")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_a_broken_off_gz_file_names_the_line(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "a.jsonl.gz"
    text = "".join(json.dumps(record(n, str(n) * 500)) + "\n" for n in range(200))
    path.write_bytes(gzip.compress(text.encode(), compresslevel=0)[: len(text) // 2])
    line = text[: len(text) // 2].count("\n")
    code, _, err = run("prepare", "--source", "vicuna", "--dataset_name", path, "--output_dir", tmp_path / "out")
    assert code == 2 and any(f"breaks off in line {line + one}" in err for one in (0, 1)), err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give --source"),
        (["--source", "doly"], "source must be one of dolly"),
        (["--source", "custom"], "give --dataset_name, or the files"),
        (["--source", "vicuna", "--dataset_name", "no/such/file.jsonl"], "no file or folder no/such/file.jsonl"),
        (["--source", "vicuna", "--test_file", "missing.jsonl"], "no file missing.jsonl"),
        (["--source", "vicuna", "--dataset_name", "x", "--test_file", "y"], "exclude each other"),
        (["--source", "dolly", "--test_size", "-1"], "test_size must be >= 0"),
        (["--source", "dolly", "--dataset_config", "x"], "dataset_config does nothing here"),
        (["--source", "dolly", "--dataset_name", "FILE"], "cannot be taken out of 3 records"),
        (["--source", "vicuna", "--dataset_name", "FILE", "--columns", "output=b"], "no such column"),
        (["--source", "sni", "--dataset_name", "FILE"], "no record of test is left of 3"),
        (["--source", "vicuna", "--dataset_name", "FILE", "--test_size", "1"], "are split already"),
    ],
)
def test_wrong_calls_are_one_line(tmp_path: Path, run: Run, more: list[str], message: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [record(n) for n in range(3)])
    given = [str(path) if word == "FILE" else word for word in more]
    code, out, err = run("prepare", *given, "--output_dir", tmp_path / "out")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and message in err


def test_data_of_your_own_keep_their_shape(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for rows in (
        [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(4)],
        [{"messages": chat}] * 4,
        [record(n, ["a", "b"]) for n in range(4)],
    ):
        path = write_rows(tmp_path / "a.jsonl", rows)
        assert prepare_source("custom", dataset_name=str(path)).splits == {"train": rows}
    path = write_rows(tmp_path / "a.jsonl", [{"frage": f"p{n}", "antwort": f"c{n}"} for n in range(9)])
    found = prepare_source(
        "custom", dataset_name=str(path), columns="prompt=frage,completion=antwort", sizes={"validation": 2, "test": 3}
    )
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 4, "validation": 2, "test": 3}
    assert all(set(row) == {"prompt", "completion"} for rows in found.splits.values() for row in rows)


def test_prepared_folders_are_read_split_by_split_and_changes_are_noticed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [record(n) for n in range(20)])
    prepare_source("dolly", dataset_name=str(path), sizes={"validation": 3, "test": 2}).write(tmp_path / "ready")
    for split, count in (("train", 15), ("validation", 3), ("test", 2)):
        assert len(load_records(str(tmp_path / "ready"), split=split)) == count
    names = [str(tmp_path / "ready"), None, str(tmp_path / "ready" / "test.jsonl"), str(path), "owner/name"]
    facts = prepared_facts(names)
    assert list(facts) == [names[0], names[2]] and facts[str(names[0])]["source"] == "dolly"
    (tmp_path / "ready" / "test.jsonl").write_text("{}\n")
    with pytest.warns(UserWarning, match="test.jsonl was changed after switchkd prepare"):
        prepared_facts(names[:1])
    (tmp_path / "ready" / "prepared.json").write_text("[]")
    with pytest.raises(UserError, match=r"cannot read .*prepared"):
        prepared_facts(names[:1])


def test_training_and_evaluation_keep_what_prepared_their_data(models: Path, tmp_path: Path, run: Run) -> None:
    path = write_rows(tmp_path / "a.jsonl", [record(n) for n in range(8)])
    ready = tmp_path / "ready"
    prepare_source("custom", dataset_name=str(path), sizes={"validation": 1, "test": 2}).write(ready)
    code, _, err = run(
        *("train", "--method", "sft", "--model_name_or_path", models / "student", "--dataset_name", ready),
        *("--dataset_test_split", "validation", "--template", "none", "--max_steps", 1, "--use_cpu"),
        *("--save_strategy", "no", "--report_to", "none", "--output_dir", tmp_path / "run"),
    )
    assert code == 0, err
    code, _, err = run(
        *("evaluate", "--model_name_or_path", tmp_path / "run", "--dataset_name", ready, "--template", "none"),
        *("--decoding_seeds", 1, "--max_completion_length", 2, "--output_dir", tmp_path / "scores"),
    )
    assert code == 0, err
    described = json.loads((ready / "prepared.json").read_text())
    for folder in ("run", "scores"):
        assert json.loads((tmp_path / folder / "prepared.json").read_text()) == {str(ready): described}
    config = read_config(tmp_path / "scores")
    assert config is not None and config["dataset_name"] == str(ready)


def test_the_published_files_go_through_unchanged(shared_dir: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    data = shared_dir / "data"
    found = prepare_source("dolly", dataset_name=str(data / "dolly"))
    assert {split: len(rows) for split, rows in found.splits.items()} == SOURCES["dolly"].published
    assert {pair: found.facts["overlap"][pair] for pair in SOURCES["dolly"].published_overlap} == (
        SOURCES["dolly"].published_overlap
    )
    for name, folder in (("self_instruct", "self-inst"), ("vicuna", "vicuna")):
        found = prepare_source(name, dataset_name=str(data / folder))
        assert len(found.splits["test"]) == SOURCES[name].published["test"]
        found.write(tmp_path / name)
        records = load_records(str(tmp_path / name), split="test")
        published = load_records(str(data / folder / "valid.jsonl"))["prompt"]
        prepared, _ = prepare(records, tiny_tokenizer, max_prompt_length=20_000)
        assert prepared["prompt"] == published


def test_a_preparation_that_was_killed_is_begun_again_by_the_same_command(tmp_path: Path, run: Run) -> None:
    """It was refused, because the folder held another run."""
    rows = write_rows(tmp_path / "rows.jsonl", [record(number) for number in range(8)])
    words = ("prepare", "--source", "custom", "--dataset_name", rows, "--output_dir", tmp_path / "data")
    assert run(*words)[0] == 0
    whole = (tmp_path / "data" / "train.jsonl").read_bytes()
    (tmp_path / "data" / "prepared.json").unlink()  # written last
    (tmp_path / "data" / "train.jsonl").write_bytes(whole[:20])
    code, _, err = run(*words)
    assert code == 0, err
    assert (tmp_path / "data" / "train.jsonl").read_bytes() == whole
    assert "holds another run" in run(*words)[2]
