"""The model card: what it says is what happened, it loads as one, and it gives nothing away."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetInfo
from helpers.command_line import train_options, write_rows
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_trainer
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, pipeline

from switchkd import METHODS
from switchkd.__main__ import main
from switchkd.training.card import Origin, citation, hub_id

METHOD_PAGES = Path(__file__).parents[2] / "docs" / "methods"


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Two runs of the command line: all weights, and an adapter."""
    home = tmp_path_factory.mktemp("cards")
    write_rows(home / "long.jsonl", [*RAGGED_ROWS, {"prompt": "x" * 40, "completion": "y"}])
    more = ["--dataset_name", home / "long.jsonl", "--max_prompt_length", 30, "--target_teacher_share", 0.5]
    scored = ["--eval_dataset_name", models / "train.jsonl", "--eval_strategy", "steps", "--eval_steps", 1]
    for name, options in {
        "all": [*more, *scored, "--eval_rouge_l_samples", 2],
        "lora": ["--use_peft", "--lora_r", 4],
    }.items():
        assert main([str(word) for word in train_options(models, home / name, *options)]) == 0
    return home


@pytest.mark.parametrize("name", ["all", "lora"])
def test_a_saved_folder_is_a_model_a_pipeline_and_a_card(folders, name):
    card = ModelCard.load(folders / name / "README.md")
    assert card.data.library_name == ("peft" if name == "lora" else "transformers")
    assert {"switchkd", "switch"} <= set(card.data.tags) and ("lora" in card.data.tags) == (name == "lora")
    assert card.data.base_model is None and card.data.datasets is None  # both are paths, not hub ids
    assert AutoModelForCausalLM.from_pretrained(folders / name).num_parameters() > 0
    written = pipeline("text-generation", model=str(folders / name))("Q?", max_new_tokens=4)
    assert written[0]["generated_text"].startswith("Q?")


def test_the_card_says_what_happened(folders, models):
    text = (folders / "all" / "README.md").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in (folders / "all" / "metrics.jsonl").read_text().splitlines()]
    rollouts = [row for row in metrics if "rollout/teacher_share" in row]
    assert f"`{models / 'student'}`" in text and f"`{models / 'teacher'}`" in text
    assert "| prompt + completion | 8 | 1 | " in text  # kept, dropped
    assert "`reverse_kl`" in text and METHODS["switch"].summary in text
    assert f"{rollouts[-1]['rollout/initial_threshold_nats']:.4g} nats at the end" in text
    assert f"{rollouts[-1]['rollout/teacher_share']:.1%} at the last" in text
    last = [row for row in metrics if "eval_loss" in row][-1]
    assert f"| loss [nats/token] | {last['eval_loss']:.4g} |" in text
    assert (
        f"| ROUGE-L | {last['eval_rouge_l']:.4g} | evaluation data | 2 prompts, sampled with decoding seed 42 |" in text
    )
    changed = re.findall(r"^\| `(\w+)` \| `(.*)` \|$", text, flags=re.MULTILINE)
    assert dict(changed) == {
        **{"max_steps": "2", "per_device_train_batch_size": "4", "max_completion_length": "8"},
        **{"target_teacher_share": "0.5", "max_prompt_length": "30", "eval_rouge_l_samples": "2"},
        **{"eval_strategy": "steps", "eval_steps": "1"},
    }
    for package in ("switchkd", "torch", "transformers", "peft"):
        assert re.search(rf"\b{package} \d", text)
    assert "@inproceedings{koo2025switch" in text and "@software{switchkd" in text


def test_the_command_of_a_card_makes_the_same_student_again(folders, tmp_path, run):
    text = (folders / "lora" / "README.md").read_text(encoding="utf-8")
    command = re.search(r"```bash\n(switchkd train.*?)\n```", text, flags=re.DOTALL)[1].replace("\\\n", " ").split()[1:]
    code, _, error = run(*command, "--output_dir", tmp_path / "again", "--use_cpu", "--save_strategy", "no")
    assert code == 0, error
    before, after = (path / "adapter_model.safetensors" for path in (folders / "lora", tmp_path / "again"))
    assert before.stat().st_size == after.stat().st_size
    again = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert again.partition("## Run it again")[2] == text.partition("## Run it again")[2]


def test_a_student_of_random_weights_is_not_said_to_be_a_model_that_was_tuned(models, tmp_path, run, monkeypatch):
    monkeypatch.setattr("switchkd.training.card.hub_id", lambda name: name and "org/" + Path(name).name)
    for name, options in {"new": ["--student_config", '{"n_embd": 8}'], "cut": ["--student_layers", "0"]}.items():
        folder = tmp_path / name
        assert run(*train_options(models, folder, *options, "--save_strategy", "no", "--max_steps", 1))[0] == 0
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model == (None if name == "new" else "org/student")
        made = f'random weights, the configuration of {models / "student"} with {{"n_embd": 8}}'
        assert f"| {made if name == 'new' else 'layers 0'} |" in card.text
        assert shlex.join(options) in card.text


def test_use_cache_was_saved_as_false_because_training_switches_it_off(folders, tmp_path):
    for folder, wanted in ((folders / "all", True), (folders / "all" / "checkpoint-2", True)):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is wanted
    trainer = build_trainer(tmp_path / "off", build_gpt2(use_cache=False), method="sft")
    trainer.save_model()
    assert json.loads((tmp_path / "off" / "config.json").read_text())["use_cache"] is False


def test_checkpoints_have_no_card_of_ours(folders):
    assert not (folders / "all" / "checkpoint-2" / "README.md").exists()


@pytest.fixture
def trainer(tmp_path):
    """One that has not trained, with secrets where users put them."""
    kwargs = {"token": "hf_abcdefghijklmnopqrstuv", "revision": "main"}
    return build_trainer(
        tmp_path / "run",
        build_gpt2(seed=1),
        build_gpt2(seed=2),
        method="gkd",
        model_init_kwargs=kwargs,
        hub_token="hf_zyxwvutsrqponmlkjihgfe",
        run_name="my hf_qqqqqqqqqqqqqqqqqqqq run",
    )


def test_a_card_gives_no_secret_away(trainer, tmp_path):
    trainer.origin = Origin("gpt2", "gpt2-xl", "me/data", command="switchkd train --model_init_kwargs hf_" + "a" * 20)
    trainer.save_model()
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "hf_" not in text and '`{"token": "***", "revision": "main"}`' in text
    assert str(tmp_path) not in text  # nobody gave this path to anything but output_dir


def test_a_token_in_the_options_of_a_model_stood_in_config_yaml_which_is_pushed_too(models, tmp_path, run):
    kwargs = json.dumps({"token": "hf_abcdefghijklmnopqrstuv"})
    options = train_options(models, tmp_path / "run", "--model_init_kwargs", kwargs)
    assert run(*options)[0] == 0
    for path in (tmp_path / "run").glob("*.*"):
        if path.suffix in (".yaml", ".json", ".jsonl", ".md"):
            assert "hf_abc" not in path.read_text(encoding="utf-8"), path
    # The checkpoint belongs to the same options all the same.
    code, _, error = run(*options, "--resume_from_checkpoint", "true", "--max_steps", 3)
    assert code == 0, error


def test_hub_ids_become_metadata_and_arguments_of_create_model_card_win(trainer, tmp_path):
    trainer.origin = Origin("org/student", "org/teacher", "org/data")
    trainer.save_model()
    data = ModelCard.load(tmp_path / "run" / "README.md").data
    assert (data.base_model, data.datasets) == ("org/student", ["org/data"])
    trainer.create_model_card(
        language="en", license="mit", tags="mine", model_name="Little one", finetuned_from="org/other",
        tasks=["text2text-generation"], dataset_tags=["org/one"], dataset=["One"], dataset_args=["main"],
    )  # fmt: skip
    card = ModelCard.load(tmp_path / "run" / "README.md")
    found = card.data
    assert (found.language, found.license, found.base_model) == ("en", "mit", "org/other")
    assert (found.pipeline_tag, found.datasets) == ("text2text-generation", ["org/one"])
    assert "mine" in found.tags and "# Little one" in card.text and "`One main`" in card.text
    trainer.create_model_card(dataset_name="org/trl")
    after = ModelCard.load(tmp_path / "run" / "README.md").data
    assert after.datasets == ["org/trl"] and "mine" in after.tags  # tags stay, as with transformers


def test_a_readme_that_no_program_generated_stays(trainer, tmp_path, caplog):
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "README.md").write_text("# My project\n", encoding="utf-8")
    trainer.save_model()
    trainer.create_model_card()
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8") == "# My project\n"
    assert "was not generated; it stays" in caplog.text
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert "# elsewhere" in (tmp_path / "elsewhere" / "README.md").read_text(encoding="utf-8")


def test_push_to_hub_uploads_the_card(trainer, tmp_path, monkeypatch):
    uploaded = {}

    def upload_folder(**options):
        uploaded["card"] = (Path(options["folder_path"]) / "README.md").read_text(encoding="utf-8")
        uploaded["repo_id"] = options["repo_id"]

    hub = SimpleNamespace(upload_folder=upload_folder)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer.hub_model_id = trainer.args.hub_model_id = "me/little-student"
    trainer.push_to_hub(dataset="org/data", tags=["pushed"])
    card = ModelCard(uploaded["card"])
    assert uploaded["repo_id"] == "me/little-student" and 'model="me/little-student"' in card.text
    assert card.data.datasets == ["org/data"] and "pushed" in card.data.tags and "# little-student" in card.text


def test_where_a_data_set_came_from_is_read_from_what_the_hub_gave():
    source = {"hf://datasets/org/dolly@0123abcd/data/train-00000.parquet": {"num_bytes": 1, "checksum": None}}
    data = Dataset.from_list(RAGGED_ROWS, info=DatasetInfo(download_checksums=source))
    assert Origin.of("gpt2", build_gpt2(), data) == Origin("gpt2", None, "org/dolly")
    assert Origin.of(None, None, RAGGED_ROWS) == Origin()


@pytest.mark.parametrize(
    ("name", "is_hub_id"),
    [("gpt2", True), ("org/model-1.3B", True), ("./gpt2", False), ("/a/b", False), ("a/b/c", False),
     ("train.jsonl", False), (None, False), ("tests/training", False)],
)  # fmt: skip
def test_a_path_is_not_taken_for_a_hub_id(name, is_hub_id, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert hub_id(name) == (name if is_hub_id else None)


@pytest.mark.parametrize("name", METHODS)
def test_the_papers_of_a_method_are_cited_with_the_titles_of_its_page(name):
    source, text = METHODS[name].source, citation(METHODS[name])
    cited = set(re.findall(r"eprint = \{(.*)\}", text))
    assert cited == set(re.findall(r"\d{4}\.\d{5}", source))
    assert text.count("@software{switchkd") == 1
    pages = [re.sub(r"\s+", " ", page.read_text(encoding="utf-8")) for page in METHOD_PAGES.glob("*.md")]
    for title, number in re.findall(r"title = \{(.*)\},(?:.*\n)+?  eprint = \{(.*)\}", text):
        assert any(number in page and title.partition(":")[0] in page for page in pages), title
