"""`switchkd demo`: self-contained, no download."""

import argparse
from typing import Any

from switchkd.cli.console import Console, quiet_libraries
from switchkd.cli.options import OptionParser
from switchkd.cli.run_folder import RunFolder


def parser() -> OptionParser:
    """Return the options of `switchkd demo`."""
    result = OptionParser(
        prog="switchkd demo",
        usage="switchkd demo [--output_dir DIR] [--seed N] [--json]",
        description="Make an instruction set, train a small teacher and a much smaller student, distil with SWITCH, "
        "and score both before and after. No download; a few minutes on two CPU cores.",
    )
    result.add_argument("--seed", type=int, default=0, metavar="N", help="seed of data, weights and sampling")
    result.add_shared_options("where to write (default: runs/demo; an earlier demo there is replaced)")
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the demo and return its summary."""
    folder = RunFolder(options.output_dir or "runs/demo", "demo")
    folder.check(overwrite=options.overwrite_output_dir or folder.holds_run("demo"))

    from switchkd.demo.run import run_demo

    quiet_libraries(options.verbose)
    folder.claim({**vars(options), "output_dir": str(folder.path)})
    return run_demo(folder.path, seed=options.seed, say=console.say)
