"""The demo end to end, at sizes that take seconds: what it writes is what the other commands read."""

import json

import pytest
import yaml

from switchkd.__main__ import main
from switchkd.demo.run import run_demo
from switchkd.demo.settings import MODELS, DemoSettings

SMALL = DemoSettings(
    teacher_width=16,
    teacher_layers=1,
    student_width=8,
    student_layers=1,
    teacher_heads=2,
    student_heads=2,
    records=160,
    test_records=8,
    teacher_steps=4,
    warm_start_steps=2,
    distillation_steps=2,
    batch_size=4,
    max_completion_length=12,
    decoding_seeds=(1, 2),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    lines = []
    return folder, run_demo(folder, say=lines.append, settings=SMALL), "\n".join(lines)


def test_summary_holds_what_is_promised_and_the_claims_are_computed_from_it(demo):
    folder, summary, _ = demo
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    scores = summary["rouge_l"]
    assert list(scores) == list(MODELS)
    assert summary["claims"] == {
        "teacher_rouge_l_at_least_90": scores["teacher"] >= 90,
        "switch_5_points_ahead_of_student_only": scores["SWITCH"] - scores["student only"] >= 5,
        "switch_gains_over_warm_start": scores["SWITCH"] > scores["warm start"],
    }
    assert summary["switch_against"]["SFT"]["mean"] == pytest.approx(scores["SWITCH"] - scores["SFT"])
    assert 0 <= summary["teacher_share"] <= 1
    assert summary["seconds"] > 0
    assert (folder / "summary.png").stat().st_size > 10_000


def test_a_claim_that_does_not_hold_is_said(demo):
    _, summary, text = demo
    assert summary["rouge_l"]["teacher"] < 90  # four steps teach nothing
    assert "DOES NOT HOLD in this run: teacher rouge l at least 90" in text
    for claim, holds in summary["claims"].items():
        assert (claim.replace("_", " ") in text) == (not holds)


def test_scores_are_those_of_the_saved_rows(demo):
    folder, summary, _ = demo
    rows = (folder / "runs" / "SWITCH" / "seed-0" / "evaluate" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == SMALL.test_records * 2
    mean = sum(json.loads(row)["rouge_l"] for row in rows) / len(rows)
    assert mean == pytest.approx(summary["rouge_l"]["SWITCH"])


def test_the_other_commands_go_on_with_what_the_demo_left(demo, capsys):
    folder, _, _ = demo
    options = ["--model_name_or_path", str(folder / MODELS["SWITCH"])]
    teacher = ["--teacher_model_name_or_path", str(folder / MODELS["teacher"])]
    rollout = ["--prompt", "Spell river.", "--max_completion_length", "5", "--json"]
    assert main(["rollout", *options, *teacher, *rollout]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])
    data = ["--dataset_name", str(folder / "data" / "test.jsonl"), "--max_samples", "2", "--decoding_seeds", "1"]
    out = ["--max_completion_length", "5", "--output_dir", str(folder / "scored")]
    for model in MODELS.values():
        assert main(["evaluate", "--model_name_or_path", str(folder / model), *data, *out]) == 0
        out[-1] += "x"


def test_the_writer_is_all_that_differs_between_student_only_and_switch(demo):
    folder, _, _ = demo
    student, switch = (
        yaml.safe_load((folder / "runs" / label / "seed-0" / "train.yaml").read_text())
        for label in ("student-only", "SWITCH")
    )
    differing = {name for name in {*student, *switch} if student.get(name) != switch.get(name)}
    assert differing == {"method", "target_teacher_share", "draft_length", "output_dir"}
