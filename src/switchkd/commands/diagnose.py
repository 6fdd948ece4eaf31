"""`switchkd diagnose`: before any training, does it matter for this pair who writes the training text?"""

import argparse
from typing import TYPE_CHECKING, Any

from switchkd.cli.console import Console, quiet_libraries
from switchkd.cli.options import OptionParser, integers
from switchkd.cli.run_folder import RunFolder
from switchkd.commands.data import add_data_options, check_data_options, prepare_data
from switchkd.commands.pair import (
    add_pair_options,
    add_sampling_options,
    check_pair_options,
    read_excluded_ids,
    read_model,
    read_tokenizer,
)
from switchkd.commands.policy_options import OPTIONS
from switchkd.errors import UserError, check_range
from switchkd.policy_options import DEFAULT_TEACHER_SHARE

if TYPE_CHECKING:
    from switchkd.policies import SwitchPolicy

#: Options of the rule alone: what its threshold catches can be read off a text that it did not write.
POLICY_OPTIONS = ("initial_threshold", "final_ratio", "horizon", "schedule")
TOLERANCE, ROUNDS = 0.03, 6


def parser() -> OptionParser:
    """Return the options of `switchkd diagnose`."""
    result = OptionParser(
        prog="switchkd diagnose",
        usage="switchkd diagnose --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER "
        "--dataset_name DATA ...",
        description="Measure how well the teacher goes on from text of the student, of SWITCH and of others, and say "
        "whose text to train on. Use the student, the lengths and the sampling options that training will start with.",
    )
    inputs = result.add_argument_group("models and data")
    add_pair_options(inputs)
    inputs.add_argument("--dataset_name", metavar="DATA", help="file, folder or hub id, with answers")
    inputs.add_argument("--dataset_train_split", default="train", metavar="SPLIT", help="split to use")
    add_data_options(inputs)
    inputs.add_argument("--max_samples", type=int, default=64, metavar="N", help="use only the first N records")
    inputs.add_argument("--max_prompt_length", type=int, default=256, metavar="N", help="longer prompts are dropped")
    inputs.add_argument(
        "--scorer",
        metavar="FILE.py:FUNCTION",
        help="score whole texts with function(prompt, answer, references) -> score in [0, 1] instead of ROUGE-L; "
        "module:function too",
    )
    measured = result.add_argument_group("what is measured")
    measured.add_argument(
        "--positions",
        nargs="+",
        metavar="N,N,...",
        help="tokens after which texts are cut (default: 0, 5, 10, 20, 40, ... below the length limit)",
    )
    measured.add_argument(
        "--harm_probability",
        type=float,
        default=0.01,
        metavar="P",
        help="a token is harmful where the teacher gives it less",
    )
    policy = result.add_argument_group("SWITCH")
    policy.add_argument(
        "--target_teacher_share",
        type=float,
        default=DEFAULT_TEACHER_SHARE,
        metavar="S",
        help="share of the tokens that the teacher writes, in (0, 1); the threshold is calibrated to it, unless "
        "--initial_threshold gives one",
    )
    for name in POLICY_OPTIONS:
        option = OPTIONS[name]
        help = option.help_text("max_completion_length") if name != "initial_threshold" else "threshold, not calibrated"
        policy.add_argument(f"--{name}", type=option.kind, metavar=option.metavar, help=help)
    sampling = result.add_argument_group("sampling")
    add_sampling_options(sampling, max_completion_length=256, batch_size=32, at_once="texts read or written at once")
    result.add_shared_options("where to write (default: the first free one of runs/diagnose, runs/diagnose-2, ...)")
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Diagnose, print table and advice, write them with the picture and the rows, and return the summary."""
    positions = _check(options)
    folder = RunFolder(options.output_dir, "diagnose")
    folder.check(overwrite=options.overwrite_output_dir)

    from switchkd.commands.diagnose_picture import plot_diagnosis
    from switchkd.commands.diagnose_report import report, rows, summary
    from switchkd.evaluation.diagnosis import diagnose
    from switchkd.evaluation.guidance import Pair, Quality, positions_below, require_answers
    from switchkd.evaluation.scorers import load_scorer
    from switchkd.policies import SwitchPolicy

    quiet_libraries(options.verbose)
    flags = {name: getattr(options, name) for name in POLICY_OPTIONS}
    given = {name: value for name, value in flags.items() if value is not None}
    policy = SwitchPolicy(**({"horizon": options.max_completion_length} | given))
    scorer = load_scorer(options.scorer) if options.scorer is not None else None
    tokenizer = read_tokenizer(options)
    excluded_ids = read_excluded_ids(options, tokenizer)
    data, found = prepare_data(
        options,
        options.dataset_train_split,
        tokenizer,
        max_prompt_length=options.max_prompt_length,
        max_completion_length=options.max_completion_length,
    )
    console.progress(f"data: {found}")
    require_answers(data)
    teacher, student = read_model(options, "teacher"), read_model(options)
    pair = Pair(
        student,
        teacher,
        tokenizer,
        data,
        options.max_completion_length,
        {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")},
        seed=options.seed,
        batch_size=options.batch_size,
        excluded_ids=excluded_ids,
    )
    if options.initial_threshold is None:
        policy = _calibrated(pair, policy, options.target_teacher_share, console)
    diagnosis = diagnose(
        pair,
        policy,
        Quality(pair, scorer),
        positions or positions_below(options.max_completion_length),
        harm_probability=options.harm_probability,
    )
    result = {**summary(diagnosis, options), "data": vars(found)}
    console.say(report(diagnosis, result["advice"]))
    folder.claim({**vars(options), "positions": diagnosis.positions})
    folder.write_json("summary.json", result)
    folder.append("rows.jsonl", rows(diagnosis, pair))
    plot_diagnosis(diagnosis, folder.path / "diagnose.png")
    console.say(f"\ndiagnose.png, summary.json, rows.jsonl, config.yaml in {folder.path}")
    return {**result, "output_dir": str(folder.path)}


def _calibrated(pair: Any, policy: "SwitchPolicy", share: float, console: Console) -> "SwitchPolicy":
    from switchkd.training.calibration import calibrate

    found = calibrate(
        pair.student,
        pair.teacher,
        list(pair.data["prompt_ids"]),
        policy=policy,
        target_teacher_share=share,
        max_new_tokens=pair.max_completion_length,
        tolerance=TOLERANCE,
        max_rounds=ROUNDS,
        seed=pair.seed,
        eos_token_id=pair.eos,
        pad_token_id=pair.pad,
        teacher_prompt_ids=pair.teacher_prompts(),
        max_active_rows=pair.batch_size,
        excluded_ids=pair.excluded_ids,
        **pair.sampling,
    )
    if not found.reached:
        console.progress(found.note)
    return policy.at_threshold(found.initial_threshold)


def _check(options: argparse.Namespace) -> list[int] | None:
    """Refuse options out of range, and return the positions where they are given."""
    check_pair_options(
        options,
        model_name_or_path="the student",
        teacher_model_name_or_path="the teacher",
        dataset_name="prompts and answers",
    )
    check_data_options(options)
    check_range("harm_probability", options.harm_probability, 0.0, 1.0)
    if not 0.0 < options.target_teacher_share < 1.0:
        raise UserError(f"target_teacher_share must lie in (0, 1), got {options.target_teacher_share}")
    positions = integers(options.positions, "positions")
    if positions is not None:
        inside = [0 <= position < options.max_completion_length for position in positions]
        if not all(inside) or positions != sorted({0, *positions}):
            raise UserError(
                f"positions must begin with 0 and increase, below max_completion_length="
                f"{options.max_completion_length}, got {positions}"
            )
    return positions
