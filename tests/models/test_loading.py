"""Laws of loading: every weight comes from the file that was named, or one line says which does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.tiny import build_gpt2, build_llama, build_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from switchkd.__main__ import main
from switchkd.errors import UserError
from switchkd.models.loading import load_model
from switchkd.training.config import SwitchConfig
from switchkd.training.trainer import SwitchTrainer

Tensors = dict[str, torch.Tensor]
LAST_LAYER = "model.layers.1."


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def rewritten(folder: Path, change: Callable[[Tensors], Tensors], file: str = "model.safetensors") -> Path:
    """Put other tensors into a saved folder."""
    save_file(change(load_file(folder / file)), folder / file, {"format": "pt"})
    return folder


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(names)}


def renamed(tensors: Tensors) -> Tensors:
    return {f"other.{name}": value for name, value in tensors.items()}


def with_config(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def refused(name: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(name), **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_file_loads_and_gives_what_was_saved(make_model, tmp_path):
    model = make_model(seed=3)
    loaded = load_model(str(saved(tmp_path / "m", model)))
    ids = torch.arange(1, 9).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm"), "1 tensor (model.norm.weight) which the file lacks"),
        (without("lm_head"), "1 tensor (lm_head.weight) which the file lacks"),
        (without(LAST_LAYER), f"9 tensors ({LAST_LAYER}input_layernorm.weight, {LAST_LAYER}mlp.down_proj.weight, "),
        (renamed, "21 tensors (lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm.weight, ...)"),
        (lambda tensors: tensors | {"extra.weight": torch.ones(2)}, "1 tensor (extra.weight) which the file has and"),
        (
            lambda tensors: tensors | {"lm_head.weight": torch.ones(7, 32)},
            "1 tensor (lm_head.weight) which the file has in another shape",
        ),
    ],
)
def test_a_file_that_does_not_fill_the_model_is_not_loaded_with_random_weights(tmp_path, change, message):
    error = refused(rewritten(saved(tmp_path / "m", build_llama()), change), role="teacher")
    assert error.startswith("cannot load teacher ") and message in error
    assert "copy both again" in error


def test_fewer_layers_than_the_config_says_are_refused(tmp_path):
    folder = with_config(saved(tmp_path / "m", build_gpt2()), n_layer=3)
    assert "12 tensors (transformer.h.2.attn.c_attn.bias, " in refused(folder)


def test_more_layers_than_the_config_says_are_refused(tmp_path):
    folder = with_config(saved(tmp_path / "m", build_gpt2()), n_layer=1)
    assert "which the file has and the model has not" in refused(folder)


def test_a_tied_head_is_not_missing_but_its_embedding_is(tmp_path):
    folder = saved(tmp_path / "m", build_gpt2())
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_model(str(folder))
    assert "1 tensor (transformer.wte.weight) which the file lacks" in refused(
        rewritten(folder, without("transformer.wte"))
    )


def test_stored_masks_of_old_checkpoints_are_no_strangers(tmp_path):
    """gpt2 and the TinyStories models of the hub hold the causal mask of every layer."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=98, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    masks = {
        f"transformer.h.{layer}.attn.attention.{name}": torch.ones(1)
        for layer in (0, 1)
        for name in ("bias", "masked_bias")
    }
    load_model(str(rewritten(saved(tmp_path / "m", GPTNeoForCausalLM(config)), lambda tensors: tensors | masks)))


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: data[:50], lambda data: b"", lambda data: b"\xff" * 500],
    ids=["cut", "cut in the header", "empty", "garbage"],
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_damaged_weight_files_are_one_line(tmp_path, damage, kind):
    folder = saved(tmp_path / "m", build_gpt2())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]).write_bytes(damage(data))
    error = refused(folder, init_kwargs={"use_safetensors": None})
    assert "damaged" in error and "copy or download it again" in error


@pytest.fixture
def holed(tmp_path: Path) -> dict[str, Path]:
    """A whole model, and one whose file lacks the last norm."""
    return {
        "whole": saved(tmp_path / "whole", build_gpt2()),
        "holed": rewritten(saved(tmp_path / "holed", build_gpt2(seed=1)), without("transformer.ln_f")),
    }


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_trainer_refuses_a_holed_model_given_as_a_path(holed, tmp_path, role):
    paths = {"student": "whole", "teacher": "whole", role: "holed"}
    with pytest.raises(UserError, match=rf"cannot load {role} .*transformer\.ln_f\.bias, transformer\.ln_f\.weight"):
        SwitchTrainer(
            model=str(holed[paths["student"]]),
            teacher_model=str(holed[paths["teacher"]]),
            args=SwitchConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b"}]),
        )


@pytest.mark.parametrize("role", ["model", "teacher_model"])
@pytest.mark.parametrize("command", ["evaluate", "calibrate", "rollout"])
def test_commands_end_in_one_line_for_a_holed_model(holed, tmp_path, capsys, command, role):
    names = {"model": "whole", "teacher_model": "whole", role: "holed"}
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    options = [command, "--output_dir", str(tmp_path / "run"), "--dataset_name", str(tmp_path / "data.jsonl")]
    for name, folder in names.items():
        options += [f"--{name}_name_or_path", str(holed[folder])]
    options += ["--max_completion_length", "4"]
    assert main(options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("switchkd: error: cannot load ") and "transformer.ln_f.weight" in error


# ---- pickled weights


def pickled(folder: Path, file: str = "model.safetensors", to: str = "pytorch_model.bin") -> Path:
    torch.save(load_file(folder / file), folder / to)
    (folder / file).unlink()
    return folder


def test_pickled_weights_are_refused_unless_asked_for(tmp_path):
    model = build_llama(seed=3)
    folder = pickled(saved(tmp_path / "m", model))
    assert "has no weights in safetensors. Pickled ones (.bin, .pt) can run code" in refused(folder)
    assert "set allow_pickled_weights if you trust their source" in refused(folder)
    ids = torch.arange(1, 9).unsqueeze(0)
    assert torch.equal(load_model(str(folder), {"use_safetensors": None})(ids).logits, model(ids).logits)
    (folder / "pytorch_model.bin").unlink()
    assert "no file named model.safetensors" in refused(folder)  # nothing is there


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_commands_refuse_pickled_weights_and_take_them_when_told(models, tmp_path, run, role):
    folder = pickled(Path(shutil.copytree(models / role, tmp_path / role)))
    pair = {"student": models / "student", "teacher": models / "teacher", role: folder}
    words = ["--model_name_or_path", pair["student"], "--teacher_model_name_or_path", pair["teacher"]]
    short = ["--max_completion_length", 4]
    calls = {
        "rollout": ["--prompt", "a", "--output_dir", tmp_path / "rollout"],
        "train": [
            "--dataset_name",
            models / "train.jsonl",
            "--max_steps",
            1,
            "--use_cpu",
            "--output_dir",
            tmp_path / "run",
        ],
    }
    for command, more in calls.items():
        code, out, err = run(command, *words, *short, *more)
        assert (code, out) == (2, "") and "no weights in safetensors" in err.splitlines()[-1]
        code, _, err = run(command, *words, *short, *more, "--allow_pickled_weights")
        assert code == 0, err


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("allowed", [False, True])
def test_code_in_pickled_weights_is_never_run(tmp_path, allowed):
    folder, trace = pickled(saved(tmp_path / "m", build_gpt2())), tmp_path / "was_run"
    torch.save({"transformer.wte.weight": Planted(trace)}, folder / "pytorch_model.bin")
    refused(folder, init_kwargs={"use_safetensors": None} if allowed else {})
    assert not trace.exists()


# ---- adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA folder whose numbers are not those of a fresh one, beside its base."""
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base", build_llama())
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    build_tokenizer().save_pretrained(tmp_path / "adapter")
    torch.save(model.eval()(torch.arange(1, 9).unsqueeze(0)).logits, tmp_path / "logits.pt")
    return tmp_path / "adapter"


def test_an_adapter_folder_gives_what_was_saved(adapter):
    loaded = load_model(str(adapter))
    logits = torch.load(adapter.parent / "logits.pt")
    assert torch.equal(loaded(torch.arange(1, 9).unsqueeze(0)).logits, logits)


def test_an_adapter_beside_the_weights_of_its_base_gives_what_was_saved(adapter):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(adapter.parent / "base" / file, adapter / file)
    shutil.rmtree(adapter.parent / "base")
    logits = torch.load(adapter.parent / "logits.pt")
    assert torch.equal(load_model(str(adapter))(torch.arange(1, 9).unsqueeze(0)).logits, logits)
    rewritten(adapter, without("model.norm"))
    assert "model.norm.weight" in refused(adapter)


def test_a_pickled_adapter_is_refused_unless_asked_for(adapter):
    pickled(adapter, "adapter_model.safetensors", "adapter_model.bin")
    message = refused(adapter)
    assert "cannot load adapter" in message and "has no weights in safetensors" in message
    logits = torch.load(adapter.parent / "logits.pt")
    assert torch.equal(load_model(str(adapter), {"use_safetensors": None})(torch.arange(1, 9)[None]).logits, logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("base_model.model.model.layers.1"), "2 tensors (model.layers.1.self_attn.q_proj.lora_A.default"),
        (without("base_model.model.lm_head"), "1 tensor (lm_head.modules_to_save.default.weight) which the file lacks"),
        (renamed, "which the file has and the model has not"),
        (lambda tensors: {name: value[:1].clone() for name, value in tensors.items()}, "in another shape"),
    ],
)
def test_adapter_tensors_that_do_not_fit_are_not_ignored(adapter, change, message):
    error = refused(rewritten(adapter, change, "adapter_model.safetensors"))
    assert error.startswith("cannot load adapter ") and message in error


def test_damaged_and_absent_adapter_weights_are_one_line(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "damaged" in refused(adapter)
    file.unlink()
    assert refused(adapter).startswith("cannot load adapter ")


def test_a_base_with_a_hole_under_an_adapter_is_refused(adapter):
    rewritten(adapter.parent / "base", without("model.norm"))
    error = refused(adapter, role="student")
    assert "base model of adapter" in error and "model.norm.weight" in error


def test_an_adapter_whose_base_moved_names_the_base(adapter):
    base = adapter.parent / "base"
    base.rename(adapter.parent / "elsewhere")
    error = refused(adapter, role="student")
    assert error.startswith(f"adapter '{adapter}' names base '{base}', which cannot be found")
    assert "base_model_name_or_path of its adapter_config.json" in error
