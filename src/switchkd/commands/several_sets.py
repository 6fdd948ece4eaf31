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
    if not isinstance(sets, list | Mapping) or not sets:
        raise UserError(f"{what} must be a list of paths or options, or a mapping to them, got {sets!r}")
    found: dict[str, dict[str, Any]] = {}
    for key, given in sets.items() if isinstance(sets, Mapping) else ((None, given) for given in sets):
        options = {"dataset_name": given} if isinstance(given, str) else given
        if not isinstance(options, Mapping) or not isinstance(options.get("dataset_name"), str):
            which = "a test set" if key is None else f"test set {key!r}"
            raise UserError(f"{what}: {which} must be a path, or options with a dataset_name, got {given!r}")
        options, name = dict(options), key
        if key is None:
            # Without a `name` it is called by its file without the endings, or by the last part of a hub id.
            own = options.pop("name", None)
            name = own if own is not None else Path(options["dataset_name"]).name.partition(".")[0]
        if str(name) in found:
            raise UserError(f"{what}: two test sets are called {str(name)!r}; give one of them another `name`")
        check_name(str(name), "test set")
        found[str(name)] = options
    return found
