"""`switchkd diagnose`: table, advice, picture, rows, one line for a mistake."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Run, one_line_error, write_rows
from helpers.tiny import RAGGED_ROWS

from switchkd.cli.run_folder import read_config
from switchkd.commands.train_options import parser, read_options

SCORER = "def score(prompt, answer, references):\n    return len(set(answer) & set(references[0])) / 100\n"


def diagnose_options(models: Path, output_dir: Path, *more: Any) -> list[Any]:
    return [
        *("diagnose", "--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher"),
        *("--dataset_name", models / "train.jsonl", "--max_completion_length", 12, "--output_dir", output_dir, *more),
    ]


def test_diagnose_writes_what_it_prints(models: Path, tmp_path: Path, run: Run) -> None:
    folder, scorer = tmp_path / "diagnosis", tmp_path / "measure.py"
    scorer.write_text(SCORER)
    more = ("--positions", "0,2,6", "--scorer", f"{scorer}:score", "--json")
    code, out, err = run(*diagnose_options(models, folder, *more))
    assert code == 0, err
    summary = json.loads(out)
    written = json.loads((folder / "summary.json").read_text())
    assert written == {name: value for name, value in summary.items() if name != "output_dir"}
    assert summary["measure"] == "score" and summary["positions"] == [0, 2, 6]
    assert (folder / "diagnose.png").read_bytes().startswith(b"\x89PNG")
    writers = summary["writers"]
    assert summary["ranking"] == list(writers) and set(writers) == {"dataset", "student", "random", "switch", "teacher"}
    shares = [writer["guidance"]["share"]["value"] for writer in writers.values()]
    assert shares == sorted(shares, reverse=True) and writers["dataset"]["guidance"]["share"]["value"] == 1.0
    assert writers["teacher"]["against_teacher"]["share"]["value"] == 1.0
    assert all(writer["by_position"][0]["share"]["value"] == 1.0 for writer in writers.values())
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 5 * len(RAGGED_ROWS)
    for name, writer in writers.items():
        own = [row for row in rows if row["writer"] == name]
        tokens = sum(row["completion_tokens"] for row in own)
        assert writer["completion_tokens"] == pytest.approx(tokens / len(own))
        if name != "dataset":
            assert writer["teacher_share"] == pytest.approx(sum(row["teacher_tokens"] for row in own) / tokens)
    config = read_config(folder)
    assert config is not None and config["positions"] == [0, 2, 6]
    assert "guidance kept" in err and "harmful tokens" in err


def test_the_command_of_the_advice_is_one_that_train_reads(models: Path, tmp_path: Path, run: Run) -> None:
    """With a student that is its teacher, whose text loses nothing."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"{n} a", "completion": "one two three"} for n in range(20)])
    scorer = tmp_path / "measure.py"
    scorer.write_text("def score(prompt, answer, references):\n    return 0.5\n")
    options = diagnose_options(models, tmp_path / "run", "--model_name_or_path", models / "teacher", "--json")
    code, out, err = run(*options, "--dataset_name", data, "--scorer", f"{scorer}:score", "--positions", "0,1")
    assert code == 0, err
    advice = json.loads(out)["advice"]
    assert advice["verdict"] == "student" and "0% (0% to 0%)" in advice["sentence"]
    program, command, *words = shlex.split(advice["command"])
    _, config = read_options(parser().resolve([*words, "--output_dir", str(tmp_path / "trained")]))
    assert (program, command, config.method, config.max_completion_length) == ("switchkd", "train", "opd", 12)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_samples", "0"], "max_samples must be >= 1"),
        (["--positions", "0,4,12"], "positions must begin with 0 and increase, below max_completion_length=12"),
        (["--positions", "2,4"], "positions must begin with 0"),
        (["--harm_probability", "2"], "harm_probability must lie in [0, 1], got 2"),
        (["--target_teacher_share", "1"], "target_teacher_share must lie in (0, 1), got 1"),
        (["--initial_threshold", "3"], "initial_threshold must lie in [0, ln 2 nats]"),
        (["--top_p", "0"], "top_p"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--scorer", "nothing.py:f"], "no file nothing.py"),
        (["--dataset_name", "missing.jsonl"], "no file or folder missing.jsonl"),
        (["--max_completion_length", "500"], "context of 128"),
    ],
)
def test_a_mistake_is_one_line(models: Path, tmp_path: Path, run: Run, more: list[str], message: str) -> None:
    code, out, err = run(*diagnose_options(models, tmp_path / "run", *more))
    # What was read of the data is said before the lengths are checked.
    assert message in one_line_error(code, out, "".join(err.splitlines(keepends=True)[-1:]))
    assert not (tmp_path / "run").exists()


def test_data_without_answers_are_refused_in_one_line(models: Path, tmp_path: Path, run: Run) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    code, out, err = run(*diagnose_options(models, tmp_path / "run", "--dataset_name", data))
    assert "row 1 of the prepared data set has no answer" in one_line_error(code, out, err.splitlines()[-1] + "\n")


@pytest.mark.parametrize(
    "more",
    [
        ["--max_samples", "1"],
        ["--max_completion_length", "1"],
        ["--initial_threshold", "0"],
        ["--temperature", "0", "--harm_probability", "0"],
    ],
)
def test_odd_input_ends_in_a_result(models: Path, tmp_path: Path, run: Run, more: list[str]) -> None:
    code, out, err = run(*diagnose_options(models, tmp_path / "run", "--json", *more))
    assert code == 0, err
    summary = json.loads(out)
    assert summary["advice"]["sentence"].endswith(".") and "nan" not in out
    if "--initial_threshold" in more:
        assert summary["writers"]["switch"]["teacher_share"] == 1.0
        assert [one["share"]["value"] for one in summary["harm"]["caught"]] == [1.0]
