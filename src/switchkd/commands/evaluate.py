"""`switchkd evaluate`: score a model's own answers."""

import argparse
import contextlib
import time
from typing import Any

import yaml

from switchkd.cli.console import Console, quiet_libraries
from switchkd.cli.options import OptionParser, as_flags, flag, integers
from switchkd.cli.run_folder import RunFolder, folder_name
from switchkd.commands.data import add_data_options, check_data_options
from switchkd.commands.engine import add_engine_options, check_engine_options
from switchkd.commands.pair import add_pair_options, check_pair_options
from switchkd.commands.score_tables import overview
from switchkd.commands.several_sets import named_test_sets
from switchkd.errors import UserError, check_choice

#: Decoding that a published protocol fixes beyond the defaults here: its scripts block repeated 6-grams silently.
PROTOCOLS = {"ancestors": {"no_repeat_ngram_size": 6}}

#: A stopped evaluation goes on by the same call with this.
RESUME = "--resume "


def parser() -> OptionParser:
    """Return the options of `switchkd evaluate`."""
    result = OptionParser(
        prog="switchkd evaluate",
        usage="switchkd evaluate --model_name_or_path MODEL --dataset_name DATA ...",
        description="Score a causal language model's own answers by ROUGE-L (F-measure, stemmed, best reference, "
        "times 100), sampled at several decoding seeds. The teacher never writes in them.",
    )
    inputs = result.add_argument_group("model and data")
    add_pair_options(
        inputs,
        student="folder or hub id of any causal language model",
        teacher="also compare the model with it: on the reference answers, the model's own and the teacher's",
    )
    inputs.add_argument("--tokenizer_name_or_path", metavar="NAME", help="tokenizer (default: that of the model)")
    inputs.add_argument(
        "--dataset_name", nargs="+", metavar="DATA", help="file, folder or hub id, with answers; several are test sets"
    )
    inputs.add_argument(
        "--datasets", metavar="JSON", help="test sets by name instead: {name: DATA, name: {option: value}}"
    )
    inputs.add_argument(
        "--dataset_test_split", default="test", metavar="SPLIT", help="split to use; a file has only one"
    )
    add_data_options(inputs)
    inputs.add_argument("--max_samples", type=int, metavar="N", help="use only the first N records")
    inputs.add_argument("--max_prompt_length", type=int, default=256, metavar="N", help="longer prompts are dropped")
    inputs.add_argument(
        "--scorer",
        metavar="FILE.py:FUNCTION",
        help="one more measure: function(prompt, answer, references) -> score in [0, 1]; module:function too",
    )
    decoding = result.add_argument_group("decoding")
    decoding.add_argument(
        "--decoding_seeds",
        nargs="+",
        default=["10,20,30,40,50"],
        metavar="N,N,...",
        help="seeds of the sampling; every prompt is answered once per seed",
    )
    decoding.add_argument("--seeds", nargs="+", help=argparse.SUPPRESS)  # refused with the name that is meant
    decoding.add_argument("--max_completion_length", type=int, default=256, metavar="N", help="length limit, tokens")
    decoding.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy")
    decoding.add_argument("--top_k", type=int, default=0, metavar="K", help="0 keeps every token")
    decoding.add_argument("--top_p", type=float, default=1.0, metavar="P", help="1 keeps every token")
    decoding.add_argument(
        "--no_repeat_ngram_size", type=int, metavar="N", help="forbid repeated N-grams; 0, the default, allows them"
    )
    decoding.add_argument(
        "--protocol",
        metavar="NAME",
        help="decoding of a published protocol: ancestors (MiniLLM and DistiLLM: no_repeat_ngram_size 6)",
    )
    decoding.add_argument("--batch_size", type=int, default=8, metavar="N", help="answers written at once")
    add_engine_options(result.add_argument_group("engine"))
    decoding.add_argument("--resume", **flag("go on with a stopped evaluation; its answers are not written again"))
    result.add_shared_options("where to write (default: the first free one of runs/evaluate, runs/evaluate-2, ...)")
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Evaluate on every test set, print the tables, write summaries and rows, and return what was found."""
    seeds = check(options)
    folder = RunFolder(options.output_dir, "evaluate")
    sets = chosen_sets(options)
    resumes = options.resume and folder.holds_run("switchkd evaluate")
    if not resumes:
        folder.check(overwrite=options.overwrite_output_dir)

    from switchkd.commands.scoring import Scoring

    quiet_libraries(options.verbose)
    with contextlib.closing(Scoring(options, seeds, console)) as scoring:
        if sets is None:
            summary = scoring.score(options, folder)
            console.say(f"\nsummary.json, rows.jsonl, config.yaml in {folder.path}")
            return {**summary, "output_dir": str(folder.path)}
        started = time.perf_counter()
        for name, of_set in sets.items():
            of_set.output_dir = str(folder.path / folder_name(name))
        scoring.read(list(sets.values()))  # what is wrong with any set is said before the first one is scored
        folder.claim({**vars(options), "decoding_seeds": seeds}, keep=resumes)
        summaries = {}
        for name, of_set in sets.items():
            console.say(f"\n{name}")
            one = RunFolder(of_set.output_dir, "evaluate")
            one.check(overwrite=options.overwrite_output_dir or resumes)
            summaries[name] = scoring.score(of_set, one)
        summary = {
            "model_name_or_path": options.model_name_or_path,
            "rouge_l": sum(one["rouge_l"] for one in summaries.values()) / len(summaries),
            "datasets": summaries,
            "seconds": time.perf_counter() - started,
        }
        folder.write_json("summary.json", summary)
        console.say(f"\n{overview(summaries, console)}")
        console.say(f"\nsummary.json, a folder for each test set in {folder.path}")
        return {**summary, "output_dir": str(folder.path)}


def chosen_sets(options: argparse.Namespace) -> dict[str, argparse.Namespace] | None:
    """Return name -> options of every test set, or None where there is one without a name.

    Raises:
        UserError: Sets without a name of their own, or options that do not exist.
    """
    given = options.datasets if options.datasets is not None else options.dataset_name
    if options.datasets is not None:
        if options.dataset_name is not None:
            raise UserError("give dataset_name or datasets, not both")
        given = yaml.safe_load(options.datasets)
    if not isinstance(given, list | dict):
        return None
    known, sets = parser(), {}
    engine = [name for name in vars(options) if name == "rollout_engine" or name.startswith("vllm_")]
    for name, values in named_test_sets(given, "datasets").items():
        for own in ("model_name_or_path", "output_dir", "datasets", "config", *engine):
            if own in values:
                raise UserError(
                    f"datasets: {own} in {name!r} does nothing: it is the same for all test sets; remove it"
                )
        sets[name] = known.add_to(argparse.Namespace(**{**vars(options), "datasets": None}), as_flags(values))
        check(sets[name])
    return sets


def check(options: argparse.Namespace) -> list[int]:
    """Refuse options out of range and return the decoding seeds.

    Raises:
        UserError: Names the option.
    """
    required = {"model_name_or_path": "the model to score", "dataset_name": "the data to answer"}
    if options.datasets is not None:
        del required["dataset_name"]
    check_pair_options(options, **required)
    if isinstance(options.dataset_name, list) and len(options.dataset_name) == 1:
        options.dataset_name = options.dataset_name[0]
    _fill_in_protocol(options)
    check_data_options(options)
    check_engine_options(options)
    if options.rollout_engine == "vllm" and options.no_repeat_ngram_size:
        raise UserError(
            f"no_repeat_ngram_size={options.no_repeat_ngram_size}: only transformers' own generate blocks n-grams; "
            "remove rollout_engine=vllm"
        )
    if options.seeds is not None:
        raise UserError(f"seeds={' '.join(options.seeds)}: seeds are those of training; here it is decoding_seeds")
    seeds = integers(options.decoding_seeds, "decoding_seeds") or []
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"decoding_seeds must be one or more different integers, got {seeds}")
    return seeds


def _fill_in_protocol(options: argparse.Namespace) -> None:
    """Set what the named protocol decides."""
    if options.protocol is not None:
        check_choice("protocol", options.protocol, tuple(PROTOCOLS))
        for name, value in PROTOCOLS[options.protocol].items():
            if getattr(options, name) not in (None, value):
                raise UserError(
                    f"protocol={options.protocol} has {name}={value}, not {getattr(options, name)}; remove one"
                )
            setattr(options, name, value)
    if options.no_repeat_ngram_size is None:
        options.no_repeat_ngram_size = 0
