"""Fixtures: every test runs offline on one thread, on tiny models built in code."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower on two, and tests run side by side

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from helpers.command_line import Run, write_rows
from helpers.network import guard
from helpers.tiny import (
    BUILDERS,
    RAGGED_ROWS,
    ModelFactory,
    build_gpt2,
    build_llama,
    build_opt,
    build_tokenizer,
    build_trainer,
)

from switchkd.__main__ import main

TRIED = guard()


def pytest_collection_finish() -> None:
    """Spare the collector what imports have made: every Trainer run collects garbage, which takes 0.3 s otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_elsewhere_was_reached() -> Iterator[None]:
    """Fail the test that tried to connect to another machine."""
    before = TRIED.stat().st_size
    yield
    if TRIED.stat().st_size != before:
        pytest.fail(f"tried to reach {TRIED.read_text()[before:].split()}")


def pytest_unconfigure() -> None:
    """Remove the list of what was tried."""
    TRIED.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """98 ids: unknown, newline and printable ASCII, end of sequence = padding (the last id)."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_gpt2() -> ModelFactory:
    """`make_gpt2(seed=0, vocab_size=98, train=False, **config)`: a fresh float32 model in eval mode."""
    return build_gpt2


@pytest.fixture(scope="session")
def make_opt() -> ModelFactory:
    """As `make_gpt2`."""
    return build_opt


@pytest.fixture(scope="session")
def make_llama() -> ModelFactory:
    """As `make_gpt2`."""
    return build_llama


@pytest.fixture(params=list(BUILDERS))
def make_model(request: pytest.FixtureRequest) -> ModelFactory:
    """Each of the three families in turn."""
    return BUILDERS[request.param]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """`make_trainer(student, teacher, **options)`: see `build_trainer`; it writes into the test's own folder."""
    return functools.partial(build_trainer, tmp_path / "run")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared data and models beside the checkout; the test skips where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "models").is_dir():
        pytest.skip("shared data and models are not beside this checkout (../shared)")
    return path


# ---- the command line


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student`, `teacher` (more layers), `llama`, a tokenizer alone, and data files."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer()
    for name, model in {
        "student": build_gpt2(seed=1),
        "teacher": build_gpt2(seed=2, n_layer=3),
        "llama": build_llama(seed=3, num_hidden_layers=3),
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_rows(folder / "train.jsonl", RAGGED_ROWS)
    return folder


@pytest.fixture
def libraries_as_loud_as_before() -> Iterator[None]:
    """The commands quiet transformers and datasets for the whole process; other tests read what those say."""
    levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    datasets.logging.set_verbosity(levels[1])
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], libraries_as_loud_as_before: None) -> Run:
    """`run(*arguments)` -> exit code, standard output, standard error."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
