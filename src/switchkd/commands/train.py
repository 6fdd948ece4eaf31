"""`switchkd train`: distil a student on the user's models and data."""

import argparse
from typing import Any

from switchkd.cli.console import Console
from switchkd.commands.train_options import check_options, parser

__all__ = ["parser", "run"]


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train, save the model, and return what was reached."""
    check_options(options)
    # The Trainer takes seconds to import: a mistake in the options is told before.
    from switchkd.commands.train_run import train

    return train(options, console)
