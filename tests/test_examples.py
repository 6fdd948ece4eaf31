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


ACCELERATE = sorted((Path(__file__).parents[1] / "examples" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_every_shipped_launch_is_one_that_accelerate_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that accelerate does not know are refused by it; what is launched is what the name says."""
    launch = pytest.importorskip("accelerate.commands.launch")
    parser = launch.launch_command_parser()
    arguments, *_ = launch._validate_launch_command(parser.parse_args(["--config_file", str(path), "train.py"]))
    kinds = {"ddp": "multi_gpu", "fsdp2": "use_fsdp", "zero2": "use_deepspeed", "zero3": "use_deepspeed"}
    assert getattr(arguments, kinds[path.stem]) is True
    assert arguments.num_processes == 8 and arguments.mixed_precision == "bf16"
    if path.stem == "fsdp2":
        from accelerate.utils import FullyShardedDataParallelPlugin
        from accelerate.utils.launch import prepare_multi_gpu_env

        for name, value in prepare_multi_gpu_env(arguments).items():
            if name.startswith("FSDP_"):
                monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and not plugin.cpu_ram_efficient_loading
        assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    if path.stem.startswith("zero"):
        assert arguments.zero_stage == int(path.stem[-1])


def test_launches_are_shipped() -> None:
    assert [path.stem for path in ACCELERATE] == ["ddp", "fsdp2", "zero2", "zero3"]
