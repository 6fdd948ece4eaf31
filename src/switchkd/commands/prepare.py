"""`switchkd prepare`: published instruction data, or your own, as folders that training and evaluation read."""

import argparse
from pathlib import Path
from typing import Any

from switchkd.cli.console import Console, quiet_libraries
from switchkd.cli.options import OptionParser, flag
from switchkd.cli.run_folder import RunFolder
from switchkd.data_options import HELP, parse_columns
from switchkd.errors import UserError, check_choice
from switchkd.sources import SOURCES, SPLITS


def parser() -> OptionParser:
    """Return the options of `switchkd prepare`."""
    sources = "\n".join(f"{name:<14} {source.summary}" for name, source in SOURCES.items())
    result = OptionParser(
        prog="switchkd prepare",
        usage="switchkd prepare --source NAME [--dataset_name FILE|FOLDER|HUB_ID] --output_dir DIR",
        description=sources,
    )
    inputs = result.add_argument_group("data")
    inputs.add_argument("--source", metavar="NAME", help=f"which rules: {', '.join(SOURCES)}")
    inputs.add_argument(
        "--dataset_name",
        metavar="DATA",
        help="file, folder or hub id, plain or .gz (default: where the source is published on the hub)",
    )
    for split in SPLITS:
        inputs.add_argument(f"--{split}_file", metavar="FILE", help=f"file of the {split} split, instead")
    inputs.add_argument("--dataset_config", metavar="NAME", help="configuration of a hub data set (custom)")
    inputs.add_argument("--columns", metavar="NAME=COLUMN,...", help=HELP["columns"])
    rules = result.add_argument_group("rules (default: those of the source)")
    rules.add_argument(
        "--min_response_words", type=int, metavar="N", help="leave out shorter (first) responses; 0 keeps all"
    )
    rules.add_argument("--max_samples", type=int, metavar="N", help="first records of a split to keep; 0 keeps all")
    for split in ("validation", "test"):
        rules.add_argument(
            f"--{split}_size", type=int, metavar="N", help=f"records to take for {split} out of a file that holds all"
        )
    rules.add_argument("--seed", type=int, default=0, metavar="N", help="of that choice")
    rules.add_argument("--remove_overlap", **flag("take prompts of validation and test out of train"))
    result.add_shared_options(
        "folder for train.jsonl, validation.jsonl, test.jsonl and prepared.json (default: data/NAME)"
    )
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Prepare the source, print and write what was done to it, and return that."""
    check(options)
    from switchkd.data.protocol import PREPARED, prepare_source, summary_lines

    folder = RunFolder(options.output_dir, "prepare")
    stopped = folder.holds_run("switchkd prepare") and not (folder.path / PREPARED).is_file()
    folder.check(overwrite=options.overwrite_output_dir or stopped)

    quiet_libraries(options.verbose)
    given = {split: getattr(options, f"{split}_size") for split in ("validation", "test")}
    prepared = prepare_source(
        options.source,
        dataset_name=options.dataset_name,
        files={split: file for split in SPLITS if (file := getattr(options, f"{split}_file")) is not None},
        dataset_config=options.dataset_config,
        columns=options.columns,
        min_response_words=options.min_response_words,
        max_samples=options.max_samples,
        sizes=_sizes(options.source, given),
        seed=options.seed,
        remove_overlap=options.remove_overlap,
    )
    if folder.holds_run("switchkd prepare"):
        for split in SPLITS:
            (folder.path / f"{split}.jsonl").unlink(missing_ok=True)
    folder.claim(vars(options))
    prepared.write(folder.path)
    facts = prepared.facts
    for one in facts["inputs"]:
        console.say(f"{one['split']}: {one['records']:,} records of {one['name']}, sha256 {one['sha256'][:12]}")
    names = ("read", "shorter_responses", "over_the_limit", "kept", "repeated_prompts")
    rows = [(split, *(f"{counts[name]:,}" for name in names)) for split, counts in facts["splits"].items()]
    heads = ("split", "read", "too short", "over the limit", "kept", "repeated prompts")
    console.say("\n" + console.table(rows, heads) + "\n")
    for line in summary_lines(facts):
        console.say(line)
    written = ", ".join(f"{split}.jsonl" for split in facts["splits"])
    console.say(f"\n{written}, prepared.json in {folder.path}")
    return {**facts, "output_dir": str(folder.path)}


def _sizes(source: str, given: dict[str, int | None]) -> dict[str, int] | None:
    """The sizes of the splits that are made here, None for the source's own."""
    if all(size is None for size in given.values()):
        return None
    return {split: SOURCES[source].sizes.get(split, 0) if size is None else size for split, size in given.items()}


def check(options: argparse.Namespace) -> None:
    """Refuse options that are missing, out of range or do nothing.

    Raises:
        UserError: Names the option.
    """
    if options.source is None:
        raise UserError(f"give --source, one of {', '.join(SOURCES)}")
    check_choice("source", options.source, tuple(SOURCES))
    if options.output_dir is None:
        options.output_dir = str(Path("data") / options.source)
    parse_columns(options.columns)
    for name in ("min_response_words", "max_samples", "validation_size", "test_size"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise UserError(f"{name} must be >= 0, got {value}")
    if options.dataset_config is not None and options.source != "custom":
        raise UserError("dataset_config does nothing here: the files of a published source have one configuration")
