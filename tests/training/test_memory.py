"""What a step is said to take: laws of the arithmetic, models without weights, and a real step beside it."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
from helpers.tiny import BUILDERS

from switchkd.errors import UserError
from switchkd.training.advice import CHANGES, first_changes, relief_of, sized
from switchkd.training.cost import CARDS, card_of, communicated_bytes, keep_rate, measured_card, step_seconds
from switchkd.training.footprint import Adapter, footprint_of
from switchkd.training.memory import PHASES, Launch, copy_dtype, optimizer_bytes, rows_that_fit, slots_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

SIZES = {"rows": 2, "length": 24, "predicted": 12}


def text_of(model):
    return model.config.to_json_string(use_diff=False)


@pytest.fixture(scope="module")
def launch():
    student, teacher = BUILDERS["llama"](seed=1), BUILDERS["llama"](seed=2, num_hidden_layers=3)
    return Launch(text_of(student), text_of(teacher), prompt=12, completion=12, rows=4, teacher_dtype="float32")


def totals(launch):
    memory = sized(launch).memory
    return {phase: memory.total(phase) for phase in memory.phases}


@pytest.mark.parametrize("family", BUILDERS)
def test_a_model_without_weights_has_as_many_as_the_real_one_and_its_tied_ones_count_once(family):
    model = BUILDERS[family](seed=0)
    found = footprint_of(text_of(model), **SIZES, trains=True)
    assert found.parameters == found.trained == model.num_parameters()
    assert found.weights == found.gradients == sum(one.numel() * 4 for one in model.parameters())
    assert found.first_pass >= found.kept > 0
    half = footprint_of(text_of(model), **SIZES, dtype="bfloat16")
    assert half.weights * 2 == found.weights and half.trained == half.kept == 0


def test_checkpointing_keeps_less_and_an_adapter_trains_less(launch):
    whole = sized(launch).student
    assert sized(dataclasses.replace(launch, checkpointing=True)).student.kept < 0.5 * whole.kept
    adapted = sized(dataclasses.replace(launch, adapter=Adapter(4))).student
    assert 0 < adapted.trained < 0.2 * whole.trained and adapted.head_gradient == 0


def test_a_backward_pass_over_gradients_that_are_there_does_not_count_them_again(launch):
    found = sized(launch).student
    assert found.first_pass - found.gradients <= found.next_pass <= found.first_pass


@pytest.mark.parametrize("option", ["rows", "completion", "accumulation"])
def test_more_text_never_takes_less(launch, option):
    more = dataclasses.replace(launch, **{option: 2 * getattr(launch, option)})
    before, after = totals(launch), totals(more)
    assert all(after[phase] >= before[phase] for phase in before) and sum(after.values()) > sum(before.values())


def test_what_is_sharded_is_there_once_over_all_gpus(launch):
    alone = sized(launch).memory.phases["optimizer"]
    for sharding, parts in {
        "ddp": (),
        "zero2": ("optimizer states",),
        "zero3": ("optimizer states", "student weights"),
        "fsdp2": ("optimizer states", "student weights", "gradients"),
    }.items():
        shared = sized(dataclasses.replace(launch, gpus=4, sharding=sharding)).memory.phases["optimizer"]
        for part in ("optimizer states", "student weights"):
            assert shared[part] == pytest.approx(alone[part] / (4 if part in parts else 1)), (sharding, part)
        assert shared["teacher weights"] == alone["teacher weights"]
        if sharding == "fsdp2":
            assert shared["gradients"] == pytest.approx(alone["gradients"] / 4)


def test_a_sharded_teacher_is_there_once_and_its_passes_wait_for_its_layers(launch):
    whole = sized(dataclasses.replace(launch, gpus=4, sharding="ddp"))
    shared = sized(dataclasses.replace(whole.launch, shards_teacher=True))
    for phase, parts in whole.memory.phases.items():
        assert shared.memory.phases[phase]["teacher weights"] == pytest.approx(parts["teacher weights"] / 4)
    gathered = {phase: parts.get("gathered teacher weights", 0.0) for phase, parts in shared.memory.phases.items()}
    # In a rollout two layers are whole beside embeddings and head, in the loss the latter alone.
    assert gathered["rollout"] > gathered["loss"] == 4 * shared.teacher.outside > gathered["backward"] == 0.0
    before, after = (
        step_seconds(run.launch, run.student, run.teacher, CARDS["h100"], rollout_rows=4) for run in (whole, shared)
    )
    assert after["rollout"] > before["rollout"] and after["update"] == before["update"]


def test_fixed_shapes_stay_between_rollouts_and_are_counted_whole(launch):
    """Rows were chosen as if caches ended with their text, and only the rollout was said to hold them."""
    usual = sized(dataclasses.replace(launch, rows=3, rollout_rows=3))
    fixed = sized(dataclasses.replace(usual.launch, static=True))
    # Rows of 24 tokens and a draft get 32 slots, three of them the places of four.
    share = usual.memory.phases["rollout"]["student key/values"] * (4 * slots_of(24)) / (3 * 24)
    assert slots_of(24) == 32 and all(
        parts["student key/values"] == pytest.approx(share) for parts in fixed.memory.phases.values()
    )
    sizes = {"rows": 1, "length": 600, "student": 6144, "readers": [12288, 24576], "vocabulary": 50257}
    fit, held = rows_that_fit(**sizes), rows_that_fit(**sizes, static=True)
    assert held < fit and held & (held - 1) == 0


def test_states_of_the_optimizer_follow_its_name(launch):
    trained = sized(launch).student.trained
    for name, states in {"adamw_torch": 8, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}.items():
        found = sized(dataclasses.replace(launch, optimizer=name)).memory.phases["optimizer"]["optimizer states"]
        assert found == states * trained
    with pytest.raises(UserError, match="galore"):
        optimizer_bytes("galore_adamw")


def test_kept_states_of_the_teacher_are_halved_offloaded_or_not_there(launch):
    def kept(**options):
        memory = sized(dataclasses.replace(launch, accumulation=4, **options)).memory
        return memory.phases["backward"].get("kept teacher states", 0.0)

    assert kept(states_dtype="bfloat16") == kept() / 2
    assert kept(offloads_states=True) == kept() / 4
    assert "teacher pass" in totals(dataclasses.replace(launch, keeps_states=False))
    assert "rollout" not in totals(dataclasses.replace(launch, rolls_out=False))
    assert set(totals(launch)) <= set(PHASES)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"bf16": True}, "bfloat16"),
        ({"adapter": True}, "float32"),
        ({"sharded": True, "dtype": "bfloat16"}, "bfloat16"),
        ({"wanted": "never", "adapter": True}, None),
        ({"wanted": "always"}, "float32"),
    ],
)
def test_a_copy_of_the_student_is_made_where_rollouts_need_one(options, expected):
    given = {"wanted": "auto", "dtype": None, "bf16": False, "sharded": False, "adapter": False, **options}
    assert copy_dtype(given.pop("wanted"), given.pop("dtype"), student_dtype="float32", **given) == expected


def test_one_option_is_named_where_one_is_enough_and_else_as_many_as_it_takes(launch):
    run = sized(dataclasses.replace(launch, rows=16, accumulation=2))
    assert first_changes(run, run.memory.peak) == []
    (one,) = first_changes(run, 0.9 * run.memory.peak)
    assert one.peak <= 0.9 * run.memory.peak
    several = first_changes(run, 0.3 * run.memory.peak)
    peaks = [change.peak for change in several]
    assert len(several) > 1 and peaks == sorted(peaks, reverse=True) and len({one.option for one in several}) > 1
    assert first_changes(run, 1.0)[-1].peak > 1.0


def test_every_change_lowers_something_somewhere(launch):
    """An option that changes nothing would be advice that does not help."""
    base = dataclasses.replace(launch, rows=8, accumulation=2, gpus=2, sharding="ddp")
    lora = dataclasses.replace(base, adapter=Adapter(4), copy_dtype="float32")
    zero = dataclasses.replace(base, sharding="zero2")
    for option, change in CHANGES:
        tried = ((start, change(start)) for start in (base, lora, zero))
        before, after = next((start, changed) for start, changed in tried if changed is not None)
        first, second = totals(before), totals(after)
        assert any(second[phase] < first[phase] for phase in first), option


@pytest.mark.parametrize("phase", ["rollout", "loss", "backward", "optimizer"])
def test_the_relief_of_a_phase_lowers_that_phase(launch, phase):
    run = sized(dataclasses.replace(launch, rows=16, accumulation=2))
    change = relief_of(run, phase)
    assert change is not None and change.peak <= 0.9 * run.memory.total(phase)


def test_a_faster_card_takes_less_time_and_a_larger_share_of_the_teacher_more(launch):
    run = sized(launch)

    def seconds(card, share=0.5):
        return step_seconds(
            launch, run.student, run.teacher, card, rollout_rows=run.memory.rollout_rows, teacher_share=share
        )

    slow, fast = (dataclasses.replace(CARDS[name], call=0.0) for name in ("l4", "h100"))
    assert all(seconds(fast)[part] <= seconds(slow)[part] for part in seconds(fast))
    assert seconds(slow, 0.1)["rollout"] < seconds(slow, 0.8)["rollout"]
    assert [keep_rate(share) for share in (0.0, 0.1, 1.0)] == [1.0, 0.94, 0.66]
    assert communicated_bytes(launch, run.student) == 0
    with pytest.raises(UserError, match="nearest is 'h100'"):
        card_of("h1000")


def test_this_machine_can_be_measured_as_a_card():
    card = measured_card(seconds=0.01)
    assert min(card.memory, card.bandwidth, card.half, card.single, card.call) > 0 and card.reached == (1.0, 1.0)


def test_the_prediction_agrees_with_a_real_step(monkeypatch):
    """The allocations of two real steps, noted by PyTorch's profiler; larger shapes: benchmarks/plan_check.py."""
    check = importlib.import_module("plan_check")
    small = {"vocab_size": 4000, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
    student = check.LLAMA | small
    teacher = student | {"hidden_size": 128, "intermediate_size": 352}
    options = {"rows": 4, "prompt": 24, "completion": 40, "accumulation": 2}
    monkeypatch.setitem(check.SHAPES, "small", (student, teacher, options))
    found = check.check("small", steps=2)
    for phase, size in found["measured"].items():
        assert found["predicted"][phase] == pytest.approx(size, rel=0.15), phase
