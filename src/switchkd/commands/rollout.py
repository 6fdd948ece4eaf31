"""`switchkd rollout`: write completions with the teacher in the loop and show who wrote what."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.cli.console import Console, quiet_libraries, rendered, terminal
from switchkd.cli.options import OptionParser, flag
from switchkd.cli.rollouts import legend, rollout_block, rollout_text, tokens_block, tokens_text
from switchkd.cli.run_folder import RunFolder
from switchkd.commands.data import add_data_options, check_data_options, prepare_data, template_kwargs
from switchkd.commands.engine import add_engine_options, check_engine_options, rows_per_call, writer
from switchkd.commands.pair import (
    add_pair_options,
    add_sampling_options,
    check_pair_options,
    read_excluded_ids,
    read_model,
    read_tokenizer,
)
from switchkd.commands.policy_options import (
    NAMES,
    add_policy_choice,
    add_policy_options,
    check_policy_options,
    make_policy,
)
from switchkd.errors import UserError, check_choice, check_count

if TYPE_CHECKING:
    from switchkd.policies import Policy
    from switchkd.rollout import Rollout


def parser() -> OptionParser:
    """Return the options of `switchkd rollout`."""
    result = OptionParser(
        prog="switchkd rollout",
        usage="switchkd rollout --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER --prompt TEXT ...",
        description="Write completions with the teacher in the loop. The teacher's tokens are marked, or in "
        "[brackets] where the output is not a terminal.",
    )
    models = result.add_argument_group("models")
    add_pair_options(models)
    prompts = result.add_argument_group("prompts")
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt, in quotes; may be given several times"
    )
    prompts.add_argument("--dataset_name", metavar="DATA", help="take prompts from this file, folder or hub id instead")
    prompts.add_argument("--dataset_train_split", default="train", metavar="SPLIT", help="split to use")
    add_data_options(prompts)
    prompts.add_argument("--max_samples", type=int, default=4, metavar="N", help="use only the first N records")
    prompts.add_argument("--num_samples", type=int, default=1, metavar="N", help="completions per prompt")
    policy = result.add_argument_group("who writes")
    add_policy_choice(policy, f"{', '.join(NAMES)}; or your own as module:Class")
    add_policy_options(policy)
    sampling = result.add_argument_group("sampling")
    add_sampling_options(sampling, max_completion_length=128, batch_size=8, at_once="completions written at once")
    sampling.add_argument(
        "--draft_length", default="auto", metavar="N", help="tokens drafted per teacher pass, or auto"
    )
    sampling.add_argument(
        "--cuda_graphs", **flag("write with static shapes, on a GPU through CUDA graphs; it changes no text")
    )
    add_engine_options(result.add_argument_group("engine"))
    output = result.add_argument_group("output")
    output.add_argument(
        "--top_tokens", type=int, default=0, metavar="K", help="also show both models' K likeliest tokens at each token"
    )
    output.add_argument(
        "--html", metavar="FILE", help="also write a page with the writers marked, and with --top_tokens those tokens"
    )
    output.add_argument(
        "--color", default="auto", metavar="WHEN", help="auto (a terminal gets marks and colours), always or never"
    )
    result.add_shared_options("also write the rollouts, config and versions there; nothing is written without it")
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write the completions, print them, and return them with their counts."""
    check(options)
    folder = RunFolder(options.output_dir, "rollout") if options.output_dir is not None else None
    if folder is not None:
        folder.check(overwrite=options.overwrite_output_dir)

    from switchkd.models.vocabulary import require_eos

    quiet_libraries(options.verbose)
    policy = make_policy(options)
    if policy.needs_teacher and options.teacher_model_name_or_path is None:
        raise UserError(f"policy {options.policy} needs --teacher_model_name_or_path")
    student, teacher, tokenizer, excluded_ids = _models(options, policy)
    prompts = [ids for ids in _prompt_ids(options, tokenizer, console) for _ in range(options.num_samples)]
    eos = require_eos(tokenizer, student, teacher)
    screen = terminal(console.stream, "never" if console.json else options.color)
    rollouts: list[Rollout] = []
    rows: list[dict[str, Any]] = []
    text = max(map(len, prompts)) + options.max_completion_length
    with writer(options, student, teacher, text, draft_length=options.draft_length) as write:
        # The likeliest tokens of both models are read batch by batch here, whoever writes.
        at_once = options.batch_size if options.top_tokens else rows_per_call(options)
        for start in range(0, len(prompts), at_once):
            batch = prompts[start : start + at_once]
            rollout = _roll_out(options, write, policy, student, teacher, batch, start, eos, excluded_ids)
            rollouts.append(rollout)
            if folder is not None and start == 0:
                folder.claim(vars(options))
            seen = None
            if options.top_tokens:
                seen = _top_tokens(options, student, teacher, rollout, tokenizer, excluded_ids)
            for number, row in enumerate(rollout.to_dicts(tokenizer, eos)):
                rows.append(row)
                if seen is not None:
                    row["top_tokens"] = seen[number]
                _show(row, len(rows), len(prompts), screen, console)
                if folder is not None:
                    folder.append("rollouts.jsonl", [row])
    summary = {"policy": options.policy, "seed": options.seed, **_totals(rollouts)}
    said = _last_line(summary)
    console.say(said)
    if options.html is not None:
        _write_page(rows, summary, said, Path(options.html).expanduser(), console)
    if folder is not None:
        folder.append("metrics.jsonl", [summary])
        folder.write_json("summary.json", summary)
        summary["output_dir"] = str(folder.path)
    return {**summary, "rollouts": rows}


def _show(row: dict[str, Any], number: int, count: int, screen: Any, console: Console) -> None:
    """Print a completion with its writers, and what both models found likeliest where that was asked for."""
    if screen is None:
        console.say(rollout_text(row) + "\n")
    else:
        if number == 1:
            console.say(rendered(screen, legend()) + "\n")
        console.say(rendered(screen, rollout_block(row, number, count)))
    if "top_tokens" in row:
        console.say(f"{tokens_text(row)}\n" if screen is None else rendered(screen, tokens_block(row, screen.width)))


def check(options: argparse.Namespace) -> None:
    """Refuse options out of range.

    Raises:
        UserError: Names the option.
    """
    check_choice("color", options.color, ("auto", "always", "never"))
    check_pair_options(options, model_name_or_path="the student")
    if options.teacher_model_name_or_path is None and options.policy in NAMES and options.policy != "student":
        raise UserError(f"policy {options.policy} needs --teacher_model_name_or_path; or use --policy student")
    if (options.prompt is None) == (options.dataset_name is None):
        raise UserError("give either --prompt or --dataset_name")
    check_data_options(options)
    check_count("num_samples", options.num_samples, 1)
    if options.draft_length != "auto" and not options.draft_length.isdecimal():
        raise UserError(f'draft_length must be "auto" or an integer >= 1, got {options.draft_length!r}')
    check_count("top_tokens", options.top_tokens, 0)
    check_policy_options(options)
    check_engine_options(options)
    if options.html is not None:
        from switchkd.page.document import check_file

        check_file(Path(options.html).expanduser())


def _write_page(rows: list[dict[str, Any]], summary: dict[str, Any], said: str, path: Path, console: Console) -> None:
    from switchkd.page.document import write
    from switchkd.page.rollouts import rollouts_page

    write(rollouts_page(rows, summary, said), path)
    console.say(f"page: {path}")


def _models(options: argparse.Namespace, policy: "Policy") -> tuple[Any, Any, Any, list[int]]:
    tokenizer = read_tokenizer(options)
    teacher, excluded_ids = None, []
    if policy.needs_teacher:
        excluded_ids = read_excluded_ids(options, tokenizer)
        teacher = read_model(options, "teacher")
    return read_model(options), teacher, tokenizer, excluded_ids


def _prompt_ids(options: argparse.Namespace, tokenizer: Any, console: Console) -> list[list[int]]:
    from switchkd.data import encode_prompt

    if options.prompt is not None:
        reading = {
            "template": options.template,
            "split_special_tokens": options.split_special_tokens,
            "chat_template_kwargs": template_kwargs(options),
        }
        return [encode_prompt(text, tokenizer, **reading) for text in options.prompt]
    data, report = prepare_data(options, options.dataset_train_split, tokenizer, answers=False)
    console.progress(f"prompts: {report}")
    return list(data["prompt_ids"])


def _roll_out(
    options: argparse.Namespace,
    write: Callable[..., "Rollout"],
    policy: "Policy",
    student: Any,
    teacher: Any,
    prompts: list[list[int]],
    first: int,
    eos: list[int],
    excluded_ids: list[int],
) -> "Rollout":
    import torch

    return write(
        student,
        teacher,
        prompts,
        policy=policy,
        max_new_tokens=options.max_completion_length,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        draft_length="auto" if options.draft_length == "auto" else int(options.draft_length),
        eos_token_id=eos,
        return_drafted_ids=True,
        row_ids=torch.arange(first, first + len(prompts)),
        excluded_ids=excluded_ids,
        cuda_graphs=options.cuda_graphs,
    )


def _top_tokens(
    options: argparse.Namespace, student: Any, teacher: Any, rollout: "Rollout", tokenizer: Any, excluded_ids: list[int]
) -> list[list[dict[str, Any]]]:
    from switchkd.evaluation.top_tokens import top_tokens

    return top_tokens(
        student,
        teacher,
        rollout,
        tokenizer,
        count=options.top_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        excluded_ids=excluded_ids,
    )


def _totals(rollouts: list["Rollout"]) -> dict[str, Any]:
    import torch

    from switchkd.rollout import Author

    tokens = sum(int(rollout.completion_mask.sum()) for rollout in rollouts)
    teacher = sum(int((rollout.author == Author.TEACHER).sum()) for rollout in rollouts)
    divergence = torch.cat([rollout.divergence.flatten() for rollout in rollouts])
    threshold = torch.cat([rollout.threshold.flatten() for rollout in rollouts])
    threshold = threshold[~threshold.isnan()]
    seconds = sum(rollout.stats["seconds"] for rollout in rollouts)
    measured, unit = rollouts[0].measured, rollouts[0].unit
    return {
        "completions": sum(map(len, rollouts)),
        "completion_tokens": tokens,
        "teacher_share": teacher / max(tokens, 1),
        "measured": measured,
        **({} if measured is None else {measured: float(divergence.nanmean())}),
        f"threshold_{unit}": [float(threshold.min()), float(threshold.max())] if len(threshold) else None,
        "tokens_per_s": tokens / max(seconds, 1e-9),
        "seconds": seconds,
    }


def _last_line(summary: dict[str, Any]) -> str:
    from switchkd.rollout import label_of, unit_of

    parts = [f"teacher wrote {summary['teacher_share']:.0%} of {summary['completion_tokens']} tokens"]
    measured = summary["measured"]
    if measured == "rank":
        limit = summary["threshold_rank"][1]
        parts.append(f"mean rank of the drafted tokens {summary['rank']:.1f}, replaced beyond rank {limit:.0f}")
    elif measured is not None:
        unit = unit_of(measured)
        parts.append(f"mean {label_of(measured)} {summary[measured]:.3f} {unit}")
        if threshold := summary[f"threshold_{unit}"]:
            parts.append(f"threshold {threshold[1]:.3f} to {threshold[0]:.3f} {unit}")
    return ", ".join([*parts, f"{summary['tokens_per_s']:.0f} tokens/s"])
