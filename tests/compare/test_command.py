"""`switchkd compare`: every run once, refused at the door, resumed where it stopped; numbers that can be recomputed."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
import yaml
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_tokenizer
from huggingface_hub import ModelCard

from switchkd.__main__ import main
from switchkd.cli.sealed import append_sealed
from switchkd.compare import command
from switchkd.compare.checks import check
from switchkd.compare.plan import evaluations, plan
from switchkd.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "examples" / "compare_demo.yaml"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a teacher, a tokenizer and data."""
    folder = tmp_path_factory.mktemp("compare")
    build_gpt2(seed=1).save_pretrained(folder / "teacher")
    build_tokenizer().save_pretrained(folder / "teacher")
    lines = "".join(json.dumps(row) + "\n" for row in RAGGED_ROWS)
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def config_of(home, **over):
    student = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    return {
        "seeds": [0, 1],
        "train": {
            "teacher_model_name_or_path": str(home / "teacher"),
            "dataset_name": str(home / "train.jsonl"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 8,
            "use_cpu": True,
        },
        "students": {"small": {"student_config": student}, "wide": {"student_config": {**student, "n_embd": 32}}},
        "warm_start": {"max_steps": 3},
        "runs": {"sft": None, "switch": {"initial_threshold": 0.2}},
        "evaluate": {"dataset_name": str(home / "test.jsonl"), "decoding_seeds": [10, 20], "max_completion_length": 8},
        "threads": 1,
    } | over


def call(folder, config, *flags):
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return main(["compare", "--config", str(path), "--output_dir", str(folder), "--json", *flags])


class InThisProcess(Executor):
    """Runs a task where it is handed in: a process of its own takes seconds to import torch."""

    def submit(self, task, *arguments):
        future = Future()
        future.set_result(task(*arguments))
        return future


@pytest.fixture
def in_process(monkeypatch, libraries_as_loud_as_before):
    """Comparisons whose workers are not what is tested."""
    monkeypatch.setattr(command, "worker_pool", lambda jobs: InThisProcess())


@pytest.fixture(scope="module")
def finished(home):
    folder = home / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "worker_pool", lambda jobs: InThisProcess())
        assert call(folder, config_of(home)) == 0
    return folder


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]


def test_every_run_stands_once_and_the_table_can_be_recomputed(finished):
    results = results_of(finished)
    assert len(results) == 2 * 2 * 3
    assert len({(r["student"], r["run"], r["seed"]) for r in results}) == 12
    with (finished / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        folder = finished / row["student"] / row["run"].replace(" ", "-") / f"seed-{row['seed']}"
        scored = [json.loads(line) for line in (folder / "evaluate" / "rows.jsonl").open(encoding="utf-8")]
        by_seed = {seed: [r["rouge_l"] for r in scored if r["seed"] == seed] for seed in (10, 20)}
        means = [sum(values) / len(values) for values in by_seed.values()]
        assert float(row["rouge_l"]) == pytest.approx(sum(means) / 2, abs=1e-6)
        assert (float(row["teacher_passes"]) > 0) == (row["run"] == "switch")
    report = (finished / "report.txt").read_text(encoding="utf-8")
    assert "small" in report and "wide" in report and "switch" in report
    assert (finished / "comparison.png").stat().st_size > 10_000
    for name in ("report.txt", "results.md", "results.tex"):
        text = (finished / name).read_text(encoding="utf-8")
        assert "too few training seeds (2)" in text or name == "results.tex"
        assert text.count("sft") >= 4  # in the scores of both students, and in the differences


def test_the_card_of_every_model_has_its_scores(finished):
    for result in results_of(finished):
        train = finished / result["student"] / result["run"].replace(" ", "-") / f"seed-{result['seed']}" / "train"
        text = (train / "README.md").read_text(encoding="utf-8")
        scored, data = result["evaluate"]["test"], finished.parent / "test.jsonl"
        how = "8 prompts, decoding seeds 10, 20, temperature 1"
        assert "Not evaluated" not in text and text.count("## Run it again") == text.count("## Scores") == 1
        for name, value in (("ROUGE-L", scored["rouge_l"]), ("exact match [%]", scored["exact_match"])):
            assert re.search(rf"\| {re.escape(name)} \| {value:.1f}.* \| test: `{data}` \| {how} \|", text)
        assert ModelCard.load(train / "README.md").data.library_name == "transformers"


def test_too_few_seeds_is_said_before_the_first_run_too(finished, home, capfd):
    assert call(finished, config_of(home)) == 0
    said = capfd.readouterr().err
    line = "too few training seeds (2): how much a repeated training would differ is hardly known; give 3 or more\n"
    assert said.startswith(line) and said.count(line) == 2
    assert "12 of 12 runs are already finished" in said


def test_test_sets_in_a_list_have_their_own_names_and_decoding_seeds():
    sets = ["data/short.test.jsonl", {"dataset_name": "org/long", "decoding_seeds": [1]}]
    sets.append({"name": "hard", "dataset_name": "data/x.jsonl"})
    shared = {"decoding_seeds": [10, 20], "max_completion_length": 8}
    assert evaluations({**shared, "datasets": sets}) == {
        "short": {**shared, "dataset_name": "data/short.test.jsonl"},
        "long": {**shared, "dataset_name": "org/long", "decoding_seeds": [1]},
        "hard": {**shared, "dataset_name": "data/x.jsonl"},
    }


def test_runs_of_two_processes_are_those_of_one(finished, home, tmp_path, capfd):
    """Real workers: they get the task, keep to themselves what the commands print, and send the result back."""
    config = config_of(home, students={"small": config_of(home)["students"]["small"]}, seeds=[1])
    assert call(tmp_path / "runs", config, "--jobs", "2") == 0
    seen = capfd.readouterr()
    assert "[3/3] small " in seen.err and "records kept" not in seen.err + seen.out
    assert "records kept" in (tmp_path / "runs" / "small" / "sft" / "seed-1" / "log.txt").read_text()
    scores = {
        (r["student"], r["run"], r["seed"]): r["evaluate"]["test"]["rouge_l"] for r in results_of(finished)
    }  # fmt: skip
    for result in results_of(tmp_path / "runs"):
        key = result["student"], result["run"], result["seed"]
        assert result["evaluate"]["test"]["rouge_l"] == pytest.approx(scores[key], abs=1e-6)


def test_all_runs_of_a_student_and_seed_begin_with_its_warm_start(finished):
    for student in ("small", "wide"):
        for seed in (0, 1):
            for run in ("sft", "switch"):
                config = yaml.safe_load((finished / student / run / f"seed-{seed}" / "train.yaml").read_text())
                assert config["model_name_or_path"] == str(finished / student / "warm-start" / f"seed-{seed}" / "train")
                assert config["seed"] == seed
    made = [(finished / "small" / "warm-start" / f"seed-{seed}" / "train" / "model.safetensors") for seed in (0, 1)]
    assert made[0].read_bytes() != made[1].read_bytes()


def test_an_empty_config_of_a_comparison_does_not_block_its_folder_for_ever(home, tmp_path, capfd):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config.yaml").write_text("")
    assert call(tmp_path / "runs", config_of(home)) == 2
    error = capfd.readouterr().err
    assert "was not written by switchkd" in error and error.count("\n") == 1


def test_a_run_killed_between_training_and_its_result_is_not_trained_further(in_process, finished, home, tmp_path):
    """It recorded one step more than it was given."""
    again = shutil.copytree(finished, tmp_path / "again")
    said_to_lie_in(again, finished)
    cut = again / "small" / "switch" / "seed-0"
    before = {
        name: json.loads((cut / "result.json").read_text())["train"][name] for name in ("steps", "teacher_passes")
    }
    for path in again.rglob("train.yaml"):
        path.write_text(path.read_text().replace(str(finished), str(again)))
    (cut / "result.json").unlink()
    assert call(again, config_of(home)) == 0
    after = json.loads((cut / "result.json").read_text())["train"]
    assert {name: after[name] for name in before} == before


def test_answers_to_other_prompts_are_not_compared(in_process, finished, home, tmp_path, capfd):
    """Test data that had changed between two runs paired answers to different prompts, in silence."""
    again = shutil.copytree(finished, tmp_path / "again")
    said_to_lie_in(again, finished)
    path = again / "small" / "switch" / "seed-0" / "evaluate" / "rows.jsonl"
    path.write_text(path.read_text().replace("Say hello:", "Say goodbye:"))
    assert call(again, config_of(home)) == 2
    assert "small switch seed 0 answered different prompts" in capfd.readouterr().err


def said_to_lie_in(copy, original):
    """Let the results of a copied comparison name its own folder, without the checksums that this breaks."""
    for path in copy.rglob("result.json"):
        result = json.loads(path.read_text().replace(str(original), str(copy)))
        del result["checksums"]
        path.write_text(json.dumps(result))


@pytest.mark.parametrize("damage", ["cut", "digit", "answers"])
def test_a_run_whose_result_is_damaged_is_made_again(finished, home, tmp_path, damage):
    """A cut result.json ended every later call in a traceback; a changed digit was a changed score."""
    [task, *_] = plan(output_dir=finished, seeds=[0], **{name: config_of(home).get(name) for name in command.SECTIONS})
    folder = tmp_path / "one"
    shutil.copytree(task.folder, folder)
    copied = dataclasses.replace(task, folder=folder)
    assert copied.result() is not None
    path = folder / ("evaluate/rows.jsonl" if damage == "answers" else "result.json")
    text = path.read_text()
    digit = re.sub(r'("rouge_l": \d*)\d', r"\g<1>5", text, count=1)
    changed = {"cut": text[:-30], "digit": digit, "answers": text.replace('"index": 0', '"index": 1', 1)}[damage]
    assert changed != text
    path.write_text(changed)
    assert copied.result() is None


def test_what_is_done_is_not_run_again_and_what_was_cut_off_is(in_process, finished, home, capfd, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    for path in again.rglob("train.yaml"):
        path.write_text(path.read_text().replace(str(finished), str(again)))
    said_to_lie_in(again, finished)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("result.json")}
    cut = again / "small" / "switch" / "seed-1"
    (cut / "result.json").unlink()
    (cut / "evaluate" / "summary.json").unlink()
    assert call(again, config_of(home)) == 0
    seen = capfd.readouterr().err
    assert "11 of 12 runs are already finished" in seen and "[12/12] small switch, seed 1" in seen
    after = {path: path.stat().st_mtime_ns for path in again.rglob("result.json")}
    changed = {path for path in after if before[path] != after[path]}
    assert changed == {cut / "result.json"}
    first, second = results_of(finished), results_of(again)
    scores = [
        {(r["student"], r["run"], r["seed"]): r["evaluate"]["test"]["rouge_l"] for r in rs} for rs in (first, second)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_an_evaluation_that_was_cut_off_goes_on_with_its_answers(in_process, finished, home, tmp_path, monkeypatch):
    """Model and answers were thrown away, and made again."""
    again = shutil.copytree(finished, tmp_path / "again")
    said_to_lie_in(again, finished)
    for path in [*again.rglob("*.yaml"), *again.rglob("summary.json")]:
        path.write_text(path.read_text().replace(str(finished), str(again)))
    cut = again / "small" / "switch" / "seed-1"
    rows = (cut / "evaluate" / "rows.jsonl").read_text()
    model = (cut / "train" / "model.safetensors").stat().st_mtime_ns
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "evaluate")

    def write_and_stop(path, lines):
        append_sealed(path, lines)
        if any("seed" in line for line in lines):
            raise RuntimeError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr("switchkd.commands.scoring.append_sealed", write_and_stop)
        assert call(again, config_of(home)) == 2
    (cut / "log.txt").write_text("")
    assert call(again, config_of(home)) == 0
    log = (cut / "log.txt").read_text()
    assert "trained before" in log and re.search(r"[1-9]\d* of \d+ answers are there already", log)
    assert (cut / "train" / "model.safetensors").stat().st_mtime_ns == model
    assert (cut / "evaluate" / "rows.jsonl").read_text() == rows


def test_a_finished_run_with_other_options_is_refused(finished, home, capfd):
    config = config_of(home)
    config["runs"] = {"sft": None, "switch": {"initial_threshold": 0.4}}
    assert call(finished, config) == 2
    message = capfd.readouterr().err
    assert "small switch, seed 0 was run with initial_threshold=0.2 (train), now it is 0.4" in message


def test_runs_of_another_warm_start_are_not_taken_for_done(finished, home, capfd, tmp_path):
    """The warm start was made again, the runs that began with the old one were not."""
    config = config_of(home, warm_start={"max_steps": 4})
    assert call(finished, config) == 2
    assert "small warm start, seed 0 was run with max_steps=3 (train), now it is 4" in capfd.readouterr().err
    shorter = shutil.copytree(finished, tmp_path / "again")
    for path in shorter.rglob("warm-start"):
        shutil.rmtree(path)
    said_to_lie_in(shorter, finished)
    tasks = plan(output_dir=shorter, seeds=[0], **{name: config.get(name) for name in command.SECTIONS})
    with pytest.raises(UserError, match=r"max_steps=3 \(warm_start\), now it is 4"):
        [task.result() for task in tasks]


def test_words_that_yaml_reads_as_truth_values_reach_the_option(home):
    sections = {name: config_of(home).get(name) for name in command.SECTIONS}
    sections["train"] |= {"save_strategy": False, "eval_strategy": False, "use_cpu": True}
    check(plan(output_dir=Path("runs"), seeds=[0], **sections))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": {"swich": None}}, "small swich, seed 0: unknown method 'swich'; did you mean 'switch'?"),
        ({"runs": {"switch": {"inital_threshold": 0.1}}}, "small switch, seed 0: unknown option --inital_threshold"),
        ({"runs": {"sft": {"top_k": 3}}}, "small sft, seed 0: top_k=3 does nothing"),
        ({"runs": {}}, "give `runs`"),
        ({"runs": {"a/b": None}}, "'a/b' is not a valid name of a run"),
        ({"runs": {"a b": {"method": "sft"}, "a-b": {"method": "kd"}}}, "would share the folder 'a-b'; rename one"),
        ({"train": {"seed": 3}}, "seed=3 in train does nothing"),
        ({"runs": {"sft": {"output_dir": "x"}}}, "output_dir=x in run 'sft' does nothing"),
        ({"runs": {"sft": {"method": None}}}, "method"),
        ({"evaluate": {"model_name_or_path": "x"}}, "model_name_or_path=x in evaluate does nothing"),
        ({"runs": {"warm start": None}}, "a run may not be called 'warm start'"),
        ({"runs": [1]}, "runs must be a mapping"),
        ({"evaluate": {"sedes": 1}}, "unknown option --sedes"),
        ({"seeds": [1, 1]}, "seeds must be different integers"),
        ({"baseline": "kd"}, "no run 'kd'; the runs are sft, switch"),
        ({"pairs": ["sft"]}, "pairs are two runs joined by a colon"),
        ({"jobs": 0}, "jobs must be >= 1, got 0"),
        ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(home, tmp_path, capfd, change, message):
    assert call(tmp_path / "runs", config_of(home, **change)) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def partly_failed(home):
    """A comparison of which one run fails in training: its data have no answers."""
    (home / "bare.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog"}\n', encoding="utf-8")
    config = config_of(home, seeds=[0], students={"small": config_of(home)["students"]["small"]}, warm_start=None)
    config["runs"] = {"sft": {"dataset_name": str(home / "bare.jsonl")}, "kd": None}
    return home / "partly", config


def test_a_run_that_fails_is_named_and_the_others_go_on_and_give_a_result(in_process, partly_failed, capfd):
    folder, config = partly_failed
    assert call(folder, config) == 2
    out, error = capfd.readouterr()
    assert "small sft, seed 0: FAILED, " in error and "answer" in error
    assert "1 of 2 runs failed" in error
    assert [result["run"] for result in results_of(folder)] == ["kd"]
    (line,) = out.splitlines()
    result = json.loads(line)
    assert result["runs"] == 1 and list(result["failed"]) == ["small sft, seed 0"]


def test_a_run_that_fails_alone_gives_a_result_too(in_process, partly_failed, tmp_path, capfd):
    config = {**partly_failed[1], "runs": {"sft": partly_failed[1]["runs"]["sft"]}}
    assert call(tmp_path / "runs", config) == 2
    assert json.loads(capfd.readouterr().out)["runs"] == 0


def test_every_missing_input_is_one_line_however_many_runs_need_it(home, tmp_path, capfd):
    config = config_of(home, runs={"sft": None, "kd": None, "gkd": {"tokenizer_name_or_path": "./nowhere/tokenizer"}})
    config["train"] |= {"teacher_model_name_or_path": "./no/teacher", "dataset_name": "no.jsonl"}
    config["evaluate"] = {"datasets": {"one": "no.jsonl", "two": "other.jsonl"}, "scorer": "no.py:accuracy"}
    assert call(tmp_path / "runs", config) == 2
    lines = capfd.readouterr().err.splitlines()
    for part in ("./no/teacher", "./nowhere/tokenizer", "no.jsonl", "other.jsonl", "no.py"):
        assert sum(f" {part}" in line for line in lines) == 1, (part, lines)
    assert len(lines) == 5 and not (tmp_path / "runs").exists()


def test_a_missing_folder_is_one_line_and_not_one_for_each_thing_that_it_should_hold(
    home, tmp_path, capfd, monkeypatch
):
    """The usual slip: the demo that makes them has not run, or the command was started somewhere else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    config = config_of(home, seeds=list(range(10)), runs={"sft": None, "kd": None, "gkd": None})
    config["train"] |= {"teacher_model_name_or_path": "runs/demo/teacher", "dataset_name": "runs/demo/data/train.jsonl"}
    config["evaluate"] = {"datasets": ["runs/demo/data/test.jsonl"]}
    assert call(tmp_path / "out", config) == 2
    assert capfd.readouterr().err == (
        "switchkd: error: small warm start, seed 0: no folder runs/demo, which should hold teacher, data/train.jsonl, "
        f"data/test.jsonl: check the path (the current folder is '{tmp_path.name}') (and in 7 other runs)\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"students": {"s": {"student_config": {"n_embd": 15, "n_head": 2}}}}, "student_config is not a valid"),
        ({"students": {"s": {"student_config": {"n_embed": 16}}}}, "has no option 'n_embed'"),
        ({"students": {"s": {"student_layers": [0, 9]}}}, "has layers 0 to 1, not 9"),
        ({"students": {"s": {"model_name_or_path": "./no/student"}}}, "student folder ./no/student does not exist"),
        ({"warm_start": None, "students": {"s": {"student_config": {"n_embed": 16}}}}, "has no option 'n_embed'"),
        (
            {
                "train": {"dataset_name": "x.jsonl", "max_steps": 1},
                "students": {"s": {"model_name_or_path": "TEACHER"}},
            },
            "needs a teacher",
        ),
        ({"evaluate": {"max_completion_length": 8}}, "give --dataset_name"),
        ({"evaluate": {"dataset_name": "x.jsonl", "top_p": 2}}, "top_p must lie in (0, 1]"),
        ({"evaluate": {"dataset_name": "x.jsonl", "decoding_seeds": [1, 1]}}, "decoding_seeds must be one or more"),
        (
            {"evaluate": {"dataset_name": "x.jsonl", "seeds": [1]}},
            "seeds are those of training; here it is decoding_seeds",
        ),
        ({"evaluate": {"datasets": "x.jsonl"}}, "datasets must be a list of paths or options, or a mapping"),
        ({"evaluate": {"datasets": [{"name": "x"}]}}, "a test set must be a path, or options with a dataset_name"),
        ({"evaluate": {"datasets": ["x.jsonl", {"dataset_name": "a/x.jsonl"}]}}, "two test sets are called 'x'"),
        ({"evaluate": {"datasets": {"a b": "x.jsonl", "a-b": "y.jsonl"}}}, "would share the folder"),
        ({"measure": "accuracy"}, "measure must be one of rouge_l, exact_match, got 'accuracy'"),
    ],
)
def test_what_every_run_would_refuse_is_said_once_and_first(home, tmp_path, capfd, change, message):
    config = config_of(home, **change)
    for name in ("x.jsonl", "y.jsonl"):
        (tmp_path / name).write_text((home / "test.jsonl").read_text(), encoding="utf-8")
    text = yaml.safe_dump(config).replace("TEACHER", str(home / "teacher"))
    for name in ("x.jsonl", "y.jsonl"):
        text = text.replace(name, str(tmp_path / name))
    assert call(tmp_path / "runs", yaml.safe_load(text)) == 2
    error = capfd.readouterr().err
    assert error.count(message) == 1 and error.count("\n") == 1, error
    assert not (tmp_path / "runs").exists()


def test_models_of_finished_runs_go_where_only_their_scores_are_kept(in_process, finished, home, capfd, tmp_path):
    folder = tmp_path / "runs"
    config = config_of(home, students={"small": config_of(home)["students"]["small"]}, seeds=[0], keep_models=False)
    config["train"] |= {"save_strategy": "steps", "save_steps": 1}
    assert call(folder, config) == 0
    left = {path.relative_to(folder / "small").parts[0] for path in folder.rglob("*.safetensors")}
    assert left == {"warm-start"}
    assert not list((folder / "small" / "sft").rglob("checkpoint-*"))
    assert all(task.is_file() for task in (folder / "small").glob("*/seed-0/evaluate/rows.jsonl"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    capfd.readouterr()
    assert call(folder, {**config, "runs": {**config["runs"], "kd": None}}) == 0
    assert "3 of 4 runs are already finished" in capfd.readouterr().err
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_a_grid_is_trained_scored_and_compared_within_its_columns(in_process, home, tmp_path, capfd):
    """Each cell's scores are those of the same run spelt out by hand; files and pictures are by axis."""
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def vowels(prompt, answer, references):\n    return sum(c in 'aeiou' for c in answer) / 8\n")
    base = config_of(home, warm_start=None, students=None, seeds=[0, 1], measure="vowels")
    base["train"] |= {"student_config": {"n_embd": 16, "n_layer": 1, "n_head": 2}, "full_determinism": True}
    base["evaluate"] |= {"scorer": f"{scorer}:vowels"}
    writer = {"student": {"method": "opd"}, "dataset": {"method": "kd"}}
    objective = {"forward": {"divergence": "forward_kl"}, "reverse": {"divergence": "reverse_kl"}}
    exclude = [{"writer": "dataset", "objective": "reverse"}]
    grid = {**base, "runs": None, "grid": {"writer": writer, "objective": objective, "exclude": exclude}}
    assert call(tmp_path / "grid", grid) == 0, capfd.readouterr().err
    result = json.loads(capfd.readouterr().out)
    spelt = {f"{w} {o}": writer[w] | objective[o] for w, o in (("student", "forward"), ("dataset", "forward"))}
    assert call(tmp_path / "spelt", {**base, "runs": spelt}) == 0
    by_hand = json.loads(capfd.readouterr().out)["vowels"]["test"][""]
    found = result["vowels"]["test"][""]
    assert list(found) == ["student / forward", "student / reverse", "dataset / forward"]
    assert {label.replace(" ", " / "): scores for label, scores in by_hand.items()} == {
        label: scores for label, scores in found.items() if "reverse" not in label
    }
    with (tmp_path / "grid" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    by_axis = {(row["writer"], row["objective"], row["seed"]): float(row["vowels"]) for row in rows}
    assert by_axis == pytest.approx(
        {(*label.split(" / "), str(seed)): one[seed] for label, one in found.items() for seed in (0, 1)}
    )
    with (tmp_path / "grid" / "differences.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["first"], row["second"], row["writer"]) == ("dataset / forward", "student / forward", "dataset")
    assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
    assert row["p"] == row["adjusted_p"]  # of one comparison
    report = (tmp_path / "grid" / "report.txt").read_text(encoding="utf-8")
    assert "too few training seeds (2)" in report and "vowels: mean +-" in report
    assert "| writer | forward | reverse |" in (tmp_path / "grid" / "results.md").read_text(encoding="utf-8")
    assert (tmp_path / "grid" / "map.png").stat().st_size > 10_000


def test_workers_of_a_comparison_that_was_killed_do_not_go_on_for_ever(tmp_path):
    """The workers of the pool, with a task that needs no torch: it writes for a minute."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from switchkd.compare.command import worker_pool\n"
        "def write(path):\n"
        "    with open(path, 'w') as file:\n"
        "        for _ in range(6000):\n"
        "            file.write('x')\n"
        "            file.flush()\n"
        "            time.sleep(0.01)\n"
        "if __name__ == '__main__':\n"
        "    pool = worker_pool(2)\n"
        "    [pool.submit(write, f'log{number}') for number in (0, 1)]\n"
        "    time.sleep(1000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(command.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=environment)
    logs = [tmp_path / "log0", tmp_path / "log1"]
    wait_until(lambda: all(log.exists() and log.stat().st_size > 3 for log in logs), seconds=60)
    process.kill()
    process.wait()
    sizes = []

    def stands_still():
        sizes.append([log.stat().st_size for log in logs])
        return len(sizes) > 1 and sizes[-1] == sizes[-2]

    wait_until(stands_still, seconds=30, pause=0.5)


def wait_until(condition, *, seconds, pause=0.1):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(pause)


def test_one_run_more_adds_to_what_is_there(in_process, finished, home, tmp_path):
    config = config_of(home, seeds=[0], students=None, warm_start=None)
    config["train"]["student_config"] = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    folder = tmp_path / "runs"
    config["runs"] = {"sft": None}
    assert call(folder, config) == 0
    config["runs"]["kd"] = None
    assert call(folder, config) == 0
    assert [result["run"] for result in results_of(folder)] == ["sft", "kd"]
    assert "one training seed only" in (folder / "report.txt").read_text(encoding="utf-8")


def test_the_shipped_example_is_valid():
    options = command.parser().resolve(["--config", str(EXAMPLE)])
    sections = {name: command._section(name, getattr(options, name)) for name in command.SECTIONS}
    tasks = plan(output_dir=Path("runs"), seeds=[0], **sections)
    check(tasks, inputs=False)
    command.compared(options, sections)
    assert {"sft", "kd", "seqkd", "imitkd", "gkd", "minillm", "distillm", "switch"} <= {task.label for task in tasks}
    assert len({task.student for task in tasks}) == 2


def test_a_file_where_a_folder_should_be_is_one_line(home, tmp_path, capfd):
    (tmp_path / "runs").write_text("mine")
    assert call(tmp_path / "runs", config_of(home)) == 2
    assert "is a file; give a folder" in capfd.readouterr().err
    with pytest.raises(UserError):
        plan(output_dir=tmp_path, seeds=[0], train={}, runs={"..": None}, evaluate={})


def test_runs_are_compared_by_their_divergence_from_the_teacher_where_it_is_named(in_process, home, tmp_path, capsys):
    config = config_of(home, students={"": {"student_config": {"n_embd": 16, "n_layer": 1, "n_head": 2}}})
    config["measure"] = "reverse_sequence_kl"
    assert call(tmp_path / "without", config) == 2
    assert "where evaluate has a teacher_model_name_or_path" in capsys.readouterr().err
    config["evaluate"]["teacher_model_name_or_path"] = str(home / "teacher")
    assert call(tmp_path / "with", config) == 0
    capsys.readouterr()
    with (tmp_path / "with" / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for result in json.loads((tmp_path / "with" / "results.json").read_text())["results"]:
        line = next(one for one in lines if (one["run"], int(one["seed"])) == (result["run"], result["seed"]))
        wanted = result["evaluate"]["test"]["sequence_divergences"]["reverse_sequence_kl"]["per_sequence"]
        assert float(line["reverse_sequence_kl"]) == pytest.approx(wanted, rel=1e-6)
