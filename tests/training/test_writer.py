"""Who writes for the student: itself on a CPU in float32, a copy elsewhere; a copy is never trained."""

import pytest
import torch
from helpers.tiny import build_gpt2, build_llama
from helpers.training import watch_batches

from switchkd.errors import UserError
from switchkd.training import text
from switchkd.training.writer import Writer

MIDDLE = {"initial_threshold": 0.42, "schedule": "constant", "draft_length": "3"}


def lora(**options):
    peft = pytest.importorskip("peft")
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 32, "init_lora_weights": False} | options
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def writers(trainer, monkeypatch):
    """Train and return every model that wrote, with whether autocast held."""
    seen = []
    original = text.roll_out
    monkeypatch.setattr(
        text,
        "roll_out",
        lambda student, *args, **kwargs: (
            seen.append((student, torch.is_autocast_enabled("cpu"))),
            original(student, *args, **kwargs),
        )[1],
    )
    trainer.train()
    return seen


def test_float32_on_a_cpu_writes_with_the_student_itself(make_trainer, monkeypatch):
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), **MIDDLE, max_steps=2)
    assert all(model is trainer.model for model, _ in writers(trainer, monkeypatch))
    assert trainer.writer.copy is None


@pytest.mark.parametrize(
    ("options", "dtype", "why"),
    [
        ({"bf16": True}, torch.bfloat16, "it trains under autocast"),
        ({"rollout_dtype": "bfloat16"}, torch.bfloat16, "rollout_dtype is bfloat16"),
        ({"rollout_copy": "always"}, torch.float32, "rollout_copy is always"),
        ({"bf16": True, "rollout_dtype": "float32"}, torch.float32, "it trains under autocast"),
    ],
)
def test_copy_writes_where_it_is_needed_and_is_told(make_trainer, monkeypatch, caplog, options, dtype, why):
    caplog.set_level("INFO", "switchkd")
    trainer = make_trainer(build_llama(), build_llama(seed=1), **MIDDLE, **options, max_steps=2, learning_rate=0.1)
    seen = writers(trainer, monkeypatch)
    assert {id(model) for model, _ in seen} == {id(trainer.writer.copy.model)}
    assert not any(autocast for _, autocast in seen)  # the short forward does not serve autocast
    assert {parameter.dtype for parameter in trainer.writer.copy.model.parameters()} == {dtype}
    lines = [record.getMessage() for record in caplog.records if "a copy of the student" in record.getMessage()]
    assert len(lines) == 1 and f"{trainer.writer.copy.nbytes:,} bytes" in lines[0] and why in lines[0]


def test_copy_of_the_same_precision_writes_the_same_text(make_trainer):
    texts = []
    for copies in ("never", "always"):
        trainer = make_trainer(build_llama(), build_llama(seed=1), **MIDDLE, rollout_copy=copies, max_steps=3)
        seen = watch_batches(trainer)
        trainer.train()
        texts.append([inputs["input_ids"].tolist() for inputs, _ in seen])
    assert texts[0] == texts[1] and texts[0][0] != texts[0][2]


def test_adapters_are_merged_for_writing_and_the_text_is_that_of_the_module(make_trainer):
    texts = []
    for copies in ("never", "auto"):
        torch.manual_seed(0)
        trainer = make_trainer(
            build_llama(), build_llama(seed=1), **MIDDLE, rollout_copy=copies, peft_config=lora(), max_steps=2
        )
        seen = watch_batches(trainer)
        trainer.train()
        texts.append([inputs["input_ids"].tolist() for inputs, _ in seen])
        assert (trainer.writer.copy is not None) == (copies == "auto")
    assert texts[0] == texts[1]


def test_rollout_of_a_step_uses_the_weights_of_that_step(make_trainer):
    """Stale: a copy renewed at the wrong moment writes what the student of another step would."""
    trainer = make_trainer(build_llama(), build_llama(seed=1), rollout_copy="always")
    with trainer.writer.of(trainer.model) as writer:
        before = writer.lm_head.weight.clone()
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(1.0)
    with trainer.writer.of(trainer.model) as writer:
        assert torch.equal(writer.lm_head.weight, trainer.model.lm_head.weight)
        assert not torch.equal(writer.lm_head.weight, before)


def test_training_goes_on_after_an_error_in_a_rollout(make_trainer, monkeypatch):
    trainer = make_trainer(build_llama(), build_llama(seed=1), **MIDDLE, rollout_copy="always", max_steps=2)
    original = trainer.text.write

    def fails(*args, **kwargs):
        monkeypatch.setattr(trainer.text, "write", original)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(trainer.text, "write", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.model.training


def test_copy_is_neither_trained_nor_saved(make_trainer, tmp_path):
    from safetensors.torch import load_file

    trainer = make_trainer(
        build_llama(), build_llama(seed=1), **MIDDLE, bf16=True, output_dir=str(tmp_path / "run"), max_steps=2
    )
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved.keys() == trainer.model.state_dict().keys()
    assert {value.dtype for value in saved.values()} == {torch.float32}
    own = {id(parameter) for parameter in trainer.writer.copy.model.parameters()}
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not own & held
    assert all(parameter.grad is None for parameter in trainer.writer.copy.model.parameters())


def test_student_that_cannot_be_copied_writes_itself_unless_a_copy_is_asked_for(make_trainer):
    trainer = make_trainer(build_llama(), build_llama(seed=1), **MIDDLE, peft_config=lora(use_dora=True))
    trainer.train()
    assert trainer.writer.copy is None
    trainer = make_trainer(
        build_llama(), build_llama(seed=1), **MIDDLE, peft_config=lora(use_dora=True), rollout_copy="always"
    )
    with pytest.raises(UserError, match="no copy of the student can write its rollouts: its adapter is a variant"):
        trainer.train()


def test_sharded_student_cannot_write_alone(make_trainer):
    accelerator = make_trainer(build_llama(), build_llama(seed=1)).accelerator
    with pytest.raises(UserError, match="rollout_copy=never: a sharded student cannot write alone"):
        Writer(accelerator, copies="never", dtype=None, offload=False, sharded=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_copy": "sometimes"}, "rollout_copy must be auto, always or never, got 'sometimes'"),
        ({"rollout_dtype": "int8"}, "rollout_dtype must be float32, bfloat16 or float16, got 'int8'"),
        ({"rollout_copy": "never", "rollout_dtype": "bfloat16"}, "rollout_copy is never"),
        ({"offload_rollout_copy": True}, "does nothing: training runs on the CPU"),
        ({"method": "kd", "rollout_copy": "always"}, "method 'kd' rolls nothing out"),
    ],
)
def test_options_of_the_copy_are_checked(make_trainer, options, message):
    with pytest.raises(UserError, match=message):
        make_trainer(build_llama(), build_llama(seed=1), **options)


def test_evaluation_answers_with_the_student_itself(make_trainer):
    """Scores are those of the weights that are saved, not of their roundings."""
    trainer = make_trainer(build_llama(), build_llama(seed=1), **MIDDLE, bf16=True)
    with trainer.writer.answering(trainer.model) as model:
        assert model is trainer.model
