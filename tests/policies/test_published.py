"""Laws of the kin: what each writes, written down by enumeration, and where they coincide with others."""

import math

import pytest
import torch
from helpers.enumeration import assert_frequencies_match, make_tables
from helpers.pairs import assert_same, make_pair, make_prompts
from helpers.tiny import EOS_ID

from switchkd.divergences import forward_kl, generalized_jsd, reverse_kl
from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.policies import (
    AdaSwitchPolicy,
    BlendPolicy,
    Positions,
    RelayPolicy,
    SkdPolicy,
    StudentPolicy,
    SwitchPolicy,
    TeacherPolicy,
    TrustRegionPolicy,
)
from switchkd.policies.published import largest_weight_within
from switchkd.rollout import Author

LENGTHS = (1, 3, "auto")


def skd_distribution(student, teacher, top_k):
    """The student cut to the teacher's top K, the lost mass given to the teacher."""
    inside = teacher >= teacher.topk(top_k).values[-1]
    kept = torch.where(inside, student.exp(), 0.0)
    return kept + (1.0 - kept.sum()) * teacher.exp()


def ada_switch_author(policy, tables, prefix):
    """Walk the text in plain Python: once the KL jumps above its own recent mean the teacher keeps the pen."""
    seen = []
    for token in prefix:
        divergence = float(forward_kl(tables[0][token], tables[1][token]))
        if (
            len(seen) >= policy.divergence_window
            and divergence
            > policy.divergence_multiple * sum(seen[-policy.divergence_window :]) / policy.divergence_window
        ):
            return "teacher"
        seen.append(divergence)
    return "student"


def relay_author(policy, tables, prefix):
    left, legs, author = 0, 0, ""
    for token in prefix:
        jumps = float(generalized_jsd(tables[0][token], tables[1][token])) > policy.trigger_threshold
        if left == 0 and legs < policy.leg_budget and jumps:
            left, legs = policy.leg_length, legs + 1
        author = "teacher" if left else "student"
        left = max(left - 1, 0)
    return author


def bisected_blend(student, teacher, epsilon):
    """The geometric blend within the budget, by plain bisection in float64."""
    student, teacher = student.double(), teacher.double()
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        blended = ((1 - middle) * student + middle * teacher).log_softmax(-1)
        low, high = (middle, high) if float(reverse_kl(blended, student)) <= epsilon else (low, middle)
    return ((1 - low) * student + low * teacher).log_softmax(-1).exp()


SKD, ADA = SkdPolicy(2), AdaSwitchPolicy(divergence_multiple=1.2, divergence_window=1)
RELAY, TRB = RelayPolicy(trigger_threshold=0.1, leg_length=2, leg_budget=1), TrustRegionPolicy(kl_budget=0.1)


@pytest.mark.parametrize("draft_length", LENGTHS)
@pytest.mark.parametrize("name", ["skd", "skd_1", "adaswitch", "adaswitch_window_2", "relay", "relay_many", "trb"])
def test_frequencies_of_whole_texts_match_the_enumerated_rule(name, draft_length):
    tables = make_tables(3, seed=1)
    policy, author = {
        "skd": (SKD, None),
        "skd_1": (SkdPolicy(1), None),
        "adaswitch": (ADA, ada_switch_author),
        "adaswitch_window_2": (AdaSwitchPolicy(divergence_multiple=1.1, divergence_window=2), ada_switch_author),
        "relay": (RELAY, relay_author),
        "relay_many": (RelayPolicy(trigger_threshold=0.1, leg_length=1, leg_budget=2), relay_author),
        "trb": (TRB, None),
    }[name]

    def behaviour(prefix):
        one, other = (table[prefix[-1]] for table in tables)
        if author is not None:
            return (other if author(policy, tables, prefix) == "teacher" else one).exp()
        if isinstance(policy, SkdPolicy):
            return skd_distribution(one, other, policy.teacher_top_k)
        return bisected_blend(one, other, policy.kl_budget)

    rollout = assert_frequencies_match(policy, tables, behaviour, draft_length, steps=4)
    assert 0.02 < rollout.teacher_share < 0.98


POLICIES = {
    "skd": SkdPolicy(5),
    "adaswitch": AdaSwitchPolicy(divergence_multiple=1.3, divergence_window=3),
    "relay": RelayPolicy(trigger_threshold=0.15, leg_length=3, leg_budget=2),
    "trb": TrustRegionPolicy(kl_budget=0.2),
}


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("name", list(POLICIES))
def test_every_draft_length_writes_the_same_tokens_authors_and_measures(name, family):
    student, teacher = make_pair(family)
    ids, mask = make_prompts(5)
    options = {"policy": POLICIES[name], "max_new_tokens": 20, "eos_token_id": [EOS_ID, 5]}
    reference = roll_out(student, teacher, ids, mask, draft_length=1, **options)
    assert 0.0 < reference.teacher_share < 1.0
    for length in (3, "auto"):
        assert_same(reference, roll_out(student, teacher, ids, mask, draft_length=length, **options), tolerance=1e-3)
    waited = roll_out(student, teacher, ids, mask, draft_length=5, max_active_rows=2, **options)
    assert_same(reference, waited, tolerance=1e-3)


@pytest.mark.parametrize("draft_length", [1, 4])
@pytest.mark.parametrize(
    ("policy", "other"),
    [
        (SkdPolicy(98), StudentPolicy()),
        (AdaSwitchPolicy(divergence_multiple=1e9), StudentPolicy()),
        (AdaSwitchPolicy(divergence_window=100), StudentPolicy()),
        (RelayPolicy(trigger_threshold=0.0, leg_budget=0), StudentPolicy()),
        (RelayPolicy(trigger_threshold=math.log(2.0)), StudentPolicy()),
        (RelayPolicy(trigger_threshold=0.0, leg_length=30), TeacherPolicy()),
        (RelayPolicy(trigger_threshold=0.1, leg_length=1, leg_budget=99), SwitchPolicy(0.1, schedule="constant")),
        (TrustRegionPolicy(kl_budget=0.0), StudentPolicy()),
        (TrustRegionPolicy(kl_budget=0.2).at_progress(1.0), StudentPolicy()),
        (TrustRegionPolicy(kl_budget=math.inf), TeacherPolicy()),
        (BlendPolicy(0.0), StudentPolicy()),
        (BlendPolicy(1.0), TeacherPolicy()),
    ],
)
def test_where_two_rules_coincide_they_write_the_same_text(policy, other, draft_length):
    student, teacher = make_pair("gpt2", noise=0.4)
    ids, mask = make_prompts(4)
    options = {"max_new_tokens": 20, "eos_token_id": EOS_ID, "draft_length": draft_length}
    rollout = roll_out(student, teacher, ids, mask, policy=policy, **options)
    alone = roll_out(student, teacher, ids, mask, policy=other, **options)
    assert torch.equal(rollout.completion_ids, alone.completion_ids)
    if not policy.blends:  # whose tokens name no writer but the draft and its replacement
        assert torch.equal(rollout.author, alone.author)


# ---- SKD


def test_skd_ranks_the_drafted_token_in_the_teachers_order_and_ties_belong_to_the_top():
    teacher = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1, 0.0]).log().expand(6, -1)
    student = torch.full((6, 6), 1 / 6).log()
    ranks = SkdPolicy(2).measure(student, teacher, torch.arange(6))
    assert ranks[:5].tolist() == [1.0, 2.0, 2.0, 4.0, 4.0]
    for top_k, inside in ((1, 1), (2, 3), (3, 3), (4, 5), (6, 5), (100, 5)):
        policy = SkdPolicy(top_k)
        author = policy.decide(Positions(policy.measure(student, teacher, torch.arange(6)), torch.zeros(6))).author
        # An id that the teacher excludes is outside every top K.
        assert author.tolist() == [Author.STUDENT] * inside + [Author.TEACHER] * (6 - inside)


@pytest.mark.parametrize("draft_length", [1, 5])
def test_skd_keeps_no_token_that_the_teacher_ranks_below_k(draft_length):
    student, teacher = make_pair("gpt2", noise=0.6)
    ids, mask = make_prompts(6)
    rollout = roll_out(student, teacher, ids, mask, policy=SkdPolicy(3), max_new_tokens=20, draft_length=draft_length)
    keep = rollout.completion_mask
    assert torch.equal((rollout.author == Author.TEACHER)[keep], (rollout.divergence > 3)[keep])
    for row in range(6):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        text = rollout.completion_ids[row]
        with torch.no_grad():
            logits = teacher(torch.cat([prompt, text]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        by_student = rollout.author[row] == Author.STUDENT
        rank = 1 + (logits > logits.gather(1, text.unsqueeze(1))).sum(1)
        assert int(rank[by_student].max()) <= 3  # what stands there, not a token drawn anew


# ---- AdaSwitch and relay


@pytest.mark.parametrize("draft_length", [1, 4])
def test_ada_switch_gives_the_pen_away_once_and_for_good(draft_length):
    student, teacher = make_pair("llama")
    ids, mask = make_prompts(6)
    policy = AdaSwitchPolicy(divergence_multiple=1.3, divergence_window=4)
    rollout = roll_out(student, teacher, ids, mask, policy=policy, max_new_tokens=30, draft_length=draft_length)
    switched = 0
    for row in range(6):
        taught = rollout.author[row] == Author.TEACHER
        place = int(taught.to(torch.uint8).argmax()) if bool(taught.any()) else 30
        assert bool(taught[place:].all()) and place >= 4
        divergence, threshold = rollout.divergence[row], rollout.threshold[row]
        for position in range(4, min(place + 1, 30)):
            recent = float(divergence[position - 4 : position].mean())
            assert float(threshold[position]) == pytest.approx(1.3 * recent, rel=1e-5)
            assert bool(divergence[position] > threshold[position]) == (position == place)
        assert bool(threshold[:4].isnan().all()) and bool(threshold[place + 1 :].isnan().all())
        switched += place < 30
    assert switched >= 3


def test_ada_switch_forgets_an_infinite_divergence_with_its_window():
    """A student that excludes an id the teacher allows: KL is inf for a while, never nan for good."""
    policy = AdaSwitchPolicy(divergence_multiple=2.0, divergence_window=2)
    state, authors = policy.initial_state(1, torch.device("cpu")), []
    for position, measure in enumerate([math.inf, 0.1, 0.1, 0.1, 0.5, 0.1]):
        decision = policy.decide(Positions(torch.tensor([measure]), torch.tensor([position]), state))
        state = decision.state
        authors.append(int(decision.author))
    assert authors == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("draft_length", [1, 4])
def test_relay_runs_whole_legs_within_its_budget(draft_length):
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(6)
    policy = RelayPolicy(trigger_threshold=0.08, leg_length=4, leg_budget=2)
    rollout = roll_out(student, teacher, ids, mask, policy=policy, max_new_tokens=30, draft_length=draft_length)
    for row in range(6):
        starts = (rollout.divergence[row] > rollout.threshold[row]).nonzero().squeeze(-1).tolist()
        assert len(starts) == 2
        expected = torch.zeros(30, dtype=torch.bool)
        for start in starts:
            expected[start : start + 4] = True
        assert torch.equal(rollout.author[row] == Author.TEACHER, expected)
        assert bool(rollout.threshold[row, starts[1] + 1 :].isnan().all())


# ---- trust-region blending


@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 0.5, 3.0])
@pytest.mark.parametrize("size", [2, 30, 3000])
def test_the_blend_spends_the_budget_and_no_more(size, epsilon):
    generator = torch.Generator().manual_seed(size)
    teacher = (torch.randn(40, size, generator=generator) * 2).log_softmax(-1)
    student = (teacher + torch.randn(40, size, generator=generator)).log_softmax(-1)
    mu = TrustRegionPolicy(epsilon).behaviour(student, teacher)
    assert torch.allclose(mu.exp().sum(-1), torch.ones(40), atol=1e-4)
    spent = reverse_kl(mu, student)
    fits = forward_kl(student, teacher) <= epsilon
    assert bool((spent <= epsilon + 1e-5).all())
    assert bool((spent[~fits] >= epsilon * 0.998 - 1e-5).all())
    assert torch.equal(mu[fits], teacher[fits])


def test_the_weight_is_that_of_plain_bisection():
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((torch.randn(60, 12, generator=generator) * 2).log_softmax(-1) for _ in range(2))
    for epsilon in (0.01, 0.3):
        mu = TrustRegionPolicy(epsilon).behaviour(student, teacher).exp().double()
        for row in range(60):
            assert torch.allclose(mu[row], bisected_blend(student[row], teacher[row], epsilon), atol=1e-3)


def test_a_row_finds_the_same_weight_alone_and_among_others():
    generator = torch.Generator().manual_seed(3)
    student, teacher = ((torch.randn(20, 50, generator=generator) * 2).log_softmax(-1) for _ in range(2))
    together = largest_weight_within(student, teacher, 0.1)
    alone = [float(largest_weight_within(student[row : row + 1], teacher[row : row + 1], 0.1)) for row in range(20)]
    assert together.tolist() == pytest.approx(alone, rel=1e-5)


def test_excluded_ids_cost_their_mass_and_are_never_written():
    """Top-k warping leaves -inf behind, in different places for the two models."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(30, 8, generator=generator) for _ in range(2))
    student[:, 0] = teacher[:, 1] = -math.inf
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    mu = TrustRegionPolicy(1.0).behaviour(student, teacher)
    lost = student[:, 1].exp()
    blended = -torch.log1p(-lost) < 1.0
    assert bool(blended.any()) and not bool(mu.isnan().any())
    assert bool((mu[blended][:, :2] == -math.inf).all())  # what either excludes
    assert torch.equal(mu[~blended], student[~blended])  # excluding id 1 alone is too dear
    assert bool((reverse_kl(mu, student) <= 1.0 + 1e-5).all())
    disjoint = torch.full((1, 4), -math.inf)
    first, second = disjoint.clone(), disjoint.clone()
    first[0, 0] = second[0, 1] = 0.0
    assert torch.equal(TrustRegionPolicy(1.0).behaviour(first, second), first)
    assert torch.equal(TrustRegionPolicy(math.inf).behaviour(first, second), second)


def test_the_budget_falls_to_zero_over_the_warmup_and_stays_there():
    policy = TrustRegionPolicy(kl_budget=0.4, kl_budget_warmup=0.5)
    budgets = [policy.at_progress(progress).kl_budget for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert budgets == pytest.approx([0.4, 0.2, 0.0, 0.0, 0.0])
    assert policy.kl_budget == 0.4
    assert TrustRegionPolicy(math.inf).at_progress(1.0).kl_budget == 0.0


def test_other_policies_are_the_same_at_every_moment_of_training():
    for policy in (StudentPolicy(), TeacherPolicy(), SwitchPolicy(), SkdPolicy(), AdaSwitchPolicy(), RelayPolicy()):
        assert policy.at_progress(0.7) is policy


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (SkdPolicy, {"teacher_top_k": 0}, "teacher_top_k must be an integer >= 1, got 0"),
        (AdaSwitchPolicy, {"divergence_multiple": 0}, "divergence_multiple must be > 0, got 0"),
        (AdaSwitchPolicy, {"divergence_multiple": math.nan}, "divergence_multiple"),
        (AdaSwitchPolicy, {"divergence_window": 0}, "divergence_window must be an integer >= 1, got 0"),
        (RelayPolicy, {"trigger_threshold": 0.8}, "trigger_threshold must lie in .0, ln 2 nats., got 0.8"),
        (RelayPolicy, {"leg_length": 0}, "leg_length must be an integer >= 1, got 0"),
        (RelayPolicy, {"leg_budget": -1}, "leg_budget must be an integer >= 0, got -1"),
        (TrustRegionPolicy, {"kl_budget": -0.1}, "kl_budget must be >= 0 nats, got -0.1"),
        (TrustRegionPolicy, {"kl_budget": math.nan}, "kl_budget"),
        (TrustRegionPolicy, {"kl_budget_warmup": 0.0}, "kl_budget_warmup must lie in .0, 1."),
    ],
)
def test_options_outside_their_range_are_refused_in_one_line(policy, options, message):
    with pytest.raises(UserError, match=message) as caught:
        policy(**options)
    assert "\n" not in str(caught.value)
