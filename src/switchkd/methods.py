"""The methods as values: exact name -> who writes the training text, how often, and what is learned from it.

Nothing here imports torch: `switchkd train --help` and a wrong option need not wait for it.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from switchkd import plugins
from switchkd.errors import UserError, check_choice, check_range
from switchkd.objective_names import CROSS_ENTROPY, OBJECTIVES
from switchkd.policy_options import POLICY_OPTIONS

if TYPE_CHECKING:  # importing them takes torch, which the help and a wrong option need not wait for
    from switchkd.policies import Policy


@dataclass(frozen=True)
class Method:
    """One way to train a student.

    Attributes:
        name: The exact name used on the command line and in configs.
        summary: One line: who writes, what is learned.
        objective: `cross_entropy` or the name of a divergence.
        source: Paper.
        objective_options: Keyword options of that divergence.
        policy: The rollout policy: a name in `switchkd.policies.POLICIES` or a class; None where the text is the
            dataset's.
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
    policy: "str | type[Policy] | None" = None
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
        """Names of the config fields that are passed to the policy; a policy's other options are `policy_kwargs`."""
        if self.tunable is not None or self.policy is None:
            return self.tunable or ()
        return tuple(name for name in self._own_defaults(length_limit=None) if name in POLICY_OPTIONS)

    def default_options(self, length_limit: Any) -> dict[str, Any]:
        """Return the policy's options with the values that hold where the config has None.

        Args:
            length_limit: Of completions, tokens; some options follow it.
        """
        if self.policy is None:
            return {}
        defaults = {**self._own_defaults(length_limit), **self.policy_defaults}
        return {name: defaults[name] for name in self.policy_options}

    def _own_defaults(self, length_limit: Any) -> dict[str, Any]:
        """Option -> default of the policy; those of a named one stand in the table, which needs no torch."""
        if isinstance(self.policy, str):
            own = {name: o.default[self.policy] for name, o in POLICY_OPTIONS.items() if self.policy in o.default}
            return {name: length_limit if value is None else value for name, value in own.items()}
        if self.policy is None:
            return {}
        return self.policy.options() | dict.fromkeys(self.policy.length_options, length_limit)

    def policy_class(self) -> "type[Policy] | None":
        """Return the class of the policy, None where the text is the dataset's.

        Raises:
            UserError: There is no policy of that name.
        """
        from switchkd.policies import find_policy

        return find_policy(self.policy) if isinstance(self.policy, str) else self.policy


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
            policy="teacher",
            teacher_text=True,
            source="Kim and Rush, arXiv 1606.07947",
        ),
        Method(
            name="imitkd",
            summary="student-written text, forward KL",
            objective="forward_kl",
            policy="student",
            on_policy_fraction=1.0,
            source="Lin et al., arXiv 2009.07253",
        ),
        Method(
            name="gkd",
            summary="student-written text in half of the steps, dataset answers in the others; JSD",
            objective="generalized_jsd",
            objective_options={"teacher_weight": 0.5},
            policy="student",
            on_policy_fraction=0.5,
            source="Agarwal et al., arXiv 2306.13649",
        ),
        Method(
            name="opd",
            summary="student-written text, reverse KL",
            objective="reverse_kl",
            policy="student",
            on_policy_fraction=1.0,
            source="Thinking Machines Lab, On-Policy Distillation, 2025",
        ),
        Method(
            name="minillm",
            summary="text sampled from 0.8 student + 0.2 teacher, reverse KL of whole texts by policy gradient",
            objective="reverse_kl",
            policy="blend",
            on_policy_fraction=1.0,
            policy_gradient=True,
            source="Gu et al., arXiv 2306.08543",
        ),
        Method(
            name="distillm",
            summary="dataset answers, then more and more student-written text through a replay store; skewed KL",
            objective="skewed_reverse_kl",
            policy="student",
            on_policy_fraction=0.0,
            adaptive_fraction=True,
            replay=True,
            source="Ko et al., arXiv 2402.03898",
        ),
        Method(
            name="truncated",
            summary="student-written text whose length limit grows over training; reverse KL",
            objective="reverse_kl",
            policy="student",
            on_policy_fraction=1.0,
            truncation_start=0.1,
            source="Ziheng et al., arXiv 2605.27028; Zhang et al., arXiv 2605.31490",
        ),
        Method(
            name="teacher_prefix",
            summary="the teacher writes the first tokens, ever fewer over training, the student the rest; reverse KL",
            objective="reverse_kl",
            policy="teacher_prefix",
            on_policy_fraction=1.0,
            source="public practice, no paper",
        ),
        Method(
            name="switch",
            summary="the student writes, the teacher takes over where the two differ too much; reverse KL",
            objective="reverse_kl",
            policy="switch",
            on_policy_fraction=1.0,
            source="Koo et al., arXiv 2410.19503",
        ),
        Method(
            name="skd",
            summary="student-written text; the teacher replaces drafted tokens outside its top K; forward KL",
            objective="forward_kl",
            policy="skd",
            on_policy_fraction=1.0,
            source="Xu et al., arXiv 2410.11325",
        ),
        Method(
            name="adaswitch",
            summary="student up to one position far harder than those before, teacher after it; forward KL",
            objective="forward_kl",
            policy="adaswitch",
            on_policy_fraction=1.0,
            source="Peng et al., arXiv 2510.07842",
        ),
        Method(
            name="ssd",
            summary="switch at a constant threshold; the teacher is the student before training, with a richer prompt",
            objective="generalized_jsd",
            objective_options={"teacher_weight": 0.5},
            policy="switch",
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
            policy="relay",
            on_policy_fraction=1.0,
            source="Xu et al., arXiv 2607.26057",
        ),
        Method(
            name="trb",
            summary="text sampled from a blend within a KL budget that falls to zero; reverse KL",
            objective="reverse_kl",
            policy="trb",
            on_policy_fraction=1.0,
            source="Plyusov et al., arXiv 2605.31159",
        ),
        Method(
            name="random",
            summary="control: the teacher writes random positions; reverse KL",
            objective="reverse_kl",
            policy="random",
            on_policy_fraction=1.0,
            source="control of switch, arXiv 2410.19503",
        ),
        Method(
            name="teacher_first",
            summary="control: the teacher writes the first tokens, the student the rest; reverse KL",
            objective="reverse_kl",
            policy="teacher_first",
            on_policy_fraction=1.0,
            source="control of switch, arXiv 2410.19503",
        ),
        Method(
            name="student_first",
            summary="control: the student writes the first tokens, the teacher the rest; reverse KL",
            objective="reverse_kl",
            policy="student_first",
            on_policy_fraction=1.0,
            source="control of switch, arXiv 2410.19503",
        ),
        Method(
            name="student_entropy",
            summary="control: the teacher writes where the student's entropy is high; reverse KL",
            objective="reverse_kl",
            policy="student_entropy",
            on_policy_fraction=1.0,
            source="control of switch, arXiv 2410.19503",
        ),
        Method(
            name="student_confidence",
            summary="control: the teacher writes where the student's likeliest token is unlikely; reverse KL",
            objective="reverse_kl",
            policy="student_confidence",
            on_policy_fraction=1.0,
            source="control of switch, arXiv 2410.19503",
        ),
    )
}


def register_method(method: Method) -> Method:
    """Add a method of your own to the table, so that a config can name it, and return it.

    Args:
        method: With a name that no other method has. What registers itself when a package is imported can be announced
            instead, as an entry point of the group `switchkd.methods`: then the command line knows it too.

    Raises:
        UserError: The name is taken, or the method does not fit together.
    """
    if METHODS.get(method.name, method) != method:
        raise UserError(f"a method {method.name!r} exists already; give yours another name")
    check_choice(f"method {method.name!r}: objective", method.objective, tuple(OBJECTIVES))
    check_range(f"method {method.name!r}: on_policy_fraction", method.on_policy_fraction, 0.0, 1.0)
    if method.policy is None and (method.on_policy_fraction > 0 or method.teacher_text or method.replay):
        raise UserError(f"method {method.name!r} rolls text out, but has no policy; give one")
    METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """Return the method of that exact name.

    Args:
        name: One of `METHODS`, one that an installed package announces under `switchkd.methods`, or
            `path/to/file.py:METHOD` or `module:METHOD`.

    Raises:
        UserError: No such method; the nearest name is given.
    """
    found = METHODS.get(name) or plugins.load_named("method", plugins.METHODS, name)
    if found is None:
        valid = [*METHODS, *plugins.announced(plugins.METHODS)]
        near = difflib.get_close_matches(name, valid, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown method {name!r}; {hint}valid: {', '.join(valid)}")
    if not isinstance(found, Method):
        raise UserError(f"method {name}: expected a switchkd.Method, got {found!r}")
    return found
