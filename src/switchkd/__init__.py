"""switchkd: distil large language models with the teacher in the loop."""

from importlib import import_module
from importlib.metadata import version
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchkd.engine import roll_out
    from switchkd.errors import UserError
    from switchkd.policies import BlendPolicy, StudentPolicy, SwitchPolicy, TeacherPolicy
    from switchkd.rollout import Author, Rollout
    from switchkd.training.config import SwitchConfig
    from switchkd.training.trainer import SwitchTrainer

__version__ = version("switchkd")

# Imported on first use: `switchkd --help` must not wait for torch.
_HOMES = {
    "Author": "rollout",
    "BlendPolicy": "policies",
    "Rollout": "rollout",
    "StudentPolicy": "policies",
    "SwitchConfig": "training.config",
    "SwitchPolicy": "policies",
    "SwitchTrainer": "training.trainer",
    "TeacherPolicy": "policies",
    "UserError": "errors",
    "roll_out": "engine",
}

__all__ = [
    "Author",
    "BlendPolicy",
    "Rollout",
    "StudentPolicy",
    "SwitchConfig",
    "SwitchPolicy",
    "SwitchTrainer",
    "TeacherPolicy",
    "UserError",
    "__version__",
    "roll_out",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"switchkd.{_HOMES[name]}"), name)
    if name in _submodules():
        return import_module(f"switchkd.{name}")
    raise AttributeError(f"module 'switchkd' has no attribute {name!r}")


def _submodules() -> set[str]:
    return {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}


def __dir__() -> list[str]:
    return sorted({*__all__, *_submodules()})
