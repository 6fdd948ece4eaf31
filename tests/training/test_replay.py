"""Laws of the replay store and of the rule that decides when to use it."""

import io
import math

import pytest
import torch
from helpers.pairs import make_pair, make_prompts

from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.policies import SwitchPolicy
from switchkd.rollout import Rollout
from switchkd.training.replay import AdaptiveFraction, ReplayStore


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_rollout(rows=5, seed=0):
    student, teacher = make_pair("gpt2")
    ids, mask = make_prompts(rows, seed=seed)
    policy = SwitchPolicy(0.12, schedule="constant")
    return roll_out(student, teacher, ids, mask, policy=policy, max_new_tokens=12, seed=seed, eos_token_id=[3, 8, 40])


def texts(rollout):
    """Every row as the tuple of all that is known of it, padding aside."""
    rows = []
    for row in range(len(rollout)):
        keep = rollout.completion_mask[row]
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
        columns = (getattr(rollout, name)[row][keep] for name in ("completion_ids", "author", "divergence"))
        rows.append((tuple(prompt.tolist()), *(tuple(column.tolist()) for column in columns)))
    return rows


def numbered(count):
    """Rows of one token each, whose prompt is their number."""
    numbers = torch.arange(count).unsqueeze(1)
    return Rollout(
        prompt_ids=numbers,
        prompt_mask=torch.ones_like(numbers, dtype=torch.bool),
        completion_ids=numbers + 1,
        completion_mask=torch.ones_like(numbers, dtype=torch.bool),
        author=torch.ones_like(numbers, dtype=torch.uint8),
        divergence=torch.full((count, 1), 0.5),
        threshold=torch.full((count, 1), math.nan),
    )


def test_what_goes_in_comes_out_without_the_padding_of_its_batch():
    rollout = make_rollout()
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 1
    store = ReplayStore(10)
    store.add(rollout)
    back = store.sample(5, generator(), pad_token_id=7)
    assert sorted(texts(back)) == sorted(texts(rollout))
    assert bool((back.completion_ids[~back.completion_mask] == 7).all())
    assert bool((back.prompt_ids[~back.prompt_mask] == 7).all())
    assert not bool((back.prompt_mask[:, :-1] & ~back.prompt_mask[:, 1:]).any())  # padded on the left
    alone = store.sample(1, generator())
    assert bool(alone.prompt_mask.all() and alone.completion_mask.all())


def test_the_oldest_rows_leave_first():
    store = ReplayStore(4)
    store.add(numbered(3))
    assert len(store) == 3 and not store.full
    rows = numbered(6)
    store.add(rows)
    assert len(store) == 4 and store.full
    assert sorted(store.sample(4, generator()).prompt_ids.flatten().tolist()) == [2, 3, 4, 5]


def test_a_stored_row_does_not_change_with_the_rollout_it_came_from():
    rollout = numbered(2)
    store = ReplayStore(2)
    store.add(rollout)
    rollout.completion_ids.fill_(99)
    assert sorted(store.sample(2, generator()).completion_ids.flatten().tolist()) == [1, 2]


def test_rows_are_drawn_uniformly_and_not_twice_while_others_wait():
    store = ReplayStore(5)
    store.add(numbered(5))
    counts = torch.zeros(5)
    source = generator(1)
    for _ in range(2000):
        drawn = store.sample(3, source).prompt_ids.flatten()
        assert len(set(drawn.tolist())) == 3
        counts += torch.bincount(drawn, minlength=5)
    assert bool(((counts / 6000 - 0.2).abs() < 0.02).all())
    many = torch.bincount(store.sample(12, source).prompt_ids.flatten(), minlength=5)
    assert many.tolist() == pytest.approx([2.4] * 5, abs=0.7)


def test_the_same_generator_draws_the_same_rows():
    store = ReplayStore(5)
    store.add(numbered(5))
    first, second = (store.sample(3, generator(4)).prompt_ids.tolist() for _ in range(2))
    assert first == second


def test_a_checkpoint_brings_every_row_back_in_order():
    store = ReplayStore(6)
    latest = make_rollout(4, seed=2)
    store.add(make_rollout(4, seed=1))
    store.add(latest)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    resumed = ReplayStore(6)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert len(resumed) == 6
    for seed in range(3):
        assert texts(resumed.sample(4, generator(seed))) == texts(store.sample(4, generator(seed)))
    smaller = ReplayStore(2)
    smaller.load_state_dict(store.state_dict())
    assert sorted(texts(smaller.sample(2, generator()))) == sorted(texts(latest)[2:])


def test_a_store_without_room_stays_empty_and_says_so():
    store = ReplayStore(0)
    store.add(numbered(3))
    assert len(store) == 0
    resumed = ReplayStore(3)
    resumed.load_state_dict(store.state_dict())
    assert len(resumed) == 0
    with pytest.raises(UserError, match="replay store is empty"):
        store.sample(1, generator())
    with pytest.raises(UserError, match="capacity must be >= 0 rows, got -1"):
        ReplayStore(-1)


# ---- DistiLLM's fraction


def test_the_fraction_grows_only_when_the_loss_rises_above_its_reference_by_the_margin():
    fraction = AdaptiveFraction()
    seen = [fraction.observe(loss) for loss in (2.0, 1.5, 2.05, 2.2, 2.25, 2.31, 1.0)]
    assert seen == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2])
    full = AdaptiveFraction(0.95)
    full.observe(0.0)
    assert full.observe(1.0) == 1.0


def test_the_shares_of_fresh_and_stored_text_are_those_of_the_rule():
    store = ReplayStore(2)
    store.add(numbered(2))
    fraction = AdaptiveFraction(0.6)
    numbers = ((torch.arange(1000) + 0.5) / 1000).tolist()
    for progress, fresh in ((0.0, 0.6), (0.5, 0.3), (1.0, 0.0)):
        sources = [fraction.source(number, progress, store) for number in numbers]
        assert sources.count("dataset") / 1000 == pytest.approx(0.4)
        assert sources.count("fresh") / 1000 == pytest.approx(fresh)
    half_empty = ReplayStore(3)
    half_empty.add(numbered(2))
    for not_to_draw_from in (half_empty, ReplayStore(0)):
        sources = [fraction.source(number, 1.0, not_to_draw_from) for number in numbers]
        assert sources.count("fresh") / 1000 == pytest.approx(0.6)
    assert {AdaptiveFraction().source(number, 0.0, store) for number in numbers} == {"dataset"}


def test_the_fraction_goes_on_from_a_checkpoint():
    fraction, resumed = AdaptiveFraction(), AdaptiveFraction()
    for loss in (1.0, 1.2):
        fraction.observe(loss)
    resumed.load_state_dict(fraction.state_dict())
    assert [resumed.observe(loss) for loss in (1.25, 1.4)] == [fraction.observe(loss) for loss in (1.25, 1.4)]
    fresh = AdaptiveFraction()
    fresh.load_state_dict(AdaptiveFraction().state_dict())
    assert fresh.observe(9.0) == 0.0


@pytest.mark.parametrize("options", [{"initial": 1.1}, {"initial": -0.1}])
def test_fractions_outside_their_range_are_refused(options):
    with pytest.raises(UserError, match="adaptive fraction must"):
        AdaptiveFraction(**options)
