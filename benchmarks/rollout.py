"""Rollout speed against what a user would write with transformers, measured side by side in one run.

    python benchmarks/rollout.py --shared ../shared --pairs tinystories gpt2 --repeats 5

For every pair, batch size and teacher share the peers run in turn, `--repeats` times over, and the medians are
compared. Peers: `plain`, two DynamicCache models one token at a time; `dropping`, the same with finished rows dropped;
`generate`, transformers' own generation of the same model (and `trl`, TRL's way of calling it, where TRL is
installed). The pair `qwen3` (shapes of Qwen3 0.6B and 4B, made on the device) compares static shapes and CUDA graphs
instead, see `static_rollout.py`:

    python benchmarks/rollout.py --pairs qwen3 --device cuda --batches 64 8 --shares 0.1 0.53 --new_tokens 512

The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from pairs import gpt2_pair, qwen3_pair, tinystories_pair
from transformers import DynamicCache

import switchkd
from switchkd.policies import StudentPolicy, SwitchPolicy, TeacherPolicy
from switchkd.training.calibration import calibrate

SHARES = (0.10, 0.30, 0.53, 0.80)


def plain(student: Any, teacher: Any, prompts: torch.Tensor, threshold: float, new: int, *, drop: int | None = None):
    """SWITCH as a user would write it: both models cached, one token at a time; `drop`: rows end at this id."""
    caches = [DynamicCache(config=model.config) for model in (student, teacher)]
    tokens, written = prompts, []
    rows = torch.arange(len(prompts), device=prompts.device)
    with torch.inference_mode():
        for _ in range(new):
            logits = [
                model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
                for model, cache in zip((student, teacher), caches, strict=True)
            ]
            student_probs, teacher_probs = (one.softmax(-1) for one in logits)
            mixture = (student_probs + teacher_probs) / 2
            jsd = (
                (student_probs * (student_probs / mixture).log()).nan_to_num().sum(-1)
                + (teacher_probs * (teacher_probs / mixture).log()).nan_to_num().sum(-1)
            ) / 2
            takes_over = (jsd > threshold).unsqueeze(1)
            tokens = torch.multinomial(torch.where(takes_over, teacher_probs, student_probs), 1)
            written.append((rows, tokens, takes_over))
            if drop is not None:
                alive = (tokens[:, 0] != drop).nonzero().squeeze(1)
                if not len(alive):
                    break
                if len(alive) < len(rows):
                    rows, tokens = rows[alive], tokens[alive]
                    for cache in caches:
                        cache.batch_select_indices(alive)
    return sum(len(one) for one, _, _ in written), sum(int(over.sum()) for _, _, over in written)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(runs: dict[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Return each run's median seconds per token and its spread: half the interquartile range over the median."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            synchronize()
            started = time.perf_counter()
            tokens = run()
            synchronize()
            if repeat:  # the first round warms up
                times[name].append((time.perf_counter() - started) / tokens)
    result = {}
    for name, values in times.items():
        values.sort()
        quarter = max(len(values) // 4, 0)
        middle = statistics.median(values)
        result[name] = {"s_per_token": middle, "spread": (values[-1 - quarter] - values[quarter]) / 2 / middle}
    return result


def threshold_for(student: Any, teacher: Any, prompts: torch.Tensor, share: float, new: int) -> float:
    """Return the constant threshold at which the teacher writes about `share` of the tokens on these very prompts.

    Prompts differ, so each batch gets its own threshold; few prompts are continued several times over.
    """
    prompts = prompts.repeat(max(16 // len(prompts), 1), 1)
    found = calibrate(
        student,
        teacher,
        prompts,
        policy=SwitchPolicy(initial_threshold=0.1, schedule="constant"),
        target_teacher_share=share,
        max_new_tokens=new,
        tolerance=0.015,
        max_rounds=10,
        seed=123,
    )
    print(f"share {share}: {found.note}", flush=True)
    return found.initial_threshold


def measure_pair(name: str, student: Any, teacher: Any, prompts: torch.Tensor, args: argparse.Namespace) -> list[dict]:
    lines: list[dict] = []
    new = args.new_tokens
    for batch in args.batches:
        some = prompts[:batch]
        for share in args.shares:
            threshold = threshold_for(student, teacher, some, share, new)
            lines.append(
                {"pair": name, "batch": batch, "share": share} | measure_share(student, teacher, some, threshold, args)
            )
            print(json.dumps(lines[-1]), flush=True)
        lines += measure_alone(name, student, teacher, some, args)
    return lines


def measure_share(
    student: Any, teacher: Any, prompts: torch.Tensor, threshold: float, args: argparse.Namespace
) -> dict:
    """One cell of the grid: SWITCH at a threshold, against the plain loop."""
    new, seeds, stats, shares = args.new_tokens, iter(range(10_000)), {}, []
    policy = SwitchPolicy(initial_threshold=threshold, schedule="constant")

    def ours(length: int | str) -> int:
        rollout = switchkd.roll_out(
            student, teacher, prompts, policy=policy, max_new_tokens=new, draft_length=length, seed=next(seeds)
        )
        if length == "auto":
            stats.update(rollout.stats)
            shares.append(rollout.teacher_share)
        return int(rollout.completion_mask.sum())

    runs: dict[str, Callable[[], int]] = {
        "plain": lambda: plain(student, teacher, prompts, threshold, new)[0],
        "ours": lambda: ours("auto"),
    }
    for length in args.fixed:
        runs[f"draft_{length}"] = lambda length=length: ours(length)
    times = interleaved(runs, args.repeats)
    plain_s = times["plain"]["s_per_token"]
    return {
        "speedup": round(plain_s / times["ours"]["s_per_token"], 3),
        "spread": round(max(times[run]["spread"] for run in ("plain", "ours")), 3),
        "tokens_per_s": round(1 / times["ours"]["s_per_token"], 1),
        "teacher_share": round(statistics.mean(shares), 3),
        "tokens_per_teacher_pass": round(new / stats["teacher_passes"], 2),
        "parts_s": {part: round(stats[part], 4) for part in ("student_s", "teacher_s", "verify_s")},
        "fixed": {run: round(plain_s / one["s_per_token"], 3) for run, one in times.items() if run.startswith("draft")},
    }


def measure_alone(name: str, student: Any, teacher: Any, prompts: torch.Tensor, args: argparse.Namespace) -> list[dict]:
    """One model alone, against transformers' generate of that model, and the ragged case against dropping rows."""
    new, seeds, lines = args.new_tokens, iter(range(10_000)), []

    def generated(model: Any) -> int:
        out = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )
        return out[:, prompts.shape[1] :].numel()

    def ours(policy: Any) -> int:
        rollout = switchkd.roll_out(student, teacher, prompts, policy=policy, max_new_tokens=new, seed=next(seeds))
        return int(rollout.completion_mask.sum())

    for who, model, policy in (("student", student, StudentPolicy()), ("teacher", teacher, TeacherPolicy())):
        runs: dict[str, Callable[[], int]] = {
            "generate": lambda model=model: generated(model),
            "ours": lambda policy=policy: ours(policy),
        }
        if who == "student" and (trl := _trl_generation(student, prompts, new)) is not None:
            runs["trl"] = trl
        times = interleaved(runs, args.repeats)
        line = {
            "pair": name,
            "batch": len(prompts),
            "policy": who,
            "speedup_over_generate": round(times["generate"]["s_per_token"] / times["ours"]["s_per_token"], 3),
            "spread": round(max(one["spread"] for one in times.values()), 3),
            "tokens_per_s": round(1 / times["ours"]["s_per_token"], 1),
        }
        if "trl" in times:
            line["speedup_over_trl"] = round(times["trl"]["s_per_token"] / times["ours"]["s_per_token"], 3)
        print(json.dumps(line), flush=True)
        lines.append(line)
    return lines


def _trl_generation(student: Any, prompts: torch.Tensor, new: int) -> Callable[[], int] | None:
    """TRL's on-policy generation: `generate` with its GKD generation config, as its trainer calls it."""
    with contextlib.suppress(ImportError):
        from trl.experimental.gkd import GKDTrainer

        config = transformers.GenerationConfig(
            max_new_tokens=new,
            min_new_tokens=new,
            temperature=1.0,
            do_sample=True,
            top_k=0,
            use_cache=True,
            pad_token_id=0,
        )
        inputs = {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}

        def run() -> int:
            ids = GKDTrainer.generate_on_policy_outputs(student, inputs, config)[0]
            return ids[:, prompts.shape[1] :].numel()

        return run
    return None


def measure_ragged(name: str, student: Any, teacher: Any, prompts: torch.Tensor, args: argparse.Namespace) -> dict:
    """Rows of very different lengths: 16 prompts, at most 8 at once, against dropping finished rows."""
    threshold = threshold_for(student, teacher, prompts[:16], 0.3, args.new_tokens)
    policy = SwitchPolicy(initial_threshold=threshold, schedule="constant")
    seeds = iter(range(10_000))
    probe = switchkd.roll_out(student, teacher, prompts[:16], policy=policy, max_new_tokens=args.new_tokens)
    # The id whose use as end of sequence gives the most ragged rows.
    counts = torch.bincount(probe.completion_ids.flatten())
    eos = int((counts - 2 * len(prompts[:16])).abs().argmin())

    def ours(rows: int) -> int:
        rollout = switchkd.roll_out(
            student,
            teacher,
            prompts[:16],
            policy=policy,
            max_new_tokens=args.new_tokens,
            seed=next(seeds),
            eos_token_id=eos,
            max_active_rows=rows,
        )
        return int(rollout.completion_mask.sum())

    times = interleaved(
        {
            "plain": lambda: plain(student, teacher, prompts[:16], threshold, args.new_tokens)[0],
            "dropping": lambda: plain(student, teacher, prompts[:16], threshold, args.new_tokens, drop=eos)[0],
            "ours": lambda: ours(16),
            "ours_8_active": lambda: ours(8),
        },
        args.repeats,
    )
    line = {
        "pair": name,
        "ragged": True,
        "batch": 16,
        "speedup_over_dropping": round(times["dropping"]["s_per_token"] / times["ours"]["s_per_token"], 3),
        "with_8_active_rows": round(times["dropping"]["s_per_token"] / times["ours_8_active"]["s_per_token"], 3),
        "spread": round(max(one["spread"] for one in times.values()), 3),
    }
    print(json.dumps(line), flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with the TinyStories models")
    parser.add_argument("--pairs", nargs="+", default=["tinystories", "gpt2"], choices=["tinystories", "gpt2", "qwen3"])
    parser.add_argument("--sizes", default="full", choices=["full", "tiny"], help="of the pair qwen3")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--fixed", nargs="*", type=int, default=[], help="also time these fixed draft lengths")
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = []
    for name in args.pairs:
        if name == "tinystories" and not (args.shared / "models").is_dir():
            print(f"skipped {name}: {args.shared} has no models", flush=True)
            continue
        if name == "qwen3":
            from static_rollout import measure_static  # it uses this file

            lines += measure_static(name, *qwen3_pair(args.sizes, device=args.device), args)
            continue
        student, teacher, prompts = tinystories_pair(args.shared) if name == "tinystories" else gpt2_pair()
        student, teacher, prompts = student.to(args.device), teacher.to(args.device), prompts.to(args.device)
        lines += measure_pair(name, student, teacher, prompts, args)
        lines.append(measure_ragged(name, student, teacher, prompts, args))
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(json.dumps({"benchmark": "rollout", "device": device, "versions": versions, "lines": lines}))


if __name__ == "__main__":
    main()
