"""What a run was made of and made with: data, first prompt, options, versions, hashes."""

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import yaml

from switchkd.cli.run_folder import plain, without_secrets
from switchkd.page.document import Section, Table, Text
from switchkd.report.folders import Run

#: Options that say where a run was written to or how it was watched, not what it did.
NOT_TOLD = ("output_dir", "logging_dir", "run_name", "project", "report_to", "disable_tqdm", "log_level", "seed",
            "log_level_replica", "accelerator_config", "local_rank", "num_input_tokens_seen")  # fmt: skip
NOT_TOLD_PREFIXES = ("hub_", "logging_", "save_", "ddp_", "trackio_")
#: Commands whose options are sections of a file rather than single values.
IN_SECTIONS = ("compare", "demo")


def data_section(runs: Sequence[Run]) -> Section | None:
    """Return what was read of the data, the first prompt as the student read it, and where the data came from."""
    rows: list[list[Any]] = []
    blocks: list[Any] = []
    for run in runs:
        found = run.summary.get("data")
        # A training has a report for each of its data sets.
        parts = (
            found if isinstance(found, dict) and all(isinstance(one, dict) for one in found.values()) else {"": found}
        )
        for name, report in parts.items():
            if isinstance(report, dict):
                rows.append([f"{run.name} {name}".strip(), run.test_set or _data_name(run, name), _words(report)])
    if rows:
        blocks.append(Table("What was read", ["run", "data", "report"], _merged(rows), "data"))
    prompts: dict[str, list[str]] = {}
    for run in runs:
        if isinstance(prompt := run.summary.get("first_prompt"), str):
            prompts.setdefault(prompt, []).append(run.name)
    blocks += [Text(f"First prompt: {_names(names)}", prompt) for prompt, names in prompts.items()]
    sources: dict[str, list[str]] = {}
    for run in runs:
        if run.prepared:
            sources.setdefault(json.dumps(run.prepared, indent=2, ensure_ascii=False), []).append(run.name)
    blocks += [Text(f"Sources and hashes of the data: {_names(names)}", text) for text, names in sources.items()]
    return Section("Data", blocks) if blocks else None


def config_section(runs: Sequence[Run]) -> Section | None:
    """Return the options of runs that differ from their defaults: those that all share, then those that differ."""
    blocks: list[Any] = []
    for command in dict.fromkeys(run.command for run in runs):
        chosen = [run for run in runs if run.command == command]
        if command in IN_SECTIONS:
            blocks += [Text(f"{run.name}: the file of switchkd {command}", _yaml(run.config)) for run in chosen]
            continue
        defaults = _defaults(command)
        changed = {run.name: _changed(run.config, defaults) for run in chosen}
        names = list(dict.fromkeys(name for values in changed.values() for name in values))
        shared = [name for name in names if len({str(values.get(name)) for values in changed.values()}) == 1]
        which = f"switchkd {command}, " + (
            "all runs" if len(chosen) > 1 else chosen[0].name if len(runs) > 1 else "this run"
        )
        rows = [[name, _value(next(iter(changed.values()))[name]), _value(defaults.get(name))] for name in shared]
        blocks.append(Table(f"{which}: other than the defaults", ["option", "value", "default"], rows,
                            f"options-{command}", open=len(rows) <= 30))  # fmt: skip
        apart = [name for name in names if name not in shared]
        if apart:
            cells = [
                [name, _value(defaults.get(name)), *(_value(values.get(name, defaults.get(name)))
                                                     for values in changed.values())]
                for name in apart
            ]  # fmt: skip
            blocks.append(Table(f"switchkd {command}: what differs between the runs", ["option", "default", *changed],
                                cells, f"options-{command}-by-run"))  # fmt: skip
    return Section("Options", blocks) if blocks else None


def version_section(runs: Sequence[Run]) -> Section | None:
    """Return the versions that results may depend on, a column for each set of them."""
    groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for run in runs:
        if run.versions:
            groups.setdefault(json.dumps(run.versions, sort_keys=True), (run.versions, []))[1].append(run.name)
    if not groups:
        return None
    found = list(groups.values())
    packages = list(dict.fromkeys(name for versions, _ in found for name in versions))
    heads = ["all runs"] if len(found) == 1 else [_names(names) for _, names in found]
    rows = [[name, *(versions.get(name) for versions, _ in found)] for name in packages]
    return Section("Versions", [Table("Versions", ["package", *heads], rows, "versions")])


def _defaults(command: str) -> dict[str, Any]:
    parser = import_module(f"switchkd.commands.{command}").parser()
    return {action.dest: plain(action.default) for action in parser._actions}


def _changed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: without_secrets({name: value})[name]
        for name, value in config.items()
        if name not in NOT_TOLD
        and not name.startswith(NOT_TOLD_PREFIXES)
        and not _is_off(value)
        and str(value) != str(defaults.get(name))
    }


def _is_off(value: Any) -> bool:
    """TrainingArguments writes "off" in several ways."""
    return value is None or value is False or value in ("", [], {})


def _data_name(run: Run, part: str) -> str | None:
    names = ("eval_dataset_name", "dataset_name") if part.startswith("eval") else ("dataset_name", "dataset_mixture")
    return next((_value(run.config[name]) for name in names if run.config.get(name)), None)


def _words(report: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {_value(value)}" for name, value in report.items() if not _is_off(value)
    )


def _merged(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Rows that only differ in their first cell as one."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for first, *rest in rows:
        groups.setdefault(tuple(rest), []).append(first)
    return [[_names(names), *rest] for rest, names in groups.items()]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _yaml(config: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in without_secrets(dict(config)).items() if value is not None}
    return str(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100))
