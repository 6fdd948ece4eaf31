"""Fail where the tree in README.md and the files that git tracks disagree: no stray notes, no forgotten file.

The tree must name every entry of the repository root and every file of src/switchkd below the line of its folder, one
by one or as a pattern such as `*.yaml`. A folder's `__init__.py` is named by the folder itself.
"""

import fnmatch
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "src/switchkd/"


def named_in_tree(readme: str) -> dict[str, set[str]]:
    """Folder ("" is the root) -> the names that the README's tree gives it."""
    tree = next(block for block in readme.split("```")[1::2] if f"\n{PACKAGE}\n" in block)
    names, folder = defaultdict(set), ""
    for line in tree.strip().splitlines():
        # Names come first; two blanks begin the remark.
        words = re.split(r"\s{2,}", line.strip())[0].split()
        if words == [PACKAGE] or (line.startswith("  ") and words[0].endswith("/")):
            folder = PACKAGE if words == [PACKAGE] else f"{PACKAGE}{words[0]}"
            names[folder] = set()
        elif line.startswith("    "):
            names[folder] |= set(words)
        else:
            names[PACKAGE if line.startswith("  ") else ""] |= set(words)
    return names


def tracked() -> dict[str, set[str]]:
    """The same of the files that git tracks."""
    names = defaultdict(set)
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in listing.splitlines():
        names[""].add(path.split("/")[0])
        folder, name = path.rpartition("/")[::2]
        if path.startswith(PACKAGE) and (name != "__init__.py" or f"{folder}/" == PACKAGE):
            names[f"{folder}/"].add(name)
    names[""].discard("src")  # named by the package's own line
    return names


def main() -> int:
    """Print every difference; return 1 if there is one."""
    shown, found = named_in_tree((ROOT / "README.md").read_text(encoding="utf-8")), tracked()
    wrong = []
    for folder in sorted(shown.keys() | found.keys()):
        for pattern in [name for name in shown[folder] if "*" in name]:
            shown[folder] = shown[folder] - {pattern} | set(fnmatch.filter(found[folder], pattern))
        wrong += [f"{folder}{name} is not in README.md's tree" for name in sorted(found[folder] - shown[folder])]
        wrong += [f"{folder}{name} is in README.md's tree only" for name in sorted(shown[folder] - found[folder])]
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
