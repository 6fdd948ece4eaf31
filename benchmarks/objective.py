"""Time and peak memory of the chunked objective against the plain one, TRL's chunked divergence and `kl_div`.

    python benchmarks/objective.py --positions 4096 --vocabularies 50257 151936 --rounds 3
    python benchmarks/objective.py --quick          # a minute: does everything run, are the gradients right

Every contender computes the mean divergence of N supervised positions and its gradients with respect to the student's
hidden states and its output layer, from hidden states of both models. Each measurement is a process of its own, after
a small warm-up; rounds are interleaved and their medians compared.

    plain    this package's plain objective on full logits
    chunked  this package's chunked objective
    trl      TRL's chunked divergence (pip install "switchkd[bench]")
    kl_div   torch.nn.functional.kl_div on full logits

`extra_gb` is the highest memory above what the inputs take, gradients included, in 1e9 bytes: resident memory on a CPU,
allocated memory on a GPU. `gradient_error` is the largest difference from float64, in units of the loss per unit of the
input, on few positions. A contender that needs more memory than `--memory_limit_gb` is reported as such. The last line
of stdout is one JSON object.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from switchkd.models.heads import OutputHead
from switchkd.objective import reduce_losses, token_losses
from switchkd.objective.chunked import MEMORY_BUDGET, chunked_loss

CONTENDERS = ("plain", "chunked", "trl", "kl_div")
DIVERGENCES = ("forward_kl", "reverse_kl", "generalized_jsd")
#: Hidden width of models with such a vocabulary: GPT-2's smallest, Qwen2.5's smallest.
HIDDEN = {50_257: 768, 151_936: 896}
ACCURACY_POSITIONS = 64

Contender = Callable[["Inputs", str], Tensor]


class Inputs:
    """Hidden states of both models and their output layers, `[1, N, H]` and `[V, H]`."""

    def __init__(self, positions: int, vocabulary: int, hidden: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        # Logits of standard deviation 3: a few dozen ids hold half of the mass, as in trained models.
        spread = 3 / hidden**0.5
        self.student_layer, self.teacher_layer = (
            nn.Linear(hidden, vocabulary, bias=False, device="meta") for _ in range(2)
        )
        self.student_layer.weight = nn.Parameter(normal(vocabulary, hidden).mul_(spread))
        noise = normal(vocabulary, hidden).mul_(0.5 * spread)
        self.teacher_layer.weight = nn.Parameter(noise.add_(self.student_layer.weight.detach()), requires_grad=False)
        self.student_hidden = normal(1, positions, hidden).requires_grad_()
        self.teacher_hidden = normal(1, positions, hidden).mul_(0.3).add_(self.student_hidden.detach())
        self.mask = torch.ones(1, positions, dtype=torch.bool, device=device)

    def gradients(self) -> list[Tensor]:
        found = [tensor.grad for tensor in (self.student_hidden, self.student_layer.weight)]
        assert all(gradient is not None for gradient in found)
        return [gradient for gradient in found if gradient is not None]


def plain(inputs: Inputs, divergence: str) -> Tensor:
    with torch.no_grad():
        teacher_logits = inputs.teacher_layer(inputs.teacher_hidden)
    student_logits = inputs.student_layer(inputs.student_hidden)
    return reduce_losses(token_losses(student_logits, objective=divergence, teacher_logits=teacher_logits), inputs.mask)


def chunked(inputs: Inputs, divergence: str) -> Tensor:
    return chunked_loss(
        inputs.student_hidden,
        OutputHead(inputs.student_layer),
        mask=inputs.mask,
        objective=divergence,
        teacher_hidden=inputs.teacher_hidden,
        teacher_head=OutputHead(inputs.teacher_layer),
    ).loss


def trl(inputs: Inputs, divergence: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergences, _ = ChunkedDivergenceFunction.apply(
        inputs.student_hidden.flatten(0, 1),
        inputs.student_layer.weight,
        None,
        inputs.teacher_hidden.flatten(0, 1),
        inputs.teacher_layer.weight,
        None,
        {"forward_kl": 0.0, "reverse_kl": 1.0, "generalized_jsd": 0.5}[divergence],
    )
    return divergences.mean()


def kl_div(inputs: Inputs, divergence: str) -> Tensor:
    with torch.no_grad():
        teacher = inputs.teacher_layer(inputs.teacher_hidden).flatten(0, 1).float().log_softmax(-1)
    student = inputs.student_layer(inputs.student_hidden).flatten(0, 1).float().log_softmax(-1)
    if divergence == "forward_kl":
        return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    if divergence == "reverse_kl":
        return functional.kl_div(teacher, student, reduction="batchmean", log_target=True)
    mixture = torch.logaddexp(student, teacher) - 0.6931471805599453
    return 0.5 * sum(
        functional.kl_div(mixture, one, reduction="batchmean", log_target=True) for one in (student, teacher)
    )


RUN: dict[str, Contender] = {"plain": plain, "chunked": chunked, "trl": trl, "kl_div": kl_div}


# ---- one measurement, in a process of its own


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, extra bytes and the loss of one forward and backward."""
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        limit = int(args.memory_limit_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    vocabulary, run = args.vocabularies[0], RUN[args.contender]
    dtype = getattr(torch, args.dtype)
    hidden = hidden_width(vocabulary)
    try:
        small = Inputs(8, vocabulary, hidden, args.device, dtype)
        run(small, args.divergence).backward()
        del small
        inputs = Inputs(args.positions, vocabulary, hidden, args.device, dtype)
        before = memory_now(args.device)
        started = time.perf_counter()
        loss = run(inputs, args.divergence)
        loss.backward()
        value = float(loss.detach())  # waits for the device
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower():
            raise
        return {"failed": "needs more memory"}
    return {"s": seconds, "extra_gb": (memory_peak(args.device) - before) / 1e9, "loss": value}


def memory_now(device: str) -> int:
    """Return the bytes in use, and start watching for a peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: forget the peak so far
    return _status("VmRSS")


def memory_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def gradient_errors(args: argparse.Namespace) -> dict[str, float]:
    """Return the largest difference of the chunked gradients in float32 from float64, for each divergence."""
    torch.set_num_threads(args.threads)
    vocabulary = args.vocabularies[0]
    errors = {}
    for divergence in args.divergences:
        sides = []
        for run, dtype in ((chunked, torch.float32), (plain, torch.float64)):
            inputs = Inputs(ACCURACY_POSITIONS, vocabulary, hidden_width(vocabulary), args.device, torch.float32)
            inputs.student_layer.to(dtype), inputs.teacher_layer.to(dtype)
            inputs.student_hidden = inputs.student_hidden.detach().to(dtype).requires_grad_()
            inputs.teacher_hidden = inputs.teacher_hidden.to(dtype)
            run(inputs, divergence).backward()
            sides.append(inputs.gradients())
        errors[divergence] = max(
            float((found.double() - right).abs().max()) for found, right in zip(*sides, strict=True)
        )
    return errors


def hidden_width(vocabulary: int) -> int:
    return HIDDEN.get(vocabulary, 256)


# ---- the comparison


def in_a_process(args: argparse.Namespace, **over: Any) -> dict[str, Any]:
    """Return what this script measures with these arguments in a fresh process."""
    settings = {**vars(args), **over}
    command = [sys.executable, __file__]
    for name, value in settings.items():
        if isinstance(value, bool):
            command += [f"--{name}"] * value
        elif value is not None:
            command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:
        return {"failed": "needs more memory"}
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compare(args: argparse.Namespace, vocabulary: int, divergence: str, contenders: list[str]) -> dict[str, Any]:
    """Return the medians of all contenders at one vocabulary and divergence."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name in contenders:
            if not any("failed" in one for one in measured[name]):
                settings = {"contender": name, "divergence": divergence, "vocabularies": [vocabulary]}
                measured[name].append(in_a_process(args, **settings))
    line: dict[str, Any] = {"positions": args.positions, "vocabulary": vocabulary, "divergence": divergence}
    for name, results in measured.items():
        failed = next((one["failed"] for one in results if "failed" in one), None)
        if failed:
            line[name] = {"failed": failed}
            continue
        seconds = [one["s"] for one in results]
        line[name] = {
            "s": round(statistics.median(seconds), 3),
            "spread": round((max(seconds) - min(seconds)) / 2 / statistics.median(seconds), 3),
            "extra_gb": round(statistics.median(one["extra_gb"] for one in results), 3),
            "loss": round(results[0]["loss"], 6),
        }
    for name in contenders:
        if name != "chunked" and "s" in line[name] and "s" in line["chunked"]:
            line[f"time_over_{name}"] = round(line["chunked"]["s"] / line[name]["s"], 3)
    print(json.dumps(line), flush=True)
    return line


def growth(args: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Return the chunked objective's extra memory for a quarter, all and twice the positions."""
    extra = {}
    for positions in (max(args.positions // 4, 1), args.positions, 2 * args.positions):
        settings = {"contender": "chunked", "divergence": args.divergences[0], "vocabularies": [vocabulary]}
        result = in_a_process(args, **settings, positions=positions)
        extra[str(positions)] = round(result["extra_gb"], 3) if "extra_gb" in result else result["failed"]
    line = {"vocabulary": vocabulary, "divergence": args.divergences[0], "chunked_extra_gb_at_positions": extra}
    print(json.dumps(line), flush=True)
    return line


def main() -> None:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096, help="supervised positions, N")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=list(HIDDEN), help="ids, V")
    parser.add_argument("--divergences", nargs="+", default=list(DIVERGENCES), choices=DIVERGENCES)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of states and weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory_limit_gb", type=float, default=round(0.85 * available, 1))
    parser.add_argument("--quick", action="store_true", help="256 positions x 8,192 ids, one round")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--divergence", choices=DIVERGENCES, help=argparse.SUPPRESS)
    parser.add_argument("--gradient_errors", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args)))
        return
    if args.gradient_errors:
        print(json.dumps(gradient_errors(args)))
        return
    if args.quick:
        args.positions, args.vocabularies, args.rounds = 256, [8192], 1
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    contenders = list(args.contenders)
    try:
        versions["trl"] = metadata.version("trl")
    except metadata.PackageNotFoundError:
        print("trl is not installed and not compared", flush=True)
        contenders = [name for name in contenders if name != "trl"]
    lines = []
    for vocabulary in args.vocabularies:
        lines += [compare(args, vocabulary, divergence, contenders) for divergence in args.divergences]
        lines.append(growth(args, vocabulary))
        errors = in_a_process(args, gradient_errors=True, vocabularies=[vocabulary])
        lines.append({"vocabulary": vocabulary, "gradient_error": errors})
        print(json.dumps(lines[-1]), flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    summary = {
        "benchmark": "objective",
        "device": device,
        "dtype": args.dtype,
        "memory_budget_gb": MEMORY_BUDGET / 1e9,
        "versions": versions,
        "lines": lines,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
