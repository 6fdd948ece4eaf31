"""Numbers that are nan or inf: found in their step, left out, counted, kept; and text that has gone bad is said."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.tiny import EOS_ID, RAGGED_ROWS, build_gpt2, build_llama
from helpers.training import largest_difference, parameters
from transformers import TrainerCallback

from switchkd.errors import UserError
from switchkd.rollout import Author, Rollout
from switchkd.training.log import TextWatch
from switchkd.training.skipping import SKIPPED_FILE, StepGuard, magnitude

PLAIN = {"initial_threshold": 0.3, "draft_length": "4", "learning_rate": 0.01}


class Weights(TrainerCallback):
    """The weights after every step."""

    def __init__(self):
        self.seen = [None]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(parameters(model))


def with_loss(trainer, loss):
    """Let a function stand for `StepLoss.loss`."""
    kind = type(trainer.step_loss)
    object.__setattr__(trainer.step_loss, "__class__", type("Other", (kind,), {"loss": loss}))


def ruin(trainer, losses):
    """Multiply the micro-batch losses of these numbers, counted from 0, by what is given."""
    count, loss = -1, type(trainer.step_loss).loss

    def ruined(self, *args):
        nonlocal count
        count += 1
        return loss(self, *args) * losses.get(count, 1.0)

    with_loss(trainer, ruined)


def kept(trainer):
    return [json.loads(line) for line in (Path(trainer.args.output_dir) / SKIPPED_FILE).read_text().splitlines()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_a_step_with_one_bad_micro_batch_changes_nothing_and_is_kept(make_trainer, value, optimizer):
    """The run ended there and the batch was gone."""
    weights = Weights()
    options = {"max_steps": 4, "logging_steps": 2, "weight_decay": 0.1, "callbacks": [weights]}
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), **PLAIN, **options, **shape, optim=optimizer)
    ruin(trainer, {4 + 2: value})
    with pytest.warns(UserWarning, match=f"step 2 is skipped: the loss is {value}; the rows are in {SKIPPED_FILE}"):
        trainer.train()
    assert largest_difference(weights.seen[1], weights.seen[2]) == 0.0
    assert largest_difference(weights.seen[2], weights.seen[3]) > 0.0
    rows = kept(trainer)
    assert [(row["step"], row["micro_batch"]) for row in rows] == [(2, number // 2) for number in range(8)]
    assert [row["loss"] == str(value) for row in rows] == [False] * 4 + [True] * 2 + [False] * 2
    assert sorted(row["prompt"] for row in rows) == sorted(row["prompt"] for row in RAGGED_ROWS)
    for row in rows:
        assert len(row["author"]) == len(row["completion_ids"]) and {"student", "teacher"} >= set(row["author"])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["skipped_steps"] for log in logs] == [1, 1] and trainer.skipped_steps == 1
    assert all(math.isfinite(log["loss"]) for log in logs)


def test_the_mean_of_a_log_is_one_over_the_steps_that_count(make_trainer):
    logs = []
    for bad, every in (({}, 1), ({1: math.nan}, 2)):
        trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), **PLAIN, max_steps=2, logging_steps=every)
        ruin(trainer, bad)
        with pytest.warns(UserWarning, match="skipped") if bad else contextlib.nullcontext():
            trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[1] == logs[0][:1]


def test_a_gradient_that_is_nan_under_a_finite_loss_is_found(make_trainer):
    weights, calls = Weights(), []
    trainer = make_trainer(build_llama(), build_llama(seed=1), **PLAIN, max_steps=3, callbacks=[weights])

    def spoil(gradient):
        calls.append(1)
        return gradient * math.nan if len(calls) == 2 else gradient

    trainer.model.model.norm.weight.register_hook(spoil)
    with pytest.warns(UserWarning, match="step 2 is skipped: the gradient is nan"):
        trainer.train()
    assert largest_difference(weights.seen[1], weights.seen[2]) == 0.0
    assert {row["step"] for row in kept(trainer)} == {2}


def test_weights_that_an_update_has_ruined_are_found_in_that_step(make_trainer, tmp_path):
    """They were found a step later."""

    class Ruin(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.lm_head.weight.data[0, 0] = math.nan

    trainer = make_trainer(
        build_gpt2(), build_gpt2(seed=1), **PLAIN, max_steps=4, callbacks=[Ruin()], save_strategy="steps", save_steps=1
    )
    with pytest.raises(UserError, match=r"hold nan or inf, first .* after step 2; not saved"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert {row["step"] for row in kept(trainer)} == {2}


@pytest.mark.parametrize(("most", "step"), [(0, 1), (2, 3)])
def test_a_run_ends_in_one_line_after_max_skipped_steps(make_trainer, most, step):
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), **PLAIN, max_steps=9, max_skipped_steps=most)
    before = parameters(trainer.model)
    ruin(trainer, dict.fromkeys(range(99), math.nan))
    ends = pytest.raises(UserError, match=f"the loss is nan in step {step}; .* more than max_skipped_steps={most}: the")
    with ends, pytest.warns(UserWarning) if most else contextlib.nullcontext():
        trainer.train()
    assert largest_difference(before, parameters(trainer.model)) == 0.0
    assert {row["step"] for row in kept(trainer)} == set(range(1, step + 1))


@pytest.mark.parametrize(
    ("steps", "bad", "message"), [(1, [0], "the only step was skipped"), (4, [2, 3], "the last 2 steps were skipped")]
)
def test_a_run_that_ends_in_skipped_steps_does_not_end_well(make_trainer, steps, bad, message):
    """With too few steps to exceed the limit it ended with exit code 0 and a student that gives nan."""
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), **PLAIN, max_steps=steps)
    ruin(trainer, dict.fromkeys(bad, math.inf))
    with pytest.raises(UserError, match=f"{message}; the model is not saved"), pytest.warns(UserWarning):
        trainer.train()


def test_the_count_of_skipped_steps_survives_a_resume(make_trainer):
    saved = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(build_gpt2(), build_gpt2(seed=1), **PLAIN, **saved)
    ruin(first, {1: math.nan})
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        first.train()
    again = make_trainer(build_gpt2(), build_gpt2(seed=1), **PLAIN, **saved)
    again.train(resume_from_checkpoint=f"{again.args.output_dir}/checkpoint-2")
    assert again.skipped_steps == 1
    assert largest_difference(parameters(first.model), parameters(again.model)) == 0.0
    loss = [[log["train_loss"] for log in one.state.log_history if "train_loss" in log] for one in (first, again)]
    assert loss[0] == loss[1]


def test_a_micro_batch_is_added_without_asking_the_device():
    guard = StepGuard()
    guard.begin(torch.zeros((), device="meta"))
    guard.add(torch.zeros((), device="meta"))  # whoever reads it fails


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_number_is_seen_among_many(bad, dtype):
    tensors = [torch.full((70_000,), 60.0, dtype=dtype), torch.ones(3, 3, dtype=dtype), torch.zeros(0, dtype=dtype)]
    assert math.isfinite(float(magnitude(tensors))) and float(magnitude([])) == 0.0
    tensors[1][2, 1] = bad
    assert not math.isfinite(float(magnitude(tensors)))


def test_a_learning_rate_that_ruins_the_student_on_the_command_line(models, tmp_path, run):
    from helpers.command_line import train_options

    words = train_options(models, tmp_path / "run", "--learning_rate", 1e9, "--optim", "sgd", "--max_grad_norm", 0)
    words[words.index("--max_steps") + 1] = 9
    code, _, err = run(*words)
    assert code == 2 and "Traceback" not in err, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("switchkd: error: the loss is nan in step 5; 4 steps would not update the student"), err
    assert "lower learning_rate (now 1e+09)" in last
    assert (tmp_path / "run" / SKIPPED_FILE).is_file()


# ---- batches that do not fit into the memory


@pytest.mark.parametrize("where", ["loss", "rollout"])
def test_auto_find_batch_size_works_with_rollouts(make_trainer, monkeypatch, where):
    from switchkd.training import text

    trainer = make_trainer(
        build_gpt2(), build_gpt2(seed=1), max_steps=3, auto_find_batch_size=True, method="distillm",
        eval_dataset=Dataset.from_list(RAGGED_ROWS), eval_strategy="steps", eval_steps=1, on_policy_fraction=1.0,
        learning_rate=0.01,
    )  # fmt: skip
    sizes = []
    if where == "loss":
        loss = type(trainer.step_loss).loss

        def limited(self, model, teacher, inputs, *args):
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > 5 and len(sizes) > 1:  # one step fits
                raise RuntimeError("CUDA out of memory.")
            return loss(self, model, teacher, inputs, *args)

        with_loss(trainer, limited)
    else:
        roll_out = text.roll_out

        def limited(*args, max_active_rows, **options):
            sizes.append(max_active_rows)
            if max_active_rows > 0.6 * trainer.rollout_rows:
                raise RuntimeError("CUDA out of memory.")
            return roll_out(*args, max_active_rows=max_active_rows, **options)

        monkeypatch.setattr(text, "roll_out", limited)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer._train_batch_size <= 5
    assert sizes[-1] < sizes[0]
    # What the attempts with larger batches wrote is not among the stored rows.
    assert len(trainer.text.store) == 8 + trainer._train_batch_size  # an epoch of 8 rows in two steps, and a third


# ---- degenerate text


def text_of(rows, ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    nothing = torch.full(ids.shape, math.nan)
    prompts = torch.ones(rows, 1, dtype=torch.int64)
    author = torch.full(ids.shape, int(Author.STUDENT), dtype=torch.uint8)
    return Rollout(prompts, prompts.bool(), ids, mask, author, nothing, nothing)


def warnings_of(ids, limit, times=7):
    watch = TextWatch(EOS_ID, ids.shape[1])
    return [warning for _ in range(times) if (warning := watch.add(text_of(len(ids), ids), limit))]


def test_degenerate_rollouts_are_said_once_with_what_to_change():
    various = torch.arange(4 * 20).view(4, 20) % 90
    ended = various.clone()
    ended[0, -1] = EOS_ID
    assert warnings_of(ended, 20) == []
    assert warnings_of(various, 20, times=4) == []
    [cut] = warnings_of(various, 20)
    assert "were cut at max_completion_length=20: raise it" in cut
    assert warnings_of(various, 10) == []  # a shorter limit on purpose
    same = torch.full((4, 20), 7)
    same[:, -1] = EOS_ID
    [repeats] = warnings_of(same, 20)
    assert "100% of the texts of the last 5 rollouts are one token again and again: lower learning_rate" in repeats
    same[1:3] = various[1:3]
    assert warnings_of(same, 20) == []  # half of them


def test_a_training_says_that_no_text_ends(make_trainer):
    student = build_gpt2()
    trainer = make_trainer(student, build_gpt2(seed=1), **PLAIN, max_steps=6, max_completion_length=3)
    trainer.eos_token_id = 0
    trainer._text_watch = TextWatch(0, 3)
    with pytest.warns(UserWarning, match="cut at max_completion_length=3"):
        trainer.train()
