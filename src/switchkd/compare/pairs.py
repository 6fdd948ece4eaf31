"""Which run is compared with which: with its baseline, and the pairs that the user asks for."""

from collections.abc import Mapping, Sequence
from typing import Any

from switchkd.compare.grid import Run, as_label
from switchkd.errors import UserError, nearest_name


def partners(
    runs: Sequence[Run], baseline: str | Mapping[str, Any] | None, pairs: Sequence[str], others: Sequence[str] = ()
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the pairs of labels that are compared: every run with its baseline, and the given pairs.

    Args:
        runs: All runs.
        baseline: A run; a label of an axis, or axis -> label: then every cell is compared with the cell that has
            this label and is the same on the other axes. None is the first label of the first axis, or the first run.
        pairs: `first:second`, each a run or a label of an axis: then in every cell.
        others: Names besides those of the runs that a pair may hold.

    Raises:
        UserError: A name that does not exist, or a pair of which no cell has both.
    """
    named = {run.label: run for run in runs} | {name: Run(name, {}) for name in others}
    if baseline is None:
        cell = next((run.cell for run in runs if run.cell), None)
        baseline = dict([next(iter(cell.items()))]) if cell else runs[0].label
    against = [(run.label, other) for run in runs if (other := _partner(run, baseline, named)) is not None]
    if not against and len(runs) > 1:
        raise UserError(f"baseline {baseline}: no run can be compared with it; check exclude")
    listed = []
    for pair in pairs:
        names = [name.strip() for name in pair.split(":")]
        if len(names) != 2:
            raise UserError(f"pairs are two runs joined by a colon, first:second, got {pair}")
        chosen = _reference(names[0], named)
        firsts = [chosen] if isinstance(chosen, Run) else [run for run in runs if _has(run, chosen)]
        found = [(run.label, other) for run in firsts if (other := _partner(run, names[1], named)) is not None]
        if not found:
            raise UserError(f"pair {pair}: no two runs differ in this and are equal on the other axes")
        listed += found
    return against, list(dict.fromkeys(listed))


def _partner(run: Run, reference: str | Mapping[str, Any], named: Mapping[str, Run]) -> str | None:
    """The label of what a run is compared with; None where there is nothing, or it is the run itself."""
    chosen = _reference(reference, named)
    if isinstance(chosen, Run):
        return chosen.label if chosen.label != run.label else None
    if not chosen.keys() <= run.cell.keys():
        return None
    cell = {**run.cell, **chosen}
    return next((one.label for one in named.values() if one.cell == cell and one.label != run.label), None)


def _has(run: Run, chosen: Mapping[str, str]) -> bool:
    return bool(run.cell) and chosen.items() <= run.cell.items()


def _reference(reference: str | Mapping[str, Any], named: Mapping[str, Run]) -> Run | dict[str, str]:
    """The run of that name; or axis -> label."""
    axes: dict[str, dict[str, None]] = {}
    for run in named.values():
        for axis, label in run.cell.items():
            axes.setdefault(axis, {})[label] = None
    if isinstance(reference, str):
        if reference in named:
            return named[reference]
        holding = [axis for axis, labels in axes.items() if reference in labels]
        if len(holding) > 1:
            raise UserError(f"{reference!r} is a label of the axes {' and '.join(holding)}; give the whole run")
        if not holding:
            labels = f", the labels {', '.join(label for axis in axes.values() for label in axis)}" if axes else ""
            raise UserError(f"no run {reference!r}; the runs are {', '.join(named)}{labels}")
        return {holding[0]: reference}
    chosen = {axis: as_label(label) for axis, label in reference.items()}
    for axis, label in chosen.items():
        if axis not in axes:
            near = f"; the nearest is {nearest_name(axis, axes)!r}" if axes else "; there is no grid"
            raise UserError(f"baseline names axis {axis!r}{near}")
        if label not in axes[axis]:
            near = nearest_name(label, axes[axis])
            raise UserError(f"baseline names {label!r} of axis {axis!r}; the nearest is {near!r}")
    return chosen
