"""The protocol's sources as ready folders: one JSON Lines file per split, and `prepared.json`, which says how."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from switchkd.cli.run_folder import whole
from switchkd.data.raw_records import Placed, Record, prompt_key, read_source, response_words
from switchkd.errors import UserError, check_choice
from switchkd.sources import RULES, SOURCES, SPLITS, Source

#: Lies beside the files that it describes, and is copied into the folder of every run that reads them.
PREPARED = "prepared.json"


@dataclass(frozen=True)
class PreparedSource:
    """The splits of a source and what was done to get them.

    Attributes:
        splits: Split -> records, ready for `switchkd.prepare`; only splits that have records.
        facts: What `prepared.json` says: `source`, `rules`, `inputs` with their hashes, `filters`, `splits` with
            their counts, `overlap`.
    """

    splits: dict[str, list[Record]]
    facts: dict[str, Any] = field(repr=False)

    def write(self, folder: str | Path) -> None:
        """Write `train.jsonl`, `validation.jsonl`, `test.jsonl`, those that there are, and `prepared.json`.

        Args:
            folder: Is made where it is missing; a file of the same name is replaced.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        for split, records in self.splits.items():
            with whole(folder / f"{split}.jsonl") as file:
                file.write(_lines(records).decode("utf-8"))
        with whole(folder / PREPARED) as file:  # last: it says that the others are there
            file.write(json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n")


def prepare_source(
    source: str,
    *,
    dataset_name: str | None = None,
    files: Mapping[str, str] | None = None,
    dataset_config: str | None = None,
    columns: Mapping[str, str] | str | None = None,
    min_response_words: int | None = None,
    max_samples: int | None = None,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    remove_overlap: bool = False,
) -> PreparedSource:
    """Return the splits of a source of the protocol, filtered by its rules and counted; the same for the same input.

    The records have `instruction`, `input` and `output` (a text, or a list of accepted answers), without a filled
    prompt: training and evaluation fill it. Records of other shapes, which only `custom` may have, stay as they are.

    Args:
        source: A name of `switchkd.sources.SOURCES`.
        dataset_name: A file, a folder or a hub id; the source's own hub id if None. A file that holds all records is
            split here, see `sizes`.
        files: Split -> file, instead of `dataset_name`.
        dataset_config: Configuration of a hub data set; for `custom`.
        columns: What is read -> name of its column, as `switchkd.prepare` takes it.
        min_response_words: Leave out records whose (first) response has fewer words; the source's own rule if None,
            0 for none.
        max_samples: Keep the first records of a split after that filter; the source's own rule if None, 0 for all.
        sizes: Split -> records that are taken for it out of a file that holds all; the source's own if None. Records
            of one prompt stay together; which ones are taken depends on their text and the seed, not on their order.
        seed: Of that choice.
        remove_overlap: Leave out of `train` every prompt that `validation` or `test` has too.

    Raises:
        UserError: No such source, files that cannot be read or records that are not complete (the line is named), or
            no record is left.
    """
    check_choice("source", source, tuple(SOURCES))
    rule = SOURCES[source]
    minimum = rule.min_response_words if min_response_words is None else min_response_words
    limit = rule.max_samples if max_samples is None else max_samples
    read = read_source(rule, dataset_name, files or {}, dataset_config, columns)
    splits, own_split = dict(read.splits), None
    if read.whole is not None:
        own_split = dict(rule.sizes if sizes is None else sizes)
        splits |= _split(read.whole, own_split, rule.whole, seed)
    elif sizes:
        raise UserError("validation_size and test_size split one file that holds all; these data are split already")
    kept: dict[str, list[Record]] = {}
    counts: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        if split in splits:
            kept[split], counts[split] = _filtered(splits[split], minimum, limit)
    removed = _remove_overlap(kept) if remove_overlap else 0
    for split, records in kept.items():
        if not records:
            raise UserError(f"{source}: no record of {split} is left of {counts[split]['read']:,}; change the filters")
        counts[split] |= {
            "kept": len(records),
            "repeated_prompts": len(records) - len({prompt_key(record) for record in records}),
            "lists_of_references": sum(isinstance(_response(record), list) for record in records),
            "sha256": hashlib.sha256(_lines(records)).hexdigest(),
        }
    facts = {
        "source": source,
        "rules": RULES,
        "reference": rule.reference,
        "switchkd": version("switchkd"),
        "inputs": read.inputs,
        "filters": {
            "min_response_words": minimum or None,
            "max_samples": limit or None,
            "remove_overlap": remove_overlap,
            "own_split": None if own_split is None else {**own_split, "seed": seed},
        },
        "notes": read.notes,
        "splits": {split: {"file": f"{split}.jsonl", **counts[split]} for split in kept},
        "removed_overlap": removed,
        "overlap": overlap(kept),
    }
    return PreparedSource(kept, facts)


def overlap(splits: Mapping[str, Iterable[Record]]) -> dict[str, int]:
    """Return "test in train" and the like -> records of the one whose prompt the other has too."""
    prompts = {split: [prompt_key(record) for record in records] for split, records in splits.items()}
    pairs = [("test", "train"), ("validation", "train"), ("test", "validation")]
    return {
        f"{one} in {other}": sum(key in set_of for key in prompts[one])
        for one, other in pairs
        if one in prompts and other in prompts
        for set_of in [set(prompts[other])]
    }


def summary_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return what a reader should know of `prepared.json` besides the counts, a sentence each."""
    rule: Source = SOURCES[facts["source"]]
    lines = list(facts["notes"])
    if own := facts["filters"]["own_split"]:
        parts = ", ".join(f"{count:,} for {split}" for split, count in own.items() if split != "seed" and count)
        published = " It is not the published split, whose choice is not known." if rule.published else ""
        if parts:
            lines.append(f"Split here by the hash of each prompt (seed {own['seed']}): {parts}.{published}")
    kept = {split: counts["kept"] for split, counts in facts["splits"].items()}
    for split, count in kept.items():
        known = rule.published.get(split)
        if known is not None and not (own and split in ("train", *own)):
            same = "as in the papers" if count == known else f"the papers have {known:,}"
            lines.append(f"{split}: {count:,} records, {same}.")
    for pair, count in facts["overlap"].items():
        one, _, other = pair.partition(" in ")
        if count:
            as_known = ", as in the published split" if rule.published_overlap.get(pair) == count else ""
            remedy = "; --remove_overlap takes them out of train" if other == "train" else ""
            lines.append(f"{count:,} of the {kept[one]:,} {one} prompts are also in {other}{as_known}{remedy}.")
    if facts["removed_overlap"]:
        lines.append(f"{facts['removed_overlap']:,} records were taken out of train: other splits have their prompts.")
    return lines


def _split(records: list[Placed], sizes: Mapping[str, int], rest: str, seed: int) -> dict[str, list[Placed]]:
    """Records by split; within one they keep their order, and records of one prompt are never parted."""
    if sum(sizes.values()) >= len(records):
        wanted = " and ".join(f"{count} for {split}" for split, count in sizes.items())
        raise UserError(f"{wanted} cannot be taken out of {len(records)} records; lower validation_size or test_size")
    keys = [prompt_key(record) for _, record in records]
    count = Counter(keys)
    order = sorted(count, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    place = dict.fromkeys(order, rest)
    left = {split: sizes.get(split, 0) for split in ("test", "validation")}
    for key in order:
        split = next((split for split, space in left.items() if count[key] <= space), None)
        if split is not None:
            place[key] = split
            left[split] -= count[key]
    chosen: dict[str, list[Placed]] = {split: [] for split in SPLITS if split == rest or sizes.get(split)}
    for key, record in zip(keys, records, strict=True):
        chosen[place[key]].append(record)
    return chosen


def _filtered(records: list[Placed], minimum: int | None, limit: int | None) -> tuple[list[Record], dict[str, int]]:
    kept = [record for _, record in records]
    counts = {"read": len(kept)}
    if minimum:
        for place, record in records:
            if _response(record) is None:
                raise UserError(f"{place}: there is no response whose words min_response_words could count")
        kept = [record for record in kept if response_words(_response(record)) >= minimum]
    counts["shorter_responses"] = counts["read"] - len(kept)
    counts["over_the_limit"] = max(len(kept) - limit, 0) if limit else 0
    return kept[: limit or None], counts


def _remove_overlap(kept: dict[str, list[Record]]) -> int:
    if "train" not in kept or len(kept) < 2:
        raise UserError("remove_overlap needs a train split and another one")
    other = {prompt_key(record) for split, records in kept.items() if split != "train" for record in records}
    before = len(kept["train"])
    kept["train"] = [record for record in kept["train"] if prompt_key(record) not in other]
    return before - len(kept["train"])


def _response(record: Record) -> Any:
    return record.get("output", record.get("completion"))


def _lines(records: Iterable[Record]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8")
