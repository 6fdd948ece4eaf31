"""`switchkd train`: what it writes, how it goes on, what it refuses in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import Run, evaluate_options, one_line_error, rollout_options, train_options, write_rows
from helpers.tiny import TINY_VOCABULARY, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchkd.__main__ import main
from switchkd.cli.run_folder import LOCK, OWN_FILES, read_config
from switchkd.commands import rollout
from switchkd.divergences import LN_2
from switchkd.training.trainer import SwitchTrainer

# ---- train


def test_train_writes_the_model_and_what_it_did(models: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "run"
    code, out, err = run(*train_options(models, folder))
    assert code == 0, err
    assert "8 of 8 records kept" in out and "loss [nats/token]" in out and str(folder) in out
    assert "step 1/2: loss" in err and "step 2/2: loss" in err
    written = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "versions.json", "metrics.jsonl", "summary.json", "model.safetensors"} <= written
    own = (*OWN_FILES, LOCK)
    assert all(any(path.match(name) for name in own) for path in folder.iterdir() if path.is_file())
    versions = json.loads((folder / "versions.json").read_text())
    assert {"switchkd", "python", "torch", "transformers"} <= set(versions)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all({"rollout/teacher_share", "rollout/tokens_per_s"} <= set(row) for row in rows if "loss" in row)
    config = read_config(folder)
    assert config is not None and config["seed"] == 42 and config["max_completion_length"] == 8
    # Resolved: the method's own values stand there, not "null", and the threshold that was found.
    assert (config["divergence"], config["target_teacher_share"], config["horizon"]) == ("reverse_kl", 0.5, 8)
    assert config["initial_threshold"] == pytest.approx(LN_2)
    assert "warning: a teacher share of 50% was not reached: even at the largest threshold, ln 2 nats" in err
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (models / "student", folder))
    assert any(not torch.equal(*pair) for pair in zip(before.parameters(), after.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == build_tokenizer().get_vocab()


def test_json_keeps_standard_output_for_one_last_line(models: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run(*train_options(models, tmp_path / "run", "--json"))
    assert code == 0
    assert out.count("\n") == 1 and "loss [nats/token]" in err
    summary = json.loads(out)
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == {**saved, "output_dir": str(tmp_path / "run")}
    assert summary["steps"] == 2 and 0 <= summary["teacher_share"] <= 1 and summary["data"]["train"]["kept"] == 8


def test_a_written_config_starts_the_same_run_again(models: Path, tmp_path: Path, run: Run) -> None:
    steady = ["--draft_length", 4]  # "auto" follows the clock, and the last digits of a loss with it
    kwargs = ["--model_init_kwargs", '{"dtype": "float32"}']
    assert run(*train_options(models, tmp_path / "a", *kwargs, *steady))[0] == 0
    code, _, err = run("train", "--config", tmp_path / "a" / "config.yaml", "--output_dir", tmp_path / "b")
    assert code == 0, err
    first, second = (read_config(tmp_path / name) for name in "ab")
    assert first is not None and second is not None
    assert {name for name in first if first[name] != second[name]} == {"output_dir"}
    weights = [torch.load(tmp_path / name / "checkpoint-2" / "optimizer.pt") for name in "ab"]
    for one, other in zip(*(list(state["state"].values()) for state in weights), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])


def test_evaluation_data_give_an_evaluation_loss_at_the_end(models: Path, tmp_path: Path, run: Run) -> None:
    options = train_options(models, tmp_path / "run", "--eval_dataset_name", models / "train.jsonl", "--json")
    code, out, err = run(*options, "--max_eval_samples", 3, "--max_train_samples", 4, "--eval_rouge_l_samples", 2)
    assert code == 0, err
    summary = json.loads(out)
    assert 0 <= summary["eval_rouge_l"] <= 100 and "eval ROUGE-L" in err
    assert summary["eval_loss"] > 0 and summary["eval_cross_entropy"] > 0
    assert summary["data"]["eval"]["kept"] == 3 and summary["data"]["train"]["kept"] == 4


def test_a_run_goes_on_from_its_checkpoint(models: Path, tmp_path: Path, run: Run) -> None:
    constant = ["--lr_scheduler_type", "constant", "--draft_length", 4]  # "auto" follows the clock
    assert run(*train_options(models, tmp_path / "whole", "--max_steps", 4, *constant))[0] == 0
    assert run(*train_options(models, tmp_path / "parts", *constant))[0] == 0
    # A crash after the checkpoint leaves rows of steps that are made again.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": -1.0}\n')
    again = train_options(models, tmp_path / "parts", "--max_steps", 4, *constant, "--resume_from_checkpoint")
    code, _, err = run(*again)
    assert code == 0, err
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [row["step"] for row in parts if "loss" in row] == [1, 2, 3, 4]
    assert [row["loss"] for row in parts if "loss" in row] == [row["loss"] for row in whole if "loss" in row]


def test_another_run_is_not_resumed(models: Path, tmp_path: Path, run: Run) -> None:
    assert run(*train_options(models, tmp_path / "run"))[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for name, value in (("initial_threshold", 0.1), ("seed", 7), ("learning_rate", 1e-3)):
        options = train_options(models, tmp_path / "run", "--resume_from_checkpoint", "true", f"--{name}", value)
        assert f"the saved run has {name}=" in one_line_error(*run(*options))
    other = train_options(
        models, tmp_path / "run", "--resume_from_checkpoint", "--model_name_or_path", models / "llama"
    )
    assert "model_name_or_path" in one_line_error(*run(*other))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_checkpoint_elsewhere_goes_on_in_a_new_folder_only(models: Path, tmp_path: Path, run: Run) -> None:
    for name in ("a", "b"):
        assert run(*train_options(models, tmp_path / name))[0] == 0
    more = ["--max_steps", 3, "--resume_from_checkpoint", tmp_path / "a" / "checkpoint-2"]
    assert "holds another run" in one_line_error(*run(*train_options(models, tmp_path / "b", *more)))
    code, _, err = run(*train_options(models, tmp_path / "c", *more))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [3]
    assert "exclude each other" in one_line_error(
        *run(*train_options(models, tmp_path / "a", *more, "--overwrite_output_dir"))
    )


def test_resuming_without_a_checkpoint_is_refused(models: Path, tmp_path: Path, run: Run) -> None:
    for value in ([], ["true"], [tmp_path]):
        options = train_options(models, tmp_path / "run", "--resume_from_checkpoint", *value)
        assert "checkpoint" in one_line_error(*run(*options))


def test_overwriting_removes_the_runs_files_and_nothing_else(models: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "run"
    assert run(*train_options(models, folder))[0] == 0
    (folder / "notes.txt").write_text("mine")
    assert "holds another run" in one_line_error(*run(*train_options(models, folder)))
    failing = train_options(models, folder, "--overwrite_output_dir", "--initial_threshold", 3)
    one_line_error(*run(*failing))
    assert (folder / "checkpoint-2").is_dir()  # a run that cannot start has removed nothing
    options = train_options(models, folder, "--overwrite_output_dir", "--max_steps", 1)
    assert run(*options)[0] == 0
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "checkpoint-2").exists()
    assert "model_name_or_path" in one_line_error(
        *run(*train_options(models, folder, "--overwrite_output_dir", "--model_name_or_path", folder))
    )


def test_a_folder_of_something_else_is_never_touched(models: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "config.yaml").write_text("somebody: else\n")
    for more in ([], ["--overwrite_output_dir"]):
        assert "was not written by switchkd" in one_line_error(*run(*train_options(models, tmp_path, *more)))
    (tmp_path / "file").write_text("")
    assert "is a file" in one_line_error(*run(*train_options(models, tmp_path / "file")))
    assert "cannot be written" in one_line_error(*run(*train_options(models, tmp_path / "file" / "below")))


def test_interrupted_training_keeps_what_was_written(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_step = SwitchTrainer.training_step

    def step(self: SwitchTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return whole_step(self, *args, **kwargs)

    monkeypatch.setattr(SwitchTrainer, "training_step", step)
    code, _, err = run(*train_options(models, tmp_path / "run", "--max_steps", 4))
    assert code == 130
    assert "switchkd: stopped by SIGINT at step 2; continue with --resume_from_checkpoint true, from" in err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()
    monkeypatch.undo()
    code, _, err = run(*train_options(models, tmp_path / "run", "--max_steps", 4, "--resume_from_checkpoint"))
    assert code == 0, err


def test_lora_trains_an_adapter_that_evaluate_reads(models: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("peft")
    lora = ["--use_peft", "--lora_r", 2, "--lora_target_modules", "c_attn"]
    code, out, err = run(*train_options(models, tmp_path / "run", *lora))
    assert code == 0, err
    assert "of them trained" in out
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"] == 2
    code, out, err = run(*evaluate_options(models, tmp_path / "run", tmp_path / "scores", "--json"))
    assert code == 0, err
    bad = train_options(models, tmp_path / "bad", "--use_peft", "--lora_target_modules", "nothing")
    assert "nothing" in one_line_error(*run(*bad))


# ---- students from scratch


def test_student_from_the_teachers_layers(models: Path, tmp_path: Path, run: Run) -> None:
    frozen = ["--learning_rate", 0, "--max_steps", 1, "--student_layers", "0,-1"]
    options = train_options(models, tmp_path / "run", *frozen)
    del options[1:3]  # no student of its own
    options[options.index("--teacher_model_name_or_path") + 1] = models / "llama"
    code, out, err = run(*options)
    assert code == 0, err
    assert "llama, 2 layers" in out
    small, big = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "run", models / "llama"))
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, big.model.layers[2].mlp.up_proj.weight)
    assert torch.equal(small.model.embed_tokens.weight, big.model.embed_tokens.weight)


def test_taking_every_layer_gives_the_same_model(models: Path) -> None:
    from switchkd.models.untrained import student_from_layers

    ids = torch.arange(1, 9).unsqueeze(0)
    for name in ("llama", "teacher"):
        copy = student_from_layers(str(models / name), [0, 1, 2]).eval()
        whole = AutoModelForCausalLM.from_pretrained(models / name)
        assert torch.equal(copy(ids).logits, whole(ids).logits)


def test_a_new_model_takes_vocabulary_and_ends_from_the_tokenizer(models: Path, tmp_path: Path, run: Run) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
    options = ["train", "--method", "sft", "--student_config", json.dumps(config), "--use_cpu", "--max_steps", 1]
    options += ["--tokenizer_name_or_path", models / "tokenizer", "--dataset_name", models / "train.jsonl"]
    options += ["--max_completion_length", 8, "--seed", 3]
    for name in ("a", "b"):
        code, _, err = run(*options, "--output_dir", tmp_path / name)
        assert code == 0, err
    model, same = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert model.config.vocab_size == len(TINY_VOCABULARY)
    assert model.config.eos_token_id == model.config.pad_token_id == build_tokenizer().eos_token_id
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_smaller_student_follows_the_teachers_configuration(models: Path, tmp_path: Path, run: Run) -> None:
    options = train_options(models, tmp_path / "run", "--student_config", '{"n_layer": 1, "n_embd": 16}')
    del options[1:3]
    code, _, err = run(*options)
    assert code == 0, err
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert (config.n_layer, config.n_embd, config.n_head) == (1, 16, 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"n_layers": 2}', "gpt2 has no option 'n_layers'; the nearest is 'n_layer'"),
        ('{"model_type": "gtp2"}', "no model_type 'gtp2'; the nearest is 'gpt2'"),
        ('{"n_embd": 30}', "student_config is not a valid configuration"),
        ('{"n_layer": "two"}', "student_config is not a valid configuration"),
        ("{n_layer: 2}", "student_config must be a JSON object"),
        ("[2]", "student_config must be a JSON object"),
    ],
)
def test_wrong_student_configurations_are_one_line(
    models: Path, tmp_path: Path, run: Run, value: str, message: str
) -> None:
    assert message in one_line_error(*run(*train_options(models, tmp_path / "run", "--student_config", value)))


# ---- bad input: one clear line, exit code 2, nothing lost


def bad_data(folder: Path, kind: str) -> list[Any]:
    """The options that make a good run bad, and write the files they need."""
    path = folder / "bad.jsonl"
    if kind == "missing file":
        return ["--dataset_name", folder / "nothing.jsonl"]
    if kind == "malformed line":
        path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    elif kind == "unknown columns":
        write_rows(path, [{"question": "a", "reply": "b"}])
    elif kind == "nothing within the limit":
        write_rows(path, [{"prompt": "abcdef", "completion": "b"}])
        return ["--dataset_name", path, "--max_prompt_length", 3]
    elif kind == "prompt longer than the context":
        write_rows(path, [{"prompt": "a" * 125, "completion": "b"}])
    elif kind == "no records":
        path.write_text("")
    elif kind == "no answers":
        write_rows(path, [{"prompt": "a"}])
        return ["--dataset_name", path, "--method", "kd"]
    return ["--dataset_name", path]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing file", "no file or folder"),
        ("malformed line", "bad.jsonl, line 2: malformed JSON"),
        ("unknown columns", "unknown columns (question, reply)"),
        ("nothing within the limit", "all 1 prompts are longer than max_prompt_length=3"),
        ("prompt longer than the context", "exceed the student's context of 128 tokens"),
        ("no records", "is empty"),
        ("no answers", "reads dataset answers"),
    ],
)
def test_bad_data_are_one_line(models: Path, tmp_path: Path, run: Run, kind: str, message: str) -> None:
    assert message in one_line_error(*run(*train_options(models, tmp_path / "run", *bad_data(tmp_path, kind))))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--initial_threshold", "0.7"], "initial_threshold must lie in [0, ln 2"),
        (["--final_ratio", "0"], "final_ratio must lie in (0, 1]"),
        (["--schedule", "steps"], "schedule must be one of exponential, linear, constant, increasing"),
        (["--method", "swich"], "unknown method 'swich'; did you mean 'switch'?"),
        (["--divergence", "kl"], "unknown divergence 'kl'"),
        (["--method", "sft", "--final_ratio", "0.5"], "final_ratio=0.5 does nothing with method 'sft'"),
        (["--lora_r", "4"], "lora_r does nothing without use_peft"),
        (["--student_layers", "0", "--student_config", "{}"], "give only one"),
        (["--student_layers", "9"], "has layers 0 to 1, not 9"),
        (["--student_layers", "first"], "student_layers must be integers"),
        (["--eval_strategy", "steps"], "eval_strategy=steps needs --eval_dataset_name"),
        (["--dataset_test_split", "test"], "which has only one split"),
        (["--max_train_samples", "0"], "max_train_samples must be >= 1"),
        (["--model_init_kwargs", "{dtype: 1}"], "model_init_kwargs must be a JSON object"),
        (["--report_to", "nowhere"], "nowhere is not supported"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be >= 1"),
        (["--max_steps", "0"], "nothing to train"),
        (["--model_name_or_path", "./missing"], "./missing does not exist"),
    ],
)
def test_bad_options_are_one_line(models: Path, tmp_path: Path, run: Run, more: list[str], message: str) -> None:
    assert message in one_line_error(*run(*train_options(models, tmp_path / "run", *more)))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_missing_essentials_are_named(models: Path, run: Run) -> None:
    data = ["--dataset_name", models / "train.jsonl"]
    assert "--dataset_name" in one_line_error(*run("train"))
    assert "--model_name_or_path" in one_line_error(*run("train", *data))
    assert "layers from" in one_line_error(*run("train", *data, "--student_layers", 0))
    assert "--tokenizer_name_or_path" in one_line_error(*run("train", *data, "--student_config", "{}"))
    student = ["--model_name_or_path", models / "student", "--use_cpu"]
    assert "needs a teacher" in one_line_error(*run("train", *data, *student, "--max_completion_length", 8))
    assert "--dataset_name" in one_line_error(*run("evaluate", "--model_name_or_path", models / "student"))
    assert "--model_name_or_path" in one_line_error(*run("rollout", "--prompt", "a"))


def test_different_tokenizers_are_refused_with_the_first_ids(models: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(models / "teacher", tmp_path / "teacher")
    shuffled = [*TINY_VOCABULARY[:5], *TINY_VOCABULARY[6:-1], TINY_VOCABULARY[5], TINY_VOCABULARY[-1]]
    build_tokenizer(shuffled).save_pretrained(tmp_path / "teacher")
    other = ["--teacher_model_name_or_path", tmp_path / "teacher"]
    for options in (
        train_options(models, tmp_path / "run", *other),
        rollout_options(models, "--prompt", "a", *other),
    ):
        assert "different tokenizers" in (error := one_line_error(*run(*options))) and "first 5 (" in error


def test_no_end_of_sequence_anywhere_is_refused(models: Path, tmp_path: Path, run: Run) -> None:
    for name in ("student", "teacher"):
        shutil.copytree(models / name, tmp_path / name)
        for file, keys in (
            ("config.json", ("eos_token_id", "bos_token_id", "pad_token_id")),
            ("generation_config.json", ("eos_token_id", "bos_token_id", "pad_token_id")),
            ("tokenizer_config.json", ("eos_token", "pad_token")),
        ):
            content = json.loads((tmp_path / name / file).read_text())
            (tmp_path / name / file).write_text(json.dumps({**content, **dict.fromkeys(keys)}))
    names = ["--model_name_or_path", tmp_path / "student", "--teacher_model_name_or_path", tmp_path / "teacher"]
    for options in (
        train_options(models, tmp_path / "run", *names),
        rollout_options(models, "--prompt", "a", *names),
    ):
        assert "no end-of-sequence token" in one_line_error(*run(*options))


def test_a_bug_keeps_its_traceback(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rollout, "make_policy", broken)
    with pytest.raises(ZeroDivisionError):
        main([str(option) for option in rollout_options(models, "--prompt", "a")])
