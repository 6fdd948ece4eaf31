"""switchkd: distil large language models with the teacher in the loop."""

from importlib import import_module
from importlib.metadata import version
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see of the table below; "as" marks a name as public
    from switchkd.data import Mixture as Mixture
    from switchkd.data import prepare as prepare
    from switchkd.engine import check_policy as check_policy
    from switchkd.engine import roll_out as roll_out
    from switchkd.errors import UserError as UserError
    from switchkd.evaluation import evaluate as evaluate
    from switchkd.methods import METHODS as METHODS
    from switchkd.methods import Method as Method
    from switchkd.methods import register_method as register_method
    from switchkd.policies import AdaSwitchPolicy as AdaSwitchPolicy
    from switchkd.policies import BlendPolicy as BlendPolicy
    from switchkd.policies import PacedSwitchPolicy as PacedSwitchPolicy
    from switchkd.policies import Policy as Policy
    from switchkd.policies import RandomPolicy as RandomPolicy
    from switchkd.policies import RelayPolicy as RelayPolicy
    from switchkd.policies import SkdPolicy as SkdPolicy
    from switchkd.policies import StudentConfidencePolicy as StudentConfidencePolicy
    from switchkd.policies import StudentEntropyPolicy as StudentEntropyPolicy
    from switchkd.policies import StudentFirstPolicy as StudentFirstPolicy
    from switchkd.policies import StudentPolicy as StudentPolicy
    from switchkd.policies import SwitchPolicy as SwitchPolicy
    from switchkd.policies import TeacherFirstPolicy as TeacherFirstPolicy
    from switchkd.policies import TeacherPolicy as TeacherPolicy
    from switchkd.policies import TeacherPrefixPolicy as TeacherPrefixPolicy
    from switchkd.policies import ThresholdPolicy as ThresholdPolicy
    from switchkd.policies import TrustRegionPolicy as TrustRegionPolicy
    from switchkd.rollout import Author as Author
    from switchkd.rollout import Rollout as Rollout
    from switchkd.training.calibration import calibrate as calibrate
    from switchkd.training.config import SwitchConfig as SwitchConfig
    from switchkd.training.trainer import SwitchTrainer as SwitchTrainer

__version__ = version("switchkd")

# Module -> its public names, imported on first use: `switchkd --help` must not wait for torch.
_NAMES = {
    "data": ("Mixture", "prepare"),
    "engine": ("check_policy", "roll_out"),
    "errors": ("UserError",),
    "evaluation": ("evaluate",),
    "methods": ("METHODS", "Method", "register_method"),
    "policies": (
        "AdaSwitchPolicy",
        "BlendPolicy",
        "PacedSwitchPolicy",
        "Policy",
        "RandomPolicy",
        "RelayPolicy",
        "SkdPolicy",
        "StudentConfidencePolicy",
        "StudentEntropyPolicy",
        "StudentFirstPolicy",
        "StudentPolicy",
        "SwitchPolicy",
        "TeacherFirstPolicy",
        "TeacherPolicy",
        "TeacherPrefixPolicy",
        "ThresholdPolicy",
        "TrustRegionPolicy",
    ),
    "rollout": ("Author", "Rollout"),
    "training.calibration": ("calibrate",),
    "training.config": ("SwitchConfig",),
    "training.trainer": ("SwitchTrainer",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOMES)]


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
