"""Laws of the rollout: exactness against independent recomputation, limits, invariances, draft lengths."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from helpers.enumeration import NextTokenTable, assert_frequencies_match, make_tables
from helpers.pairs import assert_same, make_pair, make_prompts
from helpers.tiny import BUILDERS, EOS_ID, build_gpt2, build_llama

from switchkd.divergences import LN_2, generalized_jsd
from switchkd.engine import roll_out
from switchkd.engine.block import BlockDecoder
from switchkd.engine.draft_length import DraftLength
from switchkd.engine.request import Request
from switchkd.errors import UserError
from switchkd.models.forward import prompt_positions
from switchkd.policies import BlendPolicy, Decision, Policy, StudentPolicy, SwitchPolicy, TeacherPolicy
from switchkd.rollout import Author, Prompts
from switchkd.sampling import Stream, Warping, exponential_race, noise_keys


def recompute(model, rollout, row, warp=lambda logits: logits.log_softmax(-1)):
    """Log-probabilities at every completion token of one row, without cache, padding or batch."""
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
    completion = rollout.completion_ids[row][rollout.completion_mask[row]]
    with torch.no_grad():
        logits = model(torch.cat([prompt, completion]).unsqueeze(0), use_cache=False).logits[0]
    return warp(logits[len(prompt) - 1 : -1].float())


SWITCH = SwitchPolicy(initial_threshold=0.12, final_ratio=0.2, horizon=24)
LENGTHS = (1, 2, 3, 7, "auto")


@pytest.mark.parametrize("draft_length", LENGTHS)
@pytest.mark.parametrize("family", list(BUILDERS))
def test_both_models_without_cache_reproduce_every_divergence_and_every_author(family, draft_length):
    student, teacher = make_pair(family)
    ids, mask = make_prompts(5)
    rollout = roll_out(
        student, teacher, ids, mask, policy=SWITCH, max_new_tokens=30, draft_length=draft_length, eos_token_id=EOS_ID
    )
    assert 0.05 < rollout.teacher_share < 0.95
    for row in range(5):
        keep = rollout.completion_mask[row]
        jsd = generalized_jsd(recompute(student, rollout, row), recompute(teacher, rollout, row))
        assert torch.allclose(jsd, rollout.divergence[row][keep], atol=1e-4)
        threshold = SWITCH.threshold(torch.arange(int(keep.sum())))
        assert torch.equal(threshold, rollout.threshold[row][keep])
        assert torch.equal(rollout.author[row][keep] == Author.TEACHER, rollout.divergence[row][keep] > threshold)
        assert torch.equal(rollout.author[row][keep] != Author.TEACHER, rollout.author[row][keep] == Author.STUDENT)
    assert bool(rollout.divergence[~rollout.completion_mask].isnan().all())
    assert bool((rollout.completion_ids[~rollout.completion_mask] == EOS_ID).all())


@pytest.mark.parametrize("draft_length", LENGTHS)
def test_warping_is_applied_to_both_models_before_comparing(draft_length):
    student, teacher = make_pair("llama")
    ids, mask = make_prompts(4)
    options = {"temperature": 0.8, "top_k": 12, "top_p": 0.9}
    rollout = roll_out(
        student, teacher, ids, mask, policy=SWITCH, max_new_tokens=20, draft_length=draft_length, **options
    )
    from switchkd.sampling import warp

    for row in range(4):
        student_rows = recompute(student, rollout, row, lambda logits: warp(logits, **options))
        teacher_rows = recompute(teacher, rollout, row, lambda logits: warp(logits, **options))
        keep = rollout.completion_mask[row]
        assert torch.allclose(generalized_jsd(student_rows, teacher_rows), rollout.divergence[row][keep], atol=1e-4)
        writer = torch.where((rollout.author[row][keep] == Author.TEACHER).unsqueeze(1), teacher_rows, student_rows)
        chosen = writer.gather(1, rollout.completion_ids[row][keep].unsqueeze(1))
        assert bool((chosen > -math.inf).all())  # what its author excluded was never written


CASES = [
    pytest.param(family, dtype, batch, id=f"{family}-{str(dtype)[6:]}-{batch}")
    for family, dtype, batch in itertools.product(BUILDERS, (torch.float32, torch.float64), (1, 4, 16))
]
POLICIES = {
    "switch": SWITCH,
    "teacher": TeacherPolicy(),
    "blend": BlendPolicy(0.4),
    "constant": SwitchPolicy(initial_threshold=0.05, schedule="constant"),
}


@pytest.mark.parametrize(("family", "dtype", "batch"), CASES)
def test_every_draft_length_writes_the_same_tokens_authors_and_divergences(family, dtype, batch):
    """Over 500 random rows in all: prompts of length 1, rows that end inside a draft, both precisions."""
    for seed, policy in enumerate(POLICIES.values()):
        student, teacher = make_pair(family, seed=seed, dtype=dtype)
        ids, mask = make_prompts(batch, seed=seed)
        options = {"policy": policy, "max_new_tokens": 21, "seed": seed, "eos_token_id": [EOS_ID, 5, 17]}
        reference = roll_out(student, teacher, ids, mask, draft_length=1, **options)
        for length in (2, 5, 16, "auto"):
            rollout = roll_out(student, teacher, ids, mask, draft_length=length, **options)
            assert_same(reference, rollout)


def test_block_decoder_at_draft_length_1_is_the_sequential_reference():
    """What "auto" falls back to where drafting loses."""
    student, teacher = make_pair("opt")
    ids, mask = make_prompts(6)
    options = {"policy": SWITCH, "max_new_tokens": 20, "eos_token_id": 5}
    reference = roll_out(student, teacher, ids, mask, draft_length=1, **options)
    request = Request(
        student,
        teacher,
        prompts=Prompts(ids, mask),
        teacher_prompts=Prompts(ids, mask),
        policy=SWITCH,
        warping=Warping(1.0, 0, 1.0, 98),
        max_new_tokens=20,
        seed=0,
        row_ids=torch.arange(6),
        eos=[5],
        pad_token_id=5,
    )
    assert_same(reference, BlockDecoder(request, DraftLength(1)).run())


@pytest.mark.parametrize("draft_length", [1, 4, "auto"])
def test_padding_batch_and_row_order_change_nothing(draft_length):
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(6)
    options = {"policy": SWITCH, "max_new_tokens": 24, "eos_token_id": EOS_ID, "draft_length": draft_length}
    row_ids = torch.tensor([10, 3, 77, 4, 5, 2**40])
    together = roll_out(student, teacher, ids, mask, row_ids=row_ids, **options)
    padded_ids = torch.nn.functional.pad(ids, (4, 0), value=7)
    padded_mask = torch.nn.functional.pad(mask, (4, 0), value=False)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = roll_out(student, teacher, padded_ids[order], padded_mask[order], row_ids=row_ids[order], **options)
    for place, row in enumerate(order.tolist()):
        alone = roll_out(
            student, teacher, ids[row : row + 1], mask[row : row + 1], row_ids=row_ids[row : row + 1], **options
        )
        length = int(together.completion_mask[row].sum())
        for other, index in ((shuffled, place), (alone, 0)):
            assert int(other.completion_mask[index].sum()) == length
            assert torch.equal(other.completion_ids[index, :length], together.completion_ids[row, :length])
            assert torch.equal(other.author[index, :length], together.author[row, :length])


@pytest.mark.parametrize("draft_length", [1, "auto"])
@pytest.mark.parametrize("active", [1, 3])
def test_waiting_prompts_take_the_places_of_finished_rows_and_change_no_text(draft_length, active):
    student, teacher = make_pair("llama")
    ids, mask = make_prompts(9)
    options = {"policy": SWITCH, "max_new_tokens": 24, "eos_token_id": [EOS_ID, 3, 8, 40], "draft_length": draft_length}
    reference = roll_out(student, teacher, ids, mask, **options)
    assert len(set(reference.completion_mask.sum(1).tolist())) > 2
    assert_same(reference, roll_out(student, teacher, ids, mask, max_active_rows=active, **options))


@pytest.mark.parametrize("draft_length", [1, 4, "auto"])
def test_threshold_ln_2_without_decay_is_the_student_alone(draft_length):
    student, teacher = make_pair("gpt2", noise=1.0)
    ids, mask = make_prompts(4)
    options = {"max_new_tokens": 20, "eos_token_id": EOS_ID, "draft_length": draft_length}
    never = SwitchPolicy(initial_threshold=LN_2, schedule="constant")
    switched = roll_out(student, teacher, ids, mask, policy=never, **options)
    alone = roll_out(student, None, ids, mask, policy=StudentPolicy(), **options)
    assert torch.equal(switched.completion_ids, alone.completion_ids)
    assert torch.equal(switched.author, alone.author)
    assert switched.teacher_share == 0.0
    assert alone.stats["teacher_passes"] == 0


@pytest.mark.parametrize("draft_length", [1, 4, "auto"])
def test_threshold_zero_is_the_teacher_alone(draft_length):
    student, teacher = make_pair("gpt2", noise=0.5)
    ids, mask = make_prompts(4)
    options = {"max_new_tokens": 20, "eos_token_id": EOS_ID, "draft_length": draft_length}
    switched = roll_out(student, teacher, ids, mask, policy=SwitchPolicy(initial_threshold=0.0), **options)
    alone = roll_out(student, teacher, ids, mask, policy=TeacherPolicy(), **options)
    assert torch.equal(switched.completion_ids, alone.completion_ids)
    assert switched.teacher_share == 1.0


@pytest.mark.parametrize("draft_length", [1, 4, "auto"])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_greedy_rollouts_equal_generate_of_transformers(family, draft_length):
    student, teacher = make_pair(family, noise=0.4)
    ids, mask = make_prompts(5)
    for policy, model in ((StudentPolicy(), student), (TeacherPolicy(), teacher)):
        rollout = roll_out(
            student,
            teacher,
            ids,
            mask,
            policy=policy,
            temperature=0.0,
            max_new_tokens=20,
            eos_token_id=EOS_ID,
            draft_length=draft_length,
        )
        expected = model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=EOS_ID,
            pad_token_id=EOS_ID,
        )[:, ids.shape[1] :]
        assert torch.equal(rollout.completion_ids, expected[:, : rollout.completion_ids.shape[1]])


class AlternatingPolicy(Policy):
    """Stateful: the teacher writes every second token, by a counter of its own."""

    stateful = True

    def initial_state(self, rows, device):
        return torch.zeros(rows, dtype=torch.int64, device=device)

    def decide(self, at):
        author = torch.where(at.state % 2 == 1, int(Author.TEACHER), int(Author.STUDENT)).to(torch.uint8)
        return Decision(author, torch.full_like(at.measure, math.nan), at.state + 1)


class CountingPolicy(Policy):
    """Stateful and without a teacher: the student writes; the tokens written so far are recorded as the threshold."""

    needs_teacher, stateful = False, True

    def initial_state(self, rows, device):
        return torch.zeros(rows, dtype=torch.int64, device=device)

    def decide(self, at):
        author = torch.full_like(at.state, int(Author.STUDENT), dtype=torch.uint8)
        return Decision(author, at.state.float(), at.state + 1)


@pytest.mark.parametrize("draft_length", [1, "auto"])
def test_a_policy_with_a_state_and_no_teacher_ended_in_an_internal_error(draft_length):
    student, _ = make_pair("gpt2")
    ids, mask = make_prompts(4)
    options = {"policy": CountingPolicy(), "max_new_tokens": 20, "draft_length": draft_length}
    rollout = roll_out(student, None, ids, mask, eos_token_id=[EOS_ID, 5], max_active_rows=2, **options)
    counted = torch.arange(rollout.completion_ids.shape[1]).float().expand_as(rollout.threshold)
    assert torch.equal(rollout.threshold[rollout.completion_mask], counted[rollout.completion_mask])
    alone = roll_out(student, None, ids, mask, eos_token_id=[EOS_ID, 5], policy=StudentPolicy(), max_new_tokens=20)
    assert torch.equal(rollout.completion_ids, alone.completion_ids)


@pytest.mark.parametrize("draft_length", [1, 3, "auto"])
@pytest.mark.parametrize("name", ["switch", "teacher", "blend", "alternating"])
def test_frequencies_of_whole_texts_match_the_enumerated_behaviour(name, draft_length):
    """Chi-square over all 4^3 texts of three tokens against the product of behaviour distributions."""
    tables = make_tables()
    policy = {
        "switch": SwitchPolicy(initial_threshold=0.08, final_ratio=0.5, horizon=2),
        "teacher": TeacherPolicy(),
        "blend": BlendPolicy(0.3),
        "alternating": AlternatingPolicy(),
    }[name]

    def behaviour(prefix):
        one, other = (table[prefix[-1]] for table in tables)
        position = len(prefix) - 1
        if name == "teacher":
            return other.exp()
        if name == "blend":
            return 0.7 * one.exp() + 0.3 * other.exp()
        if name == "alternating":
            return other.exp() if position % 2 else one.exp()
        takes_over = generalized_jsd(one, other) > policy.threshold(torch.tensor(position))
        return other.exp() if takes_over else one.exp()

    rollout = assert_frequencies_match(policy, tables, behaviour, draft_length)
    if name == "switch":
        assert 0.1 < rollout.teacher_share < 0.9


@pytest.mark.parametrize("draft_length", [1, 4])
def test_ids_excluded_by_a_model_are_never_written_by_it(draft_length):
    """-inf logits: the teacher forbids id 1, the student id 2."""
    generator = torch.Generator().manual_seed(6)
    tables = [torch.randn(4, 4, generator=generator).log_softmax(-1) for _ in range(2)]
    tables[0][:, 2] = tables[1][:, 1] = -math.inf
    student, teacher = (NextTokenTable(table) for table in tables)
    prompts = torch.full((500, 1), 3)
    options = {"max_new_tokens": 4, "draft_length": draft_length}
    by_teacher = roll_out(student, teacher, prompts, policy=TeacherPolicy(), **options)
    assert 1 not in by_teacher.completion_ids and 2 in by_teacher.completion_ids
    by_student = roll_out(student, None, prompts, policy=StudentPolicy(), **options)
    assert 2 not in by_student.completion_ids and 1 in by_student.completion_ids


@pytest.mark.parametrize("draft_length", [1, 4, "auto"])
def test_rows_may_end_at_their_first_token(draft_length):
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(4)
    first = roll_out(student, teacher, ids, mask, policy=SWITCH, max_new_tokens=1, draft_length=draft_length)
    eos = first.completion_ids[:2, 0].tolist()
    rollout = roll_out(
        student, teacher, ids, mask, policy=SWITCH, max_new_tokens=15, eos_token_id=eos, draft_length=draft_length
    )
    assert rollout.completion_mask[:2].sum(1).tolist() == [1, 1]
    for row in range(4):
        kept = rollout.completion_ids[row][rollout.completion_mask[row]]
        assert not any(token in eos for token in kept[:-1].tolist())
        assert kept[-1].item() in eos or len(kept) == 15


def test_fewer_teacher_passes_than_tokens():
    for policy, limit in ((SWITCH, 1.0), (SwitchPolicy(initial_threshold=0.3, schedule="constant"), 0.5)):
        student, teacher = make_pair("gpt2")
        ids, mask = make_prompts(1)
        rollout = roll_out(student, teacher, ids, mask, policy=policy, max_new_tokens=60, draft_length=6)
        assert rollout.teacher_share < 0.9
        assert rollout.stats["teacher_passes"] - 1 < limit * 60
        assert rollout.stats["kept"] <= rollout.stats["drafted"]


@pytest.mark.parametrize("draft_length", [1, 4])
def test_teacher_hidden_is_the_state_that_predicts_each_token(draft_length):
    student, teacher = make_pair("llama")
    ids, mask = make_prompts(4)
    rollout = roll_out(
        student,
        teacher,
        ids,
        mask,
        policy=SWITCH,
        max_new_tokens=18,
        eos_token_id=5,
        draft_length=draft_length,
        return_teacher_hidden=True,
    )
    logits = teacher.get_output_embeddings()(rollout.teacher_hidden)
    for row in range(4):
        keep = rollout.completion_mask[row]
        expected = recompute(teacher, rollout, row)
        assert torch.allclose(logits[row][keep].log_softmax(-1), expected, atol=1e-4)
    assert not teacher.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("active", [None, 2])
@pytest.mark.parametrize("draft_length", [1, 4])
def test_the_drafted_token_is_the_students_own_draw_where_the_teacher_wrote_too(draft_length, active):
    student, teacher = make_pair("llama")
    ids, mask = make_prompts(4)
    options = {"max_new_tokens": 18, "eos_token_id": 5, "draft_length": draft_length, "max_active_rows": active}
    rollout = roll_out(student, teacher, ids, mask, policy=SWITCH, seed=3, return_drafted_ids=True, **options)
    differ = 0
    for row in range(4):
        keep = rollout.completion_mask[row]
        position = torch.arange(int(keep.sum()))
        keys = noise_keys(3, torch.full_like(position, row), position, Stream.DRAFT)
        drafted = exponential_race(recompute(student, rollout, row), keys)
        assert torch.equal(rollout.drafted_ids[row][keep], drafted)
        by_student = rollout.author[row][keep] == Author.STUDENT
        assert torch.equal(drafted[by_student], rollout.completion_ids[row][keep][by_student])
        differ += int((drafted != rollout.completion_ids[row][keep]).sum())
    assert differ > 5 and bool((rollout.drafted_ids[~rollout.completion_mask] == 5).all())
    assert torch.equal(rollout.first(2).drafted_ids, rollout.drafted_ids[:2])
    plain = roll_out(student, teacher, ids, mask, policy=SWITCH, seed=3, **options)
    assert plain.drafted_ids is None
    assert_same(plain, rollout)
    alone = roll_out(student, None, ids, mask, policy=StudentPolicy(), return_drafted_ids=True, **options)
    assert torch.equal(alone.drafted_ids, alone.completion_ids)


@pytest.mark.parametrize("draft_length", [1, 4])
def test_the_teacher_may_see_another_prompt(draft_length):
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(3)
    other_ids, other_mask = make_prompts(3, seed=9, longest=14)
    rollout = roll_out(
        student,
        teacher,
        ids,
        mask,
        policy=SWITCH,
        max_new_tokens=15,
        teacher_prompt_ids=other_ids,
        teacher_prompt_mask=other_mask,
        draft_length=draft_length,
    )
    for row in range(3):
        shown = copy.copy(rollout)
        shown.prompt_ids, shown.prompt_mask = other_ids, other_mask
        jsd = generalized_jsd(recompute(student, rollout, row), recompute(teacher, shown, row))
        assert torch.allclose(jsd, rollout.divergence[row][rollout.completion_mask[row]], atol=1e-4)


@pytest.mark.parametrize("draft_length", [1, 4])
def test_ids_that_one_tokenizer_alone_knows_are_never_written_and_never_compared(draft_length):
    """Both models have rows for them, and like them; the rest is renormalised."""
    student, teacher = make_pair("llama")
    alone = [5, 40, 97]
    hook = [
        model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_add(
            -1, torch.tensor(alone), torch.full((*logits.shape[:-1], 3), 6.0)))
        for model in (student, teacher)
    ]  # fmt: skip
    ids, mask = make_prompts(3)
    options = {"policy": SWITCH, "max_new_tokens": 40, "temperature": 3.0, "draft_length": draft_length}
    assert torch.isin(roll_out(student, teacher, ids, mask, **options).completion_ids, torch.tensor(alone)).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout = roll_out(student, teacher, ids, mask, **options, excluded_ids=[*alone, 2000])
    assert not torch.isin(rollout.completion_ids, torch.tensor(alone)).any()
    kept = [index for index in range(98) if index not in alone]
    for row in range(3):
        cut = [
            recompute(model, rollout, row, lambda logits: (logits[:, kept] / 3.0).log_softmax(-1))
            for model in (student, teacher)
        ]
        jsd = generalized_jsd(*cut)
        assert torch.allclose(jsd, rollout.divergence[row][rollout.completion_mask[row]], atol=1e-4)
    for handle in hook:
        handle.remove()


@pytest.mark.parametrize("draft_length", [1, 4])
def test_padded_vocabulary_rows_are_never_written_and_never_compared(draft_length):
    """Student of 98 ids, teacher padded to 112: the shared ids are compared, renormalised, with one warning."""
    student, _ = make_pair("gpt2")
    teacher = build_gpt2(seed=3, vocab_size=112)
    ids, mask = make_prompts(3)
    for one, two in ((student, teacher), (teacher, student)):
        with pytest.warns(UserWarning, match="98") as caught:
            rollout = roll_out(
                one, two, ids, mask, policy=SWITCH, max_new_tokens=40, temperature=3.0, draft_length=draft_length
            )
        assert len(caught) == 1
        assert int(rollout.completion_ids.max()) < 98
        for row in range(3):
            cut = [
                recompute(model, rollout, row, lambda logits: (logits[:, :98] / 3.0).log_softmax(-1))
                for model in (one, two)
            ]
            jsd = generalized_jsd(*cut)
            assert torch.allclose(jsd, rollout.divergence[row][rollout.completion_mask[row]], atol=1e-4)


@pytest.mark.parametrize("draft_length", [1, 4])
def test_dropout_is_off_in_rollouts_and_every_module_gets_its_mode_back(draft_length):
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(3)
    options = {"policy": SWITCH, "max_new_tokens": 10, "draft_length": draft_length}
    reference = roll_out(student, teacher, ids, mask, **options)
    student.train()
    student.transformer.h[0].attn.eval()
    student.gradient_checkpointing = True
    for block in student.transformer.h:
        block.gradient_checkpointing = True
    modes = [module.training for module in student.modules()]
    assert_same(reference, roll_out(student, teacher, ids, mask, **options))
    assert [module.training for module in student.modules()] == modes
    assert not teacher.training


def test_modes_come_back_after_an_error_inside_a_rollout():
    student, teacher = make_pair("gpt2")
    student.train()

    class Failing(SwitchPolicy):
        def measure(self, student_log_probs, teacher_log_probs, drafted):
            raise RuntimeError("measured too much")

    ids, mask = make_prompts(2)
    for length in (1, 4):
        with pytest.raises(RuntimeError, match="measured too much"):
            roll_out(student, teacher, ids, mask, policy=Failing(), max_new_tokens=5, draft_length=length)
        assert all(module.training for module in student.modules())


@pytest.mark.parametrize("draft_length", [1, 4])
def test_drafts_past_the_end_of_the_context_are_harmless(draft_length):
    student, teacher = make_pair("gpt2", n_positions=24)
    ids, mask = make_prompts(5, longest=8)
    room = 24 - 8
    options = {"policy": SWITCH, "max_new_tokens": room}
    reference = roll_out(student, teacher, ids, mask, draft_length=1, **options)
    assert_same(reference, roll_out(student, teacher, ids, mask, draft_length=draft_length * 4, **options))


def test_a_row_of_another_seed_or_identity_is_another_text():
    student, teacher = make_pair("gpt2")
    ids = torch.tensor([[3, 4, 5]] * 3)
    options = {"policy": SWITCH, "max_new_tokens": 20}
    rollout = roll_out(student, teacher, ids, **options)
    assert len({tuple(row) for row in rollout.completion_ids.tolist()}) == 3
    again = roll_out(student, teacher, ids, seed=1, **options)
    assert not torch.equal(rollout.completion_ids, again.completion_ids)
    assert_same(rollout, roll_out(student, teacher, ids, row_ids=torch.arange(3), **options))


@pytest.mark.parametrize("family", list(BUILDERS))
def test_bfloat16_rollouts_stay_close_to_the_sequential_ones(family):
    """Equality is promised for float32 only; in bfloat16 rounding moves a few tokens in a thousand."""
    student, teacher = make_pair(family, dtype=torch.bfloat16)
    ids, mask = make_prompts(16)
    options = {"policy": SWITCH, "max_new_tokens": 16}
    first = roll_out(student, teacher, ids, mask, draft_length=1, **options)
    second = roll_out(student, teacher, ids, mask, draft_length=4, **options)
    # A token that flips changes all that follows in its row: count the rows that never part.
    same = (first.completion_ids == second.completion_ids).all(1).float().mean()
    assert same > 0.6


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_are_served(implementation):
    student, teacher = make_pair("llama", attn_implementation=implementation)
    ids, mask = make_prompts(4)
    options = {"policy": SWITCH, "max_new_tokens": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = roll_out(student, teacher, ids, mask, draft_length=4, **options)
    assert_same(roll_out(student, teacher, ids, mask, draft_length=1, **options), fast)


def test_a_model_the_fast_path_cannot_serve_falls_back_with_one_warning():
    student = build_llama(seed=1)
    teacher = build_llama(seed=2)

    teacher.config.sliding_window = 8
    ids, mask = make_prompts(3)
    with pytest.warns(UserWarning, match="teacher is decoded token by token.*sliding window of 8") as caught:
        rollout = roll_out(student, teacher, ids, mask, policy=SWITCH, max_new_tokens=12, draft_length=4)
    assert len(caught) == 1
    assert_same(rollout, roll_out(student, teacher, ids, mask, policy=SWITCH, max_new_tokens=12, draft_length=1))


def test_rollout_record_names_author_and_evidence_of_every_token(tiny_tokenizer):
    student, teacher = make_pair("gpt2")
    ids = torch.tensor([tiny_tokenizer("Hi there").input_ids])
    rollout = roll_out(student, teacher, ids, policy=SWITCH, max_new_tokens=12)
    record = rollout.to_dicts(tiny_tokenizer)[0]
    assert record["prompt"] == "Hi there"
    assert set(record["author"]) <= {"student", "teacher"}
    assert len(record["tokens"]) == len(record["author"]) == len(record["divergence"]) == 12
    assert rollout.teacher_share == pytest.approx(record["author"].count("teacher") / 12)
    pure = roll_out(student, None, ids, policy=StudentPolicy(), max_new_tokens=3).to_dicts()[0]
    assert pure["divergence"] == pure["threshold"] == [None] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"draft_length": 0}, 'draft_length must be "auto" or an integer >= 1, got 0'),
        ({"draft_length": "fast"}, "draft_length"),
        ({"max_active_rows": 0}, "max_active_rows"),
        ({"max_new_tokens": 126}, "prompt of 3 tokens \\+ 126 new ones exceed the student's context of 128"),
        ({"prompt_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "prompt of row 0 is empty"),
        ({"prompt_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "padded on the left"),
        ({"prompt_mask": torch.ones(2, 4)}, "mask"),
        ({"prompt_ids": torch.tensor([[1, 2, 500]] * 2)}, "id 500"),
        ({"prompt_ids": torch.ones(2, 0, dtype=torch.int64)}, "at least one token"),
        ({"row_ids": torch.arange(3)}, "row_ids must be \\[2\\]"),
        ({"teacher": None}, "SwitchPolicy needs a teacher"),
        ({"policy": StudentPolicy(), "return_teacher_hidden": True}, "return_teacher_hidden"),
        ({"teacher_prompt_ids": torch.ones(1, 2, dtype=torch.int64)}, "1 rows"),
    ],
)
def test_arguments_that_cannot_work_are_refused_in_one_line(change, message):
    student, teacher = make_pair("gpt2")
    arguments = {
        "teacher": teacher,
        "prompt_ids": torch.tensor([[1, 2, 3]] * 2),
        "policy": SWITCH,
        "max_new_tokens": 20,
        **change,
    }
    with pytest.raises(UserError, match=message) as caught:
        roll_out(student, **arguments)
    assert "\n" not in str(caught.value)


def test_prompt_positions_count_real_tokens_from_zero():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert prompt_positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
