"""The runs of a comparison: entries of `runs`, and the cells of `grid`, the product of its axes."""

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from switchkd.cli.run_folder import check_name
from switchkd.errors import UserError, nearest_name

#: Stands between the axes' labels in the label of a cell.
BETWEEN = " / "
#: Separate names elsewhere: axes in a label, the two runs of a pair, pairs in a list.


@dataclass(frozen=True)
class Run:
    """What is trained with every seed.

    Attributes:
        label: What tables call it.
        options: Of `switchkd train`, over those that all runs share.
        cell: Axis -> label of the cell of the grid; empty for an entry of `runs`.
    """

    label: str
    options: Mapping[str, Any]
    cell: Mapping[str, str] = field(default_factory=dict)


def all_runs(
    runs: Mapping[str, Mapping[str, Any] | None] | None, grid: Any = None, train: Mapping[str, Any] | None = None
) -> list[Run]:
    """Return the entries of `runs`, whose method is their label unless they name one, and the cells of `grid`.

    Args:
        runs: Label -> options.
        grid: One grid or a list of grids: axis -> labels -> options; or option -> list of values. `exclude` lists
            cells that are left out and `include` cells with more options; both name some of the axes, each with a
            label or a list of labels.
        train: Options that all runs share: `method` may stand there for the cells.

    Raises:
        UserError: Names that are not valid, that do not exist or that occur twice, and cells without a method.
    """
    shared = (train or {}).get("method")
    if runs and shared is not None:
        raise UserError(f"method={shared} in train does nothing: the runs name their methods; remove it")
    found = []
    for label, options in (runs or {}).items():
        check_name(label, "run")
        found.append(Run(label, {"method": label, **(options or {})}))
    for part in grid if isinstance(grid, list) else [grid] if grid else []:
        found += _cells(part)
    kept: dict[str, Run] = {}
    for run in found:
        if run.cell and "method" not in run.options and shared is None:
            raise UserError(f"grid: {run.label!r} has no method; give `method` to the labels of an axis, or in train")
        if "method" in run.options and run.options["method"] is None:
            raise UserError(f"{run.label!r} has an empty method; name one or remove the key")
        if kept.setdefault(run.label, run) != run:
            raise UserError(f"two runs are called {run.label!r}; give one another label")
    return list(kept.values())


def axes_of(grid: Any) -> dict[str, list[str]]:
    """Return axis -> labels of a valid grid, or of a list of grids, in the order given."""
    found: dict[str, dict[str, None]] = {}
    for part in grid if isinstance(grid, list) else [grid] if grid else []:
        for axis, labels in _axes(part).items():
            found.setdefault(axis, {}).update(dict.fromkeys(labels))
    return {axis: list(labels) for axis, labels in found.items()}


def _cells(grid: Any) -> list[Run]:
    if not isinstance(grid, Mapping):
        raise UserError(f"grid must be a mapping from axes to labels to options, got {str(grid)[:60]!r}")
    axes = _axes(grid)
    if not axes:
        raise UserError("grid has no axis; give a mapping from axes to labels to options")
    excluded = [_selection("exclude", entry, axes, strict=True)[0] for entry in _entries(grid, "exclude")]
    cells = []
    for labels in itertools.product(*axes.values()):
        cell = dict(zip(axes, labels, strict=True))
        if not any(_matches(cell, chosen) for chosen in excluded):
            cells.append(cell)
    if not cells:
        raise UserError("grid: exclude leaves no cell")
    more: list[dict[str, Any]] = [{} for _ in cells]
    for entry in _entries(grid, "include"):
        chosen, options = _selection("include", entry, axes, strict=False)
        matching = [index for index, cell in enumerate(cells) if _matches(cell, chosen)]
        if not options or not matching:
            why = "matches no cell" if options else "gives no option"
            raise UserError(f"grid: include {json.dumps(entry)} {why}; axes are {', '.join(axes)}")
        for index in matching:
            more[index] |= options
    return [
        Run(BETWEEN.join(cell.values()), {**_options(cell, axes), **added}, cell)
        for cell, added in zip(cells, more, strict=True)
    ]


def _axes(grid: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: _axis(name, labels) for name, labels in grid.items() if name not in ("exclude", "include")}


def _axis(name: str, labels: Any) -> dict[str, dict[str, Any]]:
    """Label -> options of one axis; a list is the values of the option that the axis is called after."""
    check_name(name, "axis")
    if isinstance(labels, list) and all(isinstance(value, str | int | float) for value in labels):
        options: dict[str, Any] = {as_label(value): {name: value} for value in labels}
        if len(options) < len(labels):
            raise UserError(f"grid: axis {name!r} has the same value twice")
    elif isinstance(labels, Mapping):
        options = dict(labels)
    else:
        raise UserError(
            f"grid: axis {name!r} must be a mapping from labels to options, or the values of option {name}, got "
            f"{str(labels)[:60]!r}; lists of cells are `exclude` and `include`"
        )
    if not options:
        raise UserError(f"grid: axis {name!r} has no label")
    for label, values in options.items():
        check_name(label, f"label of axis {name!r},")
        if not isinstance(values, Mapping | None):
            raise UserError(f"grid: {name} {label!r} must be a mapping of options, got {values!r}")
    return {label: dict(values or {}) for label, values in options.items()}


def _options(cell: Mapping[str, str], axes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    giver: dict[str, str] = {}
    for axis, label in cell.items():
        for name, value in axes[axis][label].items():
            if name in giver:
                raise UserError(
                    f"grid: {name} is set by axis {giver[name]!r} ({cell[giver[name]]}) and by axis {axis!r} "
                    f"({label}); leave it to one of them, or give the cell's value under include"
                )
            giver[name], options[name] = axis, value
    return options


def _entries(grid: Mapping[str, Any], name: str) -> list[Any]:
    entries = grid.get(name) or []
    if not isinstance(entries, list):
        raise UserError(f"grid: {name} must be a list of cells, got {str(entries)[:60]!r}")
    return entries


def _selection(
    section: str, entry: Any, axes: Mapping[str, Iterable[str]], *, strict: bool
) -> tuple[dict[str, set[str]], dict[str, Any]]:
    """Axis -> the labels that an entry chooses, and its further keys, which `strict` refuses."""
    if not isinstance(entry, Mapping) or not entry:
        raise UserError(f"grid: {section} lists cells such as {{axis: label}}, got {str(entry)[:60]!r}")
    chosen: dict[str, set[str]] = {}
    rest: dict[str, Any] = {}
    for name, value in entry.items():
        if name not in axes:
            if strict:
                raise UserError(f"grid: {section} names axis {name!r}; the nearest is {nearest_name(name, axes)!r}")
            rest[name] = value
            continue
        chosen[name] = {as_label(item) for item in (value if isinstance(value, list) else [value])}
        for label in sorted(chosen[name] - set(axes[name])):
            near = nearest_name(label, axes[name])
            raise UserError(f"grid: {section} names {label!r} of axis {name!r}; the nearest is {near!r}")
    return chosen, rest


def _matches(cell: Mapping[str, str], chosen: Mapping[str, set[str]]) -> bool:
    return all(cell[axis] in labels for axis, labels in chosen.items())


def as_label(value: Any) -> str:
    """A value as a label: YAML reads `on` and `1e-3` as a truth value and a number."""
    return str(value).lower() if isinstance(value, bool) else str(value)
