"""The package as it is installed: what it needs is declared, what is built is the source, and the built one starts."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "switchkd"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


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
    # vLLM runs in an environment of its own, where its extra is installed.
    assert "vllm" in requirements("vllm")
    distributions = {canonicalize_name(homes[package][0]) for package in imported_packages() - {"vllm"}}
    assert distributions - set(requirements("peft")) == set()
    assert set(requirements()) - distributions == set()


def test_the_tested_version_of_every_dependency_is_known_and_allowed() -> None:
    tested = pinned("constraints.txt")
    for name, requirement in requirements(*PROJECT["optional-dependencies"]).items():
        assert tested[name] in requirement.specifier, requirement


def test_the_lowest_versions_are_those_that_are_declared() -> None:
    lowest = pinned("constraints-lower.txt")
    declared = requirements("peft")
    declared.pop("torch")  # chosen by the call, see the file
    for name, requirement in declared.items():
        floor = next(specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
        assert Version(floor) == lowest[name], requirement


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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a fresh copy of the source, without a network and without what earlier builds left."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(SOURCE, folder / "src" / "switchkd", ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder / "dist"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_the_source_and_nothing_else(wheel: Path) -> None:
    source = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in source} == {".py", ".typed", ".jinja", ".bib", ".css", ".js", ".yaml"}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert packed == {path.relative_to(SOURCE.parent).as_posix() for path in source}
        for path in source:
            assert archive.read(path.relative_to(SOURCE.parent).as_posix()) == path.read_bytes()


def test_the_wheel_says_who_made_it_and_that_it_is_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    for line in ("Author: The switchkd developers", "License-Expression: Apache-2.0", "Classifier: Typing :: Typed"):
        assert line in metadata.splitlines()
    for kind in ("Homepage", "Documentation", "Repository", "Changelog"):
        assert f"Project-URL: {kind}, https://" in metadata


def test_the_installed_wheel_starts(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": str(target)}
    where = "import switchkd; print(switchkd.__file__)"
    for call, answer in (
        ([sys.executable, "-c", where], str(target / "switchkd" / "__init__.py")),
        ([sys.executable, "-m", "switchkd", "--version"], f"switchkd {PROJECT['version']}"),
        ([str(target / "bin" / "switchkd"), "--version"], f"switchkd {PROJECT['version']}"),
    ):
        done = subprocess.run(call, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
        assert (done.returncode, done.stdout.strip()) == (0, answer), done.stderr
