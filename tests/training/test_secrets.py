"""No key or token in anything that a run leaves, and nothing of a checkpoint runs code when it is read."""

import json
from pathlib import Path

import pytest
import torch
from helpers.command_line import train_options

from switchkd.training.checkpoints import MANIFEST, write_manifest

#: One that looks like a token of the hub, and one that nothing but its name gives away.
LOOKS_LIKE_ONE, NAMED_SO = "hf_abcdefghijklmnopqrstuvwx", "0a1b2c3d4e5f-named-so"


def files_with(folder: Path, *secrets: str) -> list[str]:
    return [
        f"{path.relative_to(folder)}: {secret}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for secret in secrets
        if secret.encode() in path.read_bytes()
    ]


def test_no_token_is_written_anywhere(models, tmp_path, run):
    """training_args.bin of the run and of every checkpoint held the token of the hub."""
    pytest.importorskip("tensorboard")
    of_models = json.dumps({"token": NAMED_SO, "revision": "main"})
    words = train_options(
        models, tmp_path / "run", "--hub_token", NAMED_SO, "--model_init_kwargs", of_models,
        "--teacher_model_init_kwargs", json.dumps({"token": LOOKS_LIKE_ONE}), "--report_to", "tensorboard",
        "--tokenizer_kwargs", json.dumps({"token": NAMED_SO}), "--run_name", f"mine {LOOKS_LIKE_ONE}",
    )  # fmt: skip
    code, out, err = run(*words)
    assert code == 0, err
    assert (tmp_path / "run" / "checkpoint-2" / "training_args.bin").is_file()
    assert files_with(tmp_path / "run", NAMED_SO, LOOKS_LIKE_ONE) == []
    assert NAMED_SO not in out + err and LOOKS_LIKE_ONE not in out + err
    # What is not secret is kept.
    saved = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert saved.model_init_kwargs["revision"] == "main" and saved.hub_token is None
    # And the run goes on with its token from its checkpoint.
    code, _, err = run(*[4 if word == 2 else word for word in words], "--resume_from_checkpoint", "true")
    assert code == 0, err
    assert run("report", tmp_path / "run", "--output_file", tmp_path / "page.html")[0] == 0
    assert files_with(tmp_path, NAMED_SO, LOOKS_LIKE_ONE) == []


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "text_source_0.pt", "training_args.bin"]
)
def test_code_planted_in_a_checkpoint_is_not_run(models, tmp_path, run, name):
    words = train_options(models, tmp_path / "run", "--draft_length", 4, "--initial_threshold", 0.3)
    assert run(*words)[0] == 0
    checkpoint, trace = tmp_path / "run" / "checkpoint-2", tmp_path / "was_run"
    torch.save(Planted(trace), checkpoint / name)
    torch.load(checkpoint / name, weights_only=False)
    assert trace.exists()  # it would
    trace.unlink()
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, 2)
    code, _, err = run(*[3 if word == 2 else word for word in words], "--resume_from_checkpoint", "true")
    assert not trace.exists()
    assert "Traceback" not in err and code == (0 if name == "training_args.bin" else 2), err
