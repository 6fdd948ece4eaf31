"""Data sets as Python users hold them: in memory, as a stream, split by name, or several with weights."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset

from switchkd.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """Several training sets at once, each with the share of the records that training sees of it.

    Each is prepared by itself: they may have different columns. A pass over the mixture ends when every record was
    seen; smaller sets, and those of larger weight, repeat.

    Attributes:
        parts: Name, for messages -> records, in any form that `train_dataset` takes.
        weights: Name -> share, > 0; only their ratios count. Equal where it is empty.

    Raises:
        UserError: Fewer than two parts, or a weight that is not positive or belongs to no part.
    """

    parts: Mapping[str, Any]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise UserError(f"a mixture needs two data sets or more, got {', '.join(self.parts) or 'none'}")
        for name, weight in self.weights.items():
            if name not in self.parts or not 0 < weight < float("inf"):
                raise UserError(f"the weights of a mixture must be numbers > 0, one for each part, got {name}={weight}")
        if self.weights and len(self.weights) < len(self.parts):
            missing = next(name for name in self.parts if name not in self.weights)
            raise UserError(f"the mixture has no weight for {missing}; give all weights or none")

    def joined(self, prepared: Mapping[str, Dataset], seed: int) -> Dataset:
        """Return the prepared parts as one data set, drawn by their weights.

        Args:
            prepared: Name -> what `switchkd.data.prepare` made of the part.
            seed: Of the draws.

        Raises:
            UserError: Only some of the parts have a teacher_prompt.
        """
        names = [set(data.column_names) for data in prepared.values()]
        if any(columns != names[0] for columns in names):
            raise UserError("some parts of the mixture have a teacher_prompt, others none; give it in all or none")
        weights = [self.weights.get(name, 1.0) for name in prepared]
        shares = [weight / sum(weights) for weight in weights]
        return datasets.interleave_datasets(
            list(prepared.values()), probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
        )


def as_dataset(data: Any, name: str, *, records: int | None = None) -> Dataset:
    """Return records in any of the usual containers as a `datasets.Dataset`.

    Args:
        data: A `Dataset`, a `DatasetDict` of one split, a list of dicts, a pandas data frame, an object with `__len__`
            and `__getitem__` that gives dicts (a map-style `torch.utils.data.Dataset`), or a stream of dicts
            (`datasets.IterableDataset`, a torch `IterableDataset`).
        name: What the data are for, named in errors.
        records: How many records to take of a stream; None refuses one.

    Raises:
        UserError: A stream without an end, several splits at once, or something without records.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, dict):  # a DatasetDict is one
        if len(data) == 1:
            return as_dataset(next(iter(data.values())), name, records=records)
        raise UserError(f"{name} holds several splits ({', '.join(map(str, data))}); give one of them")
    if hasattr(data, "iterrows"):
        return Dataset.from_pandas(data, preserve_index=False)
    if isinstance(data, str | bytes) or (not hasattr(data, "__iter__") and not hasattr(data, "__getitem__")):
        raise UserError(
            f"{name} is a {type(data).__name__}, not records; load them: "
            'datasets.load_dataset("json", data_files="train.jsonl", split="train")'
        )
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        rows = [data[index] for index in range(len(data))]
    else:
        rows = _taken(data, name, records)
    wrong = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise UserError(f"{name}: record {wrong} is a {type(rows[wrong]).__name__}, not a dict of columns")
    try:
        return Dataset.from_list(rows)
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(f"{name}: {_first_line(error)}") from error


def first_records(records: Any, limit: int | None) -> Any:
    """Return the first records of a data set or of a stream, as a data set; all of them where there is no limit."""
    if limit is None:
        return records
    if isinstance(records, Dataset):
        return records.select(range(min(limit, len(records))))
    return as_dataset(records, "the data set", records=limit)


def _taken(stream: Any, name: str, records: int | None) -> list[Any]:
    """The first records of a stream."""
    if records is None:
        wanted = "set max_steps, which says how many records are needed, or " if name == "train_dataset" else ""
        raise UserError(
            f"{name} is a stream ({type(stream).__name__}): {wanted}give the records that are wanted: "
            "datasets.Dataset.from_list(list(stream.take(1000)))"
        )
    try:
        return list(itertools.islice(stream, records))
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name}: the stream cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
