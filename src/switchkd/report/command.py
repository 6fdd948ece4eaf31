"""`switchkd report`: one HTML file from the folders of runs."""

import argparse
from pathlib import Path
from typing import Any

from switchkd.cli.console import Console
from switchkd.cli.options import OptionParser
from switchkd.errors import UserError


def parser() -> OptionParser:
    """Return the options of `switchkd report`."""
    result = OptionParser(
        prog="switchkd report",
        usage="switchkd report RUN... [--output_file report.html]",
        description="Make one HTML file from the folders of train, compare, demo, evaluate, judge, calibrate, diagnose "
        "and rollout. It needs nothing else: it can be mailed, opened without a network, read on a phone and printed.",
    )
    # Without a default, so that no word on the command line leaves those of a config file.
    folders: dict[str, Any] = {"metavar": "RUN", "help": "folder of a run, its output_dir; one or several"}
    result.add_argument("runs", nargs="*", default=argparse.SUPPRESS, **folders)
    result.add_argument("--runs", nargs="+", default=[], **(folders | {"help": "the same, as a key of a config file"}))
    result.add_argument("--output_file", default="report.html", metavar="FILE", help="name of the page, in output_dir")
    result.add_argument("--title", metavar="TEXT", help="heading of the page (default: the names of the runs)")
    result.add_shared_options("folder of the page (default: the current one)", overwrite=False)
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Write the page, and return where it is and what it shows."""
    if not options.runs:
        raise UserError("give the folders of one or more runs: switchkd report runs/compare")
    from switchkd.page.document import check_file, write
    from switchkd.report.contents import make_page
    from switchkd.report.folders import read_runs

    path = Path(options.output_dir or ".").expanduser() / Path(options.output_file).expanduser()
    check_file(path)
    page = make_page(read_runs(options.runs), options.title)
    size = write(page, path)
    for question, said in page.cards:
        console.say(f"{question}: {'; '.join(said)}")
    for line in page.missing:
        console.say(f"not recorded: {line}")
    console.say(f"\n{path} ({size / 1e3:,.0f} kB)")
    return {
        "output_file": str(path),
        "bytes": size,
        "sections": [section.title for section in page.sections],
        "not_recorded": list(page.missing),
    }
