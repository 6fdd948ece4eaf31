"""`switchkd report`: what each command leaves becomes one page; nothing is invented, nothing breaks on damage."""

import json
import shutil
from concurrent.futures import Executor, Future

import pytest
import yaml
from helpers.command_line import write_rows
from helpers.pages import Document
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_tokenizer

from switchkd.__main__ import main
from switchkd.compare import command
from switchkd.report.compared import compare_evaluations, read_compared
from switchkd.report.curves import curve_section
from switchkd.report.folders import evaluations, read_lines, read_run, read_runs
from switchkd.report.scores import cards
from switchkd.report.texts import Texts, position_section, rollout_section

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


class InThisProcess(Executor):
    """Runs a task where it is handed in."""

    def submit(self, task, *arguments):
        future = Future()
        future.set_result(task(*arguments))
        return future


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One tiny run of each command."""
    home = tmp_path_factory.mktemp("report")
    for name, model in {"S": build_gpt2(seed=1), "T": build_gpt2(seed=2)}.items():
        model.save_pretrained(home / name)
        build_tokenizer().save_pretrained(home / name)
    data = write_rows(home / "data.jsonl", RAGGED_ROWS)
    pair = ["--model_name_or_path", home / "S", "--teacher_model_name_or_path", home / "T"]
    of_data = [*pair, "--dataset_name", data, "--max_completion_length", 8]
    calls = {
        "train": [*of_data, "--max_steps", 4, "--logging_steps", 1, "--log_completions", "true", "--use_cpu", "true",
                  "--initial_threshold", 0.2, "--save_strategy", "no"],
        "evaluate": [*of_data, "--decoding_seeds", "1,2"],
        "calibrate": [*of_data, "--target_teacher_share", 0.5],
        "diagnose": [*of_data, "--positions", "0,2"],
        "rollout": [*of_data, "--max_samples", 8, "--top_tokens", 3, "--initial_threshold", 0.2],
    }  # fmt: skip
    for name, arguments in calls.items():
        assert main([str(word) for word in [name, *arguments, "--output_dir", home / name, "--json"]]) == 0
    config = {
        "output_dir": str(home / "compare"),
        "seeds": [0, 1],
        "train": {
            "teacher_model_name_or_path": str(home / "T"), "dataset_name": str(data), "max_steps": 2,
            "max_completion_length": 8, "use_cpu": True, "model_name_or_path": str(home / "S"),
        },
        "runs": {"sft": None, "switch": {"initial_threshold": 0.2, "log_completions": True}},
        "evaluate": {"dataset_name": str(data), "decoding_seeds": [10], "max_completion_length": 8},
        "threads": 1,
    }  # fmt: skip
    (home / "compare.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "worker_pool", lambda jobs: InThisProcess())
        assert main(["compare", "--config", str(home / "compare.yaml")]) == 0
    return home


@pytest.fixture
def report(run, tmp_path):
    """`report(*folders)` -> the page that was written, read as a browser does."""

    def call(*folders):
        code, _, err = run("report", *folders, "--output_file", tmp_path / "page.html")
        assert code == 0, err
        return Document((tmp_path / "page.html").read_text(encoding="utf-8"))

    return call


COMMANDS = ("train", "evaluate", "calibrate", "diagnose", "rollout", "compare")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_page(runs, report, name):
    document = report(runs / name)
    assert document.loads() == [] and document.strays == [] and document.open == []
    heads = document.text("h2")
    expected = {
        "train": ("Learning curves", "Who writes where", "Rollouts", "Data", "Options", "Versions"),
        "evaluate": ("Scores", "Answers", "Distance from the teacher", "Data", "Options"),
        "calibrate": ("Calibration", "Options"),
        "diagnose": ("Diagnosis", "Data"),
        "rollout": ("Who writes where", "Rollouts", "Options"),
        "compare": ("Scores", "Differences", "Learning curves", "Rollouts", "Answers", "Trainings", "Options"),
    }[name]
    for title in expected:
        assert title in heads, title
    assert document.of("section")[-1]["id"] == "not-recorded"


def test_all_runs_share_one_small_page_in_which_every_figure_is_a_file(runs, run, tmp_path):
    path = tmp_path / "all.html"
    code, out, _ = run("report", *(runs / name for name in COMMANDS), "--output_file", path, "--json")
    assert code == 0
    said = json.loads(out.splitlines()[-1])
    assert said["bytes"] == path.stat().st_size < 2_000_000
    document = Document(path.read_text(encoding="utf-8"))
    figures = len(document.of("figure"))
    assert figures >= 7 and len([link for link in document.of("a") if "download" in link]) >= figures
    assert document.text("dt").startswith("What was comparedWhat wonBy how muchIs it real")
    ids = [section["id"] for section in document.of("section")]
    assert len(set(ids)) == len(ids)
    anchors = {link["href"] for link in document.of("a") if str(link["href"]).startswith("#")}
    assert anchors == {f"#{one}" for one in ids if one != "not-recorded"}


def test_the_files_of_a_page_hold_what_the_runs_logged(runs, report):
    files = report(runs / "train").files()
    logged = [line for line in read_lines(runs / "train" / "metrics.jsonl") if "loss" in line]
    losses = [line for line in files["what-was-logged"] if line["measure"] == "Loss"]
    assert [int(line["step"]) for line in losses] == [line["step"] for line in logged]
    assert [float(line["mean"]) for line in losses] == pytest.approx([line["loss"] for line in logged], rel=1e-5)
    options = {line["option"]: line for line in files["options-train"]}
    assert options["max_steps"] == {"option": "max_steps", "value": "4", "default": "-1"}
    assert "output_dir" not in options and "temperature" not in options


def test_scores_are_those_of_the_evaluations(runs, report):
    files = report(runs / "compare").files()
    results = json.loads((runs / "compare" / "results.json").read_text())["results"]
    for label in ("sft", "switch"):
        scores = [one["evaluate"]["test"]["rouge_l"] for one in results if one["run"] == label]
        (line,) = [one for one in files["scores"] if one["run"] == label and one["answer tokens"] == "all"]
        assert float(line["rouge_l"]) == pytest.approx(sum(scores) / len(scores), rel=1e-4)
        assert float(line["low"]) <= float(line["rouge_l"]) <= float(line["high"])


def test_a_rollout_tells_what_both_models_thought(runs, report):
    document = report(runs / "rollout")
    told = [one["data-told"] for one in document.of("span") if "data-told" in one]
    assert told and all("\nstudent: " in one and "\nteacher: " in one and "threshold 0.2" in told[0] for one in told)
    assert "likeliest tokens" not in document.text("li")
    assert "likeliest tokens" in report(runs / "train").text("li")


def test_the_first_prompt_is_recorded_and_shown(runs, report):
    prompt = json.loads((runs / "train" / "summary.json").read_text())["first_prompt"]
    assert prompt.startswith("first prompt, ") and prompt in report(runs / "train").text("pre")


# ---- what won


def fake(scores, label):
    """Rows of an evaluation with these scores, a prompt each."""
    return [
        {"index": n, "prompt": f"p{n}", "completion": label, "references": ["r"], "rouge_l": score,
         "exact_match": False, "completion_tokens": 3, "reference_tokens": 5}
        for n, score in enumerate(scores)
    ]  # fmt: skip


def evaluation(folder, name, scores, data="d.jsonl"):
    path = folder / name
    path.mkdir()
    (path / "config.yaml").write_text(f"# Written by switchkd 0: switchkd evaluate\ndataset_name: {data}\n")
    write_rows(path / "rows.jsonl", fake(scores, name))
    (path / "summary.json").write_text(json.dumps({"rouge_l": 1.0, "examples": len(scores), "dataset_name": data}))
    return read_run(path)


def test_the_first_screen_says_what_won_by_how_much_and_whether_it_is_real(tmp_path):
    base = [50.0 + n % 3 for n in range(24)]
    near = [score + (1 if n % 2 else -1) for n, score in enumerate(base)]
    runs = [
        evaluation(tmp_path, "base", base),
        evaluation(tmp_path, "far", [score + 20 + n % 2 for n, score in enumerate(base)]),
        evaluation(tmp_path, "near", near),
    ]
    (compared,) = compare_evaluations([each for run in runs for each in evaluations(run)])
    said = dict(cards(compared))
    assert said["What won"][0].startswith("far: ROUGE-L 71.5 ")
    assert said["By how much"][0].startswith("+20.5 points against base, the baseline (+20.")
    assert "beyond chance over prompts; one training seed, so it may not repeat" in said["Is it real"][0]
    (two,) = compare_evaluations([runs[0], runs[2]])
    assert "not beyond chance" in dict(cards(two))["Is it real"][0]


def test_evaluations_of_other_prompts_are_not_compared(tmp_path):
    runs = [
        evaluation(tmp_path, "a", [1.0, 2.0, 3.0]),
        evaluation(tmp_path, "b", [1.0, 2.0]),
        evaluation(tmp_path, "c", [1.0, 2.0, 3.0], data="e.jsonl"),
    ]
    found = compare_evaluations([each for run in runs for each in evaluations(run)])
    assert len(found) == 3 and all(one.findings == [] for one in found)


def test_several_test_sets_of_an_evaluation_are_one_comparison(tmp_path, report):
    """Each set has a folder of its own in that of the evaluation."""
    for name, scores in {"a": [1.0, 2.0, 3.0], "b": [2.0, 4.0, 3.0]}.items():
        whole = evaluation(tmp_path, name, scores)
        (whole.path / "rows.jsonl").unlink()
        (whole.path / "summary.json").write_text(json.dumps({"rouge_l": 2.0, "datasets": {"dolly": {}, "vicuna": {}}}))
        for test_set in ("dolly", "vicuna"):
            evaluation(whole.path, test_set, scores, data="[d.jsonl]")
    document = report(tmp_path / "a", tmp_path / "b")
    said = document.text("dd")
    assert "scored on dolly (3 prompts), vicuna (3 prompts)" in said and "dolly: b: ROUGE-L 3.0" in said
    assert "dolly: +1.0 points against a, the baseline" in said
    assert "dolly, 3 prompts: ROUGE-L 1.0vicuna, 3 prompts" in report(tmp_path / "a").text("dd")


def test_an_evaluation_of_the_same_prompts_stands_beside_a_comparison_and_is_no_competitor(runs, tmp_path, report):
    """As that of the teacher, whose scores had sections of their own."""
    scored = next((runs / "compare").rglob("rows.jsonl")).parent
    shutil.copytree(scored, tmp_path / "teacher-scores")
    both = report(runs / "compare", tmp_path / "teacher-scores")
    lines = [one["run"] for one in both.files()["scores"] if one["answer tokens"] == "all"]
    assert lines == ["sft", "switch", "teacher-scores"]
    assert "2 runs: sft, switch" in both.text("dd") and both.text("h2").count("Scores") == 1
    other = evaluation(tmp_path, "other", [1.0, 2.0])
    assert report(runs / "compare", other.path).text("h2").count("Scores") == 2


def test_a_page_may_have_a_title_of_its_own_and_no_two_sections_share_a_name(runs, run, tmp_path):
    path = tmp_path / "page.html"
    code, _, err = run("report", runs / "compare", runs / "train", "--title", f"mine {EVIL}", "--output_file", path)
    assert code == 0, err
    document = Document(path.read_text(encoding="utf-8"))
    assert f"mine {EVIL}" in document.text("h1") and document.of("img") == []
    ids = [section["id"] for section in document.of("section")]
    assert len(set(ids)) == len(ids) and "learning-curves:-train" in ids


def test_a_score_is_never_drawn_below_zero(tmp_path, report):
    document = report(evaluation(tmp_path, "low", [0.0, 0.0, 0.0, 6.0]).path)
    (line,) = [one for one in document.files()["scores"] if one["answer tokens"] == "all"]
    assert float(line["low"]) == 0.0 and float(line["high"]) > 1.5
    assert not any(text.startswith("\N{MINUS SIGN}") for tag, text in document.texts if tag == "text")


def test_a_mean_has_an_interval_and_a_difference_is_that_of_means(runs):
    (comparison,) = read_compared(read_run(runs / "compare")).comparisons.values()
    means = {label: comparison.mean("", label) for label in comparison.labels}
    for label, found in means.items():
        scores = [comparison.score(result) for result in comparison.of("", label)]
        assert found.mean == pytest.approx(sum(scores) / len(scores)) and found.low <= found.mean <= found.high
    difference = comparison.difference("", "switch", "sft")
    assert difference.mean == pytest.approx(means["switch"].mean - means["sft"].mean)


def test_significance_of_a_comparison_is_the_one_it_printed(runs):
    compared = read_compared(read_run(runs / "compare"))
    (finding,) = compared.findings
    assert (finding.first, finding.second, compared.baseline) == ("switch", "sft", "sft")
    said = dict(cards(compared))
    assert "2 runs: sft, switch" in said["What was compared"]
    assert "adjusted p" in said["Is it real"][0] and "of 2 training seeds" in said["Is it real"][0]


# ---- texts


def rollout_row(tokens, step=None, share=0.0, prompt="p", divergence=0.5):
    by_teacher = round(share * tokens)
    row = {
        "prompt": prompt,
        "tokens": ["x"] * tokens,
        "author": ["teacher"] * by_teacher + ["student"] * (tokens - by_teacher),
        "divergence": [divergence] * tokens,
        "threshold": [0.25] * tokens,
    }
    return row if step is None else {"step": step, **row}


def test_bands_are_the_quantiles_of_the_tokens_at_a_position():
    rows = [rollout_row(4, divergence=number / 10) for number in range(1, 11)]
    section = position_section([Texts("run", rows)])
    share, compared = section.blocks
    assert compared.headers[4:] == ["10%", "25%", "50%", "75%", "90%", "threshold"]
    for line in compared.rows:
        assert line[4:] == pytest.approx([0.19, 0.325, 0.55, 0.775, 0.91, 0.25])
    assert [line[1] for line in share.rows] == [0, 1, 2, 3] and [line[2] for line in share.rows] == [10] * 4


def test_of_a_training_the_second_half_counts():
    rows = [rollout_row(4, step, share=0.0 if step < 10 else 1.0) for step in (1, 10, 20) for _ in range(5)]
    share, *_ = position_section([Texts("run", rows)]).blocks
    assert [line[3] for line in share.rows] == [1.0] * 4


def test_extremes_and_a_prompt_logged_twice_are_shown_once_each():
    rows = [
        rollout_row(4, 10, share=1.0, prompt="most"),
        rollout_row(9, 10, share=0.5, prompt="long"),
        rollout_row(4, 10, share=0.25, prompt="twice"),
        rollout_row(4, 1, share=0.25, prompt="twice"),
    ]
    titles = [one.title for one in rollout_section([Texts("run", rows)]).blocks]
    assert titles == [
        "run, step 10: most by the teacher",
        "run, step 10: longest",
        "run, step 10: least by the teacher",
        "run, step 1: the same prompt early",
        "run, step 10: the same prompt late",
    ]


def test_a_prompt_that_several_rollouts_share_is_shown_in_each_of_them():
    """As before a training and after it; what a training logged has its own pair."""
    before = Texts("before", [rollout_row(4, prompt="only before"), rollout_row(4, share=1.0, prompt="both")])
    after = Texts("after", [rollout_row(4, share=0.5, prompt="both"), rollout_row(4, prompt="only after")])
    train = Texts("train", [rollout_row(4, 1, prompt="both")])
    views = rollout_section([train, before, after]).blocks
    assert [(one.title, one.prompt) for one in views[:3]] == [
        ("before: the same prompt", "both"),
        ("after: the same prompt", "both"),
        ("train, step 1: longest", "both"),
    ]
    assert len({one.name for one in views}) == len(views)
    alone = rollout_section([before, Texts("other", [rollout_row(4, prompt="another")])]).blocks
    assert not any("the same prompt" in one.title for one in alone)


def test_nothing_logged_is_no_section():
    assert curve_section([]) is None and position_section([]) is None and rollout_section([]) is None


# ---- as a stage of a recipe


def test_folders_may_stand_in_a_config_file_and_words_of_the_command_line_replace_them(runs, run, tmp_path):
    config = tmp_path / "report.yaml"
    config.write_text(yaml.safe_dump({"runs": [str(runs / "rollout")], "output_dir": str(tmp_path / "here")}))
    code, _, err = run("report", "--config", config)
    assert code == 0, err
    page = tmp_path / "here" / "report.html"
    assert "switchkd: rollout" in page.read_text()
    code, _, err = run("report", runs / "evaluate", "--config", config)
    assert code == 0 and "switchkd: evaluate" in page.read_text()


def test_the_report_of_a_recipe_is_made_anew_by_every_call(runs, run, tmp_path):
    """It shows what the stages before it have by now, and a page of an unfinished recipe must not stay."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"stages": {"report": {"command": "report", "runs": [str(runs / "rollout")]}}}))
    page = tmp_path / "run" / "report" / "report.html"
    for _ in range(2):
        code, out, err = run("recipe", "run", mine, "--output_dir", tmp_path / "run")
        assert code == 0 and "done before" not in out, err
        assert "switchkd: rollout" in page.read_text()
        page.unlink()


# ---- what goes wrong


def copied(runs, tmp_path, name):
    return shutil.copytree(runs / name, tmp_path / "copy")


def test_what_stands_in_the_files_of_a_run_is_never_html(runs, tmp_path, report):
    folder = copied(runs, tmp_path, "rollout")
    lines = read_lines(folder / "rollouts.jsonl")
    for line in lines:
        line["prompt"] = f"{EVIL}\ud800"
        line["tokens"] = [EVIL for _ in line["tokens"]]
        line["top_tokens"][0]["student"][0]["token"] = EVIL
    write_rows(folder / "rollouts.jsonl", lines)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    first = (folder / "config.yaml").read_text().partition("\n")[0]
    (folder / "config.yaml").write_text(f"{first}\n{yaml.safe_dump({**config, 'dataset_name': EVIL})}")
    (folder / "versions.json").write_text(json.dumps({EVIL: EVIL}))
    scored = evaluation(tmp_path, "<b>name", [1.0, 2.0])
    write_rows(scored.path / "rows.jsonl", [{**row, "prompt": EVIL, "completion": EVIL, "references": [EVIL]}
                                            for row in scored.rows])  # fmt: skip
    document = report(folder, scored.path)
    assert len(document.of("script")) == 1 and document.of("img") == [] and document.of("b") == []
    assert document.loads() == [] and document.strays == []
    assert EVIL in document.text("span") and EVIL in document.text("dd") and f"{EVIL}\\ud800" in document.text("p")


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("train", "metrics.jsonl", '{"step": 1}\n{"step": \n{"step": 2}\n', "metrics.jsonl, line 2 is damaged"),
        ("train", "metrics.jsonl", "[1]\n", "metrics.jsonl, line 1 is not a JSON object"),
        ("train", "summary.json", "{", "summary.json is damaged"),
        ("train", "summary.json", "[]", "summary.json is not a JSON object"),
        ("train", "completions.jsonl", '{"prompt": "a"}\n', "completions.jsonl, line 1 is not a rollout"),
        ("rollout", "rollouts.jsonl", b"\xff\xfe\n", "cannot read"),
        (
            "evaluate",
            "summary.json",
            '{"rouge_l": 1}',
            "not what this version of switchkd writes (KeyError('examples'))",
        ),
        ("evaluate", "rows.jsonl", '{"index": 1}\n', "not what this version of switchkd writes (KeyError('prompt'))"),
        ("calibrate", "summary.json", '{"note": 1}', "not what this version of switchkd writes"),
        ("diagnose", "summary.json", '{"writers": []}', "not what this version of switchkd writes"),
        ("compare", "differences.csv", "a,b\n1,2\n", "differences.csv is damaged"),
        ("compare", "results.json", '{"results": [1]}', "not what this version of switchkd writes"),
    ],
)
def test_a_damaged_folder_is_one_line(runs, tmp_path, run, name, file, content, message):
    folder = copied(runs, tmp_path, name)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run("report", folder, "--output_file", tmp_path / "page.html")
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert not (tmp_path / "page.html").exists()


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]


def test_a_run_that_has_not_ended_is_shown_as_far_as_it_is(runs, tmp_path, report):
    folder = copied(runs, tmp_path, "train")
    (folder / "summary.json").unlink()
    document = report(folder)
    assert "Learning curves" in document.text("h2") and "the run has not ended" in document.text("li")


def test_folders_that_are_no_runs_are_one_line(runs, tmp_path, run):
    (tmp_path / "file").write_text("")
    for given, message in {
        tmp_path / "nothing": "does not exist",
        tmp_path / "file": "is a file",
        tmp_path: "is not the output_dir of one of train,",
        runs: "it holds runs, give those: ",
    }.items():
        code, out, err = run("report", given)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    code, _, err = run("report")
    assert code == 2 and "give the folders" in err
    code, _, err = run("report", runs / "train", runs / "train")
    assert code == 2 and "is given twice" in err


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    other = shutil.copytree(runs / "rollout", tmp_path / "rollout")
    assert [run.name for run in read_runs([str(runs / "rollout"), str(other)])] == [str(runs / "rollout"), str(other)]


def test_a_file_of_the_users_own_is_not_written_over(runs, tmp_path, run):
    path = tmp_path / "report.html"
    path.write_text("my own")
    code, _, err = run("report", runs / "rollout", "--output_file", path)
    assert code == 2 and "is not a page of switchkd" in err and path.read_text() == "my own"


# ---- switchkd rollout --html


def test_rollout_writes_a_page_of_every_completion(runs, tmp_path, run):
    pair = ("--model_name_or_path", runs / "S", "--teacher_model_name_or_path", runs / "T")
    path = tmp_path / "page.html"
    options = ("--prompt", EVIL, "--num_samples", 3, "--max_completion_length", 6, "--html", path)
    code, out, _ = run("rollout", *pair, *options)
    assert code == 0 and f"page: {path}" in out
    document = Document(path.read_text(encoding="utf-8"))
    assert len(document.of("article")) == 3 and EVIL in document.text("p") and document.loads() == []
    assert len(document.of("script")) == 1 and "--top_tokens" in document.text("li")
    path.write_text("my own")
    code, _, err = run("rollout", *pair, *options)
    assert code == 2 and "is not a page of switchkd" in err
