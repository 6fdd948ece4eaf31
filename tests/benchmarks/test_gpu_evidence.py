"""The one command for a GPU: its parts are valid, it stops in time, and it goes on where it was."""

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from helpers.command_line import write_rows
from helpers.tiny import build_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
script = import_module("gpu_evidence")


@pytest.fixture
def shared(tmp_path):
    """A folder as the script expects it, with a few records and a tokenizer of characters."""
    rows = [
        {"instruction": f"Count {n}.", "input": "", "output": " ".join(f"word{i}" for i in range(12 + n % 3))}
        for n in range(24)
    ]
    folder = tmp_path / "shared" / "data"
    for name, count in {"train": 24, "dev": 4, "valid": 4}.items():
        (folder / "dolly").mkdir(parents=True, exist_ok=True)
        write_rows(folder / "dolly" / f"{name}.jsonl", rows[:count])
    build_tokenizer().save_pretrained(folder / "tokenizers" / "gpt2")
    return tmp_path / "shared"


def options(tmp_path, shared, **others):
    given = {"tokenizer": None, "sizes": "main", "seeds": [0], "writers": list(script.WRITERS), **others}
    return argparse.Namespace(output_dir=tmp_path / "out", shared=shared, **given)


@pytest.mark.parametrize("sizes", script.SIZES)
def test_what_it_runs_are_valid_trainings_and_comparisons(tmp_path, shared, sizes):
    from switchkd.commands import train
    from switchkd.commands.train_options import read_options
    from switchkd.compare import command
    from switchkd.compare.checks import check
    from switchkd.compare.plan import plan
    from switchkd.training.resolve import resolve

    names = [stage.name for stage in script.stages(options(tmp_path, shared, sizes=sizes))]
    assert names == ["data: dolly", "teacher", "compare"]
    given = train.parser().resolve(["--config", str(tmp_path / "out" / "teacher.yaml")])
    assert resolve(read_options(given)[1]).method.name == "sft"
    comparison = command.parser().resolve(["--config", str(tmp_path / "out" / "compare.yaml")])
    sections = {name: command._section(name, getattr(comparison, name)) for name in command.SECTIONS}
    tasks = plan(output_dir=tmp_path / "runs", seeds=[0], **sections)
    check(tasks, inputs=False)
    command.compared(comparison, sections)
    cells = len(script.WRITERS) * len(script.OBJECTIVES) * len(script.SIZES[sizes]["students"])
    assert script.left_of_comparison(options(tmp_path, shared, sizes=sizes)) == (0, cells)


def test_a_part_is_stopped_when_its_time_is_over_and_one_that_fails_ends_the_script(tmp_path):
    done = tmp_path / "done"
    sleeps = script.Stage("sleeps", (sys.executable, "-c", "import time; time.sleep(60)"), done)
    started = time.monotonic()
    assert script.run(sleeps, 0.5) is False and time.monotonic() - started < 10
    writes = script.Stage("writes", (sys.executable, "-c", f"open({str(done)!r}, 'w')"), done)
    assert script.run(writes, 30) is True and done.is_file()
    with pytest.raises(SystemExit, match="exit code 3"):
        script.run(script.Stage("fails", (sys.executable, "-c", "raise SystemExit(3)"), done), 30)


@pytest.mark.long
def test_it_runs_through_on_tiny_models_and_a_second_call_has_nothing_left(tmp_path, shared, monkeypatch, capfd):
    words = ["gpu_evidence.py", "--output_dir", str(tmp_path / "out"), "--shared", str(shared), "--sizes", "tiny"]
    words += ["--seeds", "0", "--writers", "student", "switch 50%"]
    results = []
    for budget in ("21", "600", "600"):  # the first is over at once
        monkeypatch.setattr(sys, "argv", [*words, "--time_budget", budget])
        assert script.main() == 0
        results.append(json.loads(capfd.readouterr().out.strip().splitlines()[-1]))
    first, second, third = results
    assert first["left"] and not second["left"] and not third["left"]
    assert second["finished_runs"] == second["runs"] == 4 and third["seconds"] == {}
    assert Path(second["results"]).is_file()
    assert yaml.safe_load((tmp_path / "out" / "compare" / "config.yaml").read_text())["seeds"] == [0]
