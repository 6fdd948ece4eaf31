"""Every shipped example is a valid configuration."""

from pathlib import Path

import pytest
import yaml

from switchkd.commands import train

FILES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
COMPARISONS = [path for path in FILES if {"runs", "grid"} & set(yaml.safe_load(path.read_text()))]
EXAMPLES = [path for path in FILES if path not in COMPARISONS]


def test_examples_are_shipped() -> None:
    assert EXAMPLES and COMPARISONS


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_every_shipped_comparison_is_a_valid_config(path: Path) -> None:
    from switchkd.compare import command
    from switchkd.compare.checks import check
    from switchkd.compare.plan import plan

    options = command.parser().resolve(["--config", str(path)])
    sections = {name: command._section(name, getattr(options, name)) for name in command.SECTIONS}
    check(plan(output_dir=Path("runs"), seeds=[0], **sections), inputs=False)
    command.compared(options, sections)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_shipped_example_is_a_valid_config(path: Path, tmp_path: Path) -> None:
    from switchkd.commands.train_options import read_options
    from switchkd.training.resolve import resolve

    options = train.parser().resolve(["--config", str(path), "--output_dir", str(tmp_path), "--bf16", "false"])
    run_args, config = read_options(options)
    method = resolve(config).method
    assert (run_args.dataset_name is not None and config.teacher_model_name_or_path) or method.name == "sft"
    assert set(yaml.safe_load(path.read_text())) <= set(vars(options))
