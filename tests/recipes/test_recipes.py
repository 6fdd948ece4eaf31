"""Recipes: every shipped file is valid, says where its numbers are from, and its stages run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Run
from helpers.families import save_family, save_protocol_data

from switchkd.errors import UserError
from switchkd.recipes.command import check
from switchkd.recipes.recipe import SHIPPED, read_recipe, shipped

FILES = sorted(SHIPPED.glob("*.yaml"))
#: Recipe -> the family of its models.
FAMILIES = {
    "gpt2-small": "gpt2",
    "gpt2-medium": "gpt2",
    "gpt2-large": "gpt2",
    "gpt2-small-ablations": "gpt2",
    "opt-125m": "opt",
    "opt-350m": "opt-350m",
    "opt-1.3b": "opt",
    "openllama-3b": "open_llama",
    "qwen3-0.6b": "qwen3",
    "llama-3.2-1b": "llama3",
}
#: They differ in numbers from a recipe of which every method is run here.
SIZES = ("gpt2-medium", "gpt2-large", "opt-125m", "opt-1.3b")
#: Two optimizer steps and a few short answers of everything.
TEACHER = (
    "max_steps=2",
    "max_completion_length=6",
    "per_device_train_batch_size=4",
    "eval_rouge_l_samples=1",
    "use_cpu=true",
)
SCORES = ("decoding_seeds=[1]", "max_completion_length=4", "max_samples=1", "dtype=float32")
TABLE = (
    *("seeds=[1]", "threads=1", "train.max_steps=2", "train.max_completion_length=6", "train.use_cpu=true"),
    *("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=1", "train.save_strategy='no'"),
    *("train.load_best_model_at_end=false", "train.eval_strategy=steps", "train.eval_steps=2"),
    *(f"evaluate.{change}" for change in SCORES),
)


def small(stages: Any) -> list[str]:
    """The changes that make a recipe small."""
    changes = [f"teacher-scores.{change}" for change in SCORES] + [f"table.{change}" for change in TABLE]
    if "teacher" in stages:
        changes += [f"teacher.{change}" for change in TEACHER]
    if "warm_start" in stages["table"]:
        changes.append("table.warm_start.max_steps=2")
    if "teacher first" in stages["table"]["runs"]:
        changes += ["table.runs.teacher first.teacher_tokens=3", "table.runs.student first.switch_position=3"]
    return changes


def test_the_families_of_the_papers_and_modern_pairs_are_there() -> None:
    assert set(shipped()) == {*FAMILIES, "miniature"}


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.summary and "\n" not in recipe.summary
    stages = recipe.resolved("runs/x")
    check(stages)
    for stage in stages:
        assert "$" not in json.dumps(stage.options)
    # What is refused above would not be seen if nothing were checked.
    for stage, option in (("table.train", "max_step"), ("table.evaluate", "top_kk"), ("dolly", "sourc")):
        with pytest.raises(UserError, match=f"stage {stage.partition('.')[0]}: .*{option}"):
            check(recipe.resolved("runs/x", [f"{stage}.{option}=1"]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_number_of_a_recipe_has_its_source_beside_it(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        content, _, comment = line.partition(" #")
        if not line.lstrip().startswith("#") and re.search(r"[:\[,] ?-?\d[\d.e-]*\s*(?=[\],}]|$)", content):
            assert comment.strip(), f"{path.name}, line {number}: say where the number is from, or 'chosen here'"


def test_a_setting_that_is_null_leaves_out_what_needs_it() -> None:
    recipe = read_recipe("gpt2-small")
    stages = {stage.name: stage for stage in recipe.resolved("runs/x", ["sni=null", "teacher=models/xl"])}
    assert "sni" not in stages and "unni" in stages
    assert list(stages["table"].options["evaluate"]["datasets"]) == ["dolly", "self_instruct", "vicuna", "unni"]
    assert stages["teacher"].options["model_name_or_path"] == "models/xl"
    assert stages["table"].options["train"]["teacher_model_name_or_path"] == "runs/x/teacher"


def test_changes_reach_into_a_stage() -> None:
    recipe = read_recipe("gpt2-large")
    stages = {
        stage.name: stage.options
        for stage in recipe.resolved("runs/x", ["table.train.learning_rate=3e-4", "teacher.output_dir=runs/y/teacher"])
    }
    assert stages["table"]["train"]["learning_rate"] == 3e-4 and stages["table"]["train"]["num_train_epochs"] == 10
    assert stages["teacher-scores"]["model_name_or_path"] == "runs/y/teacher" == stages["teacher"]["output_dir"]
    assert {stage.name: stage.options for stage in recipe.resolved("runs/x")}["table"]["train"]["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to do: switchkd recipe list"),
        (["lst"], "action must be one of list, show, run"),
        (["show"], "which recipe? gpt2-large"),
        (["show", "gpt2-smal"], "no recipe 'gpt2-smal'; the nearest is 'gpt2-small'"),
        (["show", "gpt2-small", "--set", "techer=x"], "no such setting; the nearest is 'teacher'"),
        (["show", "gpt2-small", "--set", "teacher"], "give name=value"),
        (["run", "gpt2-small", "--output_dir", "runs/a", "dolly=d"], "settings are given after --set: --set dolly=d"),
        (["show", "gpt2-small", "--set", "tabel.seeds=1"], "no stage 'tabel'"),
        (["show", "gpt2-small", "--set", "teacher.seed.x=1"], "seed of stage 'teacher' holds no options"),
        (["show", "gpt2-small", "--stages", "tabel"], "stages must be one of dolly"),
        (["show", "none.yaml"], "no config file none.yaml"),
        (["show", "FILE"], "stage 'one' needs a command"),
        (["run", "gpt2-small", "--set", "table.train.max_step=1"], "stage table: "),
    ],
)
def test_wrong_calls_are_one_line(tmp_path: Path, run: Run, words: list[str], message: str) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("stages: {one: {command: trai}}\n")
    given = [str(mine) if word == "FILE" else word for word in words]
    code, out, err = run("recipe", *given, "--output_dir", tmp_path / "out")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_what_is_shown_of_a_stage_is_a_config_file_of_its_command(tmp_path: Path, run: Run) -> None:
    code, out, _ = run("recipe", "list")
    assert code == 0 and all(name in out for name in shipped())
    code, out, _ = run("recipe", "show", "opt-350m", "--stages", "teacher")
    assert code == 0 and "# --set student=facebook/opt-350m" in out and "_paper.yaml" in out
    (tmp_path / "teacher.yaml").write_text(out)
    from switchkd.commands.train_options import check_options, parser

    options = parser().resolve(["--config", str(tmp_path / "teacher.yaml")])
    assert check_options(options).model_name_or_path == "facebook/opt-2.7b" and options.learning_rate == 5e-5


def test_a_recipe_goes_on_where_it_was_and_skips_what_is_done(tmp_path: Path, run: Run) -> None:
    """Your own recipe, on a base that is shipped; the teacher's stage fails first, as if it had been stopped."""
    data = save_protocol_data(tmp_path / "data")
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {SHIPPED / 'gpt2-small.yaml'}\nsettings:\n  vicuna: null\n")
    settings = [f"{name}={folder}" for name, folder in data.items() if name != "vicuna"]
    call = ["recipe", "run", mine, "--output_dir", tmp_path / "run", "--stages", "dolly", "sni", "teacher"]
    changes = [*settings, *(f"teacher.{change}" for change in TEACHER)]
    code, out, err = run(*call, "--set", *changes, f"teacher={tmp_path / 'missing'}")
    assert code == 2 and "stage teacher: " in err and "missing" in err and "dolly: done in" in out
    save_family(tmp_path / "xl", "gpt2", 3)
    code, out, err = run(*call, "--set", *changes, f"teacher={tmp_path / 'xl'}", "--json")
    assert code == 0, err
    assert "[1/3] dolly: done before" in err and "[2/3] sni: done before" in err
    stages = json.loads(out)["stages"]
    assert stages["teacher"]["steps"] == 2 and stages["dolly"]["splits"]["train"]["kept"] == 8
    weights = tmp_path / "run" / "teacher" / "model.safetensors"
    before = weights.read_bytes()
    code, out, err = run(*call, "--set", *changes, f"teacher={tmp_path / 'xl'}")
    assert code == 0 and "[3/3] teacher: done before" in out
    # Killed in a stage that had no whole checkpoint yet: it was refused; a cut result of a stage was a traceback.
    (tmp_path / "run" / "stages" / "teacher.json").write_text('{"ste')
    for path in [*(tmp_path / "run" / "teacher").glob("checkpoint-*/manifest.json"), weights]:
        path.unlink()
    (tmp_path / "run" / "teacher" / "summary.json").unlink()
    code, out, err = run(*call, "--set", *changes, f"teacher={tmp_path / 'xl'}")
    assert code == 0 and weights.read_bytes() == before, err
    code, out, err = run(*call, "--set", *changes, f"teacher={tmp_path / 'xl'}", "teacher.learning_rate=1")
    assert code == 2 and "stage teacher was run with learning_rate=5e-05, now it is 1" in err


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_runs_two_steps_on_the_very_architecture(name: str, tmp_path: Path, run: Run) -> None:
    settings = save_protocol_data(tmp_path / "data")
    settings["teacher"] = str(save_family(tmp_path / "big", FAMILIES[name], 3))
    settings["student"] = str(save_family(tmp_path / "little", FAMILIES[name], 2))
    recipe = read_recipe(name)
    changes = [
        f"{key}={value}"
        for key, value in settings.items()
        if recipe.settings.get(key, 0) is not None or key in ("teacher", "student")
    ]
    changes += small(recipe.stages)
    if name in SIZES:
        runs = {run: recipe.stages["table"]["runs"][run] for run in ("sft", "switch")}
        changes += [f"table.runs={json.dumps(runs)}", "table.pairs=null"]
    call = ["recipe", "run", name, "--output_dir", tmp_path / "run", "--set", *changes]
    code, out, err = run(*call, "--json")
    assert code == 0, err[-3000:]
    found = json.loads(out)["stages"]
    assert list(found) == [stage.name for stage in recipe.resolved("x")]
    results = json.loads((tmp_path / "run" / "table" / "results.json").read_text())["results"]
    planned = {"warm start"} if "warm_start" in recipe.stages["table"] else set()
    planned |= {"sft", "switch"} if name in SIZES else set(recipe.stages["table"]["runs"])
    assert {one["run"] for one in results} == planned
    assert all(one["train"]["steps"] == 2 for one in results)
    if name == "openllama-3b":
        assert (tmp_path / "run" / "teacher" / "adapter_config.json").exists()
