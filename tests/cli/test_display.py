"""What is printed and drawn: marks where the teacher wrote, tables that align, pictures that hold everything."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from switchkd.cli.display import plot_summary, position_curves, rich_table, table
from switchkd.errors import UserError
from switchkd.rollout import Author, Rollout, token_texts


def make_rollout(lengths: list[int], teacher_from: int, threshold: float = 0.3) -> Rollout:
    """Rows of the given lengths; the teacher writes every position from `teacher_from` on."""
    columns = max(lengths)
    mask = torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)
    author = torch.where(torch.arange(columns) >= teacher_from, Author.TEACHER, Author.STUDENT).expand_as(mask)
    author = author.masked_fill(~mask, Author.NONE).to(torch.uint8)
    values = torch.arange(columns, dtype=torch.float32).expand_as(mask) / 10
    return Rollout(
        prompt_ids=torch.ones(len(lengths), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(lengths), 1, dtype=torch.bool),
        completion_ids=torch.ones_like(mask, dtype=torch.int64),
        completion_mask=mask,
        author=author,
        divergence=values.masked_fill(~mask, math.nan),
        threshold=torch.full_like(values, threshold).masked_fill(~mask, math.nan),
    )


def test_table_aligns_numbers_right_and_text_left() -> None:
    text = table([("loss", 1.23456), ("tokens", 1234567), ("none", None)], ("what", "value"))
    assert text.splitlines() == [
        "what        value",
        "------  ---------",
        "loss        1.235",
        "tokens  1,234,567",
        "none            -",
    ]


def test_table_without_rows_is_its_header() -> None:
    assert table([], ("a", "b")).splitlines() == ["a  b", "-  -"]


def test_curves_average_over_the_completions_that_reach_a_position() -> None:
    curves = position_curves([make_rollout([3, 1], teacher_from=1), make_rollout([2, 2, 2], teacher_from=2)])
    assert curves["position"] == [0, 1, 2]
    # Position 0: five student tokens. 1: one of four by the teacher. 2: one row, the teacher's.
    assert curves["teacher_share"] == pytest.approx([0.0, 0.25, 1.0])
    assert curves["divergence"] == pytest.approx([0.0, 0.1, 0.2])
    assert curves["threshold"] == pytest.approx([0.3, 0.3, 0.3])


def test_curves_leave_out_positions_that_few_completions_reach() -> None:
    assert position_curves([make_rollout([5, 2, 2], teacher_from=0)], min_rows=2)["position"] == [0, 1]


def test_curves_of_a_policy_without_threshold_are_nan_there() -> None:
    curves = position_curves([make_rollout([2], teacher_from=0, threshold=math.nan)])
    assert all(math.isnan(value) for value in curves["threshold"])
    assert curves["teacher_share"] == [1.0, 1.0]


def test_texts_of_tokens_in_a_row_are_the_text() -> None:
    # A SentencePiece-like tokenizer drops the blank of a token decoded alone; bytes of a character come in pieces.
    vocabulary = ["<unk>", "▁the", "▁cat", "s", "▁", "é"]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    backend.decoder = decoders.Metaspace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    assert words.decode([2]) == "cat"
    assert token_texts(words, [2, 3, 1, 5], prompt_ids=[1]) == [" cat", "s", " the", "é"]
    assert "".join(token_texts(words, [1, 2, 3])) == words.decode([1, 2, 3])

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    characters = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    text = "aé日🙂\nb"
    ids = characters(text)["input_ids"]
    assert token_texts(characters, ids) == ["a", "", "é", "", "", "日", "", "", "", "🙂", "\n", "b"]
    # Cut inside a character, its bytes show as the replacement character instead of vanishing.
    assert token_texts(characters, ids[:5])[-1] == "\ufffd"


CURVES: dict[str, Any] = {
    "position": [0, 1, 2],
    "teacher_share": [0.1, 0.5, 1.0],
    "divergence": [0.1, 0.2, 0.1],
    "threshold": [0.3, 0.1, 0.03],
}
SCORES = {"warm start": {"0-10": (40.0, 2.0), "11-40": (30.0, 1.0)}, "SWITCH": {"0-10": (80.0, 2.0)}}


@pytest.mark.parametrize("scores", [None, SCORES])
def test_picture_is_1200_by_500(tmp_path: Path, scores: Any) -> None:
    from matplotlib.image import imread

    path = plot_summary(tmp_path / "new" / "picture.png", **CURVES, scores=scores)
    assert imread(path).shape[:2] == (500, 1200)


def test_picture_of_one_position_or_none_is_drawn(tmp_path: Path) -> None:
    one = {name: values[:1] for name, values in CURVES.items()}
    none: dict[str, Any] = {name: [] for name in CURVES}
    for curves in (one, none, {**CURVES, "threshold": [math.nan] * 3}):
        assert plot_summary(tmp_path / "picture.png", **curves).stat().st_size > 1000


def test_no_text_of_the_picture_overlaps_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    names = ("teacher", "warm start", "SFT, same steps", "SWITCH, same steps")
    scores = {name: dict.fromkeys(("0-10", "11-40", "41-100", "over 100"), (90.0, 3.0)) for name in names}
    plot_summary(tmp_path / "picture.png", **CURVES, scores=scores)
    monkeypatch.undo()
    renderer = figures[0].canvas.get_renderer()
    hidden = set()  # tick labels beyond the limits exist but are not drawn
    for axes in figures[0].findobj(plt.Axes):
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            hidden |= {tick.label1 for tick in axis.get_major_ticks() if not limits[0] <= tick.get_loc() <= limits[1]}
    texts = [text for text in figures[0].findobj(plt.Text) if text.get_text() and text.get_visible()]
    texts = [text for text in texts if text not in hidden]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    plt.close(figures[0])
    for name, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1200 and box.y1 <= 500, name
    for index, (name, box) in enumerate(boxes):
        for other_name, other in boxes[index + 1 :]:
            shared = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(shared) <= 1, (name, other_name)


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "picture.png", tmp_path / "picture.nonsense"):
        with pytest.raises(UserError, match="picture"):
            plot_summary(path, **CURVES)


def test_a_terminal_gets_the_same_cells_in_its_width() -> None:
    rows, headers = [("loss", 1.23456), ("a name of several words", 1234567), ("none", None)], ("what", "value [nats]")
    shown = {}
    for width in (24, 100):
        screen = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        with screen.capture() as capture:
            screen.print(rich_table(rows, headers))
        shown[width] = [line.rstrip() for line in capture.get().splitlines()]
        assert max(map(len, shown[width])) <= width
    plain = table(rows, headers).splitlines()
    for place in (0, 2, 3, 4):
        assert shown[100][place].split() == plain[place].split()
    assert {len(line) for line in shown[100][2:]} == {max(map(len, shown[100][2:]))}  # numbers end in one column
    assert len(shown[24]) > len(shown[100])


def test_a_completion_says_whether_it_ended_or_was_cut() -> None:
    rollout = make_rollout([2, 4], teacher_from=1)
    rollout.completion_ids[0, 1] = 7
    for ends in (7, [5, 7]):
        assert [row["finish_reason"] for row in rollout.to_dicts(eos_token_id=ends)] == ["stop", "length"]
    assert all("finish_reason" not in row for row in rollout.to_dicts())
