"""Objects of the user's own: named by a file or a module, or announced by an installed package (entry points)."""

import importlib
import importlib.util
import os
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from switchkd.errors import UserError, nearest_name

#: Groups of entry points under which installed packages announce policies (classes) and methods: name -> object.
POLICIES, METHODS = "switchkd.policies", "switchkd.methods"


def is_path(spec: str) -> bool:
    """Return whether a name is `path/to/file.py:name` or `module:name` rather than that of something built in."""
    return ":" in spec


def load_object(option: str, spec: str) -> Any:
    """Return what a file or module calls by a name.

    Args:
        option: The option that names it, for messages.
        spec: `path/to/file.py:name`, or `package.module:name`; modules are also found in the working directory.

    Raises:
        UserError: There is no such file, module or name, or it cannot be imported.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise UserError(f"{option} must be path/to/file.py:name or module:name, got {spec!r}")
    module = _module(option, source)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = f"; the nearest is {nearest_name(name, known)!r}" if known else ""
        raise UserError(f"{option}: {source} has no {name!r}{near}")
    return getattr(module, name)


def announced(group: str) -> list[str]:
    """Return the names that installed packages announce in a group of entry points."""
    return sorted(entry_points(group=group).names)


def load_named(option: str, group: str, name: str) -> Any:
    """Return what a name stands for outside this package, None where nothing is known of it.

    Args:
        option: The option that names it, for messages.
        group: Of entry points.
        name: As `load_object` takes it, or one of `announced`.

    Raises:
        UserError: It cannot be found or imported.
    """
    if is_path(name):
        return load_object(option, name)
    return _load_announced(group, name) if name in announced(group) else None


def _load_announced(group: str, name: str) -> Any:
    [entry] = list(entry_points(group=group, name=name))[:1]
    try:
        return entry.load()
    except Exception as error:  # whatever the package does when it is imported
        raise UserError(
            f"the installed entry point {group}: {name} = {entry.value} cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def _module(option: str, source: str) -> ModuleType:
    path = Path(source).expanduser()
    try:
        if path.suffix != ".py":
            if os.getcwd() not in sys.path:  # an installed command does not look there, `python -m` does
                sys.path.append(os.getcwd())
            return importlib.import_module(source)
        if not path.is_file():
            raise UserError(f"{option}: no file {source}; check the path")
        found = importlib.util.spec_from_file_location(re.sub(r"\W", "_", path.stem), path)
        assert found is not None and found.loader is not None  # for a .py file it is
        module = importlib.util.module_from_spec(found)
        # Dataclasses look their module up by name.
        sys.modules.setdefault(module.__name__, module)
        found.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:  # whatever the file does when it is imported
        raise UserError(f"{option}: cannot import {source}: {type(error).__name__}: {error}") from error
