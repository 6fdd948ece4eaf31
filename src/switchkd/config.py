"""`SwitchConfig`: transformers' TrainingArguments plus what teacher-in-the-loop distillation adds."""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from switchkd import objective
from switchkd.errors import UserError
from switchkd.methods import Method
from switchkd.policies import Policy, SwitchPolicy
from switchkd.sampling import check_warping

#: Options that only the rollout policy reads, and those that every rollout reads.
POLICY_OPTIONS = ("initial_threshold", "final_ratio", "horizon", "schedule")
ROLLOUT_OPTIONS = ("temperature", "top_k", "top_p", "draft_length", "log_completions", "num_completions_to_log")


@dataclass
class SwitchConfig(TrainingArguments):
    """Training options; everything of `transformers.TrainingArguments` is here too.

    Options that are None take the method's own value. An option that the chosen method does not use is refused, not
    ignored. The values of the SWITCH paper for `initial_threshold`, `final_ratio` and `horizon` are not published:
    the defaults are chosen here.
    """

    # As in TrainingArguments, but with values that suit distillation runs of a few hundred steps.
    logging_steps: float = field(default=10, metadata={"help": "Log every this many optimizer steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept False: the trainer needs every column that data preparation made."}
    )

    method: str = field(default="switch", metadata={"help": "Name in switchkd.methods.METHODS: sft, kd, gkd, switch."})
    divergence: str | None = field(
        default=None,
        metadata={
            "help": "Objective: forward_kl, reverse_kl, generalized_jsd, skewed_forward_kl, skewed_reverse_kl, "
            "total_variation or cross_entropy. Default: the method's."
        },
    )
    teacher_weight: float | None = field(
        default=None, metadata={"help": "Teacher weight of generalized_jsd, in (0, 1); TRL's beta."}
    )
    skew: float | None = field(default=None, metadata={"help": "Skew of skewed_*_kl, in [0, 1)."})
    loss_temperature: float = field(
        default=1.0, metadata={"help": "Divides both models' logits in the divergence, > 0. Not the sampling one."}
    )
    on_policy_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of optimizer steps trained on rolled-out text, in [0, 1]; TRL's lmbda."},
    )

    initial_threshold: float | None = field(
        default=None, metadata={"help": "SWITCH: threshold at position 0, nats, in [0, ln 2]. Default 0.3."}
    )
    final_ratio: float | None = field(
        default=None,
        metadata={"help": "SWITCH: threshold at the horizon over the initial one, in (0, 1]. Default 0.1."},
    )
    horizon: float | None = field(
        default=None, metadata={"help": "SWITCH: where final_ratio is reached, tokens. Default max_completion_length."}
    )
    schedule: str | None = field(
        default=None, metadata={"help": "SWITCH: exponential, linear, constant or increasing. Default exponential."}
    )

    max_prompt_length: int = field(
        default=256, metadata={"help": "Longer prompts are dropped and counted, never cut. Tokens."}
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Length limit of rollouts; longer dataset answers are cut. Tokens."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of rollouts; 0 is greedy."})
    top_k: int = field(default=0, metadata={"help": "Rollouts keep the k most likely ids; 0 keeps all."})
    top_p: float = field(default=1.0, metadata={"help": "Rollouts keep the most likely ids up to this mass."})
    draft_length: str = field(
        default="auto", metadata={"help": 'Tokens drafted before the teacher checks them: "auto" or a number.'}
    )

    disable_dropout: bool = field(default=True, metadata={"help": "Set the student's dropout to 0 while it trains."})
    log_completions: bool = field(
        default=False, metadata={"help": "Append a few rollouts to completions.jsonl at every logging step."}
    )
    num_completions_to_log: int = field(default=4, metadata={"help": "How many rollouts log_completions keeps."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained for the student, JSON on the command line."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained for the teacher, JSON on the command line."},
    )

    # Lets the command line read JSON for these, as TrainingArguments does for its own.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            setattr(self, name, _read_json_object(name, getattr(self, name)))
        super().__post_init__()
        if self.remove_unused_columns:
            raise UserError("remove_unused_columns must stay False: the trainer needs the prepared columns")
        if self.label_smoothing_factor:
            raise UserError(f"label_smoothing_factor={self.label_smoothing_factor} does nothing here; remove it")
        if not self.loss_temperature > 0:
            raise UserError(f"loss_temperature must be > 0, got {self.loss_temperature}")
        for name in ("max_prompt_length", "max_completion_length", "num_completions_to_log"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.on_policy_fraction is not None and not 0.0 <= self.on_policy_fraction <= 1.0:
            raise UserError(f"on_policy_fraction must lie in [0, 1], got {self.on_policy_fraction}")
        self.draft_length = str(self.draft_length)
        if self.draft_length != "auto" and not (self.draft_length.isdecimal() and int(self.draft_length) >= 1):
            raise UserError(f'draft_length must be "auto" or an integer >= 1, got {self.draft_length!r}')
        try:
            check_warping(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise UserError(str(error)) from None

    def options_set(self, *names: str) -> dict[str, Any]:
        """Return the named options that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def resolve_objective(method: Method, args: SwitchConfig) -> tuple[str, dict[str, Any]]:
    """Return the objective's name and options: the method's, unless the config sets them.

    Raises:
        UserError: An unknown name, or an option that would do nothing.
    """
    name = args.divergence or method.objective
    options = dict(method.objective_options) if name == method.objective else {}
    options |= args.options_set("teacher_weight", "skew")
    objective.check_objective(name, options)
    if name == objective.CROSS_ENTROPY and args.loss_temperature != 1.0:
        raise UserError(f"loss_temperature={args.loss_temperature} does nothing with cross_entropy; remove it")
    return name, options


def resolve_policy(method: Method, args: SwitchConfig) -> Policy | None:
    """Return the rollout policy of a method, or None for one that trains on the dataset.

    Raises:
        UserError: An option outside its range, or one that the method does not use.
    """
    for name, value in args.options_set(*POLICY_OPTIONS).items():
        if name not in method.policy_options:
            raise UserError(f"{name}={value} does nothing with method {method.name!r}; remove it or use another method")
    if method.policy is None:
        return None
    options = args.options_set(*method.policy_options)
    if "horizon" in method.policy_options:
        options.setdefault("horizon", args.max_completion_length)
    return method.policy(**options)


def resolve_fraction(method: Method, args: SwitchConfig) -> float:
    """Return the share of optimizer steps that train on rolled-out text.

    Raises:
        UserError: A method without rollouts was asked for some.
    """
    if args.on_policy_fraction is None:
        return method.on_policy_fraction
    if method.policy is None and args.on_policy_fraction > 0:
        raise UserError(
            f"on_policy_fraction={args.on_policy_fraction} does nothing with method {method.name!r}, which trains on "
            "the dataset; choose gkd or switch"
        )
    return args.on_policy_fraction


def refuse_idle_options(args: SwitchConfig, policy: Policy | None) -> None:
    """Refuse values of rollout options that nothing reads; the value that holds anyway may stand there.

    Args:
        args: The configuration.
        policy: The policy that rolls out, None where every step trains on the dataset.

    Raises:
        UserError: Names the option.
    """
    idle: dict[str, str] = {}
    if policy is None:
        why = f"method {args.method!r} rolls nothing out" + (
            " at on_policy_fraction 0" if args.on_policy_fraction == 0 else ""
        )
        idle |= dict.fromkeys((*POLICY_OPTIONS, *ROLLOUT_OPTIONS), why)
    elif not policy.needs_teacher:
        idle["draft_length"] = f"no teacher checks the rollouts of method {args.method!r}"
    if isinstance(policy, SwitchPolicy) and policy.schedule == "constant":
        idle |= dict.fromkeys(("final_ratio", "horizon"), "schedule is constant")
    if not args.log_completions:
        idle.setdefault("num_completions_to_log", "log_completions is off")
    defaults = {option.name: option.default for kind in (SwitchConfig, SwitchPolicy) for option in fields(kind)}
    defaults["horizon"] = args.max_completion_length
    for name, reason in idle.items():
        if getattr(args, name) not in (None, defaults[name]):
            raise UserError(f"{name}={getattr(args, name)} does nothing: {reason}; remove it")


def _read_json_object(name: str, value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{name} must be a JSON object, got {value!r}") from None
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name} must be a JSON object, got {value!r}")
    return value
