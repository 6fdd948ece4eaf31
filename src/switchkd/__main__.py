"""The command `switchkd`, also as `python -m switchkd`: the table of its commands."""

import sys
from collections.abc import Sequence

from switchkd.cli.main import run

#: Name -> the module that is the command, and its line of help.
COMMANDS = {
    "demo": ("switchkd.demo.command", "self-contained demo: distil a small student with SWITCH, no download"),
    "prepare": ("switchkd.commands.prepare", "make folders of the papers' data, or of your own, to train and score on"),
    "plan": (
        "switchkd.commands.plan",
        "say what a training takes on each GPU, how long a step is, and what to change where it does not fit",
    ),
    "train": ("switchkd.commands.train", "distil a student on your models and data"),
    "rollout": ("switchkd.commands.rollout", "write completions with the teacher in the loop and show who wrote what"),
    "evaluate": ("switchkd.commands.evaluate", "score a model's own answers: ROUGE-L over several decoding seeds"),
    "calibrate": (
        "switchkd.commands.calibrate",
        "find the threshold that gives a target teacher share on your prompts",
    ),
    "diagnose": (
        "switchkd.commands.diagnose",
        "measure before training whether it matters for your pair who writes the text, and whose to train on",
    ),
    "compare": (
        "switchkd.compare.command",
        "train and score methods side by side, several seeds each, and say which differences are significant",
    ),
    "judge": ("switchkd.commands.judge", "let a chat model say which of two runs answers better, prompt by prompt"),
    "report": ("switchkd.report.command", "make one HTML page from the folders of runs"),
    "recipe": ("switchkd.recipes.command", "whole experiments of the papers, stage by stage: list, show, run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with its arguments, those of the process if None, and return the exit code."""
    return run(COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
