"""Laws of static shapes: the sequential reference's text, from functions that ask nothing and find all where it was.

On CPU nothing is captured, but a key's first function serves all later calls, as a graph would, and `VERIFY` warms it
up and compares addresses: what would make a graph repeat old numbers makes these rollouts wrong.
"""

import dataclasses
import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from helpers.pairs import assert_same, make_pair, make_prompts
from helpers.tiny import CONTEXT, EOS_ID, build_gpt2

from switchkd.engine import capture, roll_out
from switchkd.engine.capture import Captures, HostReadError, NoHostReads, host_read
from switchkd.engine.session import Session
from switchkd.errors import UserError
from switchkd.models.known import known
from switchkd.policies import (
    POLICIES,
    AdaSwitchPolicy,
    BlendPolicy,
    Decision,
    PacedSwitchPolicy,
    Policy,
    RandomPolicy,
    RelayPolicy,
    SkdPolicy,
    StudentConfidencePolicy,
    StudentEntropyPolicy,
    StudentFirstPolicy,
    StudentPolicy,
    SwitchPolicy,
    TeacherFirstPolicy,
    TeacherPolicy,
    TeacherPrefixPolicy,
    TrustRegionPolicy,
    teacher_where,
)

SWITCH = SwitchPolicy(initial_threshold=0.12, final_ratio=0.2, horizon=24)
WRITERS = {
    "switch": SWITCH,
    "student": StudentPolicy(),
    "teacher": TeacherPolicy(),
    "blend": BlendPolicy(0.4),
    "skd": SkdPolicy(5),
    "adaswitch": AdaSwitchPolicy(divergence_multiple=1.3, divergence_window=3),
    "relay": RelayPolicy(trigger_threshold=0.15, leg_length=3, leg_budget=2),
    "trb": TrustRegionPolicy(kl_budget=0.2),
    "random": RandomPolicy(0.4),
    "teacher_first": TeacherFirstPolicy(6),
    "teacher_prefix": TeacherPrefixPolicy(9),
    "student_first": StudentFirstPolicy(6),
    "student_entropy": StudentEntropyPolicy(3.0, horizon=16),
    "student_confidence": StudentConfidencePolicy(2.0, horizon=16),
    "paced": PacedSwitchPolicy(SWITCH, minimum_leg=3, clock="since_teacher"),
}


@pytest.fixture(autouse=True)
def verified(monkeypatch):
    monkeypatch.setattr(capture, "VERIFY", True)


@pytest.fixture
def asking_nothing(monkeypatch):
    """Refuse every question to the device inside the functions of a round; returns how often each was called."""
    made, calls = Session.functions, []

    def guarded(function):
        def call():
            with NoHostReads():
                function()
            calls.append(function)

        return function and call

    monkeypatch.setattr(Session, "functions", lambda session, *sizes: tuple(map(guarded, made(session, *sizes))))
    return calls


def static(*arguments, **options):
    """A rollout with static shapes, and not by falling back."""
    rollout = roll_out(*arguments, cuda_graphs=True, **options)
    assert "captured" in rollout.stats
    return rollout


# ---- the same text


def test_every_policy_is_compared():
    assert WRITERS.keys() >= POLICIES.keys()


PAIRS = [
    *(("llama", name) for name in WRITERS),
    *(("gpt2", name) for name in ("switch", "relay")),
    *(("opt", name) for name in ("switch", "blend")),
    *(("qwen3", name) for name in ("switch", "paced", "random")),
]


@pytest.mark.filterwarnings("ignore:TrustRegionPolicy decides outside")
@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_static_shapes_write_what_the_sequential_reference_writes(family, name):
    student, teacher = make_pair(family)
    ids, mask = make_prompts(5, seed=1)
    options = {"policy": WRITERS[name], "max_new_tokens": 24, "eos_token_id": [EOS_ID, 5]}
    reference = roll_out(student, teacher, ids, mask, draft_length=1, **options)
    assert name in ("student", "teacher") or 0.0 < reference.teacher_share < 1.0
    assert len(set(reference.completion_mask.sum(1).tolist())) > 1
    for length, places in ((3, None), ("auto", 2)):
        rollout = static(student, teacher, ids, mask, draft_length=length, max_active_rows=places, **options)
        assert_same(reference, rollout, tolerance=1e-3)
        assert rollout.measured == reference.measured


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
        {"excluded_ids": [3, 5, 7]},
        {"return_teacher_hidden": True},
        {"return_drafted_ids": True},
        {"teacher_prompt_ids": [[9, 8, 7, 6], [5], [4, 3, 2]]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_of_a_rollout_holds(options):
    student, teacher = make_pair("llama")
    ids, mask = make_prompts(3)
    options = {"policy": SWITCH, "max_new_tokens": 20, "eos_token_id": EOS_ID, **options}
    reference = roll_out(student, teacher, ids, mask, draft_length=1, **options)
    rollout = static(student, teacher, ids, mask, draft_length=4, max_active_rows=2, **options)
    assert_same(reference, rollout)
    if "return_teacher_hidden" in options:
        assert torch.allclose(reference.teacher_hidden, rollout.teacher_hidden, atol=1e-4)
    if "return_drafted_ids" in options:
        assert torch.equal(reference.drafted_ids, rollout.drafted_ids)
        assert not torch.equal(rollout.drafted_ids, rollout.completion_ids)


def test_drafts_past_the_end_of_the_context_are_harmless():
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(3, longest=8)
    options = {"policy": SWITCH, "max_new_tokens": CONTEXT - 8}
    reference = roll_out(student, teacher, ids, mask, draft_length=3, **options)
    assert_same(reference, static(student, teacher, ids, mask, draft_length=8, **options))


def test_a_draft_of_one_token_is_a_round_of_static_shape_too():
    student, teacher = make_pair()
    rollout = static(student, teacher, [[3, 4]], policy=SWITCH, max_new_tokens=7, draft_length=1)
    assert rollout.stats["rounds"] == 7


def test_a_model_read_through_its_own_forward_is_decoded_without_and_says_so():
    student = build_gpt2(scale_attn_by_inverse_layer_idx=True)
    options = {"policy": SWITCH, "max_new_tokens": 8}
    with pytest.warns(UserWarning, match="cuda_graphs is not used: the student, a GPT2LMHeadModel, is read through"):
        rollout = roll_out(student, build_gpt2(seed=1), [[3, 4]], cuda_graphs=True, draft_length=2, **options)
    assert "captured" not in rollout.stats
    assert_same(roll_out(student, build_gpt2(seed=1), [[3, 4]], draft_length=1, **options), rollout)


def test_cuda_graphs_is_a_truth_value():
    with pytest.raises(UserError, match="cuda_graphs must be True or False, got 'yes'"):
        roll_out(build_gpt2(), None, [[3]], policy=StudentPolicy(), cuda_graphs="yes")


# ---- no host in a round


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "trb"])
def test_a_round_asks_nothing_of_the_device(name, asking_nothing):
    student, teacher = make_pair("qwen3")
    options = {"policy": WRITERS[name], "max_new_tokens": 6, "eos_token_id": EOS_ID, "excluded_ids": [4]}
    static(student, teacher, [[3, 4], [5]], draft_length=3, top_k=9, top_p=0.9, **options)
    assert len(asking_nothing) >= (4 if name == "student" else 6)


def test_the_guard_sees_a_question(asking_nothing):
    student, teacher = make_pair()
    with pytest.warns(UserWarning, match="decides outside of CUDA graphs"), pytest.raises(HostReadError):
        static(student, teacher, [[3, 4]], policy=WRITERS["trb"], max_new_tokens=6, draft_length=3)


QUESTIONS = {
    "item": lambda at: float(at.sum()),
    "a branch": lambda at: at.sum() if at.any() else at,
    "a mask": lambda at: at[at > 1],
    "assigned by a mask": lambda at: (
        at.clone().masked_fill_(at > 0, 1.0).index_put_((at > 1,), torch.zeros_like(at[0]))
    ),
    "nonzero": lambda at: at.nonzero(),
    "numbers of the host": lambda at: at + torch.tensor([1.0, 2.0, 3.0]),
    "one or the other": lambda at: torch.where(at > 1),
    "unique": lambda at: at.unique(),
    "another device": lambda at: at.to("meta"),
}


@pytest.mark.parametrize("name", list(QUESTIONS))
def test_a_question_to_the_device_is_named(name):
    assert host_read(lambda: QUESTIONS[name](torch.arange(3.0))) is not None


def test_arithmetic_and_integer_indices_are_no_questions():
    at = torch.arange(6.0).view(2, 3)
    rows = torch.tensor([1, 0])

    def function():
        (at + 1).log_softmax(-1).gather(1, rows.unsqueeze(1)), at[rows, rows], torch.where(at > 1, 0.0, at).cumprod(-1)

    assert host_read(function) is None


def test_a_policy_that_asks_decides_outside_and_says_why():
    student, teacher = make_pair()
    with pytest.warns(UserWarning, match=r"TrustRegionPolicy decides outside of CUDA graphs: it asks .*nonzero"):
        static(student, teacher, [[3, 4]], policy=WRITERS["trb"], max_new_tokens=6, draft_length=3)
    assert {key[0] for key in known(student).session.captures} == {"draft", "check"}


def test_a_policy_whose_numbers_can_change_is_never_frozen_into_a_graph():
    class Mine(Policy):
        share = 0.0
        random = True

        def decide(self, at):
            author = teacher_where(at.uniform < self.share)
            return Decision(author, torch.full_like(at.measure, 0.0))

    policy = Mine()
    student, teacher = make_pair()
    with pytest.warns(UserWarning, match="Mine decides outside of CUDA graphs: it is no frozen dataclass"):
        first = static(student, teacher, [[3, 4]], policy=policy, max_new_tokens=12, draft_length=3)
    policy.share = 1.0
    second = static(student, teacher, [[3, 4]], policy=policy, max_new_tokens=12, draft_length=3)
    assert (first.teacher_share, second.teacher_share) == (0.0, 1.0)


# ---- what stays where it is


def test_the_next_rollout_captures_nothing_and_is_the_reference_again():
    """Whatever may differ between rollouts is in tensors that stay, not in the functions."""
    student, teacher = make_pair("llama")
    first = {"prompts": make_prompts(5), "seed": 3, "max_new_tokens": 20, "eos_token_id": 5}
    second = {"prompts": make_prompts(5, seed=4), "seed": 8, "max_new_tokens": 23, "eos_token_id": 7}
    second |= {"row_ids": torch.tensor([9, 2, 2**40, 5, 11]), "teacher_prompt_ids": [[7], [6, 5], [4], [3], [9, 9]]}
    captured = []
    for options in (first, second, first):
        prompts, options = options["prompts"], {name: options[name] for name in options if name != "prompts"}
        reference = roll_out(student, teacher, *prompts, policy=SWITCH, draft_length=1, **options)
        rollout = static(student, teacher, *prompts, policy=SWITCH, draft_length=4, **options)
        assert_same(reference, rollout)
        captured.append(rollout.stats["captured"])
    assert captured[0] > 0 and captured[1:] == [0, 0]


def test_weights_that_training_changes_in_place_write_another_text_without_a_new_capture():
    student, teacher = make_pair("llama")
    options = {"policy": SWITCH, "max_new_tokens": 16}
    before = static(student, teacher, [[3, 4, 5]], draft_length=4, **options)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    after = static(student, teacher, [[3, 4, 5]], draft_length=4, **options)
    assert after.stats["captured"] == 0
    assert not torch.equal(before.completion_ids, after.completion_ids)
    assert_same(roll_out(student, teacher, [[3, 4, 5]], draft_length=1, **options), after)


def test_weights_that_lie_elsewhere_are_captured_anew():
    """A teacher that was offloaded comes back to other addresses."""
    student, teacher = make_pair("llama")
    options = {"policy": SWITCH, "max_new_tokens": 12}
    static(student, teacher, [[3, 4], [5]], draft_length=4, **options)
    for parameter in teacher.parameters():
        parameter.data = parameter.data.clone() * 1.1
    rollout = static(student, teacher, [[3, 4], [5]], draft_length=4, **options)
    assert rollout.stats["captured"] > 0
    assert_same(roll_out(student, teacher, [[3, 4], [5]], draft_length=1, **options), rollout)


def test_a_larger_rollout_makes_room_and_a_smaller_one_keeps_it():
    student, teacher = make_pair()
    options = {"policy": SWITCH, "draft_length": 4}
    sessions = []
    for rows, limit in ((2, 10), (5, 80), (2, 10)):
        ids, mask = make_prompts(rows)
        rollout = static(student, teacher, ids, mask, max_new_tokens=limit, **options)
        reference = roll_out(student, teacher, ids, mask, max_new_tokens=limit, policy=SWITCH, draft_length=1)
        assert_same(reference, rollout)
        sessions.append(known(student).session)
    assert sessions[0] is not sessions[1] and sessions[1] is sessions[2]


def test_another_policy_or_temperature_does_not_meet_the_functions_of_the_last():
    student, teacher = make_pair("llama")
    ids, mask = make_prompts(4)
    counts = []
    for policy, temperature in (
        *((SwitchPolicy(initial_threshold=threshold, schedule="constant"), 1.0) for threshold in (0.05, 0.1, 0.2, 0.4)),
        (WRITERS["adaswitch"], 1.0),
        (WRITERS["relay"], 0.7),
        (SWITCH, 0.0),
    ):
        options = {"policy": policy, "max_new_tokens": 16, "temperature": temperature}
        rollout = static(student, teacher, ids, mask, draft_length=4, **options)
        assert_same(roll_out(student, teacher, ids, mask, draft_length=1, **options), rollout)
        counts.append(len(known(student).session.captures))
    # A threshold that moves from step to step does not pile up graphs: there are row counts times three functions.
    assert max(counts) <= 9


@pytest.mark.parametrize("gone", ["student", "teacher"])
def test_nothing_is_kept_of_a_model_that_is_gone(gone):
    pair = dict(zip(("student", "teacher"), make_pair(), strict=True))
    static(pair["student"], pair["teacher"], [[3, 4]], policy=SWITCH, max_new_tokens=6, draft_length=3)
    session = weakref.ref(known(pair["student"]).session)
    assert session() is not None
    del pair[gone]
    gc.collect()
    assert session() is None


def test_a_tensor_that_moved_is_noticed():
    student, teacher = make_pair()
    options = {"policy": SWITCH, "max_new_tokens": 6, "draft_length": 3}
    static(student, teacher, [[3, 4]], **options)
    places = known(student).session.places
    places.last = places.last.clone()
    with pytest.raises(RuntimeError, match="has moved since it was captured"):
        static(student, teacher, [[3, 4]], **options)


def test_a_nan_of_a_broken_model_does_not_reach_the_next_rollout():
    """A masked slot has weight 0 in attention, and 0 * nan is nan."""
    student, teacher = make_pair("llama")
    options = {"policy": StudentPolicy(), "max_new_tokens": 12}
    static(student, teacher, [[3, 4, 5, 6, 7, 8]], **options)
    session = known(student).session
    for tensor in session.student.tensors()[:2]:
        tensor.fill_(torch.nan)
    rollout = static(student, teacher, [[3, 4]], **options)
    assert known(student).session is session
    assert_same(roll_out(student, teacher, [[3, 4]], draft_length=1, **options), rollout)


# ---- captures alone


@dataclass
class Counter:
    """A function of static shape that counts its calls in a tensor."""

    total: torch.Tensor

    def __call__(self):
        self.total += 1


def test_a_key_is_warmed_up_without_effect_and_its_first_function_serves():
    captures, first, second = Captures(torch.device("cpu")), Counter(torch.zeros(1)), Counter(torch.zeros(1))
    for function in (first, second):
        captures.get(("count", 1), function, changed=[function.total], reads=[first.total])()
    assert (float(first.total), float(second.total)) == (2.0, 0.0)
    captures.get(("count", 2), second, changed=[second.total], reads=[second.total])()
    captures.forget(lambda key: key != ("count", 1))
    captures.get(("count", 1), second, changed=[second.total], reads=[second.total])()
    assert (float(first.total), float(second.total), len(captures)) == (2.0, 2.0, 2)


# ---- on a GPU: the same laws, captured


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@CUDA
@pytest.mark.filterwarnings("ignore:TrustRegionPolicy decides outside")
@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_graphs_write_what_the_sequential_reference_writes(name, family):
    student, teacher = (model.cuda() for model in make_pair(family))
    ids, mask = make_prompts(5, seed=1)
    options = {"policy": WRITERS[name], "max_new_tokens": 24, "eos_token_id": [EOS_ID, 5]}
    reference = roll_out(student, teacher, ids, mask, draft_length=1, **options)
    for repeat in range(2):
        rollout = static(student, teacher, ids, mask, draft_length=3, max_active_rows=2, **options)
        assert_same(reference, rollout, tolerance=1e-3)
        assert (rollout.stats["captured"] > 0) == (repeat == 0)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_computes_what_its_function_computes_to_the_last_bit(dtype, monkeypatch):
    student, teacher = (model.cuda() for model in make_pair("qwen3", dtype=dtype))
    ids, mask = make_prompts(6)
    options = {"policy": SWITCH, "max_new_tokens": 40, "eos_token_id": EOS_ID, "return_teacher_hidden": True}
    graphs = static(student, teacher, ids, mask, draft_length=4, **options)
    known(student).session = None
    monkeypatch.setattr(Captures, "_capture", lambda captures, function, changed: function)
    plain = static(student, teacher, ids, mask, draft_length=4, **options)
    for field in dataclasses.fields(graphs):
        one, two = getattr(graphs, field.name), getattr(plain, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one.nan_to_num(-1.0), two.nan_to_num(-1.0)), field.name


@pytest.mark.gpu
@CUDA
def test_no_call_of_a_round_waits_for_the_device(monkeypatch):
    """CUDA's own guard, which sees what the operations' names do not tell."""
    made = Session.functions

    def guarded(function):
        def call():
            torch.cuda.set_sync_debug_mode("error")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return function and call

    monkeypatch.setattr(Session, "functions", lambda session, *sizes: tuple(map(guarded, made(session, *sizes))))
    monkeypatch.setattr(Captures, "_capture", lambda captures, function, changed: function)
    student, teacher = (model.cuda() for model in make_pair("llama"))
    static(student, teacher, [[3, 4], [5]], policy=SWITCH, max_new_tokens=12, draft_length=3, top_p=0.9)


@pytest.mark.gpu
@CUDA
def test_training_changes_weights_under_the_graphs():
    student, teacher = (model.cuda() for model in make_pair("llama"))
    options = {"policy": SWITCH, "max_new_tokens": 16}
    static(student, teacher, [[3, 4, 5]], draft_length=4, **options)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.05)
    after = static(student, teacher, [[3, 4, 5]], draft_length=4, **options)
    assert after.stats["captured"] == 0
    assert_same(roll_out(student, teacher, [[3, 4, 5]], draft_length=1, **options), after)
