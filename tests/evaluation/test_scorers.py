"""A measure of the user's own: it scores what the rows say, and whatever is wrong with it is one line."""

import json

import pytest
from helpers.command_line import evaluate_options

from switchkd.errors import UserError
from switchkd.evaluation.scorers import load_scorer

SOURCE = """
def accuracy(prompt, answer, references):
    return (sum(map(ord, answer)) % 3) / 2

def fails(prompt, answer, references):
    raise KeyError("no map")

def percent(prompt, answer, references):
    return 100.0

def rouge_l(prompt, answer, references):
    return 0.0
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_scorer.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_rows_and_summary_hold_the_scorer_s_own_numbers(models, tmp_path, run, file):
    folder = tmp_path / "scores"
    options = evaluate_options(models, models / "student", folder, "--scorer", f"{file}:accuracy", "--json")
    code, out, err = run(*options)
    assert code == 0, err
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert all(row["accuracy"] == 50.0 * (sum(map(ord, row["completion"])) % 3) for row in rows)
    assert len({row["accuracy"] for row in rows}) > 1
    summary = json.loads(out)
    assert summary["by_scorer"]["accuracy"] == pytest.approx(sum(row["accuracy"] for row in rows) / len(rows))
    weights = {name: row["examples"] for name, row in summary["by_length"].items()}
    parts = [summary["by_length"][name]["accuracy"] * weight for name, weight in weights.items()]
    assert sum(parts) / sum(weights.values()) == pytest.approx(summary["by_scorer"]["accuracy"])
    assert "accuracy" in err


def test_a_function_of_an_installed_module_serves_too():
    assert load_scorer("math:dist").name == "dist"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("accuracy", "scorer must be path/to/file.py:name or module:name, got 'accuracy'"),
        ("missing.py:accuracy", "no file missing.py"),
        ("no_such_module:accuracy", "cannot import no_such_module: ModuleNotFoundError"),
        ("{file}:acuracy", "has no 'acuracy'; the nearest is 'accuracy'"),
        ("{file}:rouge_l", "'rouge_l' is a column of the answers already"),
    ],
)
def test_a_scorer_that_is_not_there_is_one_line(file, spec, message):
    with pytest.raises(UserError) as found:
        load_scorer(spec.format(file=file))
    assert message in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "message"), [("fails", "failed on answer 'x' with KeyError"), ("percent", "a number in [0, 1], got 100.0")]
)
def test_a_scorer_that_misbehaves_is_named(file, name, message):
    scorer = load_scorer(f"{file}:{name}")
    with pytest.raises(UserError) as found:
        scorer("p", "x", ["y"])
    assert message in str(found.value)
