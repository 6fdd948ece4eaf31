"""Laws of training: what one optimizer step sees, divides by, changes and logs."""

import copy
import json
import time
import types

import pytest
import torch
from datasets import Dataset
from helpers.tiny import BUILDERS, EOS_ID, RAGGED_ROWS, build_gpt2, build_llama, build_opt
from helpers.training import MIDDLE, largest_difference, logged, parameters, trained, watch_batches
from safetensors.torch import load_file

from switchkd.data.batches import Rows, padded_batch
from switchkd.divergences import LN_2
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.policies import StudentPolicy, SwitchPolicy
from switchkd.rollout import Author
from switchkd.training import saving

# ---- one optimizer step


@pytest.mark.parametrize("method", ["sft", "kd", "switch"])
def test_eight_micro_batches_of_one_equal_one_of_eight_with_ragged_lengths(make_trainer, method):
    """Token means per micro-batch weigh short answers more: the count must span the whole accumulation window."""
    options = {"method": method} | (MIDDLE if method == "switch" else {})
    ends = [EOS_ID, *range(40, 55)]  # rollouts end early and at different lengths
    runs = []
    for size, accumulation in ((8, 1), (1, 8), (3, 3)):
        student, teacher = build_gpt2(), build_gpt2(seed=1)
        teacher.generation_config.eos_token_id = ends
        trainer = make_trainer(
            student,
            teacher,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.1,
            **options,
        )
        seen = watch_batches(trainer)
        runs.append((trained(trainer), trainer.state.log_history[0]["loss"]))
        lengths = torch.cat([inputs["completion_mask"].sum(-1) for inputs, _ in seen])
        assert len(lengths.unique()) > 3
        assert {int(count) for _, count in seen} == {int(lengths.sum())}
    start = parameters(build_gpt2())
    assert largest_difference(runs[0][0], start) > 1e-3
    for weights, loss in runs[1:]:
        assert largest_difference(runs[0][0], weights) < 1e-6
        assert loss == pytest.approx(runs[0][1], abs=1e-5)


def test_tokens_are_counted_after_the_rollout_not_before(make_trainer):
    """The Trainer counts the labels of the data set; here the rollout replaces them first."""
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), **MIDDLE, per_device_train_batch_size=2, max_steps=2)
    seen = watch_batches(trainer)
    trainer.train()
    for inputs, count in seen:
        assert int(count) == int(inputs["completion_mask"].sum())
    dataset_tokens = sum(len(row["completion"]) + 1 for row in RAGGED_ROWS[:2])
    assert any(int(count) != dataset_tokens for _, count in seen)


@pytest.mark.parametrize("objective", ["cross_entropy", "forward_kl", "reverse_kl", "generalized_jsd"])
def test_loss_of_a_row_is_the_same_alone_and_padded(make_model, make_trainer, objective):
    """GPT-2 with left padding and no position ids reads wrong positions; OPT counts them from the mask."""
    trainer = make_trainer(make_model(), make_model(seed=1), method="kd", divergence=objective)
    rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    together = trainer.compute_loss(trainer.model, padded_batch(Rows(rows), EOS_ID))
    alone = [
        (trainer.compute_loss(trainer.model, padded_batch(Rows([row]), EOS_ID)).item(), len(row["completion_ids"]))
        for row in rows
    ]
    expected = sum(loss * tokens for loss, tokens in alone) / sum(tokens for _, tokens in alone)
    assert together.item() == pytest.approx(expected, abs=1e-5)


def test_trained_end_of_sequence_survives_that_it_also_pads(make_trainer):
    """Masks found by token id lose every EOS where pad = EOS, and a student that never sees one never stops."""
    uncut = Dataset.from_list(RAGGED_ROWS[1:])
    trainer = make_trainer(build_gpt2(), method="sft", train_dataset=uncut, learning_rate=0.1, max_steps=60)
    assert trainer.processing_class.pad_token_id == trainer.processing_class.eos_token_id == EOS_ID
    batch = padded_batch(Rows([trainer.train_dataset[index] for index in range(7)]), EOS_ID)
    length = batch["completion_mask"].shape[1]
    last = batch["completion_mask"].sum(-1) - 1
    assert bool((batch["input_ids"][:, -length:].gather(1, last.unsqueeze(1)) == EOS_ID).all())
    trainer.train()
    row = trainer.train_dataset[1]
    text = roll_out(
        trainer.model,
        None,
        torch.tensor([row["prompt_ids"]]),
        policy=StudentPolicy(),
        max_new_tokens=20,
        temperature=0.0,
        eos_token_id=EOS_ID,
    )
    assert text.completion_ids[0].tolist() == row["completion_ids"]


def test_rollouts_end_at_any_end_of_sequence_of_either_model_and_supervise_it(make_trainer):
    student, teacher = build_gpt2(), build_gpt2(seed=1)
    student.generation_config.eos_token_id = [EOS_ID, *range(20, 40)]
    teacher.generation_config.eos_token_id = list(range(60, 70))
    trainer = make_trainer(student, teacher, **MIDDLE, max_completion_length=30)
    seen = watch_batches(trainer)
    trainer.train()
    ends = {EOS_ID, *range(20, 40), *range(60, 70)}
    assert set(trainer.eos_token_id) == ends
    inputs, _ = seen[0]
    mask = inputs["completion_mask"]
    early = 0
    for ids, keep in zip(inputs["input_ids"][:, -mask.shape[1] :].tolist(), mask.sum(-1).tolist(), strict=True):
        first_end = next((place for place, token in enumerate(ids) if token in ends), None)
        assert keep == (30 if first_end is None else first_end + 1)
        early += first_end is not None
    assert early >= 6


def test_no_supervised_token_gives_zero_loss_not_nan(make_trainer):
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd")
    batch = padded_batch(Rows([trainer.train_dataset[0]]), EOS_ID)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == 0.0
    loss.backward()
    assert all(float(p.grad.abs().sum()) == 0.0 for p in trainer.model.parameters() if p.grad is not None)


# ---- rollouts inside training


@pytest.mark.parametrize("builder", [build_gpt2, build_opt])
def test_dropout_of_the_training_student_is_off_in_rollouts(make_trainer, builder):
    """The Trainer puts the student in train mode; text written under dropout is not the student's."""
    student, teacher = builder(train=True), builder(seed=1)
    trainer = make_trainer(student, teacher, **MIDDLE, disable_dropout=False, per_device_train_batch_size=4)
    seen = watch_batches(trainer)
    modes = []
    forward = student.forward

    def watched(*args, **kwargs):
        modes.append((student.training, torch.is_grad_enabled(), bool(kwargs.get("use_cache"))))
        return forward(*args, **kwargs)

    student.forward = watched
    trainer.train()
    student.forward = forward
    # Every pass but the training one: eval mode, no gradient. Then all modules train again.
    assert modes[-1] == (True, True, False)
    assert all(mode[:2] == (False, False) for mode in modes[:-1])
    assert all(module.training for module in student.modules())
    reference = builder()
    inputs, _ = seen[0]
    prompt_length = inputs["input_ids"].shape[1] - inputs["completion_mask"].shape[1]
    expected = roll_out(
        reference,
        teacher,
        inputs["input_ids"][:, :prompt_length],
        inputs["attention_mask"][:, :prompt_length],
        policy=SwitchPolicy(**MIDDLE),
        max_new_tokens=12,
        seed=trainer.args.seed,
        eos_token_id=EOS_ID,
    )
    assert torch.equal(inputs["input_ids"][:, prompt_length:], expected.completion_ids)


def test_disabled_dropout_is_off_in_training_too(make_model, make_trainer):
    """OPT and LLaMA call the functional form, whose probability is no module."""
    over = {"attention_dropout": 0.3} if make_model is build_llama else {}
    student = make_model(train=True, **over)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert not torch.equal(student(ids).logits, student(ids).logits)
    trainer = make_trainer(student, make_model(seed=1), method="kd", disable_dropout=True)
    trainer.model.train()
    assert torch.equal(trainer.model(ids).logits, trainer.model(ids).logits)


def test_every_row_of_every_step_has_noise_of_its_own(make_trainer):
    """Row ids that forget the step would write the same text for a prompt in every epoch."""
    same = Dataset.from_list([RAGGED_ROWS[1]] * 4)
    trainer = make_trainer(
        build_gpt2(),
        build_gpt2(seed=1),
        **MIDDLE,
        train_dataset=same,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        max_steps=2,
    )
    seen = watch_batches(trainer)
    trainer.train()
    texts = [tuple(ids.tolist()) for inputs, _ in seen for ids in inputs["input_ids"]]
    assert len(texts) == len(set(texts)) == 8


def test_modes_are_restored_after_a_rollout_that_fails(make_trainer):
    class Failing(SwitchPolicy):
        def measure(self, *args, **kwargs):
            raise RuntimeError("measuring failed")

    student = build_gpt2(train=True)
    student.transformer.h[0].eval()
    expected = [module.training for module in student.modules()]
    trainer = make_trainer(student, build_gpt2(seed=1), **MIDDLE)
    trainer.text.policy = Failing(**MIDDLE)
    with pytest.raises(RuntimeError, match="measuring failed"):
        trainer.train()
    # The Trainer's own first act is model.train(); no rollout may leave the student in eval mode.
    assert student.training
    assert [module.training for module in student.modules()] in (expected, [True] * len(expected))


def test_gradient_checkpointing_changes_neither_the_rollout_nor_the_step(make_model, make_trainer):
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            make_model(), make_model(seed=1), **MIDDLE, gradient_checkpointing=checkpointing, learning_rate=0.1
        )
        seen = watch_batches(trainer)
        results.append((trained(trainer), seen[0][0]["input_ids"]))
    assert torch.equal(results[0][1], results[1][1])
    assert largest_difference(results[0][0], results[1][0]) < 1e-6


def test_bf16_autocast_trains_and_stays_close(make_model, make_trainer):
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(make_model(), make_model(seed=1), method="kd", bf16=bf16, max_steps=2, learning_rate=0.1)
        weights = trained(trainer)
        assert all(value.dtype == torch.float32 for value in weights.values())
        losses.append([entry["loss"] for entry in logged(trainer)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_rollouts_run_under_bf16_autocast(make_model, make_trainer):
    trainer = make_trainer(make_model(), make_model(seed=1), **MIDDLE, bf16=True, max_steps=2, learning_rate=0.1)
    trainer.train()
    assert all(0 < entry["rollout/teacher_share"] < 1 for entry in logged(trainer))


def test_wider_teacher_is_compared_on_the_shared_ids_and_never_writes_the_others(make_model, make_trainer):
    teacher = make_model(seed=1, vocab_size=130)
    trainer = make_trainer(make_model(), teacher, initial_threshold=0.0, schedule="constant")
    seen = watch_batches(trainer)
    with pytest.warns(UserWarning, match="98 and 130 ids"):
        trainer.train()
    assert int(seen[0][0]["input_ids"].max()) < 98
    assert teacher.get_output_embeddings().weight.shape[0] == 130


# ---- the teacher


@pytest.mark.parametrize("method", ["kd", "switch"])
def test_teacher_is_never_trainable_and_never_changes(make_model, make_trainer, method):
    teacher = make_model(seed=1, train=True)
    before = parameters(teacher)
    trainer = make_trainer(make_model(), teacher, method=method, max_steps=2)
    trainer.train()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(before[name], value) for name, value in teacher.named_parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized.isdisjoint(id(parameter) for parameter in teacher.parameters())


# ---- adapters


LORA_TARGETS = {"gpt2": ["c_attn"], "opt": ["q_proj", "v_proj"], "llama": ["q_proj", "v_proj"]}


def lora(targets, **options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False, **options
    )


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("draft_length", ["1", "4"])
def test_lora_trains_only_the_adapter_and_the_rollout_uses_it(make_trainer, family, draft_length):
    """Left padding included: the wrapper's forward hides the position ids that the model inside needs."""
    build = BUILDERS[family]
    base, teacher = build(), build(seed=1)
    original = parameters(base)
    torch.manual_seed(0)
    trainer = make_trainer(
        base,
        teacher,
        **MIDDLE,
        peft_config=lora(LORA_TARGETS[family], fan_in_fan_out=family == "gpt2"),
        draft_length=draft_length,
        learning_rate=0.1,
    )
    before = parameters(trainer.model)
    merged = copy.deepcopy(trainer.model).merge_and_unload().eval()
    seen = watch_batches(trainer)
    after = trained(trainer)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    kept = {name: value for name, value in after.items() if "lora_" not in name}
    assert sum(any(torch.equal(value, old) for old in original.values()) for value in kept.values()) == len(kept)

    inputs, _ = seen[0]
    prompt_length = inputs["input_ids"].shape[1] - inputs["completion_mask"].shape[1]
    ids, mask = inputs["input_ids"][:, :prompt_length], inputs["attention_mask"][:, :prompt_length]
    assert int(mask.sum(-1).min()) < prompt_length
    settings = {"policy": SwitchPolicy(**MIDDLE), "max_new_tokens": 12, "seed": trainer.args.seed}
    written = inputs["input_ids"][:, prompt_length:]
    with_adapter = roll_out(merged, teacher, ids, mask, eos_token_id=EOS_ID, **settings)
    without = roll_out(build(), teacher, ids, mask, eos_token_id=EOS_ID, **settings)
    assert torch.equal(written, with_adapter.completion_ids)
    assert not torch.equal(written, without.completion_ids)


def test_adapter_on_the_output_layer_trains_and_writes(make_trainer):
    student = build_llama()
    torch.manual_seed(0)
    trainer = make_trainer(student, build_llama(seed=1), **MIDDLE, peft_config=lora(["lm_head"]), max_steps=2)
    before = parameters(trainer.model)
    seen = watch_batches(trainer)
    after = trained(trainer)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lm_head.lora_" in name for name in moved)
    plain = make_trainer(build_llama(), build_llama(seed=1), **MIDDLE)
    plain_seen = watch_batches(plain)
    plain.train()
    assert not torch.equal(seen[0][0]["input_ids"], plain_seen[0][0]["input_ids"])


# ---- limits: methods that must meet


def test_gkd_without_rollouts_trains_on_the_dataset_alone(make_trainer):
    options = {"divergence": "generalized_jsd", "max_steps": 3, "learning_rate": 0.1}
    gkd = make_trainer(build_gpt2(), build_gpt2(seed=1), method="gkd", on_policy_fraction=0.0, **options)
    kd = make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", **options)
    assert largest_difference(trained(gkd), trained(kd)) == 0.0
    assert not any(key.startswith("rollout/") for entry in logged(gkd) for key in entry)


def test_gkd_at_fraction_one_trains_on_the_students_own_text(make_trainer):
    student = build_gpt2()
    trainer = make_trainer(student, build_gpt2(seed=1), method="gkd", on_policy_fraction=1.0)
    seen = watch_batches(trainer)
    trainer.train()
    inputs, _ = seen[0]
    prompt_length = inputs["input_ids"].shape[1] - inputs["completion_mask"].shape[1]
    expected = roll_out(
        build_gpt2(),
        None,
        inputs["input_ids"][:, :prompt_length],
        inputs["attention_mask"][:, :prompt_length],
        policy=StudentPolicy(),
        max_new_tokens=12,
        seed=trainer.args.seed,
        eos_token_id=EOS_ID,
    )
    assert torch.equal(inputs["input_ids"][:, prompt_length:], expected.completion_ids)
    assert logged(trainer)[0]["rollout/teacher_share"] == 0.0


def test_on_policy_fraction_is_the_share_of_steps_and_not_the_order_of_calls(make_trainer):
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), method="gkd", on_policy_fraction=0.25)
    chosen = [trainer.text.of_step(step, 0.0) == "fresh" for step in range(400)]
    assert 70 < sum(chosen) < 130
    assert [trainer.text.of_step(step, 0.0) == "fresh" for step in reversed(range(400))] == chosen[::-1]


def test_switch_that_never_switches_is_gkd_on_the_students_text(make_trainer):
    options = {"divergence": "reverse_kl", "max_steps": 3, "learning_rate": 0.1}
    never = {"initial_threshold": LN_2, "schedule": "constant", "reuse_teacher_hidden": False}
    switch = make_trainer(build_gpt2(), build_gpt2(seed=1), method="switch", **never, **options)
    gkd = make_trainer(build_gpt2(), build_gpt2(seed=1), method="gkd", on_policy_fraction=1.0, **options)
    assert largest_difference(trained(switch), trained(gkd)) == 0.0
    assert all(entry["rollout/teacher_share"] == 0.0 for entry in logged(switch))
    assert all(entry["rollout/jsd_nats"] > 0.1 for entry in logged(switch))


# ---- checkpoints


def test_four_steps_equal_two_and_a_resume_of_two_bit_for_bit(make_trainer):
    """Dropout on: the rollouts' own randomness must neither disturb torch's nor depend on it.

    A fixed draft length, because "auto" follows the clock: it writes the same text, but the last digits of a recorded
    divergence depend on how many tokens one pass read.
    """
    options = {
        **MIDDLE,
        "draft_length": "4",
        "disable_dropout": False,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
    }
    whole = make_trainer(build_gpt2(train=True), build_gpt2(seed=1), **options)
    expected = trained(whole)
    torch.manual_seed(12345)
    resumed = make_trainer(build_gpt2(seed=5, train=True), build_gpt2(seed=1), **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert all(torch.equal(expected[name], value) for name, value in resumed.model.named_parameters())
    assert logged(whole)[2:] == logged(resumed)[2:]
    assert [entry["step"] for entry in logged(resumed)] == [1, 2, 3, 4]


# ---- evaluation and logs


def test_eval_loss_weighs_tokens_not_batches(make_trainer):
    """A mean of batch means depends on the batch size where answers have different lengths."""
    data = Dataset.from_list(RAGGED_ROWS[:7])
    results = {}
    for size in (1, 2, 7):
        trainer = make_trainer(
            build_gpt2(), build_gpt2(seed=1), method="kd", eval_dataset=data, per_device_eval_batch_size=size
        )
        results[size] = trainer.evaluate()
    model, teacher, rows = trainer.model, trainer.teacher_model, trainer.eval_dataset
    sums = {"eval_loss": 0.0, "eval_cross_entropy": 0.0}
    for row in rows:
        ids, length = torch.tensor([row["prompt_ids"] + row["completion_ids"]]), len(row["completion_ids"])
        student, target = (reader(ids).logits[0, -length - 1 : -1].log_softmax(-1) for reader in (model, teacher))
        sums["eval_cross_entropy"] -= sum(student[place, token].item() for place, token in enumerate(ids[0, -length:]))
        sums["eval_loss"] += (target.exp() * (target - student)).sum().item()
    tokens = sum(len(row["completion_ids"]) for row in rows)
    for metrics in results.values():
        for name, total in sums.items():
            assert metrics[name] == pytest.approx(total / tokens, rel=1e-5)


def test_evaluation_of_several_sets_is_named_and_never_rolls_out(make_trainer):
    sets = {"short": Dataset.from_list(RAGGED_ROWS[2:3]), "long": Dataset.from_list(RAGGED_ROWS[:1])}
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), **MIDDLE, eval_dataset=sets)
    trainer._roll_out_window = lambda batches: pytest.fail("evaluation rolled out")
    metrics = trainer.evaluate()
    assert metrics["eval_short_loss"] != metrics["eval_long_loss"]
    assert {"eval_short_cross_entropy", "eval_long_cross_entropy"} <= metrics.keys()


def test_rollout_and_time_keys_are_logged_with_plausible_values(make_trainer):
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), **MIDDLE, max_steps=2)
    trainer.train()
    for entry in logged(trainer, times=True):
        assert 0 < entry["rollout/teacher_share"] < 1
        assert 0 < entry["rollout/jsd_nats"] < LN_2
        assert entry["rollout/threshold_nats"] == pytest.approx(0.42)
        assert 1 <= entry["rollout/completion_tokens"] <= 12
        assert entry["rollout/tokens_per_s"] > 0
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["time/rollout_s"] > 0 and entry["time/train_s"] > 0 for entry in entries)


def test_logged_rollout_values_are_means_over_the_tokens_since_the_last_log(make_trainer):
    """Half the steps, twice the tokens: a mean of means would not agree with the tokens themselves."""
    trainer = make_trainer(
        build_gpt2(), build_gpt2(seed=1), **MIDDLE, max_steps=4, logging_steps=4, per_device_train_batch_size=3
    )
    rollouts = []
    write = trainer.text.write

    def watched(*args, **kwargs):
        written = write(*args, **kwargs)
        rollouts.append(written)
        return written

    trainer.text.write = watched
    trainer.eos_token_id = [EOS_ID, *range(40, 60)]
    trainer.train()
    tokens = sum(int(rollout.completion_mask.sum()) for rollout in rollouts)
    [entry] = logged(trainer)
    by_teacher = sum(int((rollout.author == Author.TEACHER).sum()) for rollout in rollouts)
    assert entry["rollout/teacher_share"] == pytest.approx(by_teacher / tokens)
    divergence = torch.cat([rollout.divergence[rollout.completion_mask] for rollout in rollouts])
    assert entry["rollout/jsd_nats"] == pytest.approx(float(divergence.mean()), rel=1e-5)
    assert entry["rollout/completion_tokens"] == pytest.approx(tokens / sum(map(len, rollouts)))


def test_training_time_does_not_hold_the_evaluation(make_trainer):
    """Where a step evaluates but does not log, the clock must not run on."""
    trainer = make_trainer(
        build_gpt2(),
        build_gpt2(seed=1),
        method="kd",
        max_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=Dataset.from_list(RAGGED_ROWS[:2]),
    )
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: (time.sleep(1.0), evaluate(*args, **kwargs))[1]
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["time/train_s"] < 0.4


def test_logged_completions_are_json_lines_of_new_rollouts_only(make_trainer, tmp_path):
    trainer = make_trainer(
        build_gpt2(),
        build_gpt2(seed=1),
        method="gkd",
        on_policy_fraction=0.5,
        max_steps=8,
        log_completions=True,
        num_completions_to_log=2,
    )
    trainer.train()
    lines = (tmp_path / "run" / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    rolled_out = [entry["step"] for entry in logged(trainer) if "rollout/teacher_share" in entry]
    assert 0 < len(rolled_out) < 8
    assert [record["step"] for record in records] == [step for step in rolled_out for _ in range(2)]
    for record in records:
        assert len(record["completion_ids"]) == len(record["author"]) == len(record["divergence"])
        assert set(record["author"]) == {"student"} and record["drafted_ids"] == record["completion_ids"]
        assert record["prompt"] in {row["prompt"] for row in RAGGED_ROWS}


def test_logged_top_tokens_are_those_of_both_models_on_their_own_prompts(make_trainer):
    """A teacher that reads another prompt is asked about that one; each distribution agrees with a plain pass."""
    rows = [{**row, "teacher_prompt": f"! {row['prompt']}"} for row in RAGGED_ROWS[:4]]
    trainer = make_trainer(
        build_gpt2(),
        build_gpt2(seed=1),
        train_dataset=Dataset.from_list(rows),
        max_steps=1,
        logging_steps=1,
        log_completions=True,
        log_top_tokens=3,
    )
    trainer.train()
    tokenizer = trainer.processing_class
    for record in trainer.logged_completions:
        prompts = {"student": record["prompt_ids"], "teacher": tokenizer(f"! {record['prompt']}")["input_ids"]}
        for name, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
            ids = torch.tensor([prompts[name] + record["completion_ids"]])
            with torch.no_grad():
                probabilities = model.eval()(ids).logits[0, len(prompts[name]) - 1 : -1].softmax(-1)
            for token, row in zip(record["top_tokens"], probabilities, strict=True):
                best = row.topk(3)
                assert [one["id"] for one in token[name]] == best.indices.tolist()
                assert [one["probability"] for one in token[name]] == pytest.approx(best.values.tolist(), rel=1e-4)


# ---- ruin is never silent


def test_a_nan_teacher_is_refused_before_training(make_trainer):
    teacher = build_gpt2(seed=1)
    teacher.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"1 of \d+ tensors of the teacher hold nan or inf, first transformer.h.1.mlp"):
        make_trainer(build_gpt2(), teacher)
    with pytest.raises(UserError, match="hold nan or inf, first transformer"):
        roll_out(build_gpt2(), teacher, torch.tensor([[1, 2]]), policy=SwitchPolicy(), max_new_tokens=4)


def test_an_absurd_learning_rate_ends_in_one_line_and_saves_nothing(make_trainer, tmp_path):
    """Every tensor became nan, the log said loss 0.0, and the nan model was saved."""
    trainer = make_trainer(
        build_gpt2(), build_gpt2(seed=1), learning_rate=1e9, max_steps=4, save_strategy="steps", save_steps=1
    )
    with pytest.raises(UserError, match=r"the last 3 steps were.*lower learning_rate \(now 1e\+09\)"):
        trainer.train()
    assert all(entry["loss"] != 0.0 for entry in trainer.state.log_history if "loss" in entry)
    for path in tmp_path.rglob("*.safetensors"):
        assert all(bool(value.isfinite().all()) for value in load_file(path).values())
    trainer.model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match="hold nan or inf"):
        trainer.save_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_every_save_reads_the_weights_once(make_trainer, tmp_path, monkeypatch):
    """A checkpoint of the last step was read again at the end of training."""
    steps = []
    monkeypatch.setattr(saving, "check_student", lambda student, step, rate: steps.append(step))
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert steps == [1, 2]
    trainer.save_model(tmp_path / "model")
    assert steps == [1, 2, 2]
    unsaved = make_trainer(build_gpt2(), build_gpt2(seed=1), max_steps=2, save_strategy="no")
    unsaved.train()
    assert steps == [1, 2, 2, 2]


def test_logits_that_overflow_are_named_before_any_text(make_trainer):
    """The model was said to look ahead."""
    teacher = build_gpt2(seed=1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1e25)
    with pytest.raises(UserError, match="the teacher, a GPT2LMHeadModel, cannot be used: its logits are nan or inf in"):
        make_trainer(build_gpt2(), teacher)


def test_the_student_is_not_updated_by_a_loss_that_is_nan(make_trainer):
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), max_steps=3, max_skipped_steps=0)
    before = parameters(trainer.model)
    loss = trainer.step_loss.loss
    ruined = lambda *args: loss(*args) * float("nan")  # noqa: E731
    trainer.step_loss = types.SimpleNamespace(**vars(trainer.step_loss), loss=ruined)
    trainer.step_loss.needs_teacher_pass, trainer.step_loss.reads_teacher = lambda inputs: False, True
    with pytest.raises(UserError, match="the loss is nan in step 1; 1 step would not update the student"):
        trainer.train()
    assert largest_difference(before, parameters(trainer.model)) == 0.0


# ---- after training


def test_raw_data_can_be_evaluated_and_predicted_after_training(make_trainer):
    """KeyError: 'prompt_ids'."""
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), eval_dataset=Dataset.from_list(RAGGED_ROWS))
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(Dataset.from_list(RAGGED_ROWS))["eval_loss"] == expected
    assert trainer.evaluate({"a": RAGGED_ROWS})["eval_a_loss"] == expected
    assert trainer.predict(RAGGED_ROWS).metrics["test_loss"] == expected


# ---- rows decoded at once


@pytest.mark.parametrize("builder", [build_gpt2, build_llama])
def test_a_window_is_decoded_in_parts_without_changing_its_text(make_trainer, builder):
    texts = []
    for rows in (1, 3, None):
        trainer = make_trainer(
            builder(), builder(seed=1), **MIDDLE, per_device_train_batch_size=1, gradient_accumulation_steps=8,
            rollout_batch_size=rows,
        )  # fmt: skip
        seen = watch_batches(trainer)
        trainer.train()
        texts.append([inputs["input_ids"].tolist() for inputs, _ in seen])
    assert texts[0] == texts[1] == texts[2]


def test_rows_decoded_at_once_do_not_grow_with_the_accumulation_window(make_trainer):
    rows = [
        make_trainer(build_gpt2(), build_gpt2(seed=1), gradient_accumulation_steps=steps).rollout_rows
        for steps in (1, 256)
    ]
    assert rows[0] == rows[1] >= 8
    assert make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd").rollout_rows is None
