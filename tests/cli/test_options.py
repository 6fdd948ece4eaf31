"""A YAML file gives the defaults, every key is also a flag, flags win."""

from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Run, one_line_error

from switchkd.cli.options import OptionParser, flag
from switchkd.commands import rollout, train
from switchkd.errors import nearest_name


def parsed(*arguments: Any) -> Any:
    return train.parser().resolve([str(argument) for argument in arguments])


def test_flags_win_over_the_config_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("learning_rate: 1e-3\ntop_k: 7\nmethod: gkd\n")
    options = parsed("--top-k=9", "--config", config)
    assert (options.learning_rate, options.top_k, options.method, options.top_p) == (1e-3, 9, "gkd", 1.0)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 5e-4", "learning_rate", 5e-4),  # YAML 1.1 reads text
        ("eval_strategy: no", "eval_strategy", "no"),  # YAML 1.1 reads False
        ("bf16: yes", "bf16", True),
        ("disable_dropout: off", "disable_dropout", False),
        ("save_steps: null", "save_steps", 500),
        ("max-steps: 3", "max_steps", 3),
        ("run_name: 007", "run_name", "007"),
        ("student_layers: [0, -1]", "student_layers", ["0", "-1"]),
        ("student_layers: 0,4", "student_layers", ["0,4"]),
        ("report_to: [tensorboard, wandb]", "report_to", "tensorboard,wandb"),
        ("report_to: []", "report_to", "none"),
        (
            "model_init_kwargs: {dtype: float32, a: 1e-3, b: true}",
            "model_init_kwargs",
            '{"dtype": "float32", "a": 0.001, "b": true}',
        ),
        ("student_config:\n  n_layer: 2", "student_config", '{"n_layer": 2}'),
    ],
)
def test_a_key_of_the_file_is_read_as_the_flag_would_be(tmp_path: Path, line: str, name: str, value: Any) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"{line}\n")
    assert getattr(parsed("--config", config), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"line 1: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("method: sft\nlmbda: 1", r"line 2: unknown key 'lmbda'; use on_policy_fraction"),
        ("config: a.yaml", r"line 1: unknown key 'config'"),
        ("learning_rate: fast", r"line 1: learning_rate: invalid float value: 'fast'"),
        ("optim: adamm", r"line 1: optim: invalid choice 'adamm'; the nearest is 'adamw"),
        ("a: 1\nb: [", r"line 2: malformed YAML"),
        ("- a\n- b", r"expected lines of `key: value`"),
        ("method: sft\nmethod: kd", r"line 2: duplicate key 'method'"),
    ],
)
def test_a_wrong_config_file_is_refused_with_its_line(tmp_path: Path, run: Run, text: str, message: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    error = one_line_error(*run("train", "--config", config))
    assert str(config) in error and message in error


def test_every_command_takes_a_config_file(tmp_path: Path, run: Run) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("tempratur: 1\n")
    for name in ("rollout", "evaluate"):
        assert "'temperature'" in one_line_error(*run(name, "--config", config))
    assert "no config file" in one_line_error(*run("rollout", "--config", tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rat", "1"], "unknown option --learning_rat; did you mean 'learning_rate'?"),
        (["--initial_treshold=1"], "'initial_threshold'"),
        (["--max_new_tokens", "1"], "use max_completion_length"),
        (["--top_k", "many"], "--top_k: invalid int value: 'many'"),
        (["--json", "maybe"], "expected true or false, got 'maybe'"),
        (["stray"], "unexpected argument 'stray'"),
        (["x.yaml"], "unexpected argument 'x.yaml'; give a config file as --config x.yaml"),
        (["--method", "kd", "runs/a.yml"], "give a config file as --config runs/a.yml"),
        (["--top_k", "5", "6"], "unexpected argument '6'; --top_k takes one value"),
        (
            ["--run_name", "my", "run"],
            "unexpected argument 'run'; put text with blanks in quotes: --run_name \"my run\"",
        ),
        (["--top_k"], "--top_k: expected one argument"),
        (["--top"], "unknown option --top"),  # no abbreviations: they change meaning when options are added
    ],
)
def test_wrong_flags_are_one_line(run: Run, arguments: list[str], message: str) -> None:
    assert message in one_line_error(*run("train", *arguments))


def test_an_unquoted_prompt_is_refused(run: Run) -> None:
    """`--prompt Once upon` was read as the two prompts "Once" and "upon"."""
    for words in (["--prompt", "Once", "upon", "a", "--seed", "1"], ["--prompt=Once", "upon", "a"]):
        error = one_line_error(*run("rollout", *words))
        assert error == "unexpected argument 'upon'; put text with blanks in quotes: --prompt \"Once upon a\""


def test_an_option_that_is_repeated_is_a_list_in_a_file_and_flags_win(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("prompt: [Once upon, a time]\nseed: 3\n")
    parser = rollout.parser()
    assert parser.resolve(["--config", str(config)]).prompt == ["Once upon", "a time"]
    options = parser.resolve(["--prompt", "x", "--config", str(config), "--prompt", "y z"])
    assert (options.prompt, options.seed) == (["x", "y z"], 3)
    config.write_text("prompt: Once upon\n")
    assert parser.resolve(["--config", str(config)]).prompt == ["Once upon"]


def test_help_is_as_wide_as_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (72, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, run("train", "--help")[1].splitlines())) <= min(columns, 112)


def test_a_switch_is_also_a_key_with_a_value() -> None:
    parser = OptionParser()
    parser.add_argument("--fast", **flag("go"))
    parser.add_shared_options(None)
    assert [parser.resolve(words).fast for words in ([], ["--fast"], ["--fast=no"], ["--fast", "true"])] == [
        *(False, True, False, True)
    ]


def test_nearest_name_prefers_a_common_beginning() -> None:
    assert nearest_name("adamm", ["adalomo", "adamw_torch", "sgd"]) == "adamw_torch"
    assert nearest_name("n_layers", ["n_layer", "n_inner", "layer_norm_epsilon"]) == "n_layer"
