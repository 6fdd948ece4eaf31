"""Pushing a trained model to the hub without losing it where the hub cannot be reached."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import get_token

from switchkd.errors import UserError
from switchkd.models import hub

if TYPE_CHECKING:
    from switchkd.training.config import SwitchConfig

# No answer, a refusal, a name that cannot be one.
FAILURES: tuple[type[Exception], ...] = (*hub.NO_ANSWER, ValueError)


def check_hub(config: "SwitchConfig") -> bool:
    """Return whether the model is to be pushed at the end; pushes during the training need the hub at its start.

    Raises:
        UserError: The hub can be reached, but there is no token to write with.
    """
    if not config.push_to_hub:
        return False
    problem = hub.problem()
    if problem is not None:
        warnings.warn(
            f"push_to_hub: the hub cannot be reached ({problem}); the run trains and saves the model in "
            f"{config.output_dir}, and tries to push it at the end"
        )
        config.push_to_hub = False  # the Trainer would create the repository before the first step
    elif config.hub_token is None and get_token() is None:
        raise UserError("push_to_hub needs a token with write access: run `hf auth login`, or give --hub_token")
    return True


def push(trainer: Any) -> str | None:
    """Push the saved model and return None, or why that failed, in one line."""
    problem = hub.problem()
    if problem is None:
        try:
            trainer.push_to_hub()
        except FAILURES as error:
            problem = " ".join(str(error).split()) or type(error).__name__
    if problem is None:
        return None
    folder = Path(trainer.args.output_dir)
    name = trainer.args.hub_model_id or folder.absolute().name
    return f"the model is saved in {folder}, but pushing it failed ({problem}); push it with: hf upload {name} {folder}"
