"""What a comparison writes: numbers that can be recomputed, LaTeX that compiles, few sentences, and its picture."""

import csv
import re

import numpy as np
import pytest
from matplotlib import pyplot
from scipy import stats

from switchkd.compare import pictures, report
from switchkd.compare.findings import Comparison, by_length, differences_table, find, interval, sentences
from switchkd.compare.latex import escaped, latex_document
from switchkd.compare.significance import paired_difference


def comparison_of(labels, *, students=("",), seeds=3, prompts=60, gain=2.0, measure="rouge_l"):
    """Every label is ahead of the one before it by the gain, with noise of prompts and seeds."""
    rng, results, rows = np.random.default_rng(0), [], {}
    for student in students:
        for place, label in enumerate(labels):
            for seed in range(seeds):
                scores = 50 + gain * place + rng.normal(0, 2, prompts) + rng.normal(0, 0.2)
                rows[student, label, seed] = [
                    {"index": i, measure: score, "rouge_l": score, "exact_match": i % 2 == 0, "reference_tokens": 5 + i}
                    for i, score in enumerate(scores.tolist())
                ]
                trained = {"method": "sft", "seconds": 1.0, "steps": 2}
                scored = {"rouge_l_std": 0.0, "completion_tokens": 3.0}
                results.append({"student": student, "run": label, "seed": seed, "cell": {}, "train": trained,
                                "evaluate": scored})  # fmt: skip
    return Comparison(results, rows, measure)


def found_in(comparison, baseline):
    pairs = [(label, baseline) for label in comparison.labels if label != baseline]
    return find({"test": comparison}, pairs), pairs


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_intervals_in_the_csv_files_are_those_of_the_rows(tmp_path):
    comparison = comparison_of(["a", "b"])
    findings, pairs = found_in(comparison, "a")
    lengths = by_length({"test": comparison}, pairs)
    report.write_runs({"test": comparison}, tmp_path / "runs.csv")
    report.write_differences({"test": comparison}, findings, tmp_path / "differences.csv")
    report.write_lengths(lengths, tmp_path / "lengths.csv")
    scores = {key: np.array([value for value, _ in rows.values()])
              for key, rows in comparison._scores["rouge_l"].items()}  # fmt: skip
    for row in read_csv(tmp_path / "runs.csv"):
        values = scores["", row["run"], int(row["seed"])]
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        assert float(row["rouge_l_low"]) == pytest.approx(values.mean() - half)
        assert float(row["rouge_l_high"]) == pytest.approx(values.mean() + half)
        assert float(row["exact_match_low"]) < 50.0 < float(row["exact_match_high"])
    first, second = (np.stack([scores["", label, seed] for seed in range(3)]) for label in "ba")
    wanted = paired_difference(first, second)
    (row,) = read_csv(tmp_path / "differences.csv")
    every, *others = read_csv(tmp_path / "lengths.csv")
    for found in (row, every):
        assert [float(found[name]) for name in ("difference", "low", "high")] == pytest.approx(
            [wanted.mean, wanted.low, wanted.high]
        )
    assert every["answers"] == "all answers" and others[-1]["answers"] == "longest minus shortest"


def test_the_table_of_differences_says_all_and_the_sentences_only_what_matters():
    labels = ["base", *(f"run {number}" for number in range(10)), "same"]
    comparison = comparison_of(labels, students=("small", "wide"))
    findings, _ = found_in(comparison, "base")
    headers, rows = differences_table({"test": comparison}, findings)
    assert len(rows) == len(findings) == 2 * 11
    for one, row in zip(findings, rows, strict=True):
        cells = dict(zip(headers, row, strict=True))
        assert (cells["student"], cells["run"], cells["against"]) == (one.student, one.first, "base")
        assert cells["difference [points]"] == f"{one.difference.mean:+.1f}"
        assert cells["95% interval"] == f"{one.difference.low:+.1f} to {one.difference.high:+.1f}"
        assert (cells["finding"] == "ahead *") == (one.is_significant and one.difference.mean > 0)
    words = sentences({"test": comparison}, findings, [])
    assert len(words) == 5
    significant = sum(one.is_significant for one in findings)
    assert words[-1].startswith(f"{significant} of 22 differences are significant; p-values are corrected for all 22")
    largest = max(findings, key=lambda one: one.difference.mean if one.is_significant else 0.0)
    assert words[0].startswith(f"{largest.student}: {largest.first} is ahead of base by {largest.difference.mean:.1f}")
    asked = sentences({"test": comparison}, findings, [("run 0", "base")])
    assert len(asked) == 3 and all("run 0" in line for line in asked[:2])


@pytest.mark.parametrize(("seeds", "few"), [(1, True), (2, True), (3, False)])
def test_fewer_than_three_seeds_are_said_to_be_too_few(seeds, few):
    comparison = comparison_of(["a", "b"], seeds=seeds)
    findings, _ = found_in(comparison, "a")
    words = sentences({"test": comparison}, findings, [])
    assert words[0].startswith(f"too few training seeds ({seeds})") == few
    assert not (seeds == 1 and findings[0].is_significant)


def test_of_nats_fewer_are_better_in_the_table_too():
    comparison = comparison_of(["a", "b"], measure="reverse_sequence_kl")
    findings, _ = found_in(comparison, "a")
    headers, ((*_, said),) = differences_table({"test": comparison}, findings)
    assert "difference [nats]" in headers and said == "behind *"


def test_latex_shows_the_text_that_it_was_given():
    text = r"50%_of #3 & {x} ~ ^ \ $y$ <b> | -1.5 +- 0.2, 0-10"
    shown = escaped(text)
    for inside in re.findall(r"(?<!\\)[%#&_]", shown):
        raise AssertionError(f"{inside} would be read as a command in {shown}")
    assert shown == (
        r"50\%\_of \#3 \& \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$y\$ $<$b$>$ \textbar{} $-$1.5 "
        r"$\pm$ 0.2, 0-10"
    )
    document = latex_document([("50% & more", ["run", "score"], [["a_b", "1.0 +- 0.1"], ["c", None]])])
    assert document.splitlines()[0] == r"% Written by switchkd compare; needs \usepackage{booktabs}"
    for rule in ("toprule", "midrule", "bottomrule"):
        assert document.count("\\" + rule) == 1
    assert r"\begin{tabular}{lr}" in document and r"a\_b & 1.0 $\pm$ 0.1 \\" in document and r"c & -- \\" in document
    assert document.count(r"\begin{") == document.count(r"\end{") == 2


@pytest.mark.parametrize(
    ("labels", "students"),
    [
        (["sft", "switch"], ("",)),
        (["sft", "teacher writes the first sixty-four tokens of every completion / forward KL / $1.0"], ("a", "b")),
        ([f"method {number}" for number in range(40)], ("",)),
        (["sft"], ("",)),
    ],
    ids=["two", "long labels", "forty", "one"],
)
def test_the_picture_says_in_print_what_it_shows(labels, students, tmp_path, monkeypatch):
    """Axes with names and units, a line at zero, numbers, a mark and a star besides the colour; nothing is cut off."""
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    comparison = comparison_of(labels, students=students, gain=0.3)
    findings, pairs = found_in(comparison, labels[0])
    pictures.forest(comparison, findings, dict(pairs), tmp_path / "picture.png")
    (figure,) = kept
    monkeypatch.undo()
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    for one in findings:
        star = " *" if one.is_significant else ""
        assert interval(one.difference) + star in texts
    assert len(figure.axes) == len(students) * (2 if findings else 1)
    for axes in figure.axes[1::2]:
        assert "minus sft [points], 95% interval" in axes.get_xlabel() or "minus method 0" in axes.get_xlabel()
        assert any(list(line.get_xdata()) == [0.0, 0.0] for line in axes.lines)
        marks = [line for line in axes.lines if line.get_marker() == "D"]
        filled = [line.get_markerfacecolor() != "white" for line in marks]
        of_student = [one for one in findings if one.student == students[figure.axes.index(axes) // 2]]
        assert filled == [one.is_significant for one in of_student]
    drawn = figure.canvas.get_renderer()
    for axes in figure.axes:
        for text in [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label]:
            box = text.get_window_extent(drawn)
            assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, text
    assert len({axes.get_xlim() for axes in figure.axes[1::2]}) <= 1
    pyplot.close(figure)
