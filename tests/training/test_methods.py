"""Every method trains every family as its rule says, and methods coincide where their rules do."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.tiny import BUILDERS, EOS_ID, RAGGED_ROWS, build_gpt2, build_llama

from switchkd.divergences import LN_2
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.methods import METHODS
from switchkd.policies import BlendPolicy, SwitchPolicy
from switchkd.rollout import Author

WITH_HINTS = Dataset.from_list([{**row, "teacher_prompt": "Hint! " + row["prompt"]} for row in RAGGED_ROWS])
# What a method needs beyond a teacher and data with answers.
NEEDS = {
    "distillm": {
        "on_policy_fraction": 1.0,
        "replay_capacity": 8,
        "eval_dataset": Dataset.from_list(RAGGED_ROWS[:4]),
        "eval_strategy": "steps",
        "eval_steps": 10,
    },
    "ssd": {"train_dataset": WITH_HINTS},
}
# About half of the tokens of two fresh tiny models lie on each side of these.
MIDDLE = {
    "switch": {"initial_threshold": 0.42, "schedule": "constant"},
    "ssd": {"initial_threshold": 0.3},
    "skd": {"teacher_top_k": 30},
    "adaswitch": {"divergence_multiple": 1.3, "divergence_window": 3},
    "relay": {"trigger_threshold": 0.4, "leg_length": 2, "leg_budget": 2},
    "trb": {"kl_budget": 1.0},
    "teacher_first": {"teacher_tokens": 5},
    "teacher_prefix": {"teacher_tokens": 6},
    "student_first": {"switch_position": 5},
    "student_entropy": {"initial_threshold": 3.3, "schedule": "constant"},
    "student_confidence": {"initial_threshold": 1.5, "schedule": "constant"},
}
ROLLS_OUT = sorted(name for name, method in METHODS.items() if method.may_roll_out)


class Watch:
    """What reached the loss of a run: micro-batches, and the rollouts that were made."""

    def __init__(self, trainer):
        self.trainer, self.inputs, self.rollouts = trainer, [], []
        compute_loss, write = trainer.compute_loss, trainer.text.write

        def watched(model, inputs, return_outputs=False, num_items_in_batch=None):
            self.inputs.append({name: value.clone() for name, value in inputs.items()})
            return compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def watched_write(*args, **kwargs):
            written = write(*args, **kwargs)
            self.rollouts.append(written)
            return written

        trainer.compute_loss, trainer.text.write = watched, watched_write
        trainer.train()

    @property
    def losses(self):
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    @property
    def logged(self):
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]

    @property
    def weights(self):
        return torch.cat([value.detach().flatten() for value in self.trainer.model.parameters()])

    @property
    def authors(self):
        """The writers of the micro-batches; text of the data set has no column `author`."""
        dataset = torch.tensor([int(Author.DATASET)])
        values = {value for inputs in self.inputs for value in inputs.get("author", dataset).unique().tolist()}
        return {Author(value) for value in values} - {Author.NONE}

    @property
    def share(self):
        author = torch.cat([inputs["author"].flatten() for inputs in self.inputs])
        return float((author == Author.TEACHER).sum() / (author != Author.NONE).sum())


@pytest.fixture
def train(make_trainer):
    """`train(student, teacher, **options)`: a watched run."""
    return lambda student, teacher=None, **options: Watch(make_trainer(student, teacher, **options))


def options_of(name, **over):
    return {"method": name, "max_steps": 3, "learning_rate": 0.05, "max_grad_norm": 1.0} | NEEDS.get(name, {}) | over


# ---- every method, every family, three steps


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_every_family_as_its_rule_says(train, family, name):
    build = BUILDERS[family]
    student = build(train=True)
    before = torch.cat([value.detach().flatten() for value in build().parameters()])
    run = train(student, None if name == "ssd" else build(seed=1), **options_of(name, **MIDDLE.get(name, {})))
    method = METHODS[name]
    assert len(run.losses) == 3 and all(map(math.isfinite, run.losses))
    assert float((run.weights - before).abs().max()) > 1e-4
    assert run.trainer.step_loss.objective.name == method.objective
    if not method.may_roll_out:
        assert run.authors == {Author.DATASET} and not run.rollouts
    elif name in ("gkd",):
        assert run.authors == {Author.DATASET, Author.STUDENT}
    elif name in ("imitkd", "opd", "distillm", "truncated"):
        assert run.authors == {Author.STUDENT} and run.share == 0.0
    else:
        assert run.authors == {Author.STUDENT, Author.TEACHER}
        assert 0.05 < run.share < 0.95
    # Every token that was written is supervised, and none besides.
    if run.rollouts and name not in ("gkd", "distillm"):
        assert sum(int(inputs["completion_mask"].sum()) for inputs in run.inputs) == sum(
            int(rollout.completion_mask.sum()) for rollout in run.rollouts
        )


def test_authors_follow_the_rules_that_need_no_distribution(train):
    for name, writer in (("teacher_first", lambda t: t < 5), ("student_first", lambda t: t >= 5)):
        run = train(build_gpt2(), build_gpt2(seed=1), **options_of(name, **MIDDLE[name]))
        for inputs in run.inputs:
            place = torch.arange(inputs["author"].shape[1]).expand_as(inputs["author"])
            assert torch.equal((inputs["author"] == Author.TEACHER)[inputs["completion_mask"]],
                               writer(place)[inputs["completion_mask"]])  # fmt: skip


# ---- where methods coincide


def same(first, second, tolerance=2e-6):
    assert first.losses == pytest.approx(second.losses, abs=1e-5)
    assert float((first.weights - second.weights).abs().max()) < tolerance


@pytest.mark.parametrize("build", [build_gpt2, build_llama])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"method": "switch", "initial_threshold": LN_2, "schedule": "constant"}, {"method": "opd"}),
        ({"method": "opd"}, {"method": "gkd", "on_policy_fraction": 1.0, "divergence": "reverse_kl"}),
        ({"method": "imitkd"}, {"method": "opd", "divergence": "forward_kl"}),
        ({"method": "kd", "divergence": "skewed_reverse_kl", "skew": 0.0},
         {"method": "kd", "divergence": "reverse_kl"}),
        ({"method": "kd", "divergence": "skewed_forward_kl", "skew": 0.0}, {"method": "kd"}),
        ({"method": "skd", "teacher_top_k": 98}, {"method": "imitkd"}),
        ({"method": "relay", "leg_budget": 0}, {"method": "opd"}),
        ({"method": "relay", "leg_length": 1, "leg_budget": 99},
         {"method": "switch", "initial_threshold": 0.3, "schedule": "constant"}),
        ({"method": "adaswitch", "divergence_window": 50}, {"method": "imitkd"}),
        ({"method": "trb", "kl_budget": 0.0}, {"method": "opd"}),
        ({"method": "random", "teacher_probability": 0.0}, {"method": "opd"}),
        ({"method": "teacher_first", "teacher_tokens": 0}, {"method": "opd"}),
        ({"method": "teacher_prefix", "teacher_tokens": 0}, {"method": "opd"}),
        ({"method": "truncated", "truncation_start": 1.0}, {"method": "opd"}),
        ({"method": "student_first", "switch_position": 0},
         {"method": "switch", "initial_threshold": 0.0, "schedule": "constant"}),
        ({"method": "distillm", **NEEDS["distillm"], "replay_capacity": 0}, {"method": "opd",
         "divergence": "skewed_reverse_kl"}),
        ({"method": "kd", "divergence": "cross_entropy"}, {"method": "sft"}),
    ],
    ids=lambda options: options["method"],
)  # fmt: skip
def test_methods_coincide_where_their_rules_do(train, build, one, other):
    common = {"max_steps": 3, "learning_rate": 0.05, "max_grad_norm": 1.0}
    same(train(build(), build(seed=1), **common, **one), train(build(), build(seed=1), **common, **other))


def test_minillm_without_blend_and_without_future_is_the_reverse_kl_of_the_students_text(train):
    """Texts of one token have no return: only the single-step term is left, and its weights are 1."""
    common = {"max_completion_length": 1, "max_steps": 2, "learning_rate": 0.05}
    minillm = train(build_gpt2(), build_gpt2(seed=1), method="minillm", mixture_weight=0.0, **common)
    opd = train(build_gpt2(), build_gpt2(seed=1), method="opd", **common)
    assert float((minillm.weights - opd.weights).abs().max()) < 2e-6


def test_minillm_writes_from_the_blend(train):
    run = train(build_gpt2(), build_gpt2(seed=1), **options_of("minillm", mixture_weight=0.4, max_steps=1))
    rollout = run.rollouts[0]
    expected = roll_out(
        build_gpt2(),
        build_gpt2(seed=1),
        rollout.prompt_ids,
        rollout.prompt_mask,
        policy=BlendPolicy(0.4),
        max_new_tokens=12,
        seed=run.trainer.args.seed,
        eos_token_id=EOS_ID,
    )
    assert torch.equal(rollout.completion_ids, expected.completion_ids)


def test_minillm_refuses_a_sampling_that_its_weights_do_not_know(make_trainer):
    for name, value in (("temperature", 0.7), ("top_k", 5), ("top_p", 0.9)):
        with pytest.raises(UserError, match="it needs temperature 1, top_k 0 and top_p 1"):
            make_trainer(build_gpt2(), build_gpt2(seed=1), method="minillm", **{name: value})
    with pytest.raises(UserError, match="its gradient is that of the reverse KL"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), method="minillm", divergence="forward_kl")


# ---- text that grows, and a teacher who lets go


def test_truncated_text_grows_to_the_full_length_and_begins_as_the_full_text_does(train):
    """The limit is the only difference: a truncated text is the beginning of what opd would have written."""
    options = {"max_steps": 4, "learning_rate": 0.0, "max_completion_length": 12}
    short = train(build_gpt2(), build_gpt2(seed=1), method="truncated", truncation_start=0.25, **options)
    full = train(build_gpt2(), build_gpt2(seed=1), method="opd", **options)
    limits = [3, 8, 12, 12]  # 12 (0.25 + 0.75 p / 0.5) at p = 0, 1/4, 1/2, 3/4, half to even
    for limit, one, other in zip(limits, short.rollouts, full.rollouts, strict=True):
        assert one.completion_ids.shape[1] == limit
        assert torch.equal(one.completion_ids, other.completion_ids[:, :limit])


def test_rollouts_stay_short_with_an_endless_warmup_which_is_a_loss_on_the_first_tokens(train):
    options = {"max_steps": 3, "learning_rate": 0.05}
    short = train(build_gpt2(), build_gpt2(seed=1), method="truncated", truncation_start=0.5,
                  truncation_warmup=math.inf, max_completion_length=12, **options)  # fmt: skip
    same(short, train(build_gpt2(), build_gpt2(seed=1), method="opd", max_completion_length=6, **options))


def test_any_policy_can_be_truncated_and_its_schedule_still_ends_at_the_full_length(train):
    options = {"method": "switch", "truncation_start": 0.5, "max_completion_length": 12, "max_steps": 1}
    options["initial_threshold"] = 0.3
    rollout = train(build_gpt2(), build_gpt2(seed=1), **options).rollouts[0]
    expected = SwitchPolicy(0.3, horizon=12).threshold(torch.arange(6))
    assert rollout.threshold.shape[1] == 6
    assert torch.equal(
        rollout.threshold[rollout.completion_mask], expected.expand(len(rollout), 6)[rollout.completion_mask]
    )


def test_the_teachers_prefix_shortens_from_step_to_step(train):
    run = train(build_gpt2(), build_gpt2(seed=1), **options_of("teacher_prefix", teacher_tokens=6, prefix_decay=0.67))
    written = [int((rollout.author == Author.TEACHER).sum(1).max()) for rollout in run.rollouts]
    assert written == [6, 3, 0]
    whole = train(build_gpt2(), build_gpt2(seed=1), **options_of("teacher_prefix", max_steps=1))
    assert whole.share == 1.0  # k is the length limit where nothing else is said


# ---- sequence-level distillation


def test_seqkd_trains_on_what_the_teacher_wrote_and_keeps_it_as_a_data_set(train, tmp_path):
    run = train(build_gpt2(), build_gpt2(seed=1), **options_of("seqkd"))
    path = Path(run.trainer.args.output_dir) / "teacher_text.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in RAGGED_ROWS]
    written = {(*line["prompt_ids"], *line["completion_ids"]) for line in lines}
    for inputs in run.inputs:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            assert tuple(ids[mask.bool()].tolist()) in written
    # The file is a data set: plain SFT on it is the same training.
    answers = [{"prompt": line["prompt"], "completion": line["completion"]} for line in lines]
    assert len(Dataset.from_list(answers)) == len(RAGGED_ROWS)


def test_seqkd_takes_up_a_file_that_was_cut_off_and_refuses_one_of_another_teacher(make_trainer, tmp_path):
    path = tmp_path / "text.jsonl"
    options = {"method": "seqkd", "teacher_text_file": str(path), "learning_rate": 0.0}
    make_trainer(build_gpt2(), build_gpt2(seed=1), **options).train()
    whole = path.read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20], encoding="utf-8")
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), **options)
    trainer.train()
    assert path.read_text(encoding="utf-8") == whole
    again = make_trainer(build_gpt2(), build_gpt2(seed=1), **options)
    again.train()
    assert again.teacher_passes == 0
    # A changed answer was trained on, a line taken out gave all later prompts another answer: both in silence.
    lines = whole.splitlines(keepends=True)
    changed = [lines[0], lines[1].replace('"completion_ids": [', '"completion_ids": [1, '), *lines[2:]]
    for damaged, message in (
        (changed, "line 2 is damaged; remove that file, or all of it from that line on"),
        (lines[1:], "line 1 does not answer prompt 1 of the data"),
    ):
        path.write_text("".join(damaged), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            make_trainer(build_gpt2(), build_gpt2(seed=1), **options).train()
    path.write_text(whole, encoding="utf-8")
    description = path.with_suffix(".json").read_text(encoding="utf-8")
    path.with_suffix(".json").write_text(description[:30], encoding="utf-8")
    with pytest.raises(UserError, match=r"no text\.json beside it that says who wrote it, or a damaged one"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), **options).train()
    path.with_suffix(".json").write_text(description, encoding="utf-8")
    with pytest.raises(UserError, match="was made with teacher"):
        make_trainer(build_gpt2(), build_gpt2(seed=2), **options).train()
    with pytest.raises(UserError, match=r"was made with temperature 1\.0, this run has 0.5"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), temperature=0.5, **options).train()


# ---- privileged prompts


def test_the_teacher_reads_its_own_prompt_in_the_rollout_and_in_the_loss(train):
    """With the student's prompt for both, a copy of the student never disagrees with it."""
    plain = Dataset.from_list([{**row, "teacher_prompt": row["prompt"]} for row in RAGGED_ROWS])
    alike = train(build_gpt2(), **options_of("ssd", train_dataset=plain, initial_threshold=0.001, max_steps=1))
    assert alike.share == 0.0
    assert alike.losses[0] == pytest.approx(0.0, abs=1e-6)
    hinted = train(build_gpt2(), **options_of("ssd", initial_threshold=0.001, max_steps=1))
    assert hinted.share > 0.2
    assert hinted.losses[0] > 0.01
    for reuse in (True, False):
        run = train(build_gpt2(), **options_of("ssd", initial_threshold=0.05, reuse_teacher_hidden=reuse))
        assert run.losses[0] == pytest.approx(
            train(build_gpt2(), build_gpt2(), **options_of("ssd", initial_threshold=0.05)).losses[0], abs=1e-5
        )


def test_dataset_steps_of_any_method_show_the_teacher_its_own_prompt(train):
    kd = train(build_gpt2(), build_gpt2(), method="kd", train_dataset=WITH_HINTS, max_steps=1)
    assert kd.losses[0] > 0.01
    without = train(build_gpt2(), build_gpt2(), method="kd", max_steps=1)
    assert without.losses[0] == pytest.approx(0.0, abs=1e-6)
    # Nobody reads them in plain fine-tuning.
    train(build_gpt2(), method="sft", train_dataset=WITH_HINTS, max_steps=1)


# ---- replay and the adaptive fraction


def test_distillm_stores_rollouts_and_reuses_them_more_and_more(train):
    options = options_of("distillm", max_steps=30, learning_rate=0.0, replay_capacity=8, per_device_train_batch_size=4)
    run = train(build_gpt2(), build_gpt2(seed=1), **options)
    fresh = len(run.rollouts)
    assert 3 <= fresh < 27
    stored = {tuple(ids.tolist()) for r in run.rollouts for ids in r.completion_ids}
    for inputs in run.inputs:
        length = inputs["completion_mask"].shape[1]
        for ids in inputs["input_ids"][:, -length:]:
            assert any(row[:length] == tuple(ids.tolist()) for row in stored)
    assert run.logged[-1]["rollout/stored_rows"] == 8


def test_distillm_starts_on_the_dataset_and_needs_evaluations(make_trainer, train):
    options = options_of("distillm")
    del options["on_policy_fraction"]
    run = train(build_gpt2(), build_gpt2(seed=1), **options)
    assert run.authors == {Author.DATASET}
    assert run.logged[0]["rollout/on_policy_fraction"] == 0.0
    with pytest.raises(UserError, match="watches the evaluation loss"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), method="distillm")


def test_the_adaptive_fraction_grows_where_the_evaluation_loss_rises(make_trainer):
    options = options_of("distillm", max_steps=4, eval_steps=1, learning_rate=100.0, max_grad_norm=0.0)
    options["on_policy_fraction"] = 0.1
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), **options)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 5  # before the first step, and after each
    reference, expected = losses[0], 0.1
    for loss in losses[1:]:
        if loss >= reference + 0.1:
            expected, reference = expected + 0.1, loss
    assert expected > 0.1
    assert trainer.text.on_policy_fraction == pytest.approx(expected)


# ---- the share controller


def test_target_teacher_share_begins_calibrated_and_is_kept(train):
    options = {"method": "switch", "schedule": "constant", "target_teacher_share": 0.4, "learning_rate": 0.02}
    run = train(build_gpt2(), build_gpt2(seed=1), max_steps=12, max_grad_norm=1.0, **options)
    shares = [entry["rollout/teacher_share"] for entry in run.logged]
    assert abs(sum(shares) / len(shares) - 0.4) < 0.12
    thresholds = [entry["rollout/initial_threshold_nats"] for entry in run.logged]
    assert len(set(thresholds)) > 6
    with pytest.raises(UserError, match="has no threshold to move"):
        train(build_gpt2(), build_gpt2(seed=1), method="random", target_teacher_share=0.4)


@pytest.mark.parametrize("name", ["switch", "distillm"])
def test_resuming_goes_on_with_threshold_store_and_fraction(make_trainer, name):
    options = options_of(
        name,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        optim="adamw_torch",
        learning_rate=1e-2,
        draft_length="4",
        per_device_train_batch_size=4,
    )
    if name == "switch":
        options |= {"target_teacher_share": 0.4, "initial_threshold": 0.3}
    else:
        options |= {"eval_steps": 1, "replay_capacity": 4, "on_policy_fraction": 0.8}
        del options["draft_length"]
    whole = make_trainer(build_gpt2(), build_gpt2(seed=1), **options)
    whole.train()
    resumed = make_trainer(build_gpt2(seed=5), build_gpt2(seed=1), **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    first, second = whole.text.state_dict(), resumed.text.state_dict()
    assert first.keys() == second.keys() and first
    assert first.get("controller") == second.get("controller")
    assert first.get("adaptive") == second.get("adaptive")
