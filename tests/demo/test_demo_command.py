"""`switchkd demo` and the folder it writes into."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Run, one_line_error, rollout_options

from switchkd.cli.run_folder import read_config


def test_demo_replaces_an_earlier_demo_and_nothing_else(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from switchkd.demo import run as demo

    def stand_in(output_dir: Path, *, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
        say(f"seed {seed}")
        return {"seconds": 1.0}

    monkeypatch.setattr(demo, "run_demo", stand_in)
    for seed in (1, 2):
        code, out, err = run("demo", "--output_dir", tmp_path / "demo", "--seed", seed, "--json")
        assert (code, out, err) == (0, '{"seconds":1.0}\n', f"seed {seed}\n")
        config = read_config(tmp_path / "demo")
        assert config is not None and config["seed"] == seed
    assert run(*rollout_options(models, "--prompt", "a", "--output_dir", tmp_path / "other"))[0] == 0
    assert "holds another run" in one_line_error(*run("demo", "--output_dir", tmp_path / "other"))
