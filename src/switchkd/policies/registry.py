"""The one registry of policies."""

from switchkd.policies.base import Policy
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
from switchkd.policies.published import AdaSwitchPolicy, BlendPolicy, RelayPolicy, SkdPolicy, TrustRegionPolicy
from switchkd.policies.switch import SwitchPolicy

#: The one registry: name on the command line -> class.
POLICIES: dict[str, type[Policy]] = {
    "switch": SwitchPolicy,
    "student": StudentPolicy,
    "teacher": TeacherPolicy,
    "blend": BlendPolicy,
    "skd": SkdPolicy,
    "adaswitch": AdaSwitchPolicy,
    "relay": RelayPolicy,
    "trb": TrustRegionPolicy,
    "random": RandomPolicy,
    "teacher_first": TeacherFirstPolicy,
    "teacher_prefix": TeacherPrefixPolicy,
    "student_first": StudentFirstPolicy,
    "student_entropy": StudentEntropyPolicy,
    "student_confidence": StudentConfidencePolicy,
}
