"""Who writes the next token: a policy sees two next-token distributions and a position, never a model."""

from switchkd.policies.base import Decision, Policy, Positions, ThresholdPolicy, teacher_where
from switchkd.policies.controls import (
    RandomPolicy,
    StudentConfidencePolicy,
    StudentEntropyPolicy,
    StudentFirstPolicy,
    StudentPolicy,
    TeacherFirstPolicy,
    TeacherPolicy,
    TeacherPrefixPolicy,
)
from switchkd.policies.find import find_policy
from switchkd.policies.published import AdaSwitchPolicy, BlendPolicy, RelayPolicy, SkdPolicy, TrustRegionPolicy
from switchkd.policies.registry import POLICIES
from switchkd.policies.switch import PacedSwitchPolicy, SwitchPolicy

__all__ = [
    "POLICIES",
    "AdaSwitchPolicy",
    "BlendPolicy",
    "Decision",
    "PacedSwitchPolicy",
    "Policy",
    "Positions",
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
    "find_policy",
    "teacher_where",
]
