"""Everything that a run would refuse is refused before the first one starts."""

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from switchkd.cli.run_folder import json_line
from switchkd.compare.tasks import Task
from switchkd.errors import UserError


def check(tasks: Sequence[Task]) -> None:
    """Refuse options that a run would refuse, before the first one starts.

    Raises:
        UserError: Names the run.
    """
    from switchkd.commands import train_options
    from switchkd.training.resolve import resolve

    parser = train_options.parser()
    scorer = import_module("switchkd.commands.evaluate").parser()
    seen: set[str] = set()
    for task in tasks:
        key = json_line({**task.options, "seed": 0, "train": {**task.train, "seed": 0, "model_name_or_path": ""}})
        if key in seen:
            continue
        seen.add(key)
        try:
            options = parser.resolve([*_flags(task.train), "--output_dir", str(task.folder / "train")])
            _, config = train_options.read_options(options)
            resolve(config)
            for values in task.evaluate.values():
                scorer.resolve([*_flags(values), "--model_name_or_path", "x"])
        except UserError as error:
            raise UserError(f"{task.name}: {error}") from None


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Options as one would type them; a name that does not exist is refused by the parser itself."""
    tokens: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            tokens.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list):
            tokens += [f"--{name}", *map(str, value)]
        elif value is not None:
            tokens.append(f"--{name}={value}")
    return tokens
