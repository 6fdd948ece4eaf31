"""Laws of the other ways to choose who writes, and of the options by which SWITCH can differ from the paper."""

import math

import pytest
import torch
from helpers.enumeration import assert_frequencies_match, make_tables
from helpers.pairs import assert_same, make_pair, make_prompts
from helpers.tiny import EOS_ID

from switchkd.divergences import LN_2, generalized_jsd
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.policies import (
    PacedSwitchPolicy,
    Positions,
    RandomPolicy,
    StudentConfidencePolicy,
    StudentEntropyPolicy,
    StudentFirstPolicy,
    StudentPolicy,
    SwitchPolicy,
    TeacherFirstPolicy,
    TeacherPolicy,
    TeacherPrefixPolicy,
)
from switchkd.policies.controls import first_tokens_with_share
from switchkd.rollout import Author

LENGTHS = (1, 3, "auto")


def jsd_of(tables, token):
    return float(generalized_jsd(tables[0][token], tables[1][token]))


def switch_author(policy, tables, prefix):
    """Who writes after a text, by walking it again: the rule in plain Python."""
    writer, leg, since = None, 0, 0
    for position, token in enumerate(prefix):
        clock = since if policy.clock == "since_teacher" else position
        wanted = "teacher" if jsd_of(tables, token) > float(policy.rule.threshold(torch.tensor(clock))) else "student"
        if writer is not None and leg < policy.minimum_leg:
            wanted = writer
        leg = leg + 1 if wanted == writer else 1
        writer = wanted
        since = 0 if writer == "teacher" else since + 1
    return writer


#: Policies over tables of 3 ids, and who writes after a text; None stands for a mixture.
RULES = {
    "random": (RandomPolicy(0.35), lambda tables, prefix: None),
    "teacher_first": (TeacherFirstPolicy(2), lambda tables, prefix: "teacher" if len(prefix) <= 2 else "student"),
    # A third of the way: 3 tokens have become 2.
    "teacher_prefix": (
        TeacherPrefixPolicy(3).at_progress(1 / 3),
        lambda tables, prefix: "teacher" if len(prefix) <= 2 else "student",
    ),
    "student_first": (StudentFirstPolicy(1), lambda tables, prefix: "teacher" if len(prefix) > 1 else "student"),
    "student_entropy": (
        StudentEntropyPolicy(0.85, schedule="constant"),
        lambda tables, prefix: (
            "teacher" if -float((tables[0].exp() * tables[0]).sum(-1)[prefix[-1]]) > 0.85 else "student"
        ),
    ),
    "student_confidence": (
        StudentConfidencePolicy(-math.log(0.6), schedule="constant"),
        lambda tables, prefix: "teacher" if float(tables[0][prefix[-1]].exp().max()) < 0.6 else "student",
    ),
    "minimum_leg": (PacedSwitchPolicy(SwitchPolicy(0.1, schedule="constant"), 2), None),
    "since_teacher": (PacedSwitchPolicy(SwitchPolicy(0.2, final_ratio=0.1, horizon=2), 1, "since_teacher"), None),
    "both": (
        SwitchPolicy.of(initial_threshold=0.2, final_ratio=0.1, horizon=2, clock="since_teacher", minimum_leg=2),
        None,
    ),
}


@pytest.mark.parametrize("draft_length", LENGTHS)
@pytest.mark.parametrize("name", list(RULES))
def test_frequencies_of_whole_texts_match_the_enumerated_rule(name, draft_length):
    tables = make_tables(3, seed=1)
    policy, rule = RULES[name]

    def behaviour(prefix):
        writer = rule(tables, prefix) if rule else switch_author(policy, tables, prefix)
        one, other = (table[prefix[-1]].exp() for table in tables)
        if writer is None:
            return 0.65 * one + 0.35 * other
        return other if writer == "teacher" else one

    rollout = assert_frequencies_match(policy, tables, behaviour, draft_length, steps=4)
    assert 0.05 < rollout.teacher_share < 0.95
    if name == "random":
        assert rollout.teacher_share == pytest.approx(0.35, abs=0.01)


POLICIES = {
    "random": RandomPolicy(0.4),
    "teacher_first": TeacherFirstPolicy(7),
    "teacher_prefix": TeacherPrefixPolicy(12, prefix_decay=0.5).at_progress(0.25),
    "student_first": StudentFirstPolicy(7),
    "student_entropy": StudentEntropyPolicy(3.4, final_ratio=0.9, horizon=15),
    "student_confidence": StudentConfidencePolicy(1.0, final_ratio=0.5, horizon=20),
    "minimum_leg": SwitchPolicy.of(initial_threshold=0.12, final_ratio=0.2, horizon=24, minimum_leg=3),
    "since_teacher": SwitchPolicy.of(initial_threshold=0.3, final_ratio=0.2, horizon=6, clock="since_teacher"),
    "both": SwitchPolicy.of(initial_threshold=0.3, final_ratio=0.2, horizon=6, clock="since_teacher", minimum_leg=2),
}


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("name", list(POLICIES))
def test_every_draft_length_writes_the_same_tokens_authors_and_measures(name, family):
    student, teacher = make_pair(family)
    ids, mask = make_prompts(4)
    options = {"policy": POLICIES[name], "max_new_tokens": 15, "eos_token_id": [EOS_ID, 5]}
    reference = roll_out(student, teacher, ids, mask, draft_length=1, **options)
    assert 0.0 < reference.teacher_share < 1.0
    assert_same(reference, roll_out(student, teacher, ids, mask, draft_length="auto", **options))
    # Rows that wait for a place start with a fresh state.
    assert_same(reference, roll_out(student, teacher, ids, mask, draft_length=5, max_active_rows=2, **options))


@pytest.mark.parametrize("draft_length", [1, 4])
@pytest.mark.parametrize(
    ("policy", "other"),
    [
        (RandomPolicy(0.0), StudentPolicy()),
        (RandomPolicy(1.0), TeacherPolicy()),
        (TeacherFirstPolicy(0), StudentPolicy()),
        (TeacherFirstPolicy(20), TeacherPolicy()),
        (TeacherPrefixPolicy(20), TeacherPolicy()),
        (TeacherPrefixPolicy(20, prefix_decay=0.5).at_progress(0.5), StudentPolicy()),
        (TeacherPrefixPolicy(7), TeacherFirstPolicy(7)),
        (StudentFirstPolicy(0), TeacherPolicy()),
        (StudentFirstPolicy(20), StudentPolicy()),
        (StudentEntropyPolicy(math.inf), StudentPolicy()),
        (StudentEntropyPolicy(0.0), TeacherPolicy()),
        (StudentConfidencePolicy(math.inf), StudentPolicy()),
        (StudentConfidencePolicy(0.0), TeacherPolicy()),
    ],
)
def test_at_its_ends_every_strategy_is_one_author_alone(policy, other, draft_length):
    student, teacher = make_pair("gpt2", noise=0.5)
    ids, mask = make_prompts(4)
    options = {"max_new_tokens": 20, "eos_token_id": EOS_ID, "draft_length": draft_length}
    rollout = roll_out(student, teacher, ids, mask, policy=policy, **options)
    alone = roll_out(student, teacher, ids, mask, policy=other, **options)
    assert torch.equal(rollout.completion_ids, alone.completion_ids)
    assert torch.equal(rollout.author, alone.author)


def test_strategies_without_a_threshold_record_none():
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(2)
    for policy in (RandomPolicy(0.5), TeacherFirstPolicy(3), StudentFirstPolicy(3)):
        rollout = roll_out(student, teacher, ids, mask, policy=policy, max_new_tokens=6)
        assert bool(rollout.divergence.isnan().all() and rollout.threshold.isnan().all())


def test_doubt_of_the_student_is_measured_without_a_look_at_the_teacher():
    student = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    student[:, 3] = -math.inf
    student = student.log_softmax(-1)
    nothing, drafted = torch.full_like(student, math.nan), torch.zeros(50, dtype=torch.int64)
    entropy = StudentEntropyPolicy().measure(student, nothing, drafted)
    assert torch.allclose(entropy, torch.distributions.Categorical(probs=student.exp()).entropy(), atol=1e-5)
    doubt = StudentConfidencePolicy().measure(student, nothing, drafted)
    assert torch.allclose(doubt.neg().exp(), student.exp().max(-1).values)
    assert bool((doubt <= entropy + 1e-6).all())  # min-entropy is at most the entropy


# ---- the same share for every strategy


@pytest.mark.parametrize("share", [0.0, 0.2, 0.53, 1.0])
@pytest.mark.parametrize("strategy", [RandomPolicy, TeacherFirstPolicy, StudentFirstPolicy])
def test_from_share_gives_that_share_of_texts_of_one_length(strategy, share):
    student, teacher = make_pair("gpt2")
    prompts = torch.full((40, 1), 7)
    rollout = roll_out(student, teacher, prompts, policy=strategy.from_share(share, 50), max_new_tokens=50)
    assert rollout.teacher_share == pytest.approx(share, abs=0.03)


def test_from_share_counts_tokens_of_ragged_texts():
    lengths = torch.tensor([3, 10, 40, 80])
    for share in (0.1, 0.5, 0.9):
        first = TeacherFirstPolicy.from_share(share, lengths).teacher_tokens
        assert float(torch.minimum(lengths, torch.tensor(first)).sum() / lengths.sum()) == pytest.approx(
            share, abs=0.02
        )
        switch = StudentFirstPolicy.from_share(share, lengths).switch_position
        assert float((lengths - switch).clamp_min(0).sum() / lengths.sum()) == pytest.approx(share, abs=0.02)
    assert first_tokens_with_share(0.5, 10) == 5


# ---- minimum leg and drift clock


def legs_of(rollout, row):
    """(author, tokens) of every run of one author."""
    legs = []
    for author in rollout.author[row][rollout.completion_mask[row]].tolist():
        if legs and legs[-1][0] == author:
            legs[-1][1] += 1
        else:
            legs.append([author, 1])
    return legs


@pytest.mark.parametrize("draft_length", [1, 5])
@pytest.mark.parametrize("minimum", [2, 5])
def test_nobody_gives_the_pen_back_before_the_minimum_leg(minimum, draft_length):
    student, teacher = make_pair("llama")
    ids, mask = make_prompts(3)
    policy = SwitchPolicy.of(initial_threshold=0.1, schedule="constant", minimum_leg=minimum)
    options = {"max_new_tokens": 30, "draft_length": draft_length}
    rollout = roll_out(student, teacher, ids, mask, policy=policy, **options)
    legs = [legs_of(rollout, row) for row in range(3)]
    assert all(tokens >= minimum for row in legs for _, tokens in row[:-1])
    plain = roll_out(student, teacher, ids, mask, policy=SwitchPolicy(0.1, schedule="constant"), **options)
    assert min(tokens for row in range(3) for _, tokens in legs_of(plain, row)[:-1]) == 1
    # Where the pen changes hands, the threshold asks for it.
    for row, places in enumerate(legs):
        place = 0
        for author, tokens in places:
            above = rollout.divergence[row, place] > rollout.threshold[row, place]
            assert bool(above) == (author == Author.TEACHER)
            place += tokens


def test_minimum_leg_beyond_the_text_leaves_it_to_the_first_author():
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(8)
    policy = SwitchPolicy.of(initial_threshold=0.1, schedule="constant", minimum_leg=100)
    rollout = roll_out(student, teacher, ids, mask, policy=policy, max_new_tokens=20)
    assert bool((rollout.author == rollout.author[:, :1]).all())
    assert 0.0 < rollout.teacher_share < 1.0


@pytest.mark.parametrize("draft_length", [1, 4])
def test_drift_clock_with_a_constant_schedule_and_legs_of_one_token_is_the_plain_switch(draft_length):
    """The walk with a state, against the decision without one."""
    student, teacher = make_pair("opt")
    ids, mask = make_prompts(5)
    options = {"max_new_tokens": 24, "eos_token_id": EOS_ID, "draft_length": draft_length}
    plain = SwitchPolicy(0.12, schedule="constant")
    walked = PacedSwitchPolicy(plain, minimum_leg=1, clock="since_teacher")
    assert walked.stateful and not plain.stateful
    first = roll_out(student, teacher, ids, mask, policy=plain, **options)
    assert_same(first, roll_out(student, teacher, ids, mask, policy=walked, **options), tolerance=0.0)


def test_drift_clock_is_the_position_until_the_teacher_writes_and_starts_anew_afterwards():
    policy = SwitchPolicy.of(initial_threshold=0.4, final_ratio=0.1, horizon=10, clock="since_teacher")
    measures = [0.0, 0.0, 0.5, 0.0, 0.0, 0.0]
    state, seen = policy.initial_state(1, torch.device("cpu")), []
    for position, measure in enumerate(measures):
        decision = policy.decide(Positions(torch.tensor([measure]), torch.tensor([position]), state))
        state = decision.state
        seen.append(float(decision.threshold))
    by_position = policy.rule.threshold(torch.arange(6))
    assert seen == pytest.approx([*by_position[:3].tolist(), *by_position[:3].tolist()])


@pytest.mark.parametrize("draft_length", [1, 4])
def test_threshold_ln_2_is_the_student_alone_with_legs_and_clock_too(draft_length):
    student, teacher = make_pair("gpt2", noise=1.0)
    ids, mask = make_prompts(3)
    policy = SwitchPolicy.of(initial_threshold=LN_2, schedule="constant", minimum_leg=4, clock="since_teacher")
    rollout = roll_out(student, teacher, ids, mask, policy=policy, max_new_tokens=15, draft_length=draft_length)
    alone = roll_out(student, None, ids, mask, policy=StudentPolicy(), max_new_tokens=15)
    assert torch.equal(rollout.completion_ids, alone.completion_ids)


@pytest.mark.parametrize("draft_length", [1, 4])
def test_the_same_model_with_the_same_prompt_never_takes_over_from_itself(draft_length):
    """Self-distillation: only what the teacher's prompt says more than the student's makes it write."""
    _, model = make_pair("gpt2")
    ids, mask = make_prompts(4)
    other_ids, other_mask = make_prompts(4, seed=9, longest=14)
    policy = SwitchPolicy(0.2, schedule="constant")
    options = {"policy": policy, "max_new_tokens": 15, "draft_length": draft_length}
    assert roll_out(model, model, ids, mask, **options).teacher_share == 0.0
    told = roll_out(model, model, ids, mask, teacher_prompt_ids=other_ids, teacher_prompt_mask=other_mask, **options)
    assert told.teacher_share > 0.0


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (RandomPolicy, {"teacher_probability": 1.1}, "teacher_probability must lie in .0, 1., got 1.1"),
        (RandomPolicy, {"teacher_probability": math.nan}, "teacher_probability"),
        (TeacherPrefixPolicy, {"teacher_tokens": -1}, "teacher_tokens must be an integer >= 0, got -1"),
        (TeacherPrefixPolicy, {"prefix_decay": 0.0}, "prefix_decay must lie in .0, 1., a share of the training, got"),
        (TeacherFirstPolicy, {"teacher_tokens": -1}, "teacher_tokens must be an integer >= 0, got -1"),
        (StudentFirstPolicy, {"switch_position": 1.5}, "switch_position must be an integer >= 0, got 1.5"),
        (StudentEntropyPolicy, {"initial_threshold": -0.1}, "initial_threshold must lie in .0, inf nats., got -0.1"),
        (StudentConfidencePolicy, {"initial_threshold": math.nan}, "initial_threshold"),
        (SwitchPolicy.of, {"minimum_leg": 0}, "minimum_leg must be an integer >= 1, got 0"),
        (SwitchPolicy.of, {"clock": "steps"}, "clock must be one of position, since_teacher, got 'steps'"),
    ],
)
def test_options_outside_their_range_are_refused_in_one_line(policy, options, message):
    with pytest.raises(UserError, match=message) as caught:
        policy(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", [RandomPolicy, TeacherFirstPolicy, StudentFirstPolicy])
def test_shares_outside_their_range_are_refused(strategy):
    with pytest.raises(UserError, match="teacher_share must lie in"):
        strategy.from_share(1.5, 10)


def test_the_teachers_prefix_falls_linearly_to_nothing():
    policy = TeacherPrefixPolicy(teacher_tokens=40, prefix_decay=0.5)
    assert policy.at_progress(0.0) == policy
    seen = [policy.at_progress(progress).teacher_tokens for progress in (0.0, 0.125, 0.25, 0.4, 0.5, 1.0)]
    assert seen == [40, 30, 20, 8, 0, 0]
