"""Options of loading as TRL has them: revisions, precision, attention, bits, remote code, tokenizers, templates."""

import json

import pytest
import torch
from datasets import Dataset
from helpers.command_line import one_line_error, train_options
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_llama, build_tokenizer

import switchkd
from switchkd.errors import UserError
from switchkd.models.loading import load_model, load_tokenizer, quantization

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if think %}<think>{% endif %}"
MESSAGES = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 4


@pytest.fixture
def asked(monkeypatch):
    """What `from_pretrained` of models and tokenizers was given."""
    seen = []
    for kind in ("AutoModelForCausalLM", "AutoTokenizer"):
        owner = getattr(__import__("switchkd.models.loading", fromlist=[kind]), kind)
        loads = owner.from_pretrained

        def watched(source, *args, _loads=loads, _kind=kind, **kwargs):
            seen.append((_kind, str(source), kwargs))
            return _loads(source, *args, **{name: value for name, value in kwargs.items() if name != "revision"})

        monkeypatch.setattr(owner, "from_pretrained", watched)
    return seen


def test_flags_of_loading_reach_both_models_and_both_tokenizers(run, models, tmp_path, asked):
    flags = ("--model_revision", "v1", "--teacher_model_revision", "v2", "--attn_implementation", "eager")
    more = ("--dtype", "bfloat16", "--tokenizer_kwargs", '{"clean_up_tokenization_spaces": false}')
    code, _, err = run(*train_options(models, tmp_path / "run", *flags, *more))
    assert code == 0, err
    for role, revision in (("student", "v1"), ("teacher", "v2")):
        [model] = [kwargs for kind, source, kwargs in asked if kind.endswith("LM") and source.endswith(role)]
        assert (model["revision"], model["dtype"], model["attn_implementation"]) == (revision, "bfloat16", "eager")
        [tokenizer] = [kwargs for kind, source, kwargs in asked if kind.endswith("er") and source.endswith(role)]
        assert tokenizer == {
            "revision": revision,
            "trust_remote_code": False,
            "clean_up_tokenization_spaces": False,
        }
        assert model["trust_remote_code"] is False
    # What is said in the keyword arguments wins.
    kwargs = ("--model_init_kwargs", '{"dtype": "float32"}', "--dtype", "bfloat16")
    asked.clear()
    assert run(*train_options(models, tmp_path / "other", *kwargs))[0] == 0
    assert {kwargs["dtype"] for kind, _, kwargs in asked if kind.endswith("LM")} == {"float32", "bfloat16"}


@pytest.mark.parametrize("command", ["rollout", "calibrate", "diagnose", "evaluate"])
def test_every_command_with_a_pair_takes_them(run, models, tmp_path, asked, command):
    flags = ["--model_revision", "v1", "--teacher_model_revision", "v2", "--attn_implementation", "eager"]
    data = ["--prompt", "a b"] if command == "rollout" else ["--dataset_name", models / "train.jsonl"]
    pair = ["--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher"]
    code, _, err = run(command, *pair, *data, *flags, "--max_completion_length", 4, "--output_dir", tmp_path / "run")
    assert code == 0, err
    given = {source.rpartition("/")[2]: kwargs for kind, source, kwargs in asked if kind.endswith("LM")}
    assert {name: kwargs["revision"] for name, kwargs in given.items()} == {"student": "v1", "teacher": "v2"}
    assert {kwargs["attn_implementation"] for kwargs in given.values()} == {"eager"}


# ---- remote code


@pytest.fixture
def planted(tmp_path):
    """A model folder with code of its own; reading it leaves a file."""
    folder = tmp_path / "planted"
    build_gpt2(seed=1).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    trace = tmp_path / "was_run"
    source = f"""import pathlib
from transformers import GPT2Config, GPT2LMHeadModel

pathlib.Path({str(trace)!r}).touch()


class Own(GPT2Config):
    model_type = "own-model"


class OwnLM(GPT2LMHeadModel):
    config_class = Own
"""
    (folder / "own.py").write_text(source)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}
    config["model_type"] = "own-model"
    (folder / "config.json").write_text(json.dumps(config))
    return folder, trace


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(planted, run):
    folder, trace = planted
    error = one_line_error(*run("rollout", "--policy", "student", "--model_name_or_path", folder, "--prompt", "a"))
    assert "cannot load" in error and "trust_remote_code" in error and not trace.exists()
    assert type(load_model(str(folder), {"trust_remote_code": True})).__name__ == "OwnLM" and trace.exists()


# ---- bits


def test_bits_without_an_adapter_or_twice_are_refused(run, models, tmp_path, monkeypatch):
    for flags, message in (
        (("--load_in_4bit",), "load_in_4bit trains an adapter only; add --use_peft"),
        (("--bnb_4bit_quant_type", "fp4"), "does nothing without load_in_4bit"),
        (("--load_in_8bit", "--use_peft", "--student_layers", "0"), "load_in_8bit needs a student that is loaded"),
    ):
        assert message in one_line_error(*run(*train_options(models, tmp_path / "run", *flags)))
    with pytest.raises(UserError, match="exclude each other"):
        quantization(in_4bit=True, in_8bit=True)
    monkeypatch.setattr("switchkd.models.loading.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"need bitsandbytes: pip install 'switchkd\[quantization\]'"):
        quantization(in_4bit=True, in_8bit=False)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_a_model_in_few_bits_learns_and_its_base_does_not(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig

    build_llama(seed=1, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "student")
    arguments = {
        "model": str(tmp_path / "student"),
        "teacher_model": build_llama(seed=2),
        "args": switchkd.SwitchConfig(
            output_dir=str(tmp_path / "run"), max_steps=2, use_cpu=True, logging_steps=1, max_completion_length=8,
            report_to="none", initial_threshold=0.3, learning_rate=1e-2, save_strategy="no", disable_tqdm=True,
        ),
        "train_dataset": Dataset.from_list(RAGGED_ROWS),
        "processing_class": build_tokenizer(),
        "quantization_config": quantization(in_4bit=bits == 4, in_8bit=bits == 8),
    }  # fmt: skip
    with pytest.raises(UserError, match="of which only an adapter can train: give peft_config"):
        switchkd.SwitchTrainer(**arguments)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = switchkd.SwitchTrainer(**arguments, peft_config=lora)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    base, adapter = layer.base_layer.weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()
    assert base.dtype in (torch.uint8, torch.int8)
    trainer.train()
    assert torch.equal(layer.base_layer.weight, base)
    assert not torch.equal(layer.lora_B["default"].weight, adapter)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits") / "teacher"
    build_llama(seed=2, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def taught_by(folder, make_trainer, kwargs):
    """A trainer after two steps and a checkpoint under the teacher of a folder, and the log of its steps."""
    options = {"initial_threshold": 0.42, "schedule": "constant", "learning_rate": 0.1}
    options |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "teacher_model_init_kwargs": kwargs}
    trainer = make_trainer(build_llama(), str(folder), **options)
    trainer.train()
    return trainer, [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.uint8), (8, torch.int8)])
def test_a_teacher_in_few_bits_writes_and_is_learned_from(teacher_folder, make_trainer, bits, dtype):
    """As `switchkd plan` advises it, on the command line too."""
    pytest.importorskip("bitsandbytes")
    trainer, logs = taught_by(teacher_folder, make_trainer, f'{{"quantization_config": {{"load_in_{bits}bit": true}}}}')
    assert trainer.teacher_model.model.layers[0].self_attn.q_proj.weight.dtype == dtype
    assert not any(parameter.requires_grad for parameter in trainer.teacher_model.parameters())
    _, plain = taught_by(teacher_folder, make_trainer, None)
    for log, other in zip(logs, plain, strict=True):
        assert 0.0 < log["rollout/teacher_share"] < 1.0
        assert log["loss"] == pytest.approx(other["loss"], rel=0.2) and log["loss"] != other["loss"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_leaves_a_model_in_few_bits_as_it_was(teacher_folder, bits):
    """On some CPUs its logits were others after a state_dict: the scales of 4 bits came back in another order."""
    pytest.importorskip("bitsandbytes")
    config = quantization(in_4bit=bits == 4, in_8bit=bits == 8)
    model, tokens = load_model(str(teacher_folder), {"quantization_config": config}), torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        before = model(tokens).logits
        model.state_dict()
        assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("last_layer", ["cpu", "disk"])
def test_a_teacher_that_is_spread_by_a_device_map_teaches_the_same(teacher_folder, make_trainer, tmp_path, last_layer):
    """Weights that lie elsewhere until their pass have no numbers: a checkpoint could not compare them."""
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places["model.layers.1"] = last_layer
    spread = {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}
    trainer, logs = taught_by(teacher_folder, make_trainer, spread if last_layer == "disk" else {"device_map": "auto"})
    assert next(trainer.teacher_model.model.layers[1].parameters()).is_meta == (last_layer == "disk")
    plain, others = taught_by(teacher_folder, make_trainer, None)
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in others], rel=1e-5)
    pairs = zip(trainer.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in pairs)


# ---- tokenizers and chat templates


def test_a_student_object_brings_the_tokenizer_of_the_folder_it_came_from(models, make_trainer):
    student = load_model(str(models / "student"))
    trainer = make_trainer(student, build_gpt2(seed=2), processing_class=None)
    assert trainer.processing_class.get_vocab() == build_tokenizer().get_vocab()
    with pytest.raises(UserError, match="give processing_class, the tokenizer"):
        make_trainer(build_gpt2(), build_gpt2(seed=2), processing_class=None)


def test_another_chat_template_and_what_it_reads_change_the_prompts(tmp_path, make_trainer):
    (tmp_path / "chat.jinja").write_text(CHAT)

    def first_prompt(**options):
        tokenizer = build_tokenizer()
        data = Dataset.from_list(MESSAGES)
        trainer = make_trainer(
            build_gpt2(), build_gpt2(seed=1), processing_class=tokenizer, train_dataset=data, **options
        )
        return tokenizer.decode(trainer.train_dataset[0]["prompt_ids"])

    path = str(tmp_path / "chat.jinja")
    assert first_prompt(chat_template_path=path) == "<user>hi"
    assert first_prompt(chat_template_path=path, chat_template_kwargs={"think": True}) == "<user>hi<think>"
    assert first_prompt(chat_template_path=path, chat_template_kwargs='{"think": true}') == "<user>hi<think>"
    other = build_tokenizer()
    other.chat_template = CHAT.replace("<", "[")
    other.save_pretrained(tmp_path / "other")
    assert first_prompt(chat_template_path=str(tmp_path / "other")) == "[user>hi"


def test_a_chat_template_that_cannot_be_read_is_one_line(tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "bare")
    for template, message in (
        (tmp_path / "missing.jinja", "chat_template_path: cannot read"),
        (tmp_path / "missing", "chat_template_path folder"),
        (tmp_path / "bare", "has no chat template"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path / "bare"), template=str(template))


def test_rollout_and_evaluate_take_the_template_too(run, models, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHAT)
    chat = ("--chat_template_path", tmp_path / "chat.jinja", "--chat_template_kwargs", '{"think": true}')
    student = ("--model_name_or_path", models / "student", "--max_completion_length", 4, "--json")
    code, out, err = run("rollout", *student, *chat, "--policy", "student", "--template", "chat", "--prompt", "hi")
    assert code == 0, err
    assert json.loads(out)["rollouts"][0]["prompt"] == "<user>hi<think>"
    wrong = ("--chat_template_kwargs", "[1]")
    assert "chat_template_kwargs must be a JSON object" in one_line_error(
        *run("rollout", *student, *wrong, "--prompt", "a", "--policy", "student")
    )
