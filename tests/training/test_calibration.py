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
from switchkd.training.calibration import (
    SMALLEST_THRESHOLD,
    Calibration,
    ShareController,
    calibrate,
    scaled_divergences,
    share_by_position,
)

LENGTH, EOS = 16, [EOS_ID, 5]
OPTIONS = {"max_new_tokens": LENGTH, "eos_token_id": EOS}


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
    found = calibrated(SwitchPolicy(schedule="constant"), 0.37, rows=1, max_new_tokens=5, tolerance=1e-3)
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


class DriftingPair:
    """Rollouts of a pair whose divergences follow a log-logistic law that moves as the student learns.

    Args:
        tokens: Of a rollout; 0 takes the law's quantiles instead of draws: no noise.
        answer: By how much the typical ln(divergence) falls when all text is the teacher's: text answers to its writer.
        spread: Of ln(divergence); 0.8 is usual.
    """

    def __init__(self, tokens=1000, answer=0.0, spread=0.8):
        self.tokens, self.answer, self.spread = tokens, answer, spread
        self.generator = torch.Generator().manual_seed(0)
        self.share = 0.5

    def write(self, threshold, learned=0.0):
        """Return the divergences at a threshold, `[tokens]`, and the teacher's share of them."""
        uniform = (torch.arange(999, dtype=torch.float64) + 1) / 1000
        if self.tokens:
            uniform = torch.rand(self.tokens, generator=self.generator, dtype=torch.float64)
        centre = math.log(0.1) - learned - self.answer * self.share
        divergence = (centre + self.spread * torch.logit(uniform)).exp()
        self.share = float((divergence > threshold).double().mean())
        return divergence, self.share


def observed(controller, pair, rollouts, pace=0.0):
    """Return the shares of some rollouts; after each the student has come nearer by a factor e^-pace(k)."""
    shares, learned = [], 0.0
    for step in range(rollouts):
        divergence, share = pair.write(controller.threshold, learned)
        shares.append(share)
        controller.observe(divergence, share)
        learned += pace(step) if callable(pace) else pace
    return torch.tensor(shares)


@pytest.mark.parametrize("target", [0.1, 0.53, 0.9])
@pytest.mark.parametrize("start", [0.001, 0.1, 0.69])
@pytest.mark.parametrize("answer", [-1.0, 0.0, 1.0])
def test_the_controller_reaches_the_share_from_anywhere_and_stays(start, target, answer):
    shares = observed(ShareController(target, start, largest=math.inf), DriftingPair(0, answer), 100)
    assert bool((shares[20:] / target - 1.0).abs().max() < 0.03)


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("start", [0.001, 0.3])
@pytest.mark.parametrize(
    "pace",
    [0.02, 0.05, -0.02, lambda step: 0.2 * math.exp(-step / 10), lambda step: 0.05 * math.sin(step / 15)],
    ids=["learns", "learns fast", "gets worse", "learns fast at first", "to and fro"],
)
def test_the_share_is_within_a_tenth_of_its_target_after_20_rollouts_and_stays_while_the_student_learns(
    target, start, pace
):
    """A target of 30% was missed by 5 to 10 points by a controller slower than a student that learns in 100 rollouts.

    Means over ten rollouts of 1,000 tokens: a single one has a standard error of 1 to 1.6 points at any threshold.
    """
    shares = observed(ShareController(target, start, largest=math.inf), DriftingPair(), 120, pace)
    tens = shares.reshape(-1, 10).mean(1)
    assert bool((tens[2:] / target - 1.0).abs().max() < 0.1)
    assert float(shares[20:].mean()) == pytest.approx(target, rel=0.02)


def test_noise_of_single_rollouts_hardly_moves_the_threshold():
    controller, thresholds = ShareController(0.5, 0.1), []
    pair = DriftingPair()
    for _ in range(400):
        thresholds.append(math.log(controller.observe(*pair.write(controller.threshold))))
    # The quantile of one rollout has a standard error of 0.8 / (0.25 sqrt(1000)) * 0.5 = 0.05.
    assert float(torch.tensor(thresholds[40:]).std()) < 0.04


def test_a_writer_who_keeps_the_pen_is_asked_less_often():
    """With a minimum leg the teacher writes more than the threshold asks for: three times as often here."""
    controller = ShareController(0.6, 0.3, largest=math.inf)
    for _ in range(40):
        divergence, asked = DriftingPair(0).write(controller.threshold)
        written = 3 * asked / (1 + 2 * asked)
        controller.observe(divergence, written)
    assert written == pytest.approx(0.6, abs=0.01)


def test_a_share_out_of_reach_leaves_the_threshold_at_its_end_and_does_not_wind_it_up():
    controller = ShareController(0.5, 0.3)
    for _ in range(500):
        controller.observe(torch.full((50,), 0.9), 1.0)
    assert controller.threshold == pytest.approx(LN_2)
    for _ in range(500):
        controller.observe(torch.full((50,), 1e-9), 0.0)
    assert controller.threshold == SMALLEST_THRESHOLD
    shares = observed(controller, DriftingPair(0), 20)
    assert float(shares[-1]) == pytest.approx(0.5, abs=0.03)


def test_the_controller_goes_on_from_a_checkpoint_and_ignores_empty_rollouts():
    pair = DriftingPair()
    controller, resumed = ShareController(0.5, 0.3), ShareController(0.5, 0.1)
    observed(controller, pair, 5)
    resumed.load_state_dict(controller.state_dict())
    text = pair.write(controller.threshold)
    assert resumed.observe(*text) == controller.observe(*text) != 0.3
    assert controller.observe(torch.zeros(0), math.nan) == controller.threshold == resumed.threshold
    assert controller.state_dict() == resumed.state_dict()


def test_the_controller_keeps_the_share_of_a_real_pair():
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(8)
    controller, taught, tokens = ShareController(0.5, 0.02), 0, 0
    for step in range(40):
        policy = SwitchPolicy(controller.threshold, schedule="constant")
        rollout = roll_out(
            student, teacher, ids, mask, policy=policy, seed=step, max_new_tokens=LENGTH, eos_token_id=EOS
        )
        controller.observe(scaled_divergences(rollout, controller.threshold), rollout.teacher_share)
        if step >= 20:
            taught += int((rollout.author == Author.TEACHER).sum())
            tokens += int(rollout.completion_mask.sum())
    assert taught / tokens == pytest.approx(0.5, abs=0.05)


def test_controllers_outside_their_range_are_refused():
    with pytest.raises(UserError, match="target_teacher_share must lie in"):
        ShareController(0.0, 0.1)


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
    assert written["policy_options"]["schedule"] == "constant" and written["policy_options"]["horizon"] == 16
    with pytest.raises(UserError, match="give --dataset_name, the data to take prompts from"):
        command.run(command.parser().resolve(argv[:4]), console)
