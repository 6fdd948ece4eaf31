"""`switchkd rollout`: what it prints and writes, every policy, one line for a mistake."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Run, one_line_error, rollout_options
from helpers.tiny import RAGGED_ROWS, build_tokenizer

from switchkd.cli.rollouts import rollout_text
from switchkd.cli.run_folder import LOCK, read_config


def test_rollout_prints_the_text_and_a_line_of_numbers(models: Path, run: Run) -> None:
    code, out, err = run(*rollout_options(models, "--prompt", "Hello", "--initial_threshold", 0.1))
    assert code == 0 and err == ""
    assert out.startswith("Hello")
    last = out.splitlines()[-1]
    assert "teacher wrote" in last and "mean jsd" in last and "threshold 0.100 to" in last and "tokens/s" in last


def test_rollout_json_is_what_was_printed(models: Path, run: Run) -> None:
    options = rollout_options(models, "--prompt", "Hello", "--prompt", "Bye", "--num_samples", 2, "--batch_size", 3)
    code, out, err = run(*options, "--json")
    assert code == 0 and out.count("\n") == 1
    result = json.loads(out)
    assert [row["prompt"] for row in result["rollouts"]] == ["Hello", "Hello", "Bye", "Bye"]
    authors = [author for row in result["rollouts"] for author in row["author"]]
    assert result["teacher_share"] == pytest.approx(authors.count("teacher") / len(authors))
    for row in result["rollouts"]:
        assert rollout_text(row) in err
    # The same rows whatever the batch.
    again = json.loads(run(*options, "--json", "--batch_size", 1)[1])
    for one, other in zip(again["rollouts"], result["rollouts"], strict=True):
        assert (one["completion_ids"], one["author"]) == (other["completion_ids"], other["author"])
        assert one["divergence"] == pytest.approx(other["divergence"], abs=1e-5)


def test_rollout_writes_its_folder_only_when_asked(models: Path, tmp_path: Path, run: Run, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*rollout_options(models, "--prompt", "Hello"))[0] == 0
    assert list(tmp_path.iterdir()) == []
    code, out, _ = run(*rollout_options(models, "--prompt", "Hello", "--output_dir", "run", "--json", "--seed", 5))
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert rows == json.loads(out)["rollouts"]
    config = read_config(tmp_path / "run")
    assert config is not None and config["seed"] == 5 and "json" not in config
    assert {path.name for path in (tmp_path / "run").iterdir()} - {LOCK} == {
        *("config.yaml", "versions.json", "metrics.jsonl", "summary.json", "rollouts.jsonl")
    }


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("skd", ("--teacher_top_k", 1)),
        ("adaswitch", ("--divergence_window", 2, "--divergence_multiple", 0.1)),
        ("relay", ("--trigger_threshold", 0.0, "--leg_length", 2)),
        ("trb", ("--kl_budget", 5)),
        ("teacher_first", ("--teacher_tokens", 3)),
        ("teacher_prefix", ("--teacher_tokens", 3)),
        ("student_entropy", ("--initial_threshold", 0.5)),
    ],
)
def test_rollouts_of_the_kin(models: Path, run: Run, policy: str, options: tuple[Any, ...]) -> None:
    code, out, err = run(*rollout_options(models, "--prompt", "a", "--policy", policy, "--json"), *options)
    assert code == 0, err
    assert 0 < json.loads(out)["teacher_share"] <= 1


@pytest.mark.parametrize(("policy", "author"), [("student", "student"), ("teacher", "teacher")])
def test_rollout_of_one_writer(models: Path, run: Run, policy: str, author: str) -> None:
    options = rollout_options(models, "--prompt", "a", "--policy", policy, "--json")
    result = json.loads(run(*options)[1])
    assert set(result["rollouts"][0]["author"]) == {author}
    assert result["teacher_share"] == (policy == "teacher")
    assert result["measured"] is None and result["threshold_nats"] is None


def test_rollout_blends(models: Path, run: Run) -> None:
    options = rollout_options(models, "--prompt", "a", "--policy", "blend", "--mixture_weight", 0.5, "--json")
    assert run(*options)[0] == 0


def test_rollout_of_data_takes_the_first_prompts(models: Path, run: Run) -> None:
    options = rollout_options(models, "--dataset_name", models / "train.jsonl", "--max_samples", 2, "--json")
    prompts = [row["prompt"] for row in json.loads(run(*options)[1])["rollouts"]]
    assert prompts == [row["prompt"] for row in RAGGED_ROWS[:2]]


def test_rollout_fills_the_alpaca_template(models: Path, run: Run) -> None:
    options = rollout_options(
        models, "--prompt", "Add.", "--template", "alpaca", "--max_completion_length", 2, "--json"
    )
    error = one_line_error(*run(*options))  # 128 tokens of context do not hold the template
    assert "exceed the student's context of 128" in error


def test_colour_is_for_terminals_unless_asked_for(models: Path, run: Run) -> None:
    # Threshold 0: the teacher writes everything, so there is something to colour.
    options = rollout_options(models, "--prompt", "Hello", "--initial_threshold", 0)
    assert "\x1b[" not in run(*options)[1]
    assert "\x1b[1;4;" in run(*options, "--color", "always")[1]
    assert "\x1b[" not in "".join(run(*options, "--color", "always", "--json")[1:])


def test_a_terminal_gets_a_legend_and_a_header_for_every_completion(
    models: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = rollout_options(models, "--prompt", "Hello", "--prompt", "Bye", "--color", "always")
    lines = re.sub(r"\x1b\[[\d;]*m", "", run(*options)[1]).splitlines()
    assert "written by: student  teacher" in lines[0] and sum("written by" in line for line in lines) == 1
    for number, prompt in enumerate(("Hello", "Bye"), start=1):
        place = next(place for place, line in enumerate(lines) if line.startswith(f"{number} of 2: "))
        assert "the teacher wrote" in lines[place]
        assert re.search(r", (cut at the limit of 12 tokens|ended with <eos>)$", lines[place])
        assert lines[place + 1].split() == ["prompt", prompt] and lines[place + 2].startswith("completion")
    assert "teacher wrote" in lines[-1]


def test_the_end_of_a_completion_is_in_the_results(models: Path, run: Run) -> None:
    options = rollout_options(models, "--prompt", "a", "--num_samples", 40, "--batch_size", 40, "--json")
    rows = json.loads(run(*options)[1])["rollouts"]
    eos = build_tokenizer().eos_token_id
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        assert (row["completion_ids"][-1] == eos) == (row["finish_reason"] == "stop")


def test_top_tokens_are_shown_and_written(models: Path, tmp_path: Path, run: Run) -> None:
    options = rollout_options(models, "--prompt", "Hello", "--initial_threshold", 0.4, "--top_tokens", 3)
    out = run(*options)[1]
    code, line, err = run(*options, "--json", "--output_dir", tmp_path / "run")
    assert code == 0, err
    row = json.loads(line)["rollouts"][0]
    assert row == json.loads((tmp_path / "run" / "rollouts.jsonl").read_text())
    assert len(row["top_tokens"]) == len(row["completion_ids"])
    for token, divergence in zip(row["top_tokens"], row["divergence"], strict=True):
        assert len(token["student"]) == len(token["teacher"]) == 3
        assert token["jsd_nats"] == pytest.approx(divergence, abs=1e-5)
    assert row["drafted"] != row["tokens"]
    for draft, token, author in zip(row["drafted"], row["tokens"], row["author"], strict=True):
        assert author == "teacher" or draft == token
    table = out.splitlines()[2:]
    assert table[0].split()[:4] == ["#", "token", "writer", "drafted"] and table[0].endswith(
        "jsd [nats]  threshold [nats]"
    )
    assert [line.split()[0] for line in table[2 : 2 + len(row["tokens"])]] == [*map(str, range(len(row["tokens"])))]
    assert "top_tokens must be an integer >= 0" in one_line_error(*run(*options, "--top_tokens", -1))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "swich"], "policy must be one of"),
        (["--policy", "student", "--initial_threshold", "0.1"], "initial_threshold does nothing with policy 'student'"),
        (["--initial_threshold", "0.7"], "initial_threshold must lie in [0, ln 2"),
        (["--template", "chat"], "chat template"),
        (["--template", "llama"], "template must be one of"),
        (["--dataset_name", "x.jsonl"], "either --prompt or --dataset_name"),
        (["--max_completion_length", "500"], "exceed the student's context"),
        (["--temperature", "-1"], "temperature must be >= 0"),
        (["--draft_length", "-2"], "draft_length"),
        (["--num_samples", "0"], "num_samples must be an integer >= 1"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--color", "maybe"], "color must be one of"),
        (["--prompt", ""], "the prompt is empty"),
        (["--model_name_or_path", "./missing"], "./missing does not exist"),
        (["--horizon", "0"], "horizon must be > 0"),
    ],
)
def test_wrong_rollouts_are_one_line(models: Path, tmp_path: Path, run: Run, more: list[str], message: str) -> None:
    folder = tmp_path / "run"
    error = one_line_error(*run(*rollout_options(models, "--prompt", "Hello", "--output_dir", folder, *more)))
    assert message in error
    assert not folder.exists()


def test_rollout_needs_a_teacher_unless_the_student_is_alone(models: Path, run: Run) -> None:
    options = ["rollout", "--model_name_or_path", models / "student", "--prompt", "a", "--max_completion_length", 3]
    assert "--teacher_model_name_or_path" in one_line_error(*run(*options))
    assert run(*options, "--policy", "student")[0] == 0


def test_a_rank_is_not_printed_as_nats(models: Path, run: Run) -> None:
    options = rollout_options(models, "--prompt", "Hello", "--policy", "skd", "--teacher_top_k", 5)
    out = run(*options)[1]
    assert "mean rank of the drafted tokens" in out and "replaced beyond rank 5" in out and "nats" not in out
    result = json.loads(run(*options, "--json")[1])
    assert result["measured"] == result["rollouts"][0]["unit"] == "rank"
    assert result["rank"] >= 1 and not [name for name in result if name.endswith("_nats")]
