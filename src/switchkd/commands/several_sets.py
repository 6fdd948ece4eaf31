"""Several test sets at once: what they are called, and what is different for each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchkd.cli.run_folder import check_name
from switchkd.errors import UserError


def named_test_sets(sets: Any, what: str) -> dict[str, dict[str, Any]]:
    """Return name -> options, `dataset_name` among them, of every test set.

    Args:
        sets: A list of paths and options, each called by its `name` or else by its file; or a mapping from names to
            paths or options.
        what: How errors call it.

    Raises:
        UserError: Something else, or a name that cannot be the name of a folder.
    """
    if isinstance(sets, list):
        sets = _named(sets, what)
    if not isinstance(sets, Mapping) or not sets:
        raise UserError(f"{what} must be a list of paths or options, or a mapping to them, got {sets!r}")
    found = {}
    for name, given in sets.items():
        check_name(str(name), "test set")
        options = {"dataset_name": given} if isinstance(given, str) else given
        if not isinstance(options, Mapping) or not isinstance(options.get("dataset_name"), str):
            raise UserError(f"{what}: data set {name!r} must be a path, or options with a dataset_name, got {given!r}")
        found[str(name)] = dict(options)
    return found


def _named(sets: list[Any], what: str) -> dict[str, Any]:
    """Name -> options; without a `name` that of the file without its endings, or the last part of a hub id."""
    found: dict[str, Any] = {}
    for given in sets:
        options = {"dataset_name": given} if isinstance(given, str) else given
        if not isinstance(options, Mapping) or not isinstance(options.get("dataset_name"), str):
            raise UserError(f"{what}: a test set must be a path, or options with a dataset_name, got {given!r}")
        own = options.get("name")
        name = str(own) if own is not None else Path(options["dataset_name"]).name.partition(".")[0]
        if name in found:
            raise UserError(f"{what}: two test sets are called {name!r}; give one of them another `name`")
        found[name] = {key: value for key, value in options.items() if key != "name"}
    return found
