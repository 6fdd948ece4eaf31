"""The package as it is installed: what it needs is declared, what is built is the source, and the built one starts."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "switchkd"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Never imported here: transformers asks for it wherever a Trainer is made.
NEEDED_BY_OTHERS = {"accelerate"}


def requirements(*extras: str) -> dict[str, Requirement]:
    """Name of a distribution -> what pyproject.toml says of it; `extras` count too."""
    lines = PROJECT["dependencies"] + [line for name in extras for line in PROJECT["optional-dependencies"][name]]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pinned(file: str) -> dict[str, Version]:
    """Name of a distribution -> its version in a file of constraints."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def imported_packages() -> set[str]:
    """Names of the packages that any file imports, inside functions too; those of Python itself left out."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"switchkd"}


def test_everything_that_is_imported_is_declared_and_nothing_else() -> None:
    homes = importlib.metadata.packages_distributions()
    distributions = {canonicalize_name(homes[package][0]) for package in imported_packages()}
    assert distributions - set(requirements("peft")) == set()
    assert set(requirements()) - distributions == NEEDED_BY_OTHERS


def test_the_tested_version_of_every_dependency_is_known_and_allowed() -> None:
    tested = pinned("constraints.txt")
    for name, requirement in requirements(*PROJECT["optional-dependencies"]).items():
        assert tested[name] in requirement.specifier, requirement


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    # The paper is cited in the README too; both give the same title and the same people.
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert paper["title"] in readme
    assert " and ".join(f"{person['family-names']}, {person['given-names']}" for person in paper["authors"]) in readme


def test_ci_runs_what_contributors_run_on_every_python_that_is_declared() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    job = jobs["lint-and-test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    declared = [
        text.removeprefix("Programming Language :: Python :: ")
        for text in PROJECT["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: \d\.\d+", text)
    ]
    assert job["strategy"]["matrix"]["python"] == declared
