"""Golden runs: 20 optimizer steps of six methods and one rollout of every policy, pinned in `golden_losses.json`.

The laws in the other tests say what is right; these numbers say that nothing moved. They change by decision only: run

    python tests/test_golden.py --write

look at the difference, and say in the commit why every changed number had to change. A change that must alter nothing
at all, not even the last bit, is compared on one machine with

    python tests/test_golden.py --digest

before and after it: one sha256 per run, over the unrounded logs, every rollout and the trained weights.

Tokens and authors are pinned exactly: drafts have a fixed length, noise is a function of seed, row and position, and a
token changes only where two noisy scores tie to rounding. Losses and shares are pinned to `TOLERANCE`, relative. With
vector instructions of 128, 256 and 512 bits, one thread and two, with oneDNN and without, the twenty steps of a run
differed by 9e-7 at most and no token differed: the tolerance is twenty times that, for processors that were not
tried, and a fiftieth of what a loss scaled by 1.001 changes.
"""

import argparse
import contextlib
import hashlib
import json
import math
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_tokenizer, build_trainer

import switchkd
from switchkd.methods import METHODS

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 20
TOLERANCE = 2e-5

COMMON = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.05, "max_grad_norm": 1.0}
TRAINED: dict[str, dict[str, Any]] = {
    "sft": {},
    "kd": {},
    "gkd": {},
    # A fixed draft length makes runs repeat: "auto" follows the clock. The pins were made with this threshold.
    "switch": {"draft_length": "4", "initial_threshold": 0.3},
    "distillm": {"on_policy_fraction": 0.5, "replay_capacity": 16, "eval_strategy": "steps", "eval_steps": 5},
    "minillm": {"draft_length": "4"},
}
#: One rollout of each; every policy that is published or a control of one, where it mixes both authors.
ROLLED_OUT: dict[str, dict[str, Any]] = {
    "opd": {},
    "seqkd": {},
    "minillm": {},
    "switch": {"initial_threshold": 0.5, "horizon": 16},
    "skd": {"teacher_top_k": 5},
    "adaswitch": {"divergence_multiple": 1.2, "divergence_window": 3},
    "ssd": {"initial_threshold": 0.4, "minimum_leg": 2},
    "relay": {"leg_length": 3, "leg_budget": 2},
    "trb": {},
    "random": {"teacher_probability": 0.4},
    "teacher_first": {"teacher_tokens": 6},
    "teacher_prefix": {"teacher_tokens": 9},
    "student_first": {"switch_position": 6},
    "student_entropy": {"initial_threshold": 3.0, "horizon": 16},
    "student_confidence": {"initial_threshold": 2.0, "horizon": 16},
}
#: What is pinned of a step or an evaluation, where the method logs it.
PINNED = ("loss", "rollout/teacher_share", "eval_loss", "eval_cross_entropy", "rollout/on_policy_fraction")


def pair() -> tuple[Any, Any]:
    """A student and its teacher, related as real pairs are: the student is the teacher with noise on its weights."""
    student, teacher = build_gpt2(seed=2, train=True), build_gpt2(seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return student, teacher


def trained(method: str, folder: Path) -> tuple[list[dict[str, float]], bytes]:
    """Return the log of a run, and everything it computed to the last bit."""
    student, teacher = pair()
    options = {"method": method, **COMMON, **TRAINED[method]}
    if "eval_strategy" in options:
        options["eval_dataset"] = Dataset.from_list(RAGGED_ROWS[:4])
    trainer = build_trainer(folder, student, None if method == "sft" else teacher, **options)
    trainer.train()
    kept = [
        {name: float(value) for name, value in entry.items() if name in PINNED} for entry in trainer.state.log_history
    ]
    weights = torch.cat([value.detach().flatten() for value in trainer.model.parameters()])
    return [entry for entry in kept if entry], weights.numpy().tobytes()


def rolled_out(method: str) -> switchkd.Rollout:
    """Return six rollouts of ragged prompts under the policy of a method."""
    student, teacher = pair()
    tokenizer = build_tokenizer()
    prompts = tokenizer([row["prompt"] for row in RAGGED_ROWS[:6]], padding=True, return_tensors="pt")
    return switchkd.roll_out(
        student,
        teacher,
        prompts["input_ids"],
        prompts["attention_mask"],
        policy=METHODS[method].policy_class().of(**{**METHODS[method].policy_defaults, **ROLLED_OUT[method]}),
        max_new_tokens=16,
        seed=7,
        temperature=0.7,
        draft_length=4,
        eos_token_id=tokenizer.eos_token_id,
    )


def rows_of(rollout: switchkd.Rollout) -> list[dict[str, Any]]:
    """Return of each row the authors, a letter each, and the tokens."""
    return [
        {"author": "".join(author[0] for author in record["author"]), "ids": record["completion_ids"]}
        for record in rollout.to_dicts()
    ]


def differences(found: list[dict[str, float]], pinned: list[dict[str, float]]) -> Iterator[str]:
    """Name every number that is not the pinned one."""
    if len(found) != len(pinned):
        yield f"{len(found)} entries, pinned {len(pinned)}"
    for index, (new, old) in enumerate(zip(found, pinned, strict=False)):
        if new.keys() != old.keys():
            yield f"entry {index}: keys {sorted(new)}, pinned {sorted(old)}"
        for name in sorted(new.keys() & old.keys()):
            if not math.isclose(new[name], old[name], rel_tol=TOLERANCE, abs_tol=1e-9):
                yield f"entry {index}: {name} {new[name]:.9g}, pinned {old[name]:.9g}"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", TRAINED)
def test_the_losses_of_twenty_steps_are_the_pinned_ones(method, golden, tmp_path):
    found, _ = trained(method, tmp_path)
    assert sum("loss" in entry for entry in found) == STEPS
    assert list(differences(found, golden["trained"][method])) == []


@pytest.mark.parametrize("method", ROLLED_OUT)
def test_the_tokens_and_authors_of_a_rollout_are_the_pinned_ones(method, golden):
    assert rows_of(rolled_out(method)) == golden["rolled_out"][method]


def test_every_policy_is_pinned(golden):
    policies = {name: method.policy for name, method in METHODS.items() if method.policy is not None}
    assert set(policies.values()) == {policies[name] for name in ROLLED_OUT}
    assert list(golden["trained"]) == list(TRAINED) and list(golden["rolled_out"]) == list(ROLLED_OUT)


def test_a_loss_off_by_a_thousandth_is_noticed(golden):
    """Of the comparison, not of the training: each pinned value moved by 0.1% is reported."""
    for pinned in golden["trained"].values():
        moved = [{name: value * 1.001 for name, value in entry.items()} for entry in pinned]
        numbers = sum(value != 0.0 for entry in pinned for value in entry.values())
        assert len(list(differences(moved, pinned))) == numbers
        assert list(differences(pinned, pinned)) == []


def exact_bytes(method: str, log: list[dict[str, float]]) -> bytes:
    """Return the names and the unrounded values of a log."""
    values = [(name, value) for entry in log for name, value in sorted(entry.items())]
    return method.encode() + b"".join(name.encode() + struct.pack("<d", value) for name, value in values)


def measure(show: Any = None) -> dict[str, Any]:
    """Return everything that is pinned; `show(kind, method, bytes)` is called with the exact values of each run."""
    numbers: dict[str, Any] = {"trained": {}, "rolled_out": {}}
    for method in TRAINED:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            log, weights = trained(method, Path(folder))
        numbers["trained"][method] = [{name: float(f"{value:.9g}") for name, value in entry.items()} for entry in log]
        if show:
            show("trained", method, exact_bytes(method, log) + weights)
    for method in ROLLED_OUT:
        rollout = rolled_out(method)
        numbers["rolled_out"][method] = rows_of(rollout)
        if show:
            parts = (rollout.completion_ids, rollout.author, rollout.divergence, rollout.threshold)
            show("rolled_out", method, b"".join(part.contiguous().numpy().tobytes() for part in parts))
    return numbers


def written(numbers: dict[str, Any]) -> str:
    """Return the file: one line per step or row, so that a difference shows where it is."""
    kinds = [
        f' "{kind}": {{\n'
        + ",\n".join(
            f'  "{method}": [\n' + ",\n".join(f"   {json.dumps(entry)}" for entry in entries) + "\n  ]"
            for method, entries in methods.items()
        )
        + "\n }"
        for kind, methods in numbers.items()
    ]
    return "{\n" + ",\n".join(kinds) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help=f"Replace {GOLDEN.name} by what the code computes now.")
    parser.add_argument("--digest", action="store_true", help="Print the sha256 of the exact values, run by run.")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.digest):
        parser.error("give --write or --digest")
    whole = hashlib.sha256()

    def show(kind: str, method: str, exact: bytes) -> None:
        whole.update(exact)
        if arguments.digest:
            print(f"{hashlib.sha256(exact).hexdigest()}  {kind} {method}")

    numbers = measure(show)
    if arguments.digest:
        print(f"{whole.hexdigest()}  all")
    if arguments.write:
        GOLDEN.write_text(written(numbers), encoding="utf-8")
        print(f"wrote {GOLDEN}")


if __name__ == "__main__":
    main()
