"""Laws of reading row by row: any order of pieces, rollbacks, moves and growth give the logits of one plain pass."""

import pytest
import torch
from helpers.tiny import BUILDERS

from switchkd import sampling
from switchkd.engine import lean
from switchkd.engine.readable import unserved_reason
from switchkd.engine.readers import ForwardReader, LeanReader
from switchkd.sampling import Stream

ROWS, LENGTH = 4, 90


@pytest.fixture(params=["plain", "fused", "own weights", "forward"])
def way(request, monkeypatch):
    """How a model is read: plain products, the fused attention kernel, without joint copies, its own forward."""
    if request.param == "fused":
        monkeypatch.setattr(lean, "MOST_PLAIN_SCORES", 0)
    if request.param == "own weights":
        monkeypatch.setattr(lean, "MOST_COPIED_BYTES", 0)
    return request.param


@pytest.mark.parametrize("family", list(BUILDERS))
@torch.no_grad()
def test_ragged_pieces_rollbacks_moves_and_growth_give_the_logits_of_a_plain_pass(family, way):
    model = BUILDERS[family](seed=3)
    assert unserved_reason(model, LENGTH) is None
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(1, 97, (ROWS, LENGTH), generator=generator)
    expected = model(input_ids=tokens, use_cache=False).logits
    reader = (ForwardReader if way == "forward" else LeanReader.of)(model, ROWS, LENGTH + 8)
    at = [0, 0, 0, 0]
    text = tokens.clone()
    moved = False
    while min(at) < LENGTH - 5:
        count = int(torch.randint(1, 6, (), generator=generator))
        count = min(count, LENGTH - max(at))
        if count < 1:
            break
        piece = torch.stack([text[row, at[row] : at[row] + count] for row in range(len(at))])
        got = reader.read(piece, at)
        for row, start in enumerate(at):
            assert torch.allclose(got[row], expected[row, start : start + count], atol=2e-3)
        # Every row keeps its own part of the piece, as drafts are kept.
        at = [start + int(torch.randint(0, count + 1, (), generator=generator)) for start in at]
        if not moved and min(at) > 20:
            # Row 1 is finished: the last row takes its place.
            reader.move(3, 1, at[3])
            text[1], expected[1], at = text[3], expected[3], [at[0], at[3], at[2]]
            moved = True
    assert moved


@torch.no_grad()
def test_a_few_rows_join_behind_the_others():
    """Rows first .. first + A - 1 are written and read without touching those before."""
    model = BUILDERS["llama"](seed=3)
    tokens = torch.randint(1, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=tokens, use_cache=False).logits
    reader = LeanReader.of(model, 3, 12)
    reader.read(tokens[:2, :8], [0, 0])
    reader.read(tokens[2:, :5], [0], first=2)
    got = reader.read(torch.stack([tokens[0, 8:10], tokens[1, 8:10], tokens[2, 5:7]]), [8, 8, 5])
    wanted = torch.stack([expected[0, 8:10], expected[1, 8:10], expected[2, 5:7]])
    assert torch.allclose(got, wanted, atol=1e-3)


def test_the_table_of_noise_holds_the_keys_of_every_row_and_position():
    row_ids = torch.tensor([5, 2**40, 7])
    table = sampling.NoiseTable(11, row_ids, 6)
    rows, positions = torch.tensor([[2], [0]]), torch.tensor([[0, 5], [3, 4]])
    index = table.index(rows, positions)
    for stream in Stream:
        expected = sampling.noise_keys(11, row_ids[rows], positions, stream)
        assert torch.equal(table.keys(stream, index), expected)
    accept = sampling.noise_keys(11, row_ids[rows], positions, Stream.ACCEPT)
    assert torch.equal(table.log_accept(index), sampling.uniform(accept).log())


def test_drafts_past_the_last_position_stay_inside_the_table():
    table = sampling.NoiseTable(0, torch.arange(2), 4)
    assert table.index(torch.tensor([1]), torch.tensor([9])).tolist() == [7]
