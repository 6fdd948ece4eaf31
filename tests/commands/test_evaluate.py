"""`switchkd evaluate`: scores, rows, one line for a mistake."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Run, evaluate_options, one_line_error, write_rows
from helpers.tiny import build_gpt2

from switchkd.cli.run_folder import read_config
from switchkd.commands import scoring
from switchkd.evaluation import reference_losses


def test_the_pass_over_the_references_has_a_bar_and_counts_in_seconds(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`seconds` were those of the answers alone, and a long silence came before their bar."""
    spent = []

    def slow(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        time.sleep(1.0)
        result = reference_losses(*arguments, **{**options, "progress": True})
        spent.append(time.perf_counter() - started)
        return result

    monkeypatch.setattr(scoring, "reference_losses", slow)
    code, out, err = run(*evaluate_options(models, models / "student", tmp_path / "a", "--max_samples", 2, "--json"))
    assert code == 0 and json.loads(out)["seconds"] > spent[0] > 1.0
    assert "references: " in err


def test_evaluate_writes_summary_and_rows(models: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "scores"
    options = evaluate_options(models, models / "student", folder, "--max_samples", 3, "--json")
    code, out, err = run(*options, "--teacher_model_name_or_path", models / "teacher")
    assert code == 0, err
    summary = json.loads(out)
    assert set(summary["scores"]) == {"10", "20"} and summary["examples"] == 3
    assert summary["reference_losses"]["forward_kl"] > 0
    assert json.loads((folder / "summary.json").read_text()) == {
        name: value for name, value in summary.items() if name != "output_dir"
    }
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["index"]) for row in rows] == [(seed, index) for seed in (10, 20) for index in range(3)]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in metrics] == [10, 20]
    config = read_config(folder)
    assert config is not None and config["decoding_seeds"] == [10, 20]
    divergences = summary["sequence_divergences"]
    assert divergences["answers_sample_the_model"] and divergences["reverse_sequence_kl"]["texts"] == 6
    assert divergences["reverse_sequence_kl"]["per_token"] > 0 < divergences["forward_sequence_kl"]["per_token"]
    assert "the last on texts that the teacher wrote" in err and "not sampled from the model" not in err
    assert "ROUGE-L" in err and "cross-entropy" in err and "KL(teacher, model)" in err


def test_evaluate_without_a_folder_takes_a_free_one(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = evaluate_options(
        models, models / "llama", tmp_path, "--decoding_seeds", 1, "--max_samples", 1, "--max_completion_length", 2
    )
    del options[options.index("--output_dir") : options.index("--output_dir") + 2]
    assert run(*options)[0] == run(*options)[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["evaluate", "evaluate-2"]
    config = tmp_path / "runs" / "evaluate" / "config.yaml"
    assert run("evaluate", "--config", config, "--output_dir", tmp_path / "again")[0] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--decoding_seeds", "1,x"], "decoding_seeds must be integers"),
        (["--seeds", "1,2"], "seeds=1,2: seeds are those of training; here it is decoding_seeds"),
        (["--decoding_seeds", "1,1"], "decoding_seeds must be one or more different integers"),
        (["--max_samples", "0"], "max_samples must be >= 1"),
        (["--max_completion_length", "500"], "context of 128"),
        (["--dataset_name", "missing.jsonl"], "no file or folder missing.jsonl"),
        (["--top_p", "2"], "top_p"),
        (["--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_wrong_evaluations_are_one_line(models: Path, tmp_path: Path, run: Run, more: list[str], message: str) -> None:
    folder = tmp_path / "run"
    code, out, err = run(*evaluate_options(models, models / "student", folder, *more, "--json"))
    assert (code, out) == (2, "") and message in err.splitlines()[-1]
    assert not folder.exists()


def test_data_without_answers_cannot_be_scored(models: Path, tmp_path: Path, run: Run) -> None:
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    code, _, err = run(
        *evaluate_options(models, models / "student", tmp_path / "run", "--dataset_name", data, "--json")
    )
    assert code == 2 and "row 1 of the prepared data set has no reference" in err.splitlines()[-1]


def test_answers_that_do_not_sample_the_model_are_said_to_give_no_divergence_of_texts(
    models: Path, tmp_path: Path, run: Run
) -> None:
    options = evaluate_options(models, models / "student", tmp_path / "run", "--temperature", 0.5, "--json")
    code, out, err = run(*options, "--teacher_model_name_or_path", models / "teacher")
    assert code == 0, err
    assert json.loads(out)["sequence_divergences"]["answers_sample_the_model"] is False
    assert "not estimates of a KL between texts" in err


def test_without_a_teacher_no_line_compares_with_one(models: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run(*evaluate_options(models, models / "student", tmp_path / "run", "--max_samples", 1, "--json"))
    assert code == 0, err
    summary = json.loads(out)
    assert "sequence_divergences" not in summary and "forward_kl" not in summary["reference_losses"]
    assert "KL(" not in err and "teacher's" not in err and "repeated 4-grams" in err
    assert summary["intervals"] == {"rouge_l": None}  # one prompt shows no spread between prompts


def test_several_test_sets_are_scored_as_each_one_alone(models: Path, tmp_path: Path, run: Run) -> None:
    short = write_rows(tmp_path / "short.jsonl", [{"prompt": "a b", "completion": "one two"}] * 2)
    long = write_rows(
        tmp_path / "long.jsonl", [{"prompt": "c", "completion": "w " * 6}, {"prompt": "d", "completion": "w " * 11}]
    )
    base = ["evaluate", "--model_name_or_path", models / "student", "--decoding_seeds", "10,20", "--json"]
    base += ["--max_completion_length", 6, "--batch_size", 2]
    code, out, err = run(*base, "--dataset_name", short, long, "--output_dir", tmp_path / "both")
    assert code == 0, err
    found = json.loads(out)
    assert list(found["datasets"]) == ["short", "long"] and "mean of the sets" in err
    for name, file in (("short", short), ("long", long)):
        code, out, err = run(*base, "--dataset_name", file, "--output_dir", tmp_path / name)
        assert code == 0, err
        assert (tmp_path / "both" / name / "rows.jsonl").read_text() == (tmp_path / name / "rows.jsonl").read_text()
        assert not (tmp_path / "both" / name / "answers.jsonl").exists()
    assert found["rouge_l"] == sum(one["rouge_l"] for one in found["datasets"].values()) / 2
    words = found["datasets"]["long"]["by_words"]
    assert {name: row["examples"] for name, row in words.items()} == {"6-10": 1, "over 10": 1}
    config = tmp_path / "sets.yaml"
    config.write_text(f"datasets:\n  first: {short}\n  second: {{dataset_name: {long}, max_samples: 1}}\n")
    code, out, err = run(*base, "--config", config, "--output_dir", tmp_path / "named")
    assert code == 0, err
    assert {name: one["examples"] for name, one in json.loads(out)["datasets"].items()} == {"first": 2, "second": 1}
    assert run(*base, "--config", tmp_path / "named" / "config.yaml", "--output_dir", tmp_path / "again")[0] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--datasets", '{"a": 3}'], "must be a path, or options with a dataset_name"),
        (["--datasets", '{"a": "x.jsonl"}', "--dataset_name", "y.jsonl"], "give dataset_name or datasets, not both"),
        (["--datasets", '{"a": {"dataset_name": "x", "model_name_or_path": "y"}}'], "the same for all test sets"),
        (["--datasets", '{"a": {"dataset_name": "x", "max_sample": 1}}'], "unknown option --max_sample"),
        (["--dataset_name", "x/test.jsonl", "y/test.jsonl"], "two test sets are called 'test'"),
        (["--dataset_name", "DATA", "missing.jsonl"], "no file or folder missing.jsonl"),
        (["--dataset_name", "DATA", "--protocol", "ours"], "protocol must be one of ancestors"),
        (["--dataset_name", "DATA", "--protocol", "ancestors", "--no_repeat_ngram_size", "3"], "ngram_size=6, not 3"),
    ],
)  # fmt: skip
def test_wrong_test_sets_are_one_line(models: Path, tmp_path: Path, run: Run, more: list[str], message: str) -> None:
    given = [str(models / "train.jsonl") if word == "DATA" else word for word in more]
    code, out, err = run("evaluate", "--model_name_or_path", models / "student", *given, "--output_dir", tmp_path / "x")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and message in err
    assert not (tmp_path / "x").exists()


def test_the_ancestors_protocol_blocks_repeated_six_grams_and_says_so(models: Path, tmp_path: Path, run: Run) -> None:
    options = evaluate_options(models, models / "student", tmp_path / "run", "--max_samples", 1, "--json")
    code, out, err = run(*options, "--protocol", "ancestors")
    assert code == 0, err
    decoding = json.loads(out)["decoding"]
    assert (decoding["no_repeat_ngram_size"], decoding["temperature"], decoding["top_p"]) == (6, 1.0, 1.0)
    assert "no_repeat_ngram_size 6" in err


def test_a_stopped_evaluation_goes_on_at_the_row_and_finds_the_same(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(folder: str, *more: Any) -> list[Any]:
        return evaluate_options(models, models / "student", tmp_path / folder, "--batch_size", 2, *more)

    assert run(*options("whole"))[0] == 0
    answers: list[int] = []
    real = scoring.evaluate

    def stopped(*arguments: Any, keep: Any, **more: Any) -> Any:
        def keep_two(seed: int, batch: Any) -> None:
            keep(seed, batch)
            answers.extend(batch)
            if len(answers) >= 4:
                raise KeyboardInterrupt

        return real(*arguments, keep=keep_two, **more)

    monkeypatch.setattr(scoring, "evaluate", stopped)
    assert run(*options("stopped"))[0] == 130
    monkeypatch.setattr(scoring, "evaluate", real)
    with (tmp_path / "stopped" / "answers.jsonl").open("a") as file:
        file.write('{"seed": 10, "ind')  # a line that was cut off
    assert "holds another run" in run(*options("stopped"))[2]
    code, _, err = run(*options("stopped", "--resume", "--temperature", 0.5))
    assert code == 2 and "were written with temperature=1.0, now it is 0.5" in err
    code, out, err = run(*options("stopped", "--resume", "--batch_size", 3))
    assert code == 0 and "4 of " in out, err
    for name in ("rows.jsonl", "metrics.jsonl"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()
    code, out, _ = run(*options("stopped", "--resume"))
    assert code == 0 and "finished before" in out


@pytest.mark.parametrize("lines", [1, 3, 9, 25, 38, 46])
def test_an_evaluation_is_kept_row_by_row_in_every_pass(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    """The passes over references and over divergences were made anew from their first row."""

    def options(folder: str, *more: Any) -> list[Any]:
        pair = ("--teacher_model_name_or_path", models / "teacher", "--batch_size", 2)
        return evaluate_options(models, models / "student", tmp_path / folder, *pair, *more)

    assert run(*options("whole"))[0] == 0
    append, written = scoring.append_sealed, []

    def counted(path: Path, rows: Any) -> None:
        append(path, rows)
        written.extend(json.dumps(row) for row in rows)

    def stopped(path: Path, rows: Any) -> None:
        counted(path, rows)
        if len(written) >= lines:
            monkeypatch.setattr(scoring, "append_sealed", counted)
            raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "append_sealed", stopped)
    assert run(*options("stopped", "--resume"))[0] == 130
    code, _, err = run(*options("stopped", "--resume"))
    assert code == 0, err
    assert len(written) == len(set(written)) == 1 + 8 + 16 + 16 + 8 + 8  # each line once: none was computed twice
    for name in ("rows.jsonl", "metrics.jsonl"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("stopped", "whole"))
    assert {**one, "seconds": 0, "decoding_seconds": 0} == {**two, "seconds": 0, "decoding_seconds": 0}
    assert not (tmp_path / "stopped" / "answers.jsonl").exists()


def test_answers_of_other_weights_are_not_gone_on_from(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(*more: Any) -> list[Any]:
        return evaluate_options(models, tmp_path / "model", tmp_path / "run", "--resume", *more)

    shutil.copytree(models / "student", tmp_path / "model")
    real = scoring.evaluate
    monkeypatch.setattr(scoring, "evaluate", lambda *arguments, **more: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(*options())[0] == 130
    monkeypatch.setattr(scoring, "evaluate", real)
    build_gpt2(seed=5).save_pretrained(tmp_path / "model")
    code, _, err = run(*options())
    assert code == 2 and "were written with other weights of the same names" in err
    path = tmp_path / "run" / "answers.jsonl"
    whole_text = path.read_text()
    for damaged in (whole_text.replace('"index": 3', '"index" 3'), whole_text.replace('"index": 3', '"index": 4')):
        path.write_text(damaged)
        assert "line 2 is damaged; remove that file, or all of it from that line on" in run(*options())[2]
    path.write_text("{")
    assert run(*options())[0] == 0  # cut in its first line: nothing is there


@pytest.mark.parametrize(
    "flags", [("--top_p", 2), ("--temperature", "nan"), ("--decoding_seeds", "1,1"), ("--scorer", "no:f")]
)
def test_options_are_checked_before_anything_is_computed(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, Any]
) -> None:
    monkeypatch.setattr(scoring, "reference_losses", lambda *arguments, **more: pytest.fail("computed"))
    monkeypatch.setattr(scoring, "read_model", lambda *arguments: pytest.fail("read the model"))
    one_line_error(*run(*evaluate_options(models, models / "student", tmp_path / "run", *flags)))
