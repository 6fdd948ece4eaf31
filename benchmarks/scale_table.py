"""The table "Sizes" of docs/scale.md: pairs of models x machines, by the arithmetic of `switchkd plan`.

    python benchmarks/scale_table.py                     # some minutes on one core, no GPU and no weights
    python benchmarks/scale_table.py --card a100-80gb --machines 1 8

For each pair and machine the plan begins with `--bf16`, DDP on several GPUs and micro-batches of 8 rows, 64 rows in an
optimizer step over all GPUs, and takes from there what `switchkd plan` advises: until it fits, then as many rows
decoded at once as there is room for. The last line of stdout
is one JSON object.
"""

import argparse
import json
import sys
import warnings
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging

from switchkd.cli.display import markdown_table
from switchkd.training.advice import Change, Sized, first_changes, more_rows, sized
from switchkd.training.cost import card_of, step_seconds
from switchkd.training.memory import Launch


def llama(
    hidden: int, wide: int, layers: int, heads: int, groups: int, vocabulary: int, *, tied: bool
) -> dict[str, Any]:
    """Return a LLaMA's configuration."""
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }  # fmt: skip


def qwen3(hidden: int, wide: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    """Return a Qwen3's configuration."""
    shape = llama(hidden, wide, layers, heads, 8, 151936, tied=tied)
    return {**shape, "model_type": "qwen3", "head_dim": 128}


#: Published shapes: student, teacher.
PAIRS = {
    "Qwen3 0.6B <- 8B": (qwen3(1024, 3072, 28, 16, tied=True), qwen3(4096, 12288, 36, 32, tied=False)),
    "Llama 3 1B <- 8B": (
        llama(2048, 8192, 16, 32, 8, 128256, tied=True) | {"head_dim": 64},
        llama(4096, 14336, 32, 32, 8, 128256, tied=False),
    ),
    "OpenLLaMA 3B <- 7B": (
        llama(3200, 8640, 26, 32, 32, 32000, tied=False),
        llama(4096, 11008, 32, 32, 32, 32000, tied=False),
    ),
    "Llama 2 7B <- 70B": (
        llama(4096, 11008, 32, 32, 32, 32000, tied=False),
        llama(8192, 28672, 80, 64, 8, 32000, tied=False),
    ),
}
GLOBAL_ROWS = 64
ROWS = 8


def launch_of(pair: str, gpus: int) -> Launch:
    """Return where the plan of a pair begins."""
    student, teacher = (AutoConfig.for_model(**dict(values)).to_json_string(use_diff=False) for values in PAIRS[pair])
    rows = max(min(ROWS, GLOBAL_ROWS // gpus), 1)
    return Launch(
        student,
        teacher,
        prompt=256,
        completion=512,
        rows=rows,
        accumulation=max(GLOBAL_ROWS // (gpus * rows), 1),
        bf16=True,
        gpus=gpus,
        sharding="none" if gpus == 1 else "ddp",
        copy_dtype="bfloat16",
    )


def planned(pair: str, gpus: int, card_name: str) -> dict[str, Any]:
    """Return what a pair takes on a machine, with what must be changed."""
    card = card_of(card_name)
    run: Sized = sized(launch_of(pair, gpus))
    first = run.memory.peak
    changes: list[Change] = first_changes(run, card.memory)
    launch = changes[-1].launch if changes else run.launch
    run = sized(launch)
    options = [change.option for change in changes]
    if not any("rollout_batch_size" in option for option in options) and (more := more_rows(run, card.memory)):
        run, launch = more, more.launch
        options.append(f"--rollout_batch_size {launch.rollout_rows}")
    seconds = step_seconds(launch, run.student, run.teacher, card, rollout_rows=run.memory.rollout_rows)
    total = sum(seconds.values())
    return {
        "pair": pair,
        "gpus": gpus,
        "rows": f"{launch.rows} x {launch.accumulation}",
        "changes": options,
        "first_gb": first / 1e9,
        "peak_gb": run.memory.peak / 1e9,
        "phase": run.memory.largest,
        "fits": run.memory.peak <= card.memory,
        "seconds": total,
        "rollout_seconds": seconds.get("rollout", 0.0),
        "tokens_per_s": gpus * launch.rows * launch.accumulation * launch.completion / total,
    }


def machine(gpus: int) -> str:
    """Return how a number of GPUs is called."""
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs" if gpus <= 8 else f"{-(-gpus // 8)} x 8 GPUs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="h100")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 8, 16], help="numbers of GPUs")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    found = []
    for pair in options.pairs:
        for gpus in options.machines:
            found.append(planned(pair, gpus, options.card))
            print(f"{pair}, {machine(gpus)}: done", file=sys.stderr, flush=True)
    rows = [
        [
            one["pair"],
            machine(one["gpus"]),
            " ".join(f"`{option}`" for option in one["changes"]) or "-",
            f"{one['first_gb']:,.0f}",
            f"{one['peak_gb']:,.0f}, {one['phase']}" if one["fits"] else f"**{one['peak_gb']:,.0f}: does not fit**",
            f"{one['seconds']:,.0f} ({one['rollout_seconds']:,.0f})" if one["fits"] else "-",
            f"{one['tokens_per_s']:,.0f}" if one["fits"] else "-",
        ]
        for one in found
    ]
    headers = ["student <- teacher", f"{options.card}", "settings beside `--bf16`", "GB before", "GB with them"]
    print(markdown_table(rows, [*headers, "s a step (rollout)", "tokens/s"]))
    print(json.dumps({"benchmark": "scale_table", "card": options.card, "results": found}))


if __name__ == "__main__":
    main()
