"""Kills commands and damages their files at random; the same command, given again, must end as if nothing had been.

Each case runs one command on tiny models. It is killed (SIGKILL, SIGTERM) at a random time, or its files may not grow
beyond a random size (a full disk); in between a file of what it left may be cut, changed by a byte or removed. The same
command is given until it ends. Then weights, rows of the log and scores must be those of the run that was left alone,
bit for bit; or it refuses in one line what only its user can replace. A line of JSON on standard output is the result.

    python benchmarks/chaos.py --minutes 30 --seed 0 [--only train compare] [--cases 10]
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_tokenizer

# What the commands import is imported here, once.
import switchkd.commands.evaluate
import switchkd.commands.scoring
import switchkd.commands.train_run
import switchkd.compare.command
import switchkd.recipes.command  # noqa: F401
from switchkd.__main__ import main as main_of_switchkd

#: How often the same command may be given before a run counts as lost.
MOST_CALLS = 12
#: Of results: what the clock writes, and where.
TIMES = ("seconds", "_s", "_runtime", "_per_second", "tokens_per_s", "output_dir", "model_name_or_path", "dataset_name")
#: Files that hold results and that nothing reads back before a command ends.
COMPARED = ("metrics.jsonl", "rows.jsonl", "summary.json", "results.json", "model.safetensors", "teacher_text.jsonl")
#: A finished part's results are not damaged: nothing but the user's copy of them is left then.
SPARED = ("summary.json", "rows.jsonl", "model.safetensors", "prepared.json", "train.jsonl")


@dataclass
class Counts:
    """What happened."""

    cases: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    calls: int = 0
    equal: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def make_inputs(folder: Path) -> None:
    """Models, tokenizer, data, and the config files of a comparison and a recipe."""
    tokenizer = build_tokenizer()
    for name, model in {"student": build_gpt2(seed=1), "teacher": build_gpt2(seed=2, n_layer=3)}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = RAGGED_ROWS * 4
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = [{"prompt": row["prompt"] + str(i), "completion": row["completion"]} for i, row in enumerate(rows)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    train = {
        **{"model_name_or_path": str(folder / "student"), "teacher_model_name_or_path": str(folder / "teacher")},
        **{"dataset_name": str(folder / "train.jsonl"), "max_completion_length": 8, "per_device_train_batch_size": 4},
        **{"use_cpu": True, "max_steps": 12, "save_steps": 2, "save_total_limit": 2, "logging_steps": 3},
    }
    score = {"dataset_name": str(folder / "train.jsonl"), "max_completion_length": 8, "decoding_seeds": [1, 2]}
    steady = {"initial_threshold": 0.3, "draft_length": 4}
    compare = {
        **{"train": train, "runs": {"sft": {}, "switch": steady}, "seeds": [0], "threads": 1},
        "evaluate": {**score, "batch_size": 4},
    }
    stages: dict[str, Any] = {
        "data": {"command": "prepare", "source": "custom", "dataset_name": str(folder / "records.jsonl")},
        "student": {"command": "train", **train, **steady, "dataset_name": "$stages.data"},
        "scores": {"command": "evaluate", **score, "model_name_or_path": "$stages.student", "batch_size": 4},
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(compare))
    (folder / "chain.yaml").write_text(
        yaml.safe_dump({"summary": "all stages", "settings": {}, "stages": stages}, sort_keys=False)
    )
    (folder / "train.yaml").write_text(yaml.safe_dump({**train, **steady}))
    text = {**train, "method": "seqkd", "max_steps": 4}
    (folder / "seqkd.yaml").write_text(yaml.safe_dump(text))


def commands(inputs: Path) -> dict[str, list[str]]:
    """Name -> the command, but for its --output_dir."""
    score = ["--dataset_name", inputs / "train.jsonl", "--max_completion_length", 8, "--decoding_seeds", "1,2,3"]
    pair = ["--model_name_or_path", inputs / "student", "--teacher_model_name_or_path", inputs / "teacher"]
    auto = ["--resume_from_checkpoint", "auto"]
    found: dict[str, list[Any]] = {
        "train": ["train", "--config", inputs / "train.yaml", *auto],
        "seqkd": ["train", "--config", inputs / "seqkd.yaml", *auto],
        "evaluate": ["evaluate", *pair, *score, "--batch_size", 2, "--resume"],
        "compare": ["compare", "--config", inputs / "compare.yaml"],
        "prepare": ["prepare", "--source", "custom", "--dataset_name", inputs / "records.jsonl"],
        "recipe": ["recipe", "run", inputs / "chain.yaml"],
    }
    return {name: [str(word) for word in words] for name, words in found.items()}


def call(words: list[str], folder: Path, *, kill: tuple[int, float] | None = None, room: int | None = None) -> Any:
    """Run a command in a process of its own; return its exit code, its standard error and how long it took.

    The process is a fork of this one, which has imported the libraries: a start from nothing would be most of the time,
    and most kills would meet an import.
    """
    reading, writing = os.pipe()  # a file would not grow beyond the room either
    os.set_blocking(reading, False)
    sys.stderr.flush()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _become(["switchkd", *words, "--output_dir", str(folder)], writing, room)
    os.close(writing)
    said = b""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            while part := os.read(reading, 1 << 16):
                said += part
        if done:
            break
        if kill is not None and time.perf_counter() - started > kill[1]:
            try:
                # As when the machine goes: all of it at once.
                (os.killpg if kill[0] == signal.SIGKILL else os.kill)(child, kill[0])
            except ProcessLookupError:
                os.kill(child, kill[0])  # it has no group of its own yet
            kill = None
        time.sleep(0.005)
    os.close(reading)
    return os.waitstatus_to_exitcode(status), said.decode(errors="replace"), time.perf_counter() - started


def _become(words: list[str], said: int, room: int | None) -> None:
    """Be the command; does not return."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.argv = words
        if room is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        code = main_of_switchkd(words[1:])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def damage(folder: Path, chance: random.Random) -> str | None:
    """Damage a file of a stopped run; return what was done to which."""
    files = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size and not _is_spared(path)
    ]
    if not files:
        return None
    path, kind = chance.choice(files), chance.choice(["cut", "flip", "remove"])
    data = bytearray(path.read_bytes())
    if kind == "remove":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: chance.randrange(len(data))])
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    return f"{kind} {path.relative_to(folder)}"


def _is_spared(path: Path) -> bool:
    ended = path.name == "metrics.jsonl" and (path.parent / "summary.json").is_file()
    return (path.name in SPARED or ended) and "checkpoint-" not in str(path)


def state(folder: Path) -> dict[str, Any]:
    """What a finished run is compared by: weights, rows and scores, without what the clock wrote."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name not in COMPARED and not (path.suffix == ".jsonl" and folder == path.parent):
            continue
        if path.name in ("answers.jsonl", "skipped_steps.jsonl", "completions.jsonl") or "checkpoint-" in name:
            continue
        if path.suffix == ".safetensors":
            found |= {f"{name} {key}": value for key, value in load_file(path).items()}
        else:
            found[name] = _read(path)
    return found


def _read(path: Path) -> Any:
    """A file of JSON or JSON Lines without the times; text that is neither is a difference, not an error of ours."""
    try:
        if path.suffix == ".jsonl":
            return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        return _timeless(json.loads(path.read_text()))
    except ValueError as error:
        return f"damaged: {error}"


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not key.endswith(TIMES) and key != "options"}
        return {key: _timeless(item) for key, item in kept.items() if key != "stage_seconds"}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def difference(one: dict[str, Any], two: dict[str, Any]) -> str | None:
    """The first thing in which two final states differ."""
    if one.keys() != two.keys():
        return f"files: {sorted(set(one) ^ set(two))[:4]}"
    for name, value in one.items():
        same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        if not same:
            return name
    return None


def one_case(
    name: str,
    words: list[str],
    folder: Path,
    whole: dict[str, Any],
    seconds: float,
    chance: random.Random,
    counts: Counts,
) -> None:
    """Interrupt a command one to three times, then let it end, and count how that went."""
    history: list[str] = []
    faults = chance.choice([1, 1, 2, 3])
    refusals = 0
    for _ in range(MOST_CALLS):
        kill = room = None
        if len(history) < faults:
            kind = chance.choice(["SIGKILL", "SIGKILL", "SIGTERM", "full disk"])
            if kind == "full disk":
                room = int(10 ** chance.uniform(2, 5.6))
                history.append(f"room for files of {room} bytes")
            else:
                after = chance.uniform(0.0, 1.0) * seconds
                kill = (signal.Signals[kind], after)
                history.append(f"{kind} after {after:.2f} s")
            counts.faults[kind] += 1
        code, said, _ = call(words, folder, kill=kill, room=room)
        counts.calls += 1
        place = f"{name}: {'; '.join(history)}"
        if "Traceback (most recent call last)" in said:
            counts.tracebacks.append(f"{place}: {said.strip().splitlines()[-1][:200]}")
            return
        if code == 0 and kill is None and room is None:
            break
        if code == 0:  # it was faster, or had room enough
            break
        if kill is None and room is None and code == 2:
            # Nothing was done to this call: it refuses what it found.
            refusals += 1
            last = said.strip().splitlines()[-1]
            if name == "prepare" and "holds another run" in last and (folder / "prepared.json").is_file():
                break  # it had ended, and was killed on its way out
            damaged = any(word in " ".join(history) for word in ("cut ", "flip ", "remove "))
            if damaged and last.startswith("switchkd: error: "):
                counts.refused += 1
                return
            counts.lost.append(f"{place}: {last[:300]}")
            return
        if kill is not None and chance.random() < 0.5 and (done := damage(folder, chance)):
            history.append(done)
            counts.faults[done.split()[0]] += 1
            faults += 1  # what was damaged does not take the place of a kill
    else:
        counts.lost.append(f"{name}: {'; '.join(history)}: no end after {MOST_CALLS} calls")
        return
    found = difference(whole, state(folder))
    if found is None:
        counts.equal += 1
    else:
        counts.different.append(f"{name}: {'; '.join(history)}: {found}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--cases", type=int, help="end after this many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(commands(Path())), default=list(commands(Path())))
    options = parser.parse_args(arguments)
    began, counts = time.perf_counter(), Counts()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        inputs, runs = Path(place) / "inputs", Path(place) / "runs"
        make_inputs(inputs)
        chosen = {name: words for name, words in commands(inputs).items() if name in options.only}
        whole, seconds = {}, {}
        for name, words in chosen.items():
            # Twice in one place, then compared: paths stand in results, and what differs by itself proves nothing.
            states = []
            for _ in range(2):
                shutil.rmtree(runs / name, ignore_errors=True)
                code, said, seconds[name] = call(words, runs / name)
                assert code == 0, f"{name} alone failed: {said}"
                states.append(state(runs / name))
            assert (found := difference(*states)) is None, f"{name} differs from itself in {found}"
            whole[name] = states[0]
        order = list(chosen)
        while (time.perf_counter() - began) / 60 < options.minutes:
            number = sum(counts.cases.values())
            if options.cases is not None and number >= options.cases:
                break
            name = order[number % len(order)]
            shutil.rmtree(runs / name, ignore_errors=True)
            one_case(name, chosen[name], runs / name, whole[name], seconds[name], chance, counts)
            counts.cases[name] += 1
            bad = [*counts.lost, *counts.tracebacks, *counts.different]
            print(f"{number + 1}: {name}, {len(bad)} bad" + (f", last {bad[-1]}" if bad else ""), file=sys.stderr)
    result = {
        "benchmark": "chaos",
        "seed": options.seed,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "cases": dict(counts.cases),
        "faults": dict(counts.faults),
        "calls": counts.calls,
        "equal": counts.equal,
        "refused": counts.refused,
        "lost": counts.lost,
        "tracebacks": counts.tracebacks,
        "silent_differences": counts.different,
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
