"""Every shipped example is a valid configuration."""

from pathlib import Path

import pytest
import yaml

from switchkd.commands import train

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("[!c]*.yaml"))


def test_examples_are_shipped() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_shipped_example_is_a_valid_config(path: Path, tmp_path: Path) -> None:
    from switchkd.commands.train_options import read_options
    from switchkd.training.resolve import resolve

    options = train.parser().resolve(["--config", str(path), "--output_dir", str(tmp_path), "--bf16", "false"])
    run_args, config = read_options(options)
    method = resolve(config).method
    assert (run_args.dataset_name is not None and config.teacher_model_name_or_path) or method.name == "sft"
    assert set(yaml.safe_load(path.read_text())) <= set(vars(options))
