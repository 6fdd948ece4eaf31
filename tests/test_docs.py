"""The documents keep up with the code: every logged key is explained, every local link leads somewhere."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.tiny import RAGGED_ROWS, build_gpt2

from switchkd.divergences import DIVERGENCES
from switchkd.objective import objective_options
from switchkd.rollout import MEASURED
from switchkd.training.config import SwitchConfig
from switchkd.training.log import LOGGED_MEANS, LOGGED_STATES

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
LONGEST_README = 200
MARKDOWN_WIDTH = 100


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown viewer gives to the headings of a file."""
    headings = re.findall(r"^#+ +(.+?)\s*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def explained(document: str) -> set[str]:
    """The keys that have a section of their own: headings such as `loss` or `rollout/teacher_share`."""
    return {
        key
        for line in re.findall(r"^#{2,4} +(.*)$", document, flags=re.MULTILINE)
        for key in re.findall(r"`([^`]+)`", line)
    }


def test_every_key_the_trainer_logs_is_explained(make_trainer):
    trainer = make_trainer(
        build_gpt2(),
        build_gpt2(seed=1),
        max_grad_norm=1.0,
        eval_dataset=Dataset.from_list(RAGGED_ROWS[:2]),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
    )
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    other_policies = {f"rollout/{name}" for name in MEASURED if name != trainer.plan.policy.measured}
    assert set(LOGGED_MEANS) - other_policies == set(LOGGED_MEANS) & logged
    assert {"loss", "eval_loss", "eval_cross_entropy"} <= logged
    assert sorted(logged - explained(text("docs/metrics.md"))) == []


def test_nothing_is_explained_that_is_never_logged(make_trainer):
    keys = {key for key in explained(text("docs/metrics.md")) if key.startswith(("rollout/", "time/"))}
    assert keys == {*LOGGED_MEANS, *LOGGED_STATES}


def test_every_divergence_and_its_options_are_explained():
    document = text("docs/objective.md")
    for name in DIVERGENCES:
        assert f"`{name}`" in document
        for option in objective_options(name):
            assert f"`{option}`" in document
    for option in ("loss_temperature", "divergence"):
        assert f"`{option}`" in document
        assert option in SwitchConfig.__dataclass_fields__


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_links_lead_somewhere(path):
    content = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)", content)
    broken = []
    for link in links:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def test_the_walks_of_the_architecture_lead_to_code_that_is_there():
    document, source = " ".join(text("docs/architecture.md").split()), ROOT / "src" / "switchkd"
    missing = [path for path in re.findall(r"`([\w/]+\.py)`", document) if not (source / path).exists()]
    assert [path for path in missing if not (ROOT / path).exists()] == []
    for path, name in re.findall(r"`([\w/]+\.py)`: `(\w+)`", document):
        code = (source / path).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name}\b|^{name}\b", code, flags=re.MULTILINE), f"{path} has no {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_markdown_is_wrapped_at_one_width(path):
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    # A row of a table cannot be broken.
    long = [line for line in prose.splitlines() if len(line) > MARKDOWN_WIDTH and not line.startswith("|")]
    assert long == []


def test_readme_is_short():
    assert len(text("README.md").splitlines()) <= LONGEST_README
