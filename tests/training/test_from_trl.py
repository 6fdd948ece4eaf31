"""docs/from_trl.md, followed to the letter: the file, the script, and every name that it promises."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.command_line import one_line_error
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_tokenizer

import switchkd
from switchkd.other_names import NOT_HERE, OTHER_NAMES, WITHOUT_MEANING, changes_nothing, similar_name, way_out

PAGE = (Path(__file__).parents[2] / "docs" / "from_trl.md").read_text(encoding="utf-8")


def block(language):
    [text] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return text


@pytest.fixture
def file(models, tmp_path, monkeypatch):
    """`before.yaml` of the page in the working directory, on the tiny pair."""
    text = block("yaml")
    for name, place in (("STUDENT", "llama"), ("TEACHER", "llama"), ("DATA", "train.jsonl")):
        text = text.replace(name, str(models / place))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "before.yaml").write_text(text)
    return tmp_path / "before.yaml"


def test_a_file_of_trl_is_refused_once_with_everything_that_is_to_be_edited(file, run):
    code, _, err = run("train", "--config", "before.yaml")
    assert code == 2 and err == block("text")
    assert len(re.findall(r"(?m)^\w+:", block("yaml"))) >= 38


def test_after_the_two_edits_the_file_trains_and_what_changes_nothing_is_said(file, run):
    text = file.read_text().replace("beta: 1.0", "divergence: reverse_kl\nmethod: opd")
    file.write_text(text.replace("num_completions_to_print", "num_completions_to_log"))
    code, _, err = run("train", "--config", "before.yaml")
    assert code == 0, err
    notes = [line for line in err.splitlines() if line.startswith("switchkd: note: ")]
    names = ("lora_task_type=CAUSAL_LM", "repetition_penalty=1.0", "use_vllm=False", "shuffle_dataset=True")
    assert [note.split()[2] for note in notes][:4] == list(names)
    assert (file.parent / "runs" / "from_trl" / "adapter_config.json").is_file()


def test_the_script_runs_as_the_page_shows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"student": build_gpt2(seed=1), "teacher": build_gpt2(seed=2), "tokenizer": build_tokenizer()}
    exec(block("python"), names | {"dataset": Dataset.from_list(RAGGED_ROWS)})


def test_flags_of_trl_that_change_nothing_are_left_out_and_others_refused_with_the_reason(run, models):
    data = ("--dataset_name", models / "train.jsonl", "--model_name_or_path", models / "student", "--method", "sft")
    error = one_line_error(*run("train", *data, "--use_vllm", "true", "--packing", "false"))
    assert "unknown option --use_vllm; rollout_engine vllm writes rollouts on vLLM here, see docs/vllm.md" in error


def test_unknown_keyword_arguments_are_named_with_what_to_use():
    with pytest.raises(TypeError, match=r"SwitchConfig got .*'lmbda' \(use on_policy_fraction\), 'zzz'"):
        switchkd.SwitchConfig(lmbda=0.5, zzz=1)
    with pytest.raises(TypeError, match=r"SwitchTrainer got .*'tokenizer' \(use processing_class\)"):
        switchkd.SwitchTrainer(model=build_gpt2(), tokenizer=build_tokenizer())


def test_a_name_that_is_like_none_gets_no_hint():
    """`model_revision` used to be told that the nearest one was `hub_revision`."""
    names = ["hub_revision", "method", "learning_rate", "max_completion_length"]
    assert similar_name("model_revision", names) is None and way_out("model_revision", names) == ""
    assert similar_name("metod", names) == "method" and similar_name("max_comp", names) == "max_completion_length"
    assert way_out("beta", []).startswith("use divergence") and way_out("lmbda", names) == ""


def test_values_that_change_nothing_are_told_from_those_that_do():
    assert changes_nothing("use_vllm", False) and not changes_nothing("use_vllm", True)
    assert changes_nothing("repetition_penalty", 1.0) and not changes_nothing("repetition_penalty", True)
    assert changes_nothing("vllm_server_timeout", 8000) and not changes_nothing("zzz", None)
    assert changes_nothing("min_p", None) and not changes_nothing("min_p", 0.1)


def test_the_page_has_every_name_of_the_tables():
    of_trl = list(OTHER_NAMES)[: list(OTHER_NAMES).index("student_model")]
    names = {*of_trl, *NOT_HERE, *(name for name in WITHOUT_MEANING if not name.startswith("vllm_"))} - {"teacher"}
    assert {name for name in names if f"`{name}" not in PAGE} == set()


def test_no_name_of_the_tables_is_an_option_here():
    from switchkd.commands.train_options import parser

    flags = {flag[2:] for flag in parser()._option_string_actions if flag.startswith("--")}
    assert flags & (OTHER_NAMES.keys() | WITHOUT_MEANING.keys() | NOT_HERE.keys()) == set()
    targets = {name for name in OTHER_NAMES.values() if " " not in name}
    assert targets - flags - {"processing_class", "max_samples", "teacher_model", "model"} == set()
