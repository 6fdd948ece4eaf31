"""Laws of the draws: distributions, independence of streams, counter-based randomness, coupling."""

import math
import shutil

import pytest
import torch

from switchkd import sampling
from switchkd.divergences import generalized_jsd
from switchkd.errors import check_warping
from switchkd.fusing import fusing
from switchkd.policies import RandomPolicy
from switchkd.sampling import Stream
from switchkd.training.text import TextSource

CHI_SQUARE_LIMIT = 5.0  # standard deviations above the mean: about one false alarm in a million tests


def chi_square_excess(tokens: torch.Tensor, log_probs: torch.Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean."""
    probabilities = log_probs.double().exp()
    expected = probabilities * len(tokens)
    observed = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert observed[probabilities == 0].sum() == 0
    possible = probabilities > 0
    statistic = ((observed - expected) ** 2 / expected)[possible].sum()
    freedom = int(possible.sum()) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom)) if freedom else 0.0


def keys(rows: int, stream: Stream = Stream.DRAFT, seed: int = 0, position: int = 0) -> torch.Tensor:
    return sampling.noise_keys(seed, torch.arange(rows), torch.full((rows,), position), stream)


@pytest.mark.parametrize("vary", ["row", "position", "seed"])
def test_race_frequencies_match_the_distribution(vary):
    rows = 40_000
    log_probs = (torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2).log_softmax(-1)
    if vary == "row":
        noise = keys(rows)
    elif vary == "position":
        noise = sampling.noise_keys(0, torch.zeros(rows, dtype=torch.int64), torch.arange(rows), Stream.DRAFT)
    else:
        one = torch.zeros(1, dtype=torch.int64)
        noise = torch.cat([sampling.noise_keys(seed, one, one, Stream.DRAFT) for seed in range(rows // 10)])
    tokens = sampling.exponential_race(log_probs.expand(len(noise), -1), noise)
    assert chi_square_excess(tokens, log_probs) < CHI_SQUARE_LIMIT


def test_rare_ids_of_a_large_vocabulary_are_drawn_at_their_rate():
    """An id of probability 1e-3 and 50,000 ids of 1e-6 each get their share: no resolution is lost in the tail."""
    size, rows = 50_001, 3_000
    probabilities = torch.full((size,), 0.05 / (size - 1))
    probabilities[0] = 0.95
    tokens = torch.cat(
        [sampling.exponential_race(probabilities.log().expand(500, -1), part) for part in keys(rows).split(500)]
    )
    tail = int((tokens > 0).sum())
    assert abs(tail - 0.05 * rows) < 5 * math.sqrt(0.05 * 0.95 * rows)
    assert tokens[tokens > 0].unique().numel() > 0.95 * tail  # spread over the tail, not on a few ids


def test_uniform_noise_is_uniform_and_streams_are_independent():
    rows = 50_000
    first, second = sampling.uniform(keys(rows, Stream.ACCEPT)), sampling.uniform(keys(rows, Stream.RESIDUAL))
    cells = (first * 10).long() * 10 + (second * 10).long()
    assert chi_square_excess(cells, torch.full((100,), 0.01).log()) < CHI_SQUARE_LIMIT
    assert float(first.min()) > 0 and float(first.max()) < 1


def test_noise_of_neighbouring_ids_and_positions_is_uncorrelated():
    noise = sampling.log_exponential(keys(2_000), 64)
    following = sampling.log_exponential(keys(2_000, position=1), 64)
    limit = 5 / math.sqrt(noise.numel())
    for left, right in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:]), (noise, following)):
        assert abs(float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])) < limit


def test_noise_depends_on_nothing_but_seed_row_position_and_stream():
    alone = sampling.noise_keys(3, torch.tensor([7]), torch.tensor([11]), Stream.DRAFT)
    batch = sampling.noise_keys(3, torch.tensor([1, 7, 9]), torch.tensor([11, 11, 0]), Stream.DRAFT)
    assert alone.item() == batch[1].item()
    assert torch.equal(sampling.log_exponential(alone, 20), sampling.log_exponential(batch, 30)[1:2, :20])
    others = [
        sampling.noise_keys(seed, torch.tensor([row]), torch.tensor([position]), stream).item()
        for seed, row, position, stream in [(4, 7, 11, 1), (3, 8, 11, 1), (3, 7, 12, 1), (3, 7, 11, 2), (-3, 7, 11, 1)]
    ]
    assert len({alone.item(), *others}) == 6


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_coupled_draw_is_distributed_as_the_behaviour_and_keeps_as_often_as_can_be(sharpness):
    rows, size = 40_000, 6
    generator = torch.Generator().manual_seed(2)
    student = (torch.randn(size, generator=generator) * sharpness).log_softmax(-1)
    behaviour = (torch.randn(size, generator=generator) * sharpness).log_softmax(-1)
    student_rows, behaviour_rows = student.expand(rows, -1), behaviour.expand(rows, -1)
    drafted = sampling.exponential_race(student_rows, keys(rows))
    tokens, kept = sampling.coupled_draw(
        drafted, student_rows, behaviour_rows, keys(rows, Stream.ACCEPT), keys(rows, Stream.RESIDUAL)
    )
    assert chi_square_excess(tokens, behaviour) < CHI_SQUARE_LIMIT
    assert torch.equal(kept, tokens == drafted)
    overlap = float(torch.minimum(student.exp(), behaviour.exp()).sum())
    assert abs(float(kept.double().mean()) - overlap) < 5 * math.sqrt(0.25 / rows)


def test_coupled_draw_keeps_the_draft_where_the_residual_is_all_zero():
    log_probs = torch.tensor([[0.5, 0.5]]).log().expand(500, -1)
    nearly = log_probs - 1e-6  # behaviour below the student everywhere, as rounding can leave it
    drafted = torch.zeros(500, dtype=torch.int64)
    tokens, kept = sampling.coupled_draw(
        drafted, log_probs, nearly, keys(500, Stream.ACCEPT), keys(500, Stream.RESIDUAL)
    )
    assert torch.equal(tokens, drafted) and bool(kept.all())


def test_ids_excluded_with_minus_infinity_are_never_drawn():
    log_probs = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]]).log_softmax(-1).expand(2_000, -1)
    behaviour = torch.tensor([[-math.inf, -math.inf, 0.0, 0.0]]).log_softmax(-1).expand(2_000, -1)
    drafted = sampling.exponential_race(log_probs, keys(2_000))
    assert set(drafted.tolist()) == {0, 2}
    tokens, _ = sampling.coupled_draw(
        drafted, log_probs, behaviour, keys(2_000, Stream.ACCEPT), keys(2_000, Stream.RESIDUAL)
    )
    assert set(tokens.tolist()) == {2, 3}


def test_warp_keeps_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()[:, [2, 0, 3, 1]]
    kept = sampling.warp(logits, top_p=0.8)
    assert torch.allclose(kept.exp(), torch.tensor([[0.0, 0.625, 0.0, 0.375]]))
    assert torch.equal(sampling.warp(logits, top_p=1e-9).exp(), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_warp_top_k_temperature_and_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert torch.allclose(
        sampling.warp(logits, top_k=2, temperature=2.0).exp(),
        torch.tensor([[0.0, *torch.tensor([1.5, 1.0]).softmax(0).tolist()]]),
    )
    assert torch.equal(sampling.warp(logits, temperature=0.0), torch.tensor([[-math.inf, 0.0, -math.inf]]))
    assert torch.equal(sampling.warp(logits, top_k=1), sampling.warp(logits, temperature=0.0))


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.8, "temperature": 0.7}])
def test_warp_equals_transformers_own_processors(options):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(3)) * 3
    expected = logits
    if "temperature" in options:
        expected = TemperatureLogitsWarper(options["temperature"])(None, expected)
    if "top_k" in options:
        expected = TopKLogitsWarper(options["top_k"])(None, expected)
    if "top_p" in options:
        expected = TopPLogitsWarper(options["top_p"])(None, expected)
    assert torch.allclose(sampling.warp(logits, **options).exp(), expected.softmax(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((-1.0, 0, 1.0), "temperature"),
        ((math.nan, 0, 1.0), "temperature"),
        ((1.0, -1, 1.0), "top_k"),
        ((1.0, 0, 0.0), "top_p"),
        ((1.0, 0, 1.1), "top_p"),
    ],
)
def test_sampling_options_outside_their_range_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        check_warping(*options)


@pytest.mark.parametrize("weight", [0.5, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jsd_without_gradients_is_the_jsd_with_them(weight, dtype):
    """The rollout's shorter formula, in chunks of rows, with -inf on either side, both sides, and far-apart logits."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(3, 40, 7000, generator=generator, dtype=dtype) * 4 for _ in range(2))
    teacher[0] = student[0]
    teacher[1] = student[1] + 1e-3 * teacher[1]
    student[2, :20, :3000], teacher[2, 10:30, 2000:] = -math.inf, -math.inf
    student[2, 30:, 5], teacher[2, 35:, 6] = 1e4, 1e4
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = generalized_jsd(student.clone().requires_grad_(), teacher, teacher_weight=weight).detach()
    value = generalized_jsd(student, teacher, teacher_weight=weight)
    assert value.shape == expected.shape == (3, 40)
    assert torch.allclose(value, expected, atol=1e-6, rtol=1e-5)
    assert float(value[0].max()) < 1e-6
    assert bool((value[1] > 0).all())


def test_warping_into_a_tensor_is_the_warping():
    logits = torch.randn(90, 7000, generator=torch.Generator().manual_seed(5), dtype=torch.float32).bfloat16()
    for options in ((1.0, 0, 1.0), (0.7, 50, 0.9), (0.0, 0, 1.0)):
        warping = sampling.Warping(*options, vocabulary_size=6990)
        out = torch.full((90, 2, 6990), math.nan)
        assert torch.equal(warping.into(out[:, 1], logits), warping(logits))
        assert bool(out[:, 0].isnan().all())


def test_the_source_of_a_step_is_not_the_number_that_random_uses_for_that_row():
    """The draw "data set or rollout" of step s was the policy's number of row s at position 0."""
    source = TextSource(RandomPolicy(teacher_probability=0.5), fraction=0.5, seed=3)
    steps = torch.arange(4000)
    rolled_out = torch.tensor([source.of_step(int(step), 0.0) == "fresh" for step in steps])
    of_policy = sampling.uniform(keys(4000, Stream.POLICY, seed=3)) < 0.5
    agreeing = float((rolled_out == of_policy).double().mean())
    assert abs(agreeing - 0.5) < 0.04 and abs(float(rolled_out.double().mean()) - 0.5) < 0.04


def test_noise_in_one_expression_is_the_noise_to_the_last_bit():
    """What a compiler gets instead of the loop over memory that eager code needs."""
    sample = keys(500)
    assert torch.equal(sampling._log_exponential_in_one(sample, 1_003), sampling.log_exponential(sample, 1_003))


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_draws_and_divergences_are_those_of_the_functions():
    student, teacher = (
        torch.randn(40, 5_003, generator=torch.Generator().manual_seed(seed)).log_softmax(-1) for seed in (0, 1)
    )
    plain = sampling.exponential_race(student, keys(40)), generalized_jsd(student, teacher)
    calls = []
    with torch.no_grad(), fusing(), pytest.MonkeyPatch.context() as patch:
        compile_ = torch.compile
        patch.setattr(torch, "compile", lambda function: calls.append(function.__name__) or compile_(function))
        compiled = sampling.exponential_race(student, keys(40)), generalized_jsd(student, teacher)
    assert calls == ["exponential_race", "_jsd_rows"]
    assert torch.equal(plain[0], compiled[0])
    assert torch.allclose(plain[1], compiled[1], atol=1e-6)
