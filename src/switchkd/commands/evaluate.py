"""`switchkd evaluate`: score a model's own answers."""

import argparse
import time
from typing import Any

from switchkd.cli.console import Console, quiet_libraries
from switchkd.cli.options import OptionParser, integers, is_terminal
from switchkd.cli.run_folder import RunFolder
from switchkd.commands.data import add_data_options, check_data_options, prepare_data
from switchkd.errors import UserError, check_warping

DTYPES = ("auto", "float32", "bfloat16", "float16")


def parser() -> OptionParser:
    """Return the options of `switchkd evaluate`."""
    result = OptionParser(
        prog="switchkd evaluate",
        usage="switchkd evaluate --model_name_or_path MODEL --dataset_name DATA ...",
        description="Score a causal language model's own answers by ROUGE-L (F-measure, stemmed, best reference, "
        "times 100), sampled at several decoding seeds. The teacher never writes in them.",
    )
    inputs = result.add_argument_group("model and data")
    inputs.add_argument("--model_name_or_path", metavar="MODEL", help="folder or hub id of any causal language model")
    inputs.add_argument("--tokenizer_name_or_path", metavar="NAME", help="tokenizer (default: that of the model)")
    inputs.add_argument(
        "--teacher_model_name_or_path",
        metavar="TEACHER",
        help="also compare the model with it: on the reference answers, the model's own and the teacher's",
    )
    inputs.add_argument("--dtype", default="auto", help="weights: auto (as saved), float32, bfloat16 or float16")
    inputs.add_argument("--dataset_name", metavar="DATA", help="file, folder or hub id, with answers")
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
        "--no_repeat_ngram_size", type=int, default=0, metavar="N", help="forbid repeated N-grams; 0 allows them"
    )
    decoding.add_argument("--batch_size", type=int, default=8, metavar="N", help="answers written at once")
    result.add_shared_options("where to write (default: the first free one of runs/evaluate, runs/evaluate-2, ...)")
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Evaluate, print the table, write summary and rows, and return the summary."""
    seeds = check(options)
    folder = RunFolder(options.output_dir, "evaluate")
    folder.check(overwrite=options.overwrite_output_dir)

    from switchkd.data.prepared import prepared_facts
    from switchkd.data.protocol import PREPARED
    from switchkd.evaluation import evaluate, reference_losses, sequence_divergences
    from switchkd.evaluation.losses import samples_the_model
    from switchkd.evaluation.scorers import load_scorer
    from switchkd.models.loading import default_device, excluded_with, load_model, load_tokenizer

    quiet_libraries(options.verbose)
    tokenizer = load_tokenizer(options.tokenizer_name_or_path or options.model_name_or_path)
    data, report = prepare_data(
        options,
        options.dataset_test_split,
        tokenizer,
        max_prompt_length=options.max_prompt_length,
        max_completion_length=options.max_completion_length,
    )
    console.say(f"data: {report}")
    kwargs, device = {"dtype": options.dtype}, default_device()
    teacher, excluded_ids = None, []
    if options.teacher_model_name_or_path is not None:
        excluded_ids = excluded_with(tokenizer, options.teacher_model_name_or_path)
        teacher = load_model(options.teacher_model_name_or_path, kwargs, role="teacher").to(device)
    model = load_model(options.model_name_or_path, kwargs).to(device)
    started, progress = time.perf_counter(), is_terminal(console.stream)
    shared: dict[str, Any] = {"batch_size": options.batch_size, "progress": progress}
    losses = reference_losses(model, tokenizer, data, teacher=teacher, excluded_ids=excluded_ids, **shared)
    result = evaluate(
        model,
        tokenizer,
        data,
        decoding_seeds=seeds,
        max_completion_length=options.max_completion_length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        scorer=load_scorer(options.scorer) if options.scorer is not None else None,
        **shared,
    )
    summary = {
        "model_name_or_path": options.model_name_or_path,
        "dataset_name": options.dataset_name,
        **result.summary(),
        "reference_losses": losses,
        "data": vars(report),
    }
    if teacher is not None:
        divergences = sequence_divergences(
            model,
            teacher,
            tokenizer,
            data,
            [(row["index"], ids) for row, ids in zip(result.rows, result.completion_ids, strict=True)],
            max_completion_length=options.max_completion_length,
            seed=seeds[0],
            excluded_ids=excluded_ids,
            **shared,
        )
        for row, value in zip(result.rows, divergences["reverse_sequence_kl"].pop("of_answers"), strict=True):
            row["reverse_sequence_kl"] = value
        summary["sequence_divergences"] = {
            "answers_sample_the_model": samples_the_model(result.decoding),
            **divergences,
        }
    summary["seconds"] = time.perf_counter() - started  # the passes over references and answers as well
    console.say("\n" + _tables(summary, console))
    facts = prepared_facts([options.dataset_name])
    folder.claim({**vars(options), "decoding_seeds": seeds})
    if facts:
        folder.write_json(PREPARED, facts)
    folder.append("rows.jsonl", result.rows)
    folder.append(
        "metrics.jsonl", [{"seed": seed, "rouge_l": score} for seed, score in zip(seeds, result.scores, strict=True)]
    )
    folder.write_json("summary.json", summary)
    console.say(f"\nsummary.json, rows.jsonl, config.yaml in {folder.path}")
    return {**summary, "output_dir": str(folder.path)}


def check(options: argparse.Namespace) -> list[int]:
    """Refuse options out of range and return the decoding seeds.

    Raises:
        UserError: Names the option.
    """
    for name, meaning in (("model_name_or_path", "the model to score"), ("dataset_name", "the data to answer")):
        if getattr(options, name) is None:
            raise UserError(f"give --{name}, {meaning}")
    check_data_options(options)
    if options.dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}")
    for name in ("max_samples", "max_completion_length", "max_prompt_length", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    check_warping(options.temperature, options.top_k, options.top_p)
    if options.seeds is not None:
        raise UserError(f"seeds={' '.join(options.seeds)}: seeds are those of training; here it is decoding_seeds")
    seeds = integers(options.decoding_seeds, "decoding_seeds") or []
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"decoding_seeds must be one or more different integers, got {seeds}")
    return seeds


def _tables(summary: dict[str, Any], console: Console) -> str:
    decoding, losses, diversity = summary["decoding"], summary["reference_losses"], summary["diversity"]
    measures = {"rouge_l": "ROUGE-L"} | {name: name for name in summary["by_scorer"]}
    compared = {"cross_entropy": "cross-entropy", "forward_kl": "KL(teacher, model)"}
    ends = {f"{measure}_interval": pair for measure, pair in summary["intervals"].items()}
    rows = {"all": {"rouge_l": summary["rouge_l"], **summary["by_scorer"], **ends, "examples": summary["examples"]}}
    of_losses = {"all": losses, **losses["by_length"]}
    scores = [
        (
            name,
            row["examples"],
            *(_with_interval(row[measure], row[f"{measure}_interval"], 1) for measure in measures),
            *(
                _with_interval(of_losses[name][loss], of_losses[name]["intervals"][loss], 3)
                for loss in compared
                if loss in losses
            ),
        )
        for name, row in (rows | summary["by_length"]).items()
    ]
    heads = (*measures.values(), *(head for loss, head in compared.items() if loss in losses))
    lines = [
        console.table(scores, ("reference tokens", "examples", *heads)),
        "scores of the answers, losses of the references in nats per token; 95% intervals over prompts",
        "",
        f"ROUGE-L {summary['rouge_l']:.2f} +- {summary['rouge_l_std']:.2f} over decoding seeds "
        + ", ".join(f"{seed}: {score:.2f}" for seed, score in summary["scores"].items()),
        f"exact matches {summary['exact_match']:.1f}%, mean length {summary['completion_tokens']:.0f} tokens, "
        f"{summary['finished_share']:.0%} ended with an end-of-sequence token",
        *(
            f"{of}: distinct 1, 2 and 3-grams {diversity[f'{prefix}distinct_1']:.3f}, "
            f"{diversity[f'{prefix}distinct_2']:.3f}, {diversity[f'{prefix}distinct_3']:.3f}; "
            f"repeated 4-grams {diversity[f'{prefix}repetition']:.1%}"
            for of, prefix in (("answers", ""), ("references", "reference_"))
        ),
        "decoding: " + ", ".join(f"{name} {value}" for name, value in decoding.items() if name != "decoding_seeds"),
        f"on the {losses['tokens']:,} reference tokens: cross-entropy {losses['cross_entropy']:.3f} nats"
        + (f", KL(teacher, model) {losses['forward_kl']:.3f}, JSD {losses['jsd']:.3f}" if "jsd" in losses else ""),
    ]
    if "sequence_divergences" in summary:
        lines += ["", *_sequence_table(summary["sequence_divergences"], console)]
    return "\n".join(lines)


def _sequence_table(found: dict[str, Any], console: Console) -> list[str]:
    """How far the model is from the teacher as a writer: per token by position, and per text."""
    heads = {
        "reverse_sequence_kl": "KL(model, teacher)",
        "teacher_cross_entropy": "teacher's cross-entropy",
        "forward_sequence_kl": "KL(teacher, model)",
    }

    def at(name: str, part: str, position: str | None = None) -> str:
        parts = found[name] if position is None else found[name]["by_position"].get(position)
        return "" if parts is None else _with_interval(parts[part], parts[f"{part}_interval"], 3)

    positions = [position for name in heads for position in found[name]["by_position"]]
    rows = [("per token", *(at(name, "per_token") for name in heads))]
    rows += [
        (f"position {position}", *(at(name, "per_token", position) for name in heads))
        for position in dict.fromkeys(positions)
    ]
    rows.append(("per text", *(at(name, "per_sequence") for name in heads)))
    lines = [
        console.table(rows, ("nats", *heads.values())),
        "the first two on the model's answers, the last on texts that the teacher wrote",
    ]
    if not found["answers_sample_the_model"]:
        lines.append(
            "The answers were not sampled from the model as it is (see decoding): the first two are means on these "
            "answers, not estimates of a KL between texts."
        )
    return lines


def _with_interval(value: float, interval: tuple[float, float] | None, digits: int) -> str:
    ends = "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
    return f"{value:.{digits}f}{ends}"
