"""What the site needs beyond Markdown: links that work there and on GitHub, and the page of all options.

mkdocs calls the functions named `on_...`. Links between pages are mkdocs' own matter. A link that leaves docs/ leads to
the file in the repository, and a picture outside docs/ is copied into the site.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs runs a hook without its folder

from option_tables import option_tables

ROOT = Path(__file__).parents[2]
#: Where the tables of options go.
OPTIONS_MARK = "<!-- all options -->"

_FENCE = re.compile(r"(^ *```.*?^ *```$)", flags=re.MULTILINE | re.DOTALL)
#: A link that shows where it leads, as is usual on GitHub.
_FILE_NAME = re.compile(r"\[([\w./]+\.md)\]\(([^)\s]+)\)")
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)")


def on_config(config: Any) -> Any:
    """List the pages that the navigation of mkdocs.yml does not name at its end, so that none is lost."""
    named = set(re.findall(r"[\w/.-]+\.md", str(config["nav"])))
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    if others := [page for page in pages if page not in named]:
        config["nav"].append({"More": others})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures that pages show and that lie outside docs/."""
    from mkdocs.structure.files import File

    for page in files.documentation_pages():
        for picture in pictures_outside(page.content_string, page.src_uri):
            if picture not in files.src_uris:
                files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page's text as the site needs it."""
    repository = config["extra"]["repository"]
    if OPTIONS_MARK in markdown:
        markdown = markdown.replace(OPTIONS_MARK, option_tables())
    titles = {file.src_uri: file.page.title for file in files.documentation_pages() if file.page is not None}
    markdown = with_titles(markdown, page.file.src_uri, titles)
    return with_links(markdown, page.file.src_uri, lambda path: address(path, repository))


def with_links(markdown: str, page: str, address: Callable[[str], str]) -> str:
    """Return a page with every link that leaves docs/ replaced; blocks of code stay as they are.

    Args:
        markdown: Text of the page.
        page: Its path below docs/.
        address: Path from the repository's root -> where the link is to lead.
    """

    def replaced(found: re.Match[str]) -> str:
        path = outside(found[2], page)
        if path is None:
            return found[0]
        if is_picture(found):
            # It is copied to the same path below docs/.
            return found[1] + relpath(path, PurePosixPath(page).parent.as_posix())
        return found[1] + address(path)

    parts = _FENCE.split(markdown)
    return "".join(part if place % 2 else _LINK.sub(replaced, part) for place, part in enumerate(parts))


def with_titles(markdown: str, page: str, titles: Mapping[str, str | None]) -> str:
    """Return a page whose links that show the name of a file, such as [data.md](data.md), show the page's title.

    Args:
        markdown: Text of the page.
        page: Its path below docs/.
        titles: Path of a page below docs/ -> its title in the navigation.
    """

    def replaced(found: re.Match[str]) -> str:
        target = normpath((PurePosixPath(page).parent / found[2].partition("#")[0]).as_posix())
        return f"[{titles.get(target) or found[1]}]({found[2]})"

    return _FILE_NAME.sub(replaced, markdown)


def pictures_outside(markdown: str, page: str) -> list[str]:
    """Return the pictures of a page that lie outside docs/, as paths from the repository's root."""
    paths = [outside(found[2], page) for found in _LINK.finditer(_FENCE.sub("", markdown)) if is_picture(found)]
    return [path for path in paths if path is not None]


def is_picture(link: re.Match[str]) -> bool:
    """Return whether a link shows what it leads to."""
    return link[1].startswith("!")


def outside(link: str, page: str) -> str | None:
    """Return where a link leads as a path from the repository's root, None where that lies in docs/ or on the web."""
    if re.match(r"[a-z]+:|#|/", link):
        return None
    path = normpath((PurePosixPath("docs") / page).parent.joinpath(link).as_posix())
    return None if path.startswith("docs/") else path


def address(path: str, repository: str) -> str:
    """Return where the repository shows a file or folder, and the anchor that may follow its name."""
    kind = "tree" if (ROOT / path.partition("#")[0]).is_dir() else "blob"
    return f"{repository}/{kind}/main/{path}"
