"""What an evaluation found, as tables for people."""

from collections.abc import Mapping
from typing import Any

from switchkd.cli.console import Console


def score_tables(summary: Mapping[str, Any], console: Console) -> str:
    """Return the tables and sentences that tell people what `summary.json` of an evaluation holds."""
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
        "",
        _by_words(summary, measures, console),
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


def overview(summaries: Mapping[str, Mapping[str, Any]], console: Console) -> str:
    """Return one table of several test sets, name -> its summary."""
    measures = {"rouge_l": "ROUGE-L", **{name: name for one in summaries.values() for name in one["by_scorer"]}}
    rows = []
    for name, one in summaries.items():
        values = {"rouge_l": one["rouge_l"], **one["by_scorer"]}
        known = [
            _with_interval(values[measure], one["intervals"][measure], 1) if measure in values else ""
            for measure in measures
        ]
        rows.append(
            (name, one["examples"], *known, f"{one['rouge_l_std']:.2f}", f"{one['exact_match']:.1f}%",
             f"{one['completion_tokens']:.0f}", f"{one['reference_losses']['cross_entropy']:.3f}")
        )  # fmt: skip
    mean = sum(one["rouge_l"] for one in summaries.values()) / len(summaries)
    rows.append(("mean of the sets", "", f"{mean:.1f}", *[""] * (len(measures) - 1), "", "", "", ""))
    heads = ("test set", "examples", *measures.values(), "std over seeds", "exact", "tokens", "cross-entropy")
    return console.table(rows, heads)


def _by_words(summary: Mapping[str, Any], measures: Mapping[str, str], console: Console) -> str:
    rows = [
        (name, row["examples"], *(_with_interval(row[measure], row[f"{measure}_interval"], 1) for measure in measures))
        for name, row in summary["by_words"].items()
    ]
    return console.table(rows, ("reference words", "examples", *measures.values()))


def _sequence_table(found: Mapping[str, Any], console: Console) -> list[str]:
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
