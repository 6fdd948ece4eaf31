"""Rollouts with static shapes against drafting without graphs and against token by token, for `rollout.py`.

Peers of one cell (batch, teacher share): `plain`, two DynamicCache models one token at a time; `one_graph`, our rounds
of one token as CUDA graphs; `block`, drafts without graphs; `static`, drafts as graphs; `refilled`, the same with twice
as many prompts that wait for free places. On CPU nothing is captured, and the figures say what static shapes cost.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rollout import interleaved, plain, synchronize, threshold_for

import switchkd
from switchkd import sampling
from switchkd.policies import StudentPolicy, SwitchPolicy
from switchkd.sampling import Stream, Warping


def measure_static(name: str, student: Any, teacher: Any, prompts: torch.Tensor, args: argparse.Namespace) -> list:
    """Return a line for every batch and share, and one for the student alone."""
    lines: list[dict[str, Any]] = []
    bandwidth = bytes_per_second(prompts.device)
    for batch in args.batches:
        some = prompts.repeat(-(-2 * batch // len(prompts)), 1)[: 2 * batch]
        for share in args.shares:
            threshold = threshold_for(student, teacher, some[:batch], share, min(args.new_tokens, 64))
            line = {"pair": name, "batch": batch, "share": share}
            lines.append(line | measure_cell(student, teacher, some, threshold, batch, args))
            print(json.dumps(lines[-1]), flush=True)
        lines.append({"pair": name, "batch": batch, **measure_student(student, some[:batch], bandwidth, args)})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def measure_cell(
    student: Any, teacher: Any, prompts: torch.Tensor, threshold: float, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """SWITCH at a threshold, every way; `prompts` are twice the batch."""
    new, seeds, stats, shares = args.new_tokens, iter(range(10_000)), {}, []
    policy = SwitchPolicy(initial_threshold=threshold, schedule="constant")

    def ours(name: str, some: torch.Tensor, **options: Any) -> int:
        rollout = switchkd.roll_out(
            student, teacher, some, policy=policy, max_new_tokens=new, seed=next(seeds), **options
        )
        stats[name] = rollout.stats
        if name == "static":
            shares.append(rollout.teacher_share)
        return int(rollout.completion_mask.sum())

    some = prompts[:batch]
    runs: dict[str, Callable[[], int]] = {
        "plain": lambda: plain(student, teacher, some, threshold, new)[0],
        "one_graph": lambda: ours("one_graph", some, draft_length=1, cuda_graphs=True),
        "block": lambda: ours("block", some),
        "static": lambda: ours("static", some, cuda_graphs=True),
        "refilled": lambda: ours("refilled", prompts, cuda_graphs=True, max_active_rows=batch),
    }
    for length in args.fixed:
        runs[f"static_{length}"] = lambda length=length: ours("fixed", some, draft_length=length, cuda_graphs=True)
    times = interleaved(runs, args.repeats)
    speed = {run: 1.0 / one["s_per_token"] for run, one in times.items()}
    of_static = stats["static"]
    parts = {part: of_static[part] for part in ("prefill_s", "student_s", "teacher_s", "verify_s")}
    draws = of_static["verify_s"] + of_static["student_passes"] * draw_seconds(some, student)
    return {
        "tokens_per_s": {run: round(value, 1) for run, value in speed.items()},
        "speedup_over_plain": {run: round(value / speed["plain"], 3) for run, value in speed.items()},
        "speedup_over_one_graph": round(speed["static"] / speed["one_graph"], 3),
        "spread": round(max(one["spread"] for one in times.values()), 3),
        "teacher_share": round(statistics.mean(shares), 3),
        "mean_draft": round(of_static["student_passes"] / of_static["rounds"], 2),
        "parts_s": {part: round(seconds, 4) for part, seconds in parts.items()},
        "share_of_noise_jsd_and_draws": round(draws / sum(parts.values()), 3),
        "captured_in_last": of_static["captured"],
    }


def measure_student(student: Any, prompts: torch.Tensor, bandwidth: float, args: argparse.Namespace) -> dict[str, Any]:
    """The student alone, against the time that reading its weights once a token takes."""
    new, seeds = args.new_tokens, iter(range(10_000))

    def ours(graphs: bool) -> int:
        rollout = switchkd.roll_out(
            student, None, prompts, policy=StudentPolicy(), max_new_tokens=new, seed=next(seeds), cuda_graphs=graphs
        )
        return int(rollout.completion_mask.sum())

    times = interleaved({"block": lambda: ours(False), "static": lambda: ours(True)}, args.repeats)
    # The input embeddings are looked up; everything else is read once for every token of all rows.
    looked_up = student.get_input_embeddings().weight
    read = sum(weight.numel() * weight.element_size() for weight in student.parameters() if weight is not looked_up)
    bound = len(prompts) * bandwidth / read
    return {
        "policy": "student",
        "tokens_per_s": {run: round(1.0 / one["s_per_token"], 1) for run, one in times.items()},
        "bandwidth_bound_tokens_per_s": round(bound, 1),
        "share_of_bound": float(f"{1.0 / times['static']['s_per_token'] / bound:.3g}"),
        "gigabytes_per_s": round(bandwidth / 1e9, 1),
        "spread": round(max(one["spread"] for one in times.values()), 3),
    }


def bytes_per_second(device: torch.device) -> float:
    """Return the measured bandwidth of the device's memory: reading and writing a large copy."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source))


def draw_seconds(prompts: torch.Tensor, student: Any) -> float:
    """Return the seconds of warping, noise and draw at one position of every row of a batch."""
    size = student.get_output_embeddings().weight.shape[0]
    logits = torch.randn(len(prompts), size, dtype=student.dtype, device=prompts.device)
    keys = sampling.noise_keys(0, torch.arange(len(prompts), device=prompts.device), prompts[:, 0], Stream.DRAFT)
    warping = Warping(1.0, 0, 1.0, size)
    return seconds_of(lambda: sampling.exponential_race(warping(logits), keys))


def seconds_of(function: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median seconds of a call."""
    times = []
    for _ in range(repeats + 2):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])
