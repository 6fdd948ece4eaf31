"""Laws of the optimizer step: no second teacher pass, no logits in full, rows grouped by length, added losses."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from helpers.tiny import EOS_ID, RAGGED_ROWS, build_gpt2
from helpers.training import MIDDLE, largest_difference, parameters, trained, watch_batches

from switchkd.data.batches import Rows, dataset_batches, rollout_batches
from switchkd.data.plain_text import PlainText
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.models.heads import output_head
from switchkd.objective import completion_logits, predictions, reduce_losses, token_losses
from switchkd.policies import StudentPolicy, SwitchPolicy

TEXTS = Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in RAGGED_ROWS])
LENGTHS = {"max_prompt_length": 16, "max_completion_length": 12}


def count_passes(model):
    """Count forward calls, however they are made, but those that look a new model over once."""
    output_head(model)
    roll_out(model, None, torch.tensor([[1]]), policy=StudentPolicy(), max_new_tokens=28)
    calls = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs.get("use_cache")), with_kwargs=True
    )
    return calls


# ---- the teacher is asked once


@pytest.mark.parametrize("draft_length", ["1", "4"])
def test_rolled_out_steps_make_no_further_teacher_pass(make_model, make_trainer, draft_length):
    for reuse, further in ((True, 0), (False, 3)):
        teacher = make_model(seed=1)
        trainer = make_trainer(
            make_model(), teacher, **MIDDLE, draft_length=draft_length, max_steps=3, reuse_teacher_hidden=reuse
        )
        # Passes of the loss read whole texts without a cache; those of a rollout never do.
        calls = count_passes(teacher)
        trainer.train()
        assert sum(use_cache is False for use_cache in calls) == further
        rolled_out = sum(entry.get("rollout/teacher_passes", 0) for entry in trainer.state.log_history)
        assert trainer.teacher_passes == rolled_out + further


def test_dataset_steps_keep_their_teacher_pass(make_trainer):
    teacher = build_gpt2(seed=1)
    trainer = make_trainer(build_gpt2(), teacher, method="kd", max_steps=3, gradient_accumulation_steps=2,
                           per_device_train_batch_size=4)  # fmt: skip
    calls = count_passes(teacher)
    trainer.train()
    assert len(calls) == trainer.teacher_passes == 6


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "generalized_jsd", "adaptive_kl"])
def test_reused_states_give_the_step_of_a_teacher_that_is_asked_again(make_model, make_trainer, divergence):
    ends = [EOS_ID, *range(40, 55)]
    results = []
    for reuse in (True, False):
        teacher = make_model(seed=1)
        teacher.generation_config.eos_token_id = ends
        shape = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.1}
        options = {**MIDDLE, **shape, "divergence": divergence, "reuse_teacher_hidden": reuse}
        trainer = make_trainer(make_model(), teacher, **options)
        results.append((trained(trainer), trainer.state.log_history[0]["loss"]))
    assert largest_difference(results[0][0], results[1][0]) < 1e-6
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)


def test_states_kept_in_half_precision_stay_close(make_trainer):
    results = [
        trained(make_trainer(build_gpt2(), build_gpt2(seed=1), **MIDDLE, learning_rate=0.1, teacher_hidden_dtype=dtype))
        for dtype in (None, "bfloat16")
    ]
    assert 0 < largest_difference(*results) < 0.02


# ---- the loss from states


def plain_step(trainer, inputs, count):
    """One step of SGD at rate 1 through all logits, as a textbook would do it."""
    student, teacher = copy.deepcopy(trainer.model).train(False), trainer.teacher_model
    length = inputs["completion_mask"].shape[1]
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    forward = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "position_ids": positions}
    losses = token_losses(
        completion_logits(student(**forward).logits, length),
        objective=trainer.step_loss.objective.name,
        options=trainer.step_loss.objective.options,
        teacher_logits=completion_logits(teacher(**forward).logits, length),
    )
    loss = reduce_losses(losses, inputs["completion_mask"], count)
    loss.backward()
    return float(loss), {name: value.detach() - value.grad for name, value in student.named_parameters()}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skewed_reverse_kl", "total_variation"])
def test_step_from_states_equals_the_step_through_all_logits(make_model, make_trainer, divergence):
    trainer = make_trainer(make_model(), make_model(seed=1), **MIDDLE, divergence=divergence)
    seen = watch_batches(trainer)
    fresh = copy.deepcopy(trainer.model)
    after = trained(trainer)
    [(inputs, count)] = seen
    trainer.model = fresh
    loss, expected = plain_step(trainer, inputs, count)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert largest_difference(after, expected) < 1e-6


def test_models_without_a_readable_head_train_through_logits(make_trainer, monkeypatch):
    expected = trained(make_trainer(build_gpt2(), build_gpt2(seed=1), **MIDDLE, reuse_teacher_hidden=False))
    monkeypatch.setattr(predictions, "output_head", lambda model: None)
    assert largest_difference(
        trained(make_trainer(build_gpt2(), build_gpt2(seed=1), **MIDDLE, reuse_teacher_hidden=False)), expected
    ) < 1e-6  # fmt: skip


def test_neither_model_returns_logits_of_the_whole_vocabulary(make_trainer):
    student, teacher = build_gpt2(), build_gpt2(seed=1)
    widths = []
    trainer = make_trainer(student, teacher, method="kd")
    for model in (student, teacher):
        output_head(model)
        model.register_forward_hook(lambda module, args, output: widths.append(output.logits.shape[-1]))
    trainer.train()
    # What runs in the output layer's place returns one column that nobody reads.
    assert widths == [1, 1]


# ---- weights by author


def test_author_weights_of_zero_leave_the_others_tokens_alone(make_trainer):
    base = make_trainer(build_gpt2(), build_gpt2(seed=1), **MIDDLE)
    start, whole = parameters(base.model), trained(base)
    parts = [
        trained(make_trainer(build_gpt2(), build_gpt2(seed=1), **MIDDLE, **{name: 0.0}))
        for name in ("student_token_weight", "teacher_token_weight")
    ]
    for name, value in whole.items():
        both = (parts[0][name] - start[name]) + (parts[1][name] - start[name])
        assert torch.allclose(both, value - start[name], atol=1e-6)
    assert all(largest_difference(part, start) > 1e-3 for part in parts)


# ---- added losses


def test_ce_weight_adds_the_cross_entropy_of_dataset_answers(make_trainer):
    def step(**options):
        return trained(make_trainer(build_gpt2(), build_gpt2(seed=1), **options))

    start = parameters(build_gpt2())
    kd, sft, both = step(method="kd"), step(method="sft"), step(method="kd", ce_weight=0.5)
    for name, value in both.items():
        assert torch.allclose(
            value - start[name], (kd[name] - start[name]) + 0.5 * (sft[name] - start[name]), atol=1e-6
        )


def test_ce_weight_never_trains_on_text_the_models_wrote(make_trainer):
    with pytest.raises(UserError, match="every step trains on rolled-out text"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), ce_weight=1.0)
    options = {"method": "gkd", "max_steps": 6, "learning_rate": 0.05}
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), ce_weight=3.0, **options)
    plain = make_trainer(build_gpt2(), build_gpt2(seed=1), **options)
    for one in (trainer, plain):
        one.seen = watch_batches(one)
        one.train()
    first = next(i for i, (inputs, _) in enumerate(plain.seen) if "author" not in inputs)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (trainer, plain)]
    assert losses[0][:first] == pytest.approx(losses[1][:first], abs=1e-6)
    assert losses[0][first] > losses[1][first] + 1.0


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (2, 4)])
def test_lm_weight_adds_the_mean_cross_entropy_of_plain_text(make_trainer, size, accumulation):
    shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, **LENGTHS}
    start = parameters(build_gpt2())
    kd = trained(make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", **shape))
    added = make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", lm_weight=0.7, lm_dataset=TEXTS, **shape)
    both = trained(added)
    model = build_gpt2()
    blocks = added.plain_text.rows(0, 8, added.args.seed)
    logits = model(blocks).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).backward()
    for name, value in model.named_parameters():
        expected = kd[name] - start[name] - 0.7 * value.grad
        assert torch.allclose(both[name] - start[name], expected, atol=1e-6)


def test_plain_text_blocks_hold_the_text_and_every_pass_has_an_order_of_its_own(tiny_tokenizer):
    text = PlainText(TEXTS, tiny_tokenizer, 10)
    stream = [i for row in TEXTS for i in [*tiny_tokenizer(row["text"])["input_ids"], EOS_ID]]
    assert text.blocks.flatten().tolist() == stream[: len(stream) // 10 * 10]
    count = len(text.blocks)
    passes = [[tuple(row.tolist()) for row in text.rows(turn * count, count, 0)] for turn in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(map(tuple, text.blocks.tolist()))
    assert passes[0] != passes[1]
    across = text.rows(count - 2, 4, 0).tolist()
    assert [tuple(row) for row in across] == [*passes[0][-2:], *passes[1][:2]]


def test_plain_text_and_its_weight_need_each_other(make_trainer):
    with pytest.raises(UserError, match=r"lm_weight=0\.5 and lm_dataset must be set together"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), lm_weight=0.5)
    with pytest.raises(UserError, match="needs a column text, found prompt, completion"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), lm_weight=0.5, lm_dataset=Dataset.from_list(RAGGED_ROWS))
    with pytest.raises(UserError, match="less than one block"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), lm_weight=0.5, lm_dataset=TEXTS.select([0]))


# ---- micro-batches


def test_rows_of_like_length_share_a_micro_batch_and_none_is_lost():
    student, teacher = build_gpt2(), build_gpt2(seed=1)
    ids = torch.randint(1, 60, (9, 4), generator=torch.Generator().manual_seed(0))
    rollout = roll_out(student, teacher, ids, policy=SwitchPolicy(0.42, schedule="constant"), max_new_tokens=12,
                       eos_token_id=[EOS_ID, *range(40, 60)], return_teacher_hidden=True)  # fmt: skip
    batches = rollout_batches(rollout, [4, 4, 1])
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 1]
    widths = [batch["completion_mask"].shape[1] for batch in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    assert all(batch["completion_mask"][:, -1].any() for batch in batches)
    texts = [tuple(row[m.bool()].tolist()) for b in batches
             for row, m in zip(b["input_ids"], b["attention_mask"], strict=True)]  # fmt: skip
    expected = [(*rollout.prompt_ids[i].tolist(), *rollout.completion_ids[i][rollout.completion_mask[i]].tolist())
                for i in range(9)]  # fmt: skip
    assert sorted(texts) == sorted(expected)
    for batch in batches:
        assert batch["teacher_hidden"].shape[:2] == batch["completion_mask"].shape


def test_dataset_rows_are_regrouped_by_length_too():
    rows = [{"prompt_ids": [1] * (1 + i % 3), "completion_ids": [2] * (1 + 5 * (i % 2))} for i in range(6)]
    batches = dataset_batches([Rows(rows[:3]), Rows(rows[3:])], 0)
    assert [batch["completion_mask"].shape[1] for batch in batches] == [1, 6]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(
        len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows
    )


def test_answers_of_on_policy_steps_are_never_padded(make_trainer, monkeypatch):
    def refuse(*args):
        raise AssertionError("the text of the data set was made into a micro-batch")

    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), method="switch", max_steps=2)
    monkeypatch.setattr("switchkd.data.batches.padded_batch", refuse)
    trainer.train()
    with pytest.raises(AssertionError, match="was made into a micro-batch"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", max_steps=1).train()


# ---- evaluation


def test_best_checkpoint_by_generated_text(make_trainer, tmp_path):
    trainer = make_trainer(
        build_gpt2(),
        build_gpt2(seed=1),
        method="kd",
        eval_dataset=Dataset.from_list(RAGGED_ROWS[:3]),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=2,
        eval_rouge_l_samples=2,
        load_best_model_at_end=True,
        metric_for_best_model="rouge_l",
    )
    trainer.train()
    scores = [entry["eval_rouge_l"] for entry in trainer.state.log_history if "eval_rouge_l" in entry]
    assert len(scores) == 2 and all(0 <= score <= 100 and math.isfinite(score) for score in scores)
    assert trainer.state.best_metric == max(scores)


# ---- a GPU's memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offloaded_teacher_and_states_give_the_same_step(make_trainer):
    options = {**MIDDLE, "use_cpu": False, "learning_rate": 0.1, "draft_length": "4"}
    plain = trained(make_trainer(build_gpt2(), build_gpt2(seed=1), **options))
    trainer = make_trainer(
        build_gpt2(), build_gpt2(seed=1), **options, offload_teacher=True, offload_teacher_hidden=True
    )
    assert largest_difference(trained(trainer), plain) < 1e-6
    assert {parameter.device.type for parameter in trainer.teacher_model.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", ["offload_teacher", "offload_teacher_hidden"])
def test_offloading_is_refused_where_there_is_nothing_to_offload_from(make_trainer, name):
    with pytest.raises(UserError, match="does nothing: training runs on the CPU"):
        make_trainer(build_gpt2(), build_gpt2(seed=1), **{name: True})
