"""Laws of calibration: the share asked for is the share a rollout has, and what cannot be reached is said."""

import copy
import json
import math

import pytest
import torch
from helpers.pairs import make_pair, make_prompts
from helpers.tiny import EOS_ID, RAGGED_ROWS, build_gpt2

from switchkd.cli.console import Console
from switchkd.commands import calibrate as command
from switchkd.divergences import LN_2
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.policies import (
    StudentConfidencePolicy,
    StudentEntropyPolicy,
    StudentFirstPolicy,
    SwitchPolicy,
    TeacherFirstPolicy,
    TeacherPolicy,
)
from switchkd.rollout import Author
from switchkd.training.calibration import Calibration, ShareController, calibrate, share_by_position

LENGTH, EOS = 16, [EOS_ID, 5]
OPTIONS = {"max_completion_length": LENGTH, "eos_token_id": EOS}


def calibrated(policy, share, pair=None, rows=16, **options) -> Calibration:
    student, teacher = pair or make_pair("gpt2")
    ids, mask = make_prompts(rows)
    return calibrate(student, teacher, ids, mask, policy=policy, target_teacher_share=share, **(OPTIONS | options))


@pytest.mark.parametrize("share", [0.1, 0.53, 0.9])
@pytest.mark.parametrize(
    "policy",
    [
        SwitchPolicy(horizon=16),
        SwitchPolicy(schedule="constant"),
        SwitchPolicy(horizon=16, final_ratio=0.4, schedule="linear"),
        SwitchPolicy(horizon=16, schedule="increasing"),
        SwitchPolicy.of(horizon=8, clock="since_teacher"),
        SwitchPolicy.of(horizon=16, final_ratio=0.5, minimum_leg=2),
        StudentEntropyPolicy(schedule="constant"),
        StudentConfidencePolicy(horizon=16),
    ],
    ids=str,
)
def test_a_rollout_at_the_threshold_found_has_the_share_asked_for(policy, share):
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(24)
    found = calibrated(policy, share, (student, teacher), rows=24, tolerance=0.03)
    assert found.reached and found.rounds <= 8
    assert found.policy == policy.at_threshold(found.initial_threshold)
    rollout = roll_out(student, teacher, ids, mask, policy=found.policy, max_new_tokens=LENGTH, eos_token_id=EOS)
    assert rollout.teacher_share == found.teacher_share == pytest.approx(share, abs=0.03)
    assert found.lengths == rollout.completion_mask.sum(1).tolist()
    assert found.history[-1] == (found.initial_threshold, found.teacher_share)


def test_a_good_guess_is_left_as_it_is():
    first = calibrated(SwitchPolicy(horizon=16), 0.5)
    again = calibrated(first.policy, 0.5)
    assert again.rounds == 1 and again.policy == first.policy


def test_the_start_hardly_matters():
    found = [calibrated(SwitchPolicy(start, horizon=16), 0.4, rows=32) for start in (0.0, 0.01, 0.69)]
    assert all(one.reached for one in found)
    assert max(one.initial_threshold for one in found) < 2.0 * min(one.initial_threshold for one in found)


def test_share_by_position_adds_up_to_the_share():
    found = calibrated(SwitchPolicy(horizon=16, final_ratio=0.05), 0.5, bins=4)
    bins = found.share_by_position
    assert [(part.start, part.stop) for part in bins] == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert sum(part.tokens for part in bins) == sum(found.lengths)
    assert sum(part.tokens * part.teacher_share for part in bins) / sum(found.lengths) == pytest.approx(
        found.teacher_share
    )
    assert bins[0].teacher_share < bins[-1].teacher_share  # the threshold falls


def test_positions_that_no_text_reaches_are_left_out():
    student, teacher = make_pair("gpt2")
    rollout = roll_out(student, teacher, torch.tensor([[3]]), policy=TeacherPolicy(), max_new_tokens=5)
    parts = share_by_position(rollout, 40, 4)
    assert [(part.start, part.tokens, part.teacher_share) for part in parts] == [(0, 5, 1.0)]


def test_other_strategies_take_its_share_and_its_lengths():
    found = calibrated(SwitchPolicy(horizon=16), 0.5)
    lengths = torch.tensor(found.lengths)
    first = TeacherFirstPolicy.from_share(found.teacher_share, lengths).teacher_tokens
    assert float(lengths.clamp(max=first).sum() / lengths.sum()) == pytest.approx(found.teacher_share, abs=0.05)
    late = StudentFirstPolicy.from_share(found.teacher_share, lengths).switch_position
    assert float((lengths - late).clamp_min(0).sum() / lengths.sum()) == pytest.approx(found.teacher_share, abs=0.05)


def test_standard_error_is_about_the_spread_between_sets_of_prompts():
    student, teacher = make_pair("gpt2")
    policy = SwitchPolicy(0.15, schedule="constant")
    shares, errors = [], []
    for seed in range(12):
        ids, mask = make_prompts(12, seed=seed)
        found = calibrate(
            student, teacher, ids, mask, policy=policy, target_teacher_share=0.5, max_rounds=1, seed=seed, **OPTIONS
        )
        shares.append(found.teacher_share)
        errors.append(found.standard_error)
    assert 0.5 < float(torch.tensor(errors).mean() / torch.tensor(shares).std()) < 2.0
    one = calibrated(policy, 0.5, rows=1, max_rounds=1)
    assert math.isnan(one.standard_error)


# ---- what cannot be reached


def test_models_that_agree_are_told_so_instead_of_counting_rounding():
    _, teacher = make_pair("gpt2")
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.transformer.ln_f.weight.mul_(1.0 + 1e-6)
    found = calibrated(SwitchPolicy(), 0.5, (student, teacher))
    assert not found.reached and found.teacher_share < 0.02
    assert "even at a threshold of 1e-06 nats the teacher writes 0.0%; the models agree" in found.note


def test_a_share_too_small_for_a_falling_threshold_is_told_so_with_the_way_out():
    pair = build_gpt2(seed=0), build_gpt2(seed=9)
    found = calibrated(SwitchPolicy(horizon=4, final_ratio=0.01), 0.05, pair)
    assert not found.reached and found.initial_threshold == pytest.approx(LN_2)
    assert "raise final_ratio or take schedule constant" in found.note
    assert calibrated(SwitchPolicy(schedule="constant"), 0.05, pair).reached


def test_too_few_tokens_for_the_tolerance_are_told_so():
    found = calibrated(SwitchPolicy(schedule="constant"), 0.37, rows=1, max_completion_length=5, tolerance=1e-3)
    assert not found.reached and "take more prompts" in found.note
    assert found.teacher_share == min((share for _, share in found.history), key=lambda share: abs(share - 0.37))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_are_one_author_alone(share):
    assert calibrated(SwitchPolicy(schedule="constant"), share).teacher_share == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_teacher_share": 1.2}, "target_teacher_share must lie in .0, 1., got 1.2"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_rounds": 0}, "max_rounds must be an integer >= 1, got 0"),
        ({"bins": 0}, "bins"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_options_outside_their_range_are_refused_in_one_line(options, message):
    student, teacher = make_pair("gpt2")
    with pytest.raises(UserError, match=message) as caught:
        calibrate(student, teacher, torch.tensor([[1]]), policy=SwitchPolicy(), **options)
    assert "\n" not in str(caught.value)


# ---- the controller


def logistic(threshold, shift=0.0):
    """A share that falls with the threshold as it does for real pairs: by at most 0.3 per factor e."""
    return 1.0 / (1.0 + math.exp(1.2 * (math.log(threshold) - math.log(0.1) - shift)))


@pytest.mark.parametrize("target", [0.1, 0.53, 0.9])
@pytest.mark.parametrize("start", [0.001, 0.1, 0.69])
def test_the_controller_converges_without_overshoot(start, target):
    controller = ShareController(target, start)
    side = math.copysign(1.0, logistic(start) - target)
    for _ in range(300):
        share = logistic(controller.observe(logistic(controller.threshold)))
        assert side * (share - target) > -1e-9
    assert share == pytest.approx(target, abs=0.005)


def test_the_controller_follows_a_student_that_improves_and_averages_noise():
    generator = torch.Generator().manual_seed(0)
    controller, shares = ShareController(0.5, 0.1), []
    for step in range(400):
        share = logistic(controller.threshold, shift=-step / 200)
        shares.append(share)
        controller.observe(share + 0.03 * float(torch.randn((), generator=generator)))
    assert controller.threshold < 0.03
    assert sum(shares[100:]) / 300 == pytest.approx(0.5, abs=0.03)
    assert max(abs(share - 0.5) for share in shares) < 0.1


def test_a_share_out_of_reach_does_not_wind_the_controller_up():
    controller = ShareController(0.5, 0.3)
    for _ in range(500):
        controller.observe(1.0)
    assert controller.threshold == pytest.approx(LN_2)
    for _ in range(2000):
        controller.observe(0.0)
    assert controller.threshold == ShareController.SMALLEST
    for _ in range(10):
        controller.observe(1.0)
    assert controller.threshold > 4.0 * ShareController.SMALLEST  # at once, not after 2,000 steps


def test_the_controller_goes_on_from_a_checkpoint_and_ignores_empty_rollouts():
    controller, resumed = ShareController(0.5, 0.3), ShareController(0.5, 0.1)
    controller.observe(0.8)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.observe(0.4) == controller.observe(0.4)
    assert controller.observe(math.nan) == controller.threshold == resumed.threshold


def test_the_controller_keeps_the_share_of_a_real_pair():
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(8)
    controller, taught, tokens = ShareController(0.5, 0.02, gain=0.5), 0, 0
    for step in range(40):
        policy = SwitchPolicy(controller.threshold, schedule="constant")
        rollout = roll_out(
            student, teacher, ids, mask, policy=policy, seed=step, max_new_tokens=LENGTH, eos_token_id=EOS
        )
        controller.observe(rollout.teacher_share)
        if step >= 20:
            taught += int((rollout.author == Author.TEACHER).sum())
            tokens += int(rollout.completion_mask.sum())
    assert taught / tokens == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"target_teacher_share": 0.0}, "target_teacher_share must lie in"), ({"gain": 0.0}, "gain must lie in")],
)
def test_controllers_outside_their_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ShareController(**({"target_teacher_share": 0.5, "initial_threshold": 0.1} | options))


# ---- the command


def test_the_command_prints_and_writes_what_it_found(tmp_path, tiny_tokenizer):
    student, teacher = make_pair("gpt2")
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in RAGGED_ROWS), encoding="utf-8")
    flags = {
        "model_name_or_path": tmp_path / "student",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": prompts,
        "output_dir": tmp_path / "run",
        "target_teacher_share": 0.4,
        "tolerance": 0.05,
        "max_completion_length": 16,
        "schedule": "constant",
        "batch_size": 3,
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    console = Console(json=True)
    summary = command.run(command.parser().resolve(argv), console)
    assert summary["reached"] and summary["teacher_share"] == pytest.approx(0.4, abs=0.05)
    written = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert written == {name: value for name, value in summary.items() if name != "output_dir"}
    assert written["policy"]["schedule"] == "constant" and written["policy"]["horizon"] == 16
    with pytest.raises(UserError, match="give --dataset_name, the data to take prompts from"):
        command.run(command.parser().resolve(argv[:4]), console)
