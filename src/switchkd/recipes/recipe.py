"""A recipe: settings, and stages that are commands with their options; files hold what differs from their base."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.cli.config_file import files_of, read_config_file, read_value
from switchkd.errors import UserError, nearest_name

#: Where the shipped recipes lie; files that begin with _ are bases only.
SHIPPED = Path(__file__).parent
#: Command of a stage -> its module, and the file that it writes last.
COMMANDS = {
    "prepare": ("switchkd.commands.prepare", "prepared.json"),
    "train": ("switchkd.commands.train", "summary.json"),
    "evaluate": ("switchkd.commands.evaluate", "summary.json"),
    "diagnose": ("switchkd.commands.diagnose", "summary.json"),
    "rollout": ("switchkd.commands.rollout", "summary.json"),
    "compare": ("switchkd.compare.command", "results.json"),
    "report": ("switchkd.report.command", "report.html"),
}
_REFERENCE = re.compile(r"\$(stages\.[\w-]+|\w+)")
_DROPPED = object()


@dataclass(frozen=True)
class Stage:
    """One command of a recipe.

    Attributes:
        name: Of the stage.
        command: A key of `COMMANDS`.
        options: Of that command, complete; `output_dir` among them.
    """

    name: str
    command: str
    options: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the command writes."""
        return Path(self.options["output_dir"])


@dataclass(frozen=True)
class Recipe:
    """A recipe as its files have it, references not yet filled in.

    Attributes:
        name: Of its file.
        summary: One line.
        settings: Name -> value that stages refer to as `$name`: models, data, what differs between machines.
        stages: Name -> `command` and its options, in the order in which they run.
        files: Its own file and those that it is based on.
    """

    name: str
    summary: str
    settings: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    files: list[Path]

    def resolved(self, output_dir: str | Path, changes: Sequence[str] = ()) -> list[Stage]:
        """Return the stages with every reference filled in.

        `$name` in an option is a setting, `$stages.name` the folder of a stage. Where a setting is null, what refers
        to it is left out: an entry of a mapping or list alone, a stage where one of its own options does.

        Args:
            output_dir: Every stage has its folder in there.
            changes: "setting=value", or "stage.option=value" (deeper too: "table.train.max_steps=2").

        Raises:
            UserError: A change or a reference that names nothing.
        """
        settings, stages = self._changed(changes)
        folders = {name: str(options.get("output_dir", Path(output_dir) / name)) for name, options in stages.items()}
        values: dict[str, Any] = {name: _DROPPED if value is None else value for name, value in settings.items()}
        found = []
        for name, options in stages.items():
            known = {**values, **{f"stages.{other}": folder for other, folder in folders.items()}}
            filled = {key: _filled(value, known, f"stage {name}") for key, value in options.items() if key != "command"}
            if any(value is _DROPPED for value in filled.values()):
                folders[name] = _DROPPED  # type: ignore[assignment]
                continue
            found.append(Stage(name, options["command"], {**filled, "output_dir": folders[name]}))
        return found

    def _changed(self, changes: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        settings, stages = dict(self.settings), copy.deepcopy(self.stages)
        for change in changes:
            name, sign, text = change.partition("=")
            if not sign:
                raise UserError(f"--set {change}: give name=value, such as {next(iter(settings), 'stage.option')}=...")
            value = read_value(text)
            if "." not in name:
                if name not in settings:
                    near = nearest_name(name, settings) if settings else "none"
                    raise UserError(f"--set {name}: {self.name} has no such setting; the nearest is {near!r}")
                settings[name] = value
                continue
            stage, *path = name.split(".")
            if stage not in stages:
                raise UserError(f"--set {name}: no stage {stage!r}; stages are {', '.join(stages)}")
            place: Any = stages[stage]
            for key in path[:-1]:
                place = place.setdefault(key, {}) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise UserError(f"--set {name}: {'.'.join(path[:-1])} of stage {stage!r} holds no options")
            place[path[-1]] = value
        return settings, stages


def shipped() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml") if not path.name.startswith("_"))


def read_recipe(name: str) -> Recipe:
    """Return a recipe of the package by its name, or one of your own by its file.

    Raises:
        UserError: No such recipe, or a file that is none.
    """
    path = SHIPPED / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif name not in shipped():
        near = nearest_name(name, shipped())
        raise UserError(f"no recipe {name!r}; the nearest is {near!r}; one of your own is given as its .yaml file")
    content = read_config_file(path)
    for key in content:
        if key not in ("summary", "settings", "stages"):
            raise UserError(f"{path}: a recipe has summary, settings and stages, not {key!r}")
    stages, settings = content.get("stages"), content.get("settings") or {}
    if not isinstance(stages, dict) or not stages or not isinstance(settings, dict):
        raise UserError(f"{path}: a recipe has `stages`, a mapping from names to commands with their options")
    for stage, options in stages.items():
        command = options.get("command") if isinstance(options, dict) else None
        if command not in COMMANDS:
            raise UserError(
                f"{path}: stage {stage!r} needs a command, one of {', '.join(COMMANDS)}; it has {command!r}"
            )
    return Recipe(path.stem, str(content.get("summary", "")), settings, stages, files_of(path))


def _filled(value: Any, known: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, Mapping):
        filled = {key: _filled(item, known, where) for key, item in value.items()}
        return {key: item for key, item in filled.items() if item is not _DROPPED}
    if isinstance(value, list):
        return [item for one in value if (item := _filled(one, known, where)) is not _DROPPED]
    if not isinstance(value, str):
        return value
    names = _REFERENCE.findall(value)
    for name in names:
        if name not in known:
            raise UserError(f"{where}: {value!r} refers to {name!r}, which is no setting and no stage")
        if known[name] is _DROPPED:
            return _DROPPED
    if len(names) == 1 and value == f"${names[0]}":
        return known[names[0]]
    return _REFERENCE.sub(lambda match: str(known[match[1]]), value)
