"""The documentation site: it builds without a warning or the network, and its generated pages leave nothing out."""

import dataclasses
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import switchkd
from switchkd.__main__ import COMMANDS
from switchkd.commands.train_options import RunArguments
from switchkd.training.config import SwitchConfig

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://example.org/repository"


@pytest.fixture(autouse=True, scope="module")
def theme():
    """The modules of docs/theme can be imported, and lie nowhere in the way of others."""
    sys.path.insert(0, str(ROOT / "docs" / "theme"))
    yield
    sys.path.remove(str(ROOT / "docs" / "theme"))


@pytest.fixture(scope="module")
def options_page():
    return import_module("option_tables").option_tables()


def section(page: str, command: str) -> str:
    """The part of the page of options that is about one command."""
    return re.split(r"^## ", page, flags=re.MULTILINE)[1 + [*COMMANDS].index(command) + 1]


def test_the_page_of_options_lists_every_field_of_a_training(options_page):
    page = section(options_page, "train")
    fields = [field for of in (SwitchConfig, RunArguments) for field in dataclasses.fields(of) if field.init]
    missing = [field.name for field in fields if f"| `{field.name}` |" not in page]
    assert missing == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_options_lists_every_flag_of_a_command_once(options_page, command):
    shown = import_module(COMMANDS[command][0]).parser().full_help()
    # Small letters: an option; capitals: what stands without a name.
    flags = set(re.findall(r"^  (?:-h, )?(?:--([a-z]\w*)|([A-Z]+)\b)", shown, flags=re.MULTILINE))
    flags = {option or place for option, place in flags} - {"help"}
    page = section(options_page, command)
    listed = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    everywhere = re.findall(r"^\| `(\w+)` \|", options_page.partition("\n## ")[0], flags=re.MULTILINE)
    assert page.startswith(f"{command}\n")
    assert sorted([*listed, *everywhere]) == sorted(flags)


def test_defaults_and_texts_stand_in_the_page_of_options(options_page):
    page = section(options_page, "train")
    assert re.search(r"^\| `max_completion_length` \| N \| `256` \| .*Tokens\. \|$", page, flags=re.MULTILINE)
    assert "| `split_special_tokens` | true, false | `true` |" in page
    assert "| `learning_rate` | X | `5e-05` |" in page


def test_the_api_page_names_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: switchkd\.(\w+)$", page, flags=re.MULTILINE))
    # The table of methods is shown by docs/methods.
    assert set(switchkd.__all__) - {"__version__", "METHODS"} <= named


@pytest.mark.parametrize(
    ("page", "link", "becomes"),
    [
        ("a.md", "[x](../README.md#costs)", f"[x]({REPOSITORY}/blob/main/README.md#costs)"),
        ("methods/b.md", "[x](../../examples)", f"[x]({REPOSITORY}/tree/main/examples)"),
        ("a.md", "![x](../benchmarks/y.png)", "![x](benchmarks/y.png)"),
        ("methods/b.md", "![x](../../benchmarks/y.png)", "![x](../benchmarks/y.png)"),
        ("methods/b.md", "[x](../data.md)", "[x](../data.md)"),
        ("a.md", "[x](#here) [y](https://z.org/../a)", "[x](#here) [y](https://z.org/../a)"),
        ("a.md", "```\n[x](../README.md)\n```", "```\n[x](../README.md)\n```"),
    ],
)
def test_links_that_leave_the_documentation_lead_to_the_repository(page, link, becomes):
    hooks = import_module("hooks")
    assert hooks.with_links(link, page, lambda path: hooks.address(path, REPOSITORY)) == becomes


def test_links_that_show_a_file_name_show_the_title_of_the_page():
    titles = {"data.md": "Data", "methods/README.md": None}
    text = "[data.md](../data.md#files), [README.md](README.md), [the data](../data.md)"
    expected = "[Data](../data.md#files), [README.md](README.md), [the data](../data.md)"
    assert import_module("hooks").with_titles(text, "methods/kd.md", titles) == expected


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("mkdocs", "material", "mkdocstrings"))), reason="pip install '.[docs]' brings mkdocs"
)
def test_the_site_builds_in_strict_mode_and_needs_no_network(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    sources = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert {path.as_posix().replace("README", "index") for path in sources} <= set(pages)
    assert "teacher_hidden_dtype" in pages["options.html"] and "draft_length" in pages["api.html"]
    for name, page in pages.items():
        loaded = re.findall(r'<(?:script|img|link)\b[^>]*?(?:src|href)="([^"#?]+)', page)
        assert [address for address in loaded if address.startswith(("http", "//"))] == [], name
        if name != "404.html":  # its addresses count from the root of a server
            missing = [address for address in loaded if not ((site / name).parent / address).exists()]
            assert [address for address in missing if not address.startswith("data:")] == [], name
