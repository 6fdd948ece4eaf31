"""`switchkd calibrate`: find the threshold at which the teacher writes a target share of the tokens."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from switchkd.cli.console import Console, quiet_libraries
from switchkd.cli.display import table
from switchkd.cli.options import OptionParser
from switchkd.cli.run_folder import RunFolder
from switchkd.commands.data import add_data_options, check_data_options, prepare_data
from switchkd.commands.engine import add_engine_options, check_engine_options, writer
from switchkd.commands.pair import (
    add_pair_options,
    add_sampling_options,
    check_pair_options,
    read_excluded_ids,
    read_model,
    read_tokenizer,
)
from switchkd.commands.policy_options import (
    OPTIONS,
    add_policy_choice,
    add_policy_options,
    check_policy_options,
    make_policy,
    policy_kwargs,
)
from switchkd.errors import UserError
from switchkd.policy_options import DEFAULT_TEACHER_SHARE

if TYPE_CHECKING:
    from switchkd.training.calibration import Calibration

#: The policies of this package that have a threshold.
WITH_THRESHOLD = OPTIONS["initial_threshold"].policies


def parser() -> OptionParser:
    """Return the options of `switchkd calibrate`."""
    result = OptionParser(
        prog="switchkd calibrate",
        usage="switchkd calibrate --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER "
        "--dataset_name DATA ...",
        description="Find the initial threshold at which the teacher writes a target share of the tokens on your "
        "prompts. Use the student, the lengths and the sampling options that training will start with.",
    )
    inputs = result.add_argument_group("models and prompts")
    add_pair_options(inputs)
    inputs.add_argument("--dataset_name", metavar="DATA", help="file, folder or hub id to take prompts from")
    inputs.add_argument("--dataset_train_split", default="train", metavar="SPLIT", help="split to use")
    add_data_options(inputs)
    inputs.add_argument("--max_samples", type=int, default=64, metavar="N", help="use only the first N records")
    inputs.add_argument("--max_prompt_length", type=int, default=256, metavar="N", help="longer prompts are dropped")
    share = result.add_argument_group("the share")
    share.add_argument(
        "--target_teacher_share",
        type=float,
        default=DEFAULT_TEACHER_SHARE,
        metavar="S",
        help="target share of the tokens, in [0, 1]",
    )
    share.add_argument("--tolerance", type=float, default=0.02, metavar="S", help="largest accepted distance from it")
    share.add_argument("--max_rounds", type=int, default=8, metavar="N", help="maximum number of rollouts")
    policy = result.add_argument_group("who writes")
    add_policy_choice(policy, f"{', '.join(WITH_THRESHOLD)}; or your own as module:Class")
    add_policy_options(policy, WITH_THRESHOLD)
    sampling = result.add_argument_group("sampling")
    add_sampling_options(sampling, max_completion_length=256, batch_size=32, at_once="completions written at once")
    add_engine_options(result.add_argument_group("engine"))
    result.add_shared_options("also write summary.json, config and versions there; nothing is written without it")
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Calibrate, print what was found, and return it."""
    _check(options)
    folder = RunFolder(options.output_dir, "calibrate") if options.output_dir is not None else None
    if folder is not None:
        folder.check(overwrite=options.overwrite_output_dir)

    from switchkd.models.vocabulary import readable_pad_id, require_eos
    from switchkd.policies import ThresholdPolicy
    from switchkd.training.calibration import calibrate

    quiet_libraries(options.verbose)
    policy = make_policy(options)
    if not isinstance(policy, ThresholdPolicy):
        raise UserError(
            f"policy {options.policy!r} has no threshold to calibrate; take one of {', '.join(WITH_THRESHOLD)}, or a "
            "class of your own that is a switchkd.policies.ThresholdPolicy"
        )
    tokenizer = read_tokenizer(options)
    excluded_ids = read_excluded_ids(options, tokenizer)
    teacher, student = read_model(options, "teacher"), read_model(options)
    data, report = prepare_data(
        options,
        options.dataset_train_split,
        tokenizer,
        answers=False,
        max_prompt_length=options.max_prompt_length,
        max_completion_length=options.max_completion_length,
    )
    console.progress(f"prompts: {report}")
    eos = require_eos(tokenizer, student, teacher)
    pad = readable_pad_id(tokenizer.pad_token_id, eos, student, teacher)
    prompts = list(data["prompt_ids"])
    with writer(options, student, teacher, max(map(len, prompts)) + options.max_completion_length) as write:
        found = calibrate(
            student,
            teacher,
            prompts,
            policy=policy,
            target_teacher_share=options.target_teacher_share,
            max_new_tokens=options.max_completion_length,
            tolerance=options.tolerance,
            max_rounds=options.max_rounds,
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_token_id=eos,
            pad_token_id=pad,
            max_active_rows=options.batch_size,
            excluded_ids=excluded_ids,
            writer=write,
        )
    summary = _summary(found, options)
    console.say(_text(found, options))
    if folder is not None:
        folder.claim(vars(options))
        folder.write_json("summary.json", summary)
        summary["output_dir"] = str(folder.path)
    return summary


def _check(options: argparse.Namespace) -> None:
    check_pair_options(
        options,
        model_name_or_path="the student",
        teacher_model_name_or_path="the teacher",
        dataset_name="the data to take prompts from",
    )
    check_data_options(options)
    check_policy_options(options)
    check_engine_options(options)


def _summary(found: "Calibration", options: argparse.Namespace) -> dict[str, Any]:
    from switchkd.policies import find_policy

    policy = find_policy(options.policy)
    values = policy.options() | dict.fromkeys(policy.length_options, options.max_completion_length)
    values |= {name: value for name in OPTIONS if (value := getattr(options, name, None)) is not None}
    values |= policy_kwargs(options) | {"initial_threshold": found.initial_threshold}
    names = ("initial_threshold", "target_teacher_share", "teacher_share", "standard_error", "reached", "note")
    return {
        **{name: getattr(found, name) for name in (*names, "rounds", "seconds")},
        "policy": options.policy,
        "policy_options": {name: value for name, value in values.items() if isinstance(value, int | float | str)},
        "share_by_position": [vars(part) for part in found.share_by_position],
        "history": [{"initial_threshold": threshold, "teacher_share": share} for threshold, share in found.history],
        "completion_tokens": sum(found.lengths) / len(found.lengths),
    }


def _text(found: "Calibration", options: argparse.Namespace) -> str:
    rows = [
        (f"{part.start} - {part.stop - 1}", part.tokens, f"{part.teacher_share:.1%}")
        for part in found.share_by_position
    ]
    return "\n".join(
        [
            table(rows, ("positions", "tokens", "teacher share")),
            "",
            f"{found.note} (standard error over prompts: {found.standard_error:.1%})",
            f"{found.rounds} rollouts of {len(found.lengths)} prompts in {found.seconds:.1f} s",
            f"for training: {_for_training(found.initial_threshold, options)}",
        ]
    )


def _for_training(threshold: float, options: argparse.Namespace) -> str:
    if options.policy in WITH_THRESHOLD:
        return f"--method {options.policy} --initial_threshold {threshold:.4g}"
    kwargs = json.dumps({**policy_kwargs(options), "initial_threshold": float(f"{threshold:.4g}")})
    return f"--policy {options.policy} --policy_kwargs '{kwargs}'"
