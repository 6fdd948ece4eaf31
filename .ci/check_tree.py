"""Fail where the tree in README.md and the files that git tracks disagree: no stray notes, no forgotten folder.

The tree must name every entry of the repository root and every folder of src/switchkd. Files say in their first line
what they are.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "src/switchkd/"


def named_in_tree(readme: str) -> set[str]:
    """Entries of the root, and folders of the package as `src/switchkd/engine/`, that the README's tree names."""
    tree = next(block for block in readme.split("```")[1::2] if f"\n{PACKAGE}\n" in block)
    names: set[str] = set()
    for line in tree.strip().splitlines():
        # Names come first; two blanks begin the remark.
        words = re.split(r"\s{2,}", line.strip())[0].split()
        inside = line.startswith("  ")
        names |= {f"{PACKAGE}{word}" if inside else word for word in words if not (inside and "*" in word)}
    return names


def tracked() -> set[str]:
    """The same of the files that git tracks."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names: set[str] = set()
    for path in listing.splitlines():
        folder = f"{path.rpartition('/')[0]}/"
        names.add(folder if path.startswith(PACKAGE) else path.split("/")[0])
    return names


def main() -> int:
    """Print every difference; return 1 if there is one."""
    shown, found = named_in_tree((ROOT / "README.md").read_text(encoding="utf-8")), tracked()
    wrong = [f"{name} is not in README.md's tree" for name in sorted(found - shown)]
    wrong += [f"{name} is in README.md's tree only" for name in sorted(shown - found)]
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
