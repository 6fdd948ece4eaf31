"""`switchkd recipe`: list, show and run whole experiments."""

import argparse
import gc
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from switchkd.cli.console import Console, quiet_libraries
from switchkd.cli.options import OptionParser
from switchkd.cli.run_folder import RunFolder, plain, whole
from switchkd.errors import UserError, UserErrors, check_choice
from switchkd.recipes.recipe import COMMANDS, Recipe, Stage, read_recipe, shipped

# What a stage may change between two calls: its result does not depend on it.
_MAY_CHANGE = ("jobs", "threads", "keep_models", "batch_size", "per_device_eval_batch_size")
#: A stopped recipe goes on by the same call.
RESUME = ""


def parser() -> OptionParser:
    """Return the options of `switchkd recipe`."""
    result = OptionParser(
        prog="switchkd recipe",
        usage="switchkd recipe list | show NAME | run NAME [--output_dir DIR] [--set NAME=VALUE ...]",
        description="Whole experiments: data, teacher, warm start, distillation, scores. A stopped recipe goes on "
        "where it was: the same command skips what is done.",
    )
    what = result.add_argument_group("what to do")
    what.add_argument("action", nargs="?", metavar="list | show | run", help="names; one in full; all its stages")
    what.add_argument("name", nargs="?", metavar="NAME", help="recipe of the package, or a .yaml file of your own")
    what.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="change a setting (teacher=models/gpt2-xl; null leaves out what needs it) or an option of a stage "
        "(teacher.max_steps=100)",
    )
    what.add_argument("--stages", nargs="+", metavar="STAGE", help="show or run only these stages")
    result.add_shared_options("where the stages write (default: runs/NAME)")
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """List, show or run, and return what `--json` prints."""
    if options.action is None:
        raise UserError("say what to do: switchkd recipe list, show NAME or run NAME")
    check_choice("action", options.action, ("list", "show", "run"))
    if options.action == "list":
        return _list(console)
    if options.name is None:
        raise UserError(f"which recipe? {', '.join(shipped())}, or a .yaml file of your own")
    recipe = read_recipe(options.name)
    folder = Path(options.output_dir or Path("runs") / recipe.name)
    stages = recipe.resolved(folder, options.set or ())
    chosen = options.stages or [stage.name for stage in stages]
    for name in chosen:
        check_choice("stages", name, tuple(stage.name for stage in stages))
    stages = [stage for stage in stages if stage.name in chosen]
    if options.action == "show":
        return _show(recipe, stages, console)
    return _run(recipe, stages, RunFolder(str(folder), "recipe"), options, console)


def _list(console: Console) -> dict[str, Any]:
    recipes = [read_recipe(name) for name in shipped()]
    rows = [(recipe.name, recipe.summary, ", ".join(recipe.stages)) for recipe in recipes]
    console.say(console.table(rows, ("recipe", "summary", "stages")))
    console.say("\nswitchkd recipe show NAME; switchkd recipe run NAME --output_dir DIR")
    return {"recipes": {recipe.name: recipe.summary for recipe in recipes}}


def _show(recipe: Recipe, stages: list[Stage], console: Console) -> dict[str, Any]:
    """Every stage as a config file of its command; the comments with the sources stand in the recipe's files."""
    console.say(f"# {recipe.name}: {recipe.summary}")
    for file in recipe.files:
        console.say(f"# {file}")
    for name, value in recipe.settings.items():
        console.say(f"# --set {name}={json.dumps(value) if not isinstance(value, str) else value}")
    for stage in stages:
        console.say(f"\n# {stage.name}: switchkd {stage.command} --config FILE\n{_text(stage.options)}".rstrip())
    return {
        "name": recipe.name,
        "stages": {stage.name: {"command": stage.command, **stage.options} for stage in stages},
    }


def _run(
    recipe: Recipe, stages: list[Stage], folder: RunFolder, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    if not folder.holds_run("switchkd recipe"):
        folder.check()
    elif options.overwrite_output_dir:
        raise UserError(
            f"overwrite_output_dir: a recipe goes on with what is in {folder.path}; give another output_dir"
        )
    check(stages)
    for stage in stages:
        _check_same(stage, folder.path)
    folder.claim({**vars(options), "output_dir": str(folder.path)}, keep=True)
    (folder.path / "stages").mkdir(exist_ok=True)
    results = {}
    for number, stage in enumerate(stages, start=1):
        done, file = _result(stage, folder.path), folder.path / "stages" / f"{stage.name}.yaml"
        head = f"[{number}/{len(stages)}] {stage.name}"
        if done is not None:
            console.say(f"{head}: done before")
            results[stage.name] = done
            continue
        with whole(file) as part:
            part.write(_text(stage.options))
        console.say(f"\n{head}: switchkd {stage.command} --config {file}")
        started = time.perf_counter()
        try:
            found = _execute(stage, file, console, options.verbose)
        except UserError as error:
            messages = error.messages if isinstance(error, UserErrors) else [str(error)]
            raise UserErrors([f"stage {stage.name}: {message}" for message in messages]) from error
        results[stage.name] = plain({**found, "stage_seconds": time.perf_counter() - started})
        folder.write_json(f"stages/{stage.name}.json", results[stage.name])
        console.say(f"{stage.name}: done in {results[stage.name]['stage_seconds']:.0f} s")
    rows = [(stage.name, stage.command, _seconds(results[stage.name]), str(stage.folder)) for stage in stages]
    console.say("\n" + console.table(rows, ("stage", "command", "seconds", "folder")))
    return {"recipe": recipe.name, "output_dir": str(folder.path), "stages": results}


def check(stages: list[Stage]) -> None:
    """Refuse what the commands of the stages would refuse of their options, before the first one runs.

    Raises:
        UserErrors: A line for each stage with a mistake.
    """
    problems = []
    for stage in stages:
        try:
            _checked(stage)
        except UserErrors as error:
            problems += [f"stage {stage.name}: {message}" for message in error.messages]
        except UserError as error:
            problems.append(f"stage {stage.name}: {error}")
    if problems:
        raise UserErrors(problems)


def _checked(stage: Stage) -> None:
    """Options as the command's own parser and its checks read them; no model and no file is read."""
    from switchkd.cli.options import as_flags

    module = import_module(COMMANDS[stage.command][0])
    options = module.parser().resolve(as_flags(plain(stage.options)))
    if stage.command == "train":
        from switchkd.commands.train_options import check_options

        check_options(options)
    elif stage.command == "evaluate":
        module.check(options)
        module.chosen_sets(options)
    elif stage.command in ("prepare", "rollout"):
        module.check(options)
    elif stage.command == "compare":
        from switchkd.compare.checks import check as check_tasks

        tasks, sections, _ = module.planned(options, stage.folder)
        check_tasks(tasks, inputs=False)
        module.compared(options, sections)


def _execute(stage: Stage, file: Path, console: Console, verbose: bool) -> dict[str, Any]:
    module = import_module(COMMANDS[stage.command][0])
    flags = ["--config", str(file), "--json", str(console.json), "--verbose", str(verbose)]
    if stage.command == "evaluate":
        flags.append("--resume")
    elif stage.command == "train":
        flags += ["--resume_from_checkpoint", "auto"]
    elif stage.command not in ("compare", "report") and RunFolder(str(stage.folder), stage.command).holds_run():
        flags.append("--overwrite_output_dir")
    try:
        result: dict[str, Any] = module.run(module.parser().resolve(flags), console)
    finally:
        # The next stage may need the memory of this one's models.
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.empty_cache()
        if not verbose:
            quiet_libraries(verbose)
    return result


def _result(stage: Stage, folder: Path) -> dict[str, Any] | None:
    """What a stage that is done returned; one that was run by hand from its file in `stages` is done too."""
    if stage.command == "report":
        return None  # it takes seconds, and shows what the other stages have written by now
    file = folder / "stages" / f"{stage.name}.json"
    found = _read(file)
    if found is None and stage.command != "compare":
        found = _read(stage.folder / COMMANDS[stage.command][1])
    return found


def _read(file: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None where there is none, or a damaged one: what wrote it runs again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _check_same(stage: Stage, folder: Path) -> None:
    """Refuse to go on with a stage that is done, but with other options."""
    file = folder / "stages" / f"{stage.name}.yaml"
    if _result(stage, folder) is None or not file.is_file():
        return
    try:
        before, now = yaml.safe_load(file.read_text(encoding="utf-8")), yaml.safe_load(_text(stage.options))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"cannot read {file}; remove it, and {stage.folder} if its options may have been others")
    for name in {**before, **now}:
        if name not in _MAY_CHANGE and before.get(name) != now.get(name):
            raise UserError(
                f"stage {stage.name} was run with {name}={before.get(name)!r}, now it is {now.get(name)!r}; give "
                f"another output_dir, or remove {file.with_suffix('.json')} and {stage.folder} to run it again"
            )


def _text(options: dict[str, Any]) -> str:
    return yaml.safe_dump(plain(options), sort_keys=False, allow_unicode=True, width=120)


def _seconds(result: dict[str, Any]) -> str:
    return f"{result['stage_seconds']:.0f}" if "stage_seconds" in result else ""
