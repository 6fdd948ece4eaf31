"""The demo end to end, at sizes that take seconds: what it writes is what the other commands read."""

import json

import pytest

from switchkd.__main__ import main
from switchkd.demo.run import DemoSettings, run_demo

SMALL = DemoSettings(
    teacher_width=16,
    teacher_layers=1,
    student_width=8,
    student_layers=1,
    teacher_heads=2,
    student_heads=2,
    records=160,
    on_policy_fraction=1.0,
    test_records=8,
    teacher_steps=4,
    warm_start_steps=2,
    distillation_steps=2,
    batch_size=4,
    max_completion_length=12,
    evaluation_seeds=(1, 2),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    lines = []
    return folder, run_demo(folder, say=lines.append, settings=SMALL), "\n".join(lines)


def test_summary_holds_what_is_promised_and_the_claims_are_computed_from_it(demo):
    folder, summary, _ = demo
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    before, after, sft = (summary[f"rouge_l_{name}"] for name in ("student_before", "student_after", "sft_same_steps"))
    assert summary["claims"] == {
        "teacher_rouge_l_at_least_90": summary["rouge_l_teacher"] >= 90,
        "student_gains_at_least_5": after - before >= 5,
        "switch_at_least_sft": after >= sft,
    }
    assert 0 <= summary["teacher_share"] <= 1
    assert summary["seconds"] > 0
    assert (folder / "summary.png").stat().st_size > 10_000


def test_a_claim_that_does_not_hold_is_said(demo):
    _, summary, text = demo
    assert summary["rouge_l_teacher"] < 90  # four steps teach nothing
    assert "DOES NOT HOLD in this run: teacher rouge l at least 90" in text
    for claim, holds in summary["claims"].items():
        assert (claim.replace("_", " ") in text) == (not holds)


def test_scores_are_those_of_the_saved_rows(demo):
    folder, summary, _ = demo
    rows = [json.loads(line) for line in (folder / "rows_student_after_switch.jsonl").read_text().splitlines()]
    assert len(rows) == SMALL.test_records * 2
    assert sum(row["rouge_l"] for row in rows) / len(rows) == pytest.approx(summary["rouge_l_student_after"])


def test_the_other_commands_go_on_with_what_the_demo_left(demo, capsys):
    folder, _, _ = demo
    options = ["--model_name_or_path", str(folder / "student_switch")]
    teacher = ["--teacher_model_name_or_path", str(folder / "teacher")]
    assert (
        main(["rollout", *options, *teacher, "--prompt", "Spell river.", "--max_completion_length", "5", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])
    data = ["--dataset_name", str(folder / "data" / "test.jsonl"), "--max_samples", "2", "--seeds", "1"]
    out = ["--max_completion_length", "5", "--output_dir", str(folder / "scored")]
    assert main(["evaluate", *options, *data, *out]) == 0


def test_student_stages_start_from_the_same_weights_and_differ_by_the_method_only(demo):
    folder, _, _ = demo
    stages = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {
        name: [row["step"] for row in stages if row["stage"] == name] for name in ("student_sft", "student_switch")
    }
    assert steps["student_sft"] == steps["student_switch"]
    rates = [[row["learning_rate"] for row in stages if row["stage"] == name] for name in steps]
    assert rates[0] == rates[1]
