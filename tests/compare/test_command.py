"""`switchkd compare`: every run once, refused at the door, resumed where it stopped; numbers that can be recomputed."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_tokenizer

from switchkd.__main__ import main
from switchkd.compare import command
from switchkd.compare.checks import check
from switchkd.compare.plan import plan
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
        "evaluate": {"dataset_name": str(home / "test.jsonl"), "seeds": [10, 20], "max_completion_length": 8},
        "threads": 1,
    } | over


def call(folder, config, *flags):
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return main(["compare", "--config", str(path), "--output_dir", str(folder), "--json", *flags])


@pytest.fixture(scope="module")
def finished(home):
    folder = home / "runs"
    assert call(folder, config_of(home), "--jobs", "2") == 0
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


def test_all_runs_of_a_student_and_seed_begin_with_its_warm_start(finished):
    for student in ("small", "wide"):
        for seed in (0, 1):
            for run in ("sft", "switch"):
                config = yaml.safe_load((finished / student / run / f"seed-{seed}" / "train.yaml").read_text())
                assert config["model_name_or_path"] == str(finished / student / "warm-start" / f"seed-{seed}" / "train")
                assert config["seed"] == seed
    made = [(finished / "small" / "warm-start" / f"seed-{seed}" / "train" / "model.safetensors") for seed in (0, 1)]
    assert made[0].read_bytes() != made[1].read_bytes()


def test_what_is_done_is_not_run_again_and_what_was_cut_off_is(finished, home, capfd, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    for path in again.rglob("train.yaml"):
        path.write_text(path.read_text().replace(str(finished), str(again)))
    for path in again.rglob("result.json"):
        path.write_text(path.read_text().replace(str(finished), str(again)))
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
    for path in shorter.rglob("result.json"):
        path.write_text(path.read_text().replace(str(finished), str(shorter)))
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
        ({"runs": {"warm start": None}}, "a run may not be called 'warm start'"),
        ({"runs": [1]}, "runs must be a mapping"),
        ({"evaluate": {"sedes": 1}}, "unknown option --sedes"),
        ({"seeds": [1, 1]}, "seeds must be different integers"),
        ({"baseline": "kd"}, "no run 'kd'; the runs are sft, switch"),
        ({"pairs": ["sft"]}, "pairs are two runs joined by a colon"),
        ({"jobs": 0}, "jobs must be >= 1, got 0"),
        ({"trian": {}}, "unknown key 'trian'; the nearest valid one is 'train'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(home, tmp_path, capfd, change, message):
    assert call(tmp_path / "runs", config_of(home, **change)) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_that_fails_is_named_and_the_others_go_on(home, tmp_path, capfd):
    config = config_of(home, seeds=[0], students={"small": config_of(home)["students"]["small"]}, warm_start=None)
    config["runs"] = {"sft": {"dataset_name": "missing.jsonl"}, "kd": None}
    assert call(tmp_path / "runs", config) == 2
    error = capfd.readouterr().err
    assert "small sft, seed 0: FAILED, no file or folder missing.jsonl" in error
    assert "1 of 2 runs failed" in error
    assert [result["run"] for result in results_of(tmp_path / "runs")] == ["kd"]


def test_workers_of_a_comparison_that_was_killed_do_not_go_on_for_ever(home, tmp_path):
    config = config_of(home, seeds=[0], warm_start=None)
    config["train"]["max_steps"] = 100_000
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command_line = [sys.executable, "-m", "switchkd", "compare", "--config", str(path), "--output_dir"]
    process = subprocess.Popen([*command_line, str(tmp_path / "runs"), "--jobs", "2"], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    logs = [tmp_path / "runs" / "small" / run / "seed-0" / "log.txt" for run in ("sft", "switch")]
    wait_until(lambda: all(log.exists() and "step 10/" in log.read_text() for log in logs), seconds=120)
    process.kill()
    process.wait()
    sizes = []

    def stands_still():
        sizes.append([log.stat().st_size for log in logs])
        return len(sizes) > 1 and sizes[-1] == sizes[-2]

    wait_until(stands_still, seconds=30, pause=2.0)


def wait_until(condition, *, seconds, pause=0.2):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(pause)


def test_one_run_more_adds_to_what_is_there(finished, home, tmp_path):
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
    check(tasks)
    command.compared(options, sections)
    assert {"sft", "kd", "seqkd", "imitkd", "gkd", "minillm", "distillm", "switch"} <= {task.label for task in tasks}
    assert len({task.student for task in tasks}) == 2


def test_a_file_where_a_folder_should_be_is_one_line(home, tmp_path, capfd):
    (tmp_path / "runs").write_text("mine")
    assert call(tmp_path / "runs", config_of(home)) == 2
    assert "is a file; give a folder" in capfd.readouterr().err
    with pytest.raises(UserError):
        plan(output_dir=tmp_path, seeds=[0], train={}, runs={"..": None}, evaluate={})
