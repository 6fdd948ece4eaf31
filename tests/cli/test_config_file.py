"""Config files that hold only what differs from their base."""

from pathlib import Path

import pytest
from helpers.command_line import Run

from switchkd.cli.config_file import read_config_file
from switchkd.commands import evaluate
from switchkd.errors import UserError


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_over_its_base_is_the_file_with_both_written_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        below="a: 1\nsame: [1, 2]\ndeep: {x: 1, y: {z: 5e-4, w: text}}\nruns: {sft: , kd: {b: 1}}\n",
        above="base: below.yaml\na: 2\nsame: [3]\ndeep: {y: {z: 1}}\nruns: {kd: , gkd: {c: 1}}\nnew: 3\n",
        whole="a: 2\nsame: [3]\ndeep: {x: 1, y: {z: 1, w: text}}\nruns: {sft: , kd: , gkd: {c: 1}}\nnew: 3\n",
    )
    merged = read_config_file(tmp_path / "above.yaml")
    assert merged == read_config_file(tmp_path / "whole.yaml")
    assert list(merged) == ["a", "same", "deep", "runs", "new"] and list(merged["runs"]) == ["sft", "kd", "gkd"]
    assert read_config_file(tmp_path / "below.yaml")["deep"]["y"]["z"] == 5e-4


def test_bases_have_bases_and_the_later_of_several_wins(tmp_path: Path) -> None:
    (tmp_path / "low").mkdir()
    write(tmp_path / "low", ground="a: 1\nb: 1\nc: 1\nd: 1\n", first="base: ground.yaml\nb: 2\nc: 2\nd: 2\n")
    write(tmp_path, second="c: 3\nd: 3\n", top="base: [low/first.yaml, second.yaml]\nd: 4\n")
    assert read_config_file(tmp_path / "top.yaml") == {"a": 1, "b": 2, "c": 3, "d": 4}


def test_options_come_from_the_base_too_and_flags_win(tmp_path: Path) -> None:
    write(tmp_path, below="temperature: 0.5\ntop_k: 3\n", above="base: below.yaml\ntop_k: 4\n")
    options = evaluate.parser().resolve(["--config", str(tmp_path / "above.yaml"), "--top_p", "0.9"])
    assert (options.temperature, options.top_k, options.top_p) == (0.5, 4, 0.9)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top": "base: top.yaml\n"}, "top.yaml, line 1: base turns in a circle: top.yaml -> top.yaml"),
        ({"top": "a: 1\nbase: other.yaml\n", "other": "base: top.yaml\n"}, "circle: top.yaml -> other.yaml -> top"),
        ({"top": "a: 1\nbase: none.yaml\n"}, "top.yaml, line 2: no base file none.yaml in"),
        ({"top": "base: 3\n"}, "top.yaml, line 1: base must be a file or a list of files"),
        ({"top": "base: []\n"}, "base must be a file or a list of files"),
        ({"top": "base: other.yaml\n", "other": "a: [\n"}, "other.yaml, line 2: malformed YAML"),
        ({"top": "a: 1\na: 2\n"}, "top.yaml, line 2: duplicate key 'a'"),
    ],
)  # fmt: skip
def test_wrong_bases_are_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(UserError) as caught:
        read_config_file(tmp_path / "top.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_in_a_base_is_found_in_the_base(tmp_path: Path, run: Run) -> None:
    write(tmp_path, below="top_k: 1\ntemperatur: 0.5\n", above="base: below.yaml\ntop_k: x\n")
    code, out, err = run("evaluate", "--config", tmp_path / "above.yaml")
    assert (code, out) == (2, "")
    assert "above.yaml, line 2: top_k: invalid int" in err and "below.yaml, line 2: unknown key 'temperatur'" in err
