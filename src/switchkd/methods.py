"""The methods as values: exact name -> who writes the training text, how often, and what is learned from it."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from switchkd.errors import UserError
from switchkd.objective import CROSS_ENTROPY
from switchkd.policies import (
    AdaSwitchPolicy,
    BlendPolicy,
    Policy,
    RandomPolicy,
    RelayPolicy,
    SkdPolicy,
    StudentConfidencePolicy,
    StudentEntropyPolicy,
    StudentFirstPolicy,
    StudentPolicy,
    SwitchPolicy,
    TeacherFirstPolicy,
    TeacherPolicy,
    TeacherPrefixPolicy,
    TrustRegionPolicy,
)


@dataclass(frozen=True)
class Method:
    """One way to train a student.

    Attributes:
        name: The exact name used on the command line and in configs.
        summary: One line: who writes, what is learned.
        objective: `cross_entropy` or the name of a divergence.
        source: Paper.
        objective_options: Keyword options of that divergence.
        policy: Class of the rollout policy; None where the text is the dataset's.
        tunable: Options of the policy that a config may set, each a field of the same name; all of them if None.
        policy_defaults: Arguments of `policy` that differ from its own defaults.
        on_policy_fraction: Share of optimizer steps whose text is rolled out, in [0, 1]; the others use the dataset.
        truncation_start: Length limit of rollouts at the start of training, as a share of the full one, in (0, 1].
        adaptive_fraction: That share is only the start; it grows each time the evaluation loss gets worse.
        replay: Rolled-out rows are stored, and a growing part of the rolled-out steps takes stored ones.
        policy_gradient: The objective is MiniLLM's: the divergence weighted by importance, plus the policy gradient.
        teacher_text: Dataset answers are replaced once, before training, by the policy's rollouts.
        own_teacher: The teacher is the student as it was before training, with another prompt.
    """

    name: str
    summary: str
    objective: str
    source: str
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    policy: type[Policy] | None = None
    tunable: tuple[str, ...] | None = None
    policy_defaults: Mapping[str, Any] = field(default_factory=dict)
    on_policy_fraction: float = 0.0
    truncation_start: float = 1.0
    adaptive_fraction: bool = False
    replay: bool = False
    policy_gradient: bool = False
    teacher_text: bool = False
    own_teacher: bool = False

    @property
    def may_roll_out(self) -> bool:
        """Whether steps of this method can train on rolled-out text."""
        return self.policy is not None and not self.teacher_text

    @property
    def policy_options(self) -> tuple[str, ...]:
        """Names of the config fields that are passed to the policy."""
        if self.tunable is not None or self.policy is None:
            return self.tunable or ()
        return tuple(self.policy.options())

    def default_options(self, length_limit: Any) -> dict[str, Any]:
        """Return the policy's options with the values that hold where the config has None.

        Args:
            length_limit: Of completions, tokens; some options follow it.
        """
        if self.policy is None:
            return {}
        defaults = self.policy.options() | dict.fromkeys(self.policy.length_options, length_limit)
        defaults |= self.policy_defaults
        return {name: defaults[name] for name in self.policy_options}

    def make_policy(self, **options: Any) -> Policy | None:
        """Return the policy, None where the text is the dataset's.

        Raises:
            UserError: A value outside its range.
        """
        return None if self.policy is None else self.policy.of(**{**self.policy_defaults, **options})


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="sft",
            summary="dataset answers, cross-entropy; no teacher",
            objective=CROSS_ENTROPY,
            source="supervised fine-tuning",
        ),
        Method(
            name="kd",
            summary="dataset answers, forward KL to the teacher",
            objective="forward_kl",
            source="Hinton et al., arXiv 1503.02531",
        ),
        Method(
            name="seqkd",
            summary="answers the teacher wrote once before training, cross-entropy",
            objective=CROSS_ENTROPY,
            policy=TeacherPolicy,
            teacher_text=True,
            source="Kim and Rush, arXiv 1606.07947",
        ),
        Method(
            name="imitkd",
            summary="student-written text, forward KL",
            objective="forward_kl",
            policy=StudentPolicy,
            on_policy_fraction=1.0,
            source="Lin et al., arXiv 2009.07253",
        ),
        Method(
            name="gkd",
            summary="student-written text in half of the steps, dataset answers in the others; JSD",
            objective="generalized_jsd",
            objective_options={"teacher_weight": 0.5},
            policy=StudentPolicy,
            on_policy_fraction=0.5,
            source="Agarwal et al., arXiv 2306.13649",
        ),
        Method(
            name="opd",
            summary="student-written text, reverse KL",
            objective="reverse_kl",
            policy=StudentPolicy,
            on_policy_fraction=1.0,
            source="Thinking Machines Lab, On-Policy Distillation, 2025",
        ),
        Method(
            name="minillm",
            summary="text sampled from 0.8 student + 0.2 teacher, reverse KL of whole texts by policy gradient",
            objective="reverse_kl",
            policy=BlendPolicy,
            on_policy_fraction=1.0,
            policy_gradient=True,
            source="Gu et al., arXiv 2306.08543",
        ),
        Method(
            name="distillm",
            summary="dataset answers, then more and more student-written text through a replay store; skewed KL",
            objective="skewed_reverse_kl",
            policy=StudentPolicy,
            on_policy_fraction=0.0,
            adaptive_fraction=True,
            replay=True,
            source="Ko et al., arXiv 2402.03898",
        ),
        Method(
            name="truncated",
            summary="student-written text whose length limit grows over training; reverse KL",
            objective="reverse_kl",
            policy=StudentPolicy,
            on_policy_fraction=1.0,
            truncation_start=0.1,
            source="Ziheng et al., arXiv 2605.27028; Zhang et al., arXiv 2605.31490",
        ),
        Method(
            name="teacher_prefix",
            summary="the teacher writes the first tokens, ever fewer over training, the student the rest; reverse KL",
            objective="reverse_kl",
            policy=TeacherPrefixPolicy,
            on_policy_fraction=1.0,
            source="public practice, no paper",
        ),
        Method(
            name="switch",
            summary="the student writes, the teacher takes over where the two differ too much; reverse KL",
            objective="reverse_kl",
            policy=SwitchPolicy,
            on_policy_fraction=1.0,
            source="Koo et al., arXiv 2410.19503",
        ),
        Method(
            name="skd",
            summary="student-written text; the teacher replaces drafted tokens outside its top K; forward KL",
            objective="forward_kl",
            policy=SkdPolicy,
            on_policy_fraction=1.0,
            source="Xu et al., arXiv 2410.11325",
        ),
        Method(
            name="adaswitch",
            summary="student up to one position far harder than those before, teacher after it; forward KL",
            objective="forward_kl",
            policy=AdaSwitchPolicy,
            on_policy_fraction=1.0,
            source="Peng et al., arXiv 2510.07842",
        ),
        Method(
            name="ssd",
            summary="switch at a constant threshold; the teacher is the student before training, with a richer prompt",
            objective="generalized_jsd",
            objective_options={"teacher_weight": 0.5},
            policy=SwitchPolicy,
            tunable=("initial_threshold", "minimum_leg"),
            policy_defaults={"schedule": "constant"},
            on_policy_fraction=1.0,
            own_teacher=True,
            source="own formulation, the rule of arXiv 2410.19503",
        ),
        Method(
            name="relay",
            summary="student-written text with a few short legs of the teacher; reverse KL",
            objective="reverse_kl",
            policy=RelayPolicy,
            on_policy_fraction=1.0,
            source="Xu et al., arXiv 2607.26057",
        ),
        Method(
            name="trb",
            summary="text sampled from a blend within a KL budget that falls to zero; reverse KL",
            objective="reverse_kl",
            policy=TrustRegionPolicy,
            on_policy_fraction=1.0,
            source="Plyusov et al., arXiv 2605.31159",
        ),
        Method(
            name="random",
            summary="control: the teacher writes random positions; reverse KL",
            objective="reverse_kl",
            policy=RandomPolicy,
            on_policy_fraction=1.0,
            source="control of switch, arXiv 2410.19503",
        ),
        Method(
            name="teacher_first",
            summary="control: the teacher writes the first tokens, the student the rest; reverse KL",
            objective="reverse_kl",
            policy=TeacherFirstPolicy,
            on_policy_fraction=1.0,
            source="control of switch, arXiv 2410.19503",
        ),
        Method(
            name="student_first",
            summary="control: the student writes the first tokens, the teacher the rest; reverse KL",
            objective="reverse_kl",
            policy=StudentFirstPolicy,
            on_policy_fraction=1.0,
            source="control of switch, arXiv 2410.19503",
        ),
        Method(
            name="student_entropy",
            summary="control: the teacher writes where the student's entropy is high; reverse KL",
            objective="reverse_kl",
            policy=StudentEntropyPolicy,
            on_policy_fraction=1.0,
            source="control of switch, arXiv 2410.19503",
        ),
        Method(
            name="student_confidence",
            summary="control: the teacher writes where the student's likeliest token is unlikely; reverse KL",
            objective="reverse_kl",
            policy=StudentConfidencePolicy,
            on_policy_fraction=1.0,
            source="control of switch, arXiv 2410.19503",
        ),
    )
}


def get_method(name: str) -> Method:
    """Return the method of that exact name.

    Raises:
        UserError: No such method; the nearest name is given.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown method {name!r}; {hint}valid: {', '.join(METHODS)}")
