"""`SwitchConfig`: transformers' TrainingArguments plus what teacher-in-the-loop distillation adds."""

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from switchkd.errors import UserError
from switchkd.methods import METHODS, Method
from switchkd.objective import loss as objective
from switchkd.policies import Policy, SwitchPolicy
from switchkd.sampling import check_warping

#: Options that only a rollout policy reads, those that every rollout reads, and those of steps that roll out.
POLICY_OPTIONS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.policy_options))
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "draft_length", "rollout_batch_size")
HIDDEN_OPTIONS = ("reuse_teacher_hidden", "teacher_hidden_dtype", "offload_teacher_hidden")
STEP_OPTIONS = (
    "log_completions",
    "num_completions_to_log",
    "target_teacher_share",
    "student_token_weight",
    "teacher_token_weight",
    *HIDDEN_OPTIONS,
)
#: Options of one kind of method: option -> attribute of `Method`, and what such a method does.
OPTIONS_OF_A_KIND = {
    "replay_capacity": ("replay", "stores rollouts"),
    "clip_range": ("policy_gradient", "takes a policy gradient"),
    "teacher_text_file": ("teacher_text", "trains on text the teacher wrote before"),
}


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

    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Kept False: a loss that is nan must not be logged as 0."}
    )

    method: str = field(default="switch", metadata={"help": f"One of {', '.join(METHODS)}."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Teacher: folder or hub id."})
    divergence: str | None = field(
        default=None,
        metadata={
            "help": "Objective: forward_kl, reverse_kl, generalized_jsd, skewed_forward_kl, skewed_reverse_kl, "
            "total_variation, adaptive_kl or cross_entropy. Default: the method's."
        },
    )
    teacher_weight: float | None = field(
        default=None, metadata={"help": "Teacher weight of generalized_jsd, in (0, 1); TRL's beta."}
    )
    skew: float | None = field(default=None, metadata={"help": "Skew of skewed_*_kl, in [0, 1)."})
    head_mass: float | None = field(
        default=None, metadata={"help": "Share of the teacher's mass that is the head of adaptive_kl, in (0, 1)."}
    )
    loss_temperature: float = field(
        default=1.0, metadata={"help": "Divides both models' logits in the divergence, > 0. Not the sampling one."}
    )
    on_policy_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of optimizer steps trained on rolled-out text, in [0, 1]; TRL's lmbda. distillm: at first."
        },
    )
    clip_range: float | None = field(
        default=None,
        metadata={"help": "minillm: importance weights count as within 1 -+ this; 0 does not clip. Default 0.2."},
    )
    replay_capacity: int | None = field(
        default=None, metadata={"help": "distillm: rows of past rollouts that are kept. Default 1000."}
    )
    teacher_text_file: str | None = field(
        default=None,
        metadata={"help": "seqkd: JSONL of the teacher's answers, written or taken up. Default: in output_dir."},
    )
    ce_weight: float = field(
        default=0.0, metadata={"help": "Adds this times the cross-entropy on steps that train on dataset answers."}
    )
    lm_weight: float = field(
        default=0.0, metadata={"help": "Adds this times the cross-entropy on a data set of plain text to every step."}
    )
    student_token_weight: float = field(
        default=1.0, metadata={"help": "Multiplies the loss of rolled-out tokens that the student wrote, >= 0."}
    )
    teacher_token_weight: float = field(
        default=1.0, metadata={"help": "Multiplies the loss of rolled-out tokens that the teacher wrote, >= 0."}
    )

    target_teacher_share: float | None = field(
        default=None,
        metadata={"help": "Keep the teacher's share of rolled-out tokens here by moving the threshold, in (0, 1)."},
    )
    initial_threshold: float | None = field(
        default=None,
        metadata={"help": "Threshold at position 0, nats; switch and ssd: in [0, ln 2]. Default 0.3."},
    )
    final_ratio: float | None = field(
        default=None, metadata={"help": "Threshold at the horizon over the initial one, in (0, 1]. Default 0.1."}
    )
    horizon: float | None = field(
        default=None, metadata={"help": "Where final_ratio is reached, tokens. Default max_completion_length."}
    )
    schedule: str | None = field(
        default=None, metadata={"help": "exponential, linear, constant or increasing. Default exponential."}
    )
    minimum_leg: int | None = field(
        default=None, metadata={"help": "Nobody takes the pen back before so many tokens. Default 1."}
    )
    clock: str | None = field(
        default=None,
        metadata={"help": "What the schedule counts: position, or since_teacher. Default position."},
    )
    mixture_weight: float | None = field(
        default=None, metadata={"help": "minillm: teacher's part of the blend that writes, in [0, 1]. Default 0.2."}
    )
    teacher_top_k: int | None = field(
        default=None, metadata={"help": "skd: drafts outside the teacher's first K are replaced. Default 25."}
    )
    divergence_multiple: float | None = field(
        default=None, metadata={"help": "adaswitch: switch where KL exceeds this times its moving mean. Default 3."}
    )
    divergence_window: int | None = field(default=None, metadata={"help": "adaswitch: tokens of that mean. Default 8."})
    trigger_threshold: float | None = field(
        default=None, metadata={"help": "relay: JSD that starts a leg of the teacher, nats. Default 0.3."}
    )
    leg_length: int | None = field(default=None, metadata={"help": "relay: tokens of a leg. Default 8."})
    leg_budget: int | None = field(default=None, metadata={"help": "relay: legs of a text at most. Default 4."})
    kl_budget: float | None = field(
        default=None, metadata={"help": "trb: KL(blend, student) allowed at the start, nats. Default 0.1."}
    )
    kl_budget_warmup: float | None = field(
        default=None, metadata={"help": "trb: share of training over which it falls to 0, in (0, 1]. Default 0.5."}
    )
    teacher_share: float | None = field(
        default=None, metadata={"help": "random: share of positions the teacher writes, in [0, 1]. Default 0.53."}
    )
    teacher_tokens: int | None = field(
        default=None, metadata={"help": "teacher_first: tokens the teacher writes. Default 64."}
    )
    switch_position: int | None = field(
        default=None, metadata={"help": "student_first: where the teacher takes over, from 0. Default 64."}
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

    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows decoded at once; bounds memory and changes no text. Default: as many as fit into the memory "
            "that training one micro-batch takes."
        },
    )

    reuse_teacher_hidden: bool = field(
        default=True,
        metadata={"help": "Keep the teacher's states of a rollout for the loss instead of another teacher pass."},
    )
    teacher_hidden_dtype: str | None = field(
        default=None, metadata={"help": "Precision of the kept states: float32, bfloat16. Default: the teacher's."}
    )
    offload_teacher_hidden: bool = field(
        default=False, metadata={"help": "Keep those states in main memory until their micro-batch. GPU only."}
    )
    offload_teacher: bool = field(
        default=False, metadata={"help": "Keep the teacher in main memory while nobody asks it. GPU only."}
    )
    eval_rouge_l_samples: int = field(
        default=0,
        metadata={"help": "Evaluation also answers so many prompts and logs eval_rouge_l; 0 answers none."},
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
        if self.logging_nan_inf_filter:
            raise UserError("logging_nan_inf_filter must stay False: it would log a loss that is nan as 0")
        if self.label_smoothing_factor:
            raise UserError(f"label_smoothing_factor={self.label_smoothing_factor} does nothing here; remove it")
        self._check_own_ranges()

    def options_set(self, *names: str) -> dict[str, Any]:
        """Return the named options that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _check_own_ranges(self) -> None:
        if not (self.loss_temperature > 0 and math.isfinite(self.loss_temperature)):
            raise UserError(f"loss_temperature must be a finite number > 0, got {self.loss_temperature}")
        for name in ("max_prompt_length", "max_completion_length", "num_completions_to_log"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in (
            "ce_weight",
            "lm_weight",
            "student_token_weight",
            "teacher_token_weight",
            "eval_rouge_l_samples",
            "clip_range",
            "replay_capacity",
        ):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} must be a finite number >= 0, got {value}")
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            raise UserError(f"rollout_batch_size must be >= 1, got {self.rollout_batch_size}")
        if self.on_policy_fraction is not None and not 0.0 <= self.on_policy_fraction <= 1.0:
            raise UserError(f"on_policy_fraction must lie in [0, 1], got {self.on_policy_fraction}")
        if self.target_teacher_share is not None and not 0.0 < self.target_teacher_share < 1.0:
            raise UserError(f"target_teacher_share must lie in (0, 1), got {self.target_teacher_share}")
        if self.teacher_hidden_dtype not in (None, "float32", "bfloat16", "float16"):
            raise UserError(
                f"teacher_hidden_dtype must be float32, bfloat16 or float16, got {self.teacher_hidden_dtype!r}"
            )
        self.draft_length = str(self.draft_length)
        if self.draft_length != "auto" and not (self.draft_length.isdecimal() and int(self.draft_length) >= 1):
            raise UserError(f'draft_length must be "auto" or an integer >= 1, got {self.draft_length!r}')
        try:
            check_warping(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise UserError(str(error)) from None


def resolve_objective(method: Method, args: SwitchConfig) -> tuple[str, dict[str, Any]]:
    """Return the objective's name and options: the method's, unless the config sets them.

    Raises:
        UserError: An unknown name, or an option that would do nothing.
    """
    name = args.divergence or method.objective
    options = dict(method.objective_options) if name == method.objective else {}
    options |= args.options_set("teacher_weight", "skew", "head_mass")
    objective.check_objective(name, options)
    if name == objective.CROSS_ENTROPY and args.loss_temperature != 1.0:
        raise UserError(f"loss_temperature={args.loss_temperature} does nothing with cross_entropy; remove it")
    if method.policy_gradient and (name != method.objective or args.loss_temperature != 1.0):
        wrong = f"divergence={name}" if name != method.objective else f"loss_temperature={args.loss_temperature}"
        raise UserError(f"{wrong} does not belong to method {method.name!r}: its gradient is that of the reverse KL")
    return name, options


def resolve_policy_options(method: Method, args: SwitchConfig) -> dict[str, Any]:
    """Return the options of the method's policy with the values that hold.

    Raises:
        UserError: An option that the method does not use.
    """
    for name, value in args.options_set(*POLICY_OPTIONS).items():
        if name not in method.policy_options:
            raise UserError(f"{name}={value} does nothing with method {method.name!r}; remove it or use another method")
    options = method.default_options()
    if "horizon" in options:
        options["horizon"] = args.max_completion_length
    return options | args.options_set(*method.policy_options)


def resolve_policy(method: Method, args: SwitchConfig) -> Policy | None:
    """Return the rollout policy of a method, or None for one that trains on the dataset.

    Raises:
        UserError: An option outside its range, or one that the method does not use.
    """
    policy = method.make_policy(**resolve_policy_options(method, args))
    if method.policy_gradient and (args.temperature, args.top_k, args.top_p) != (1.0, 0, 1.0):
        raise UserError(
            f"method {method.name!r} weighs tokens by the probability they were sampled with: it needs temperature 1, "
            f"top_k 0 and top_p 1, got {args.temperature}, {args.top_k} and {args.top_p}"
        )
    return policy


def resolve_fraction(method: Method, args: SwitchConfig) -> float:
    """Return the share of optimizer steps that train on rolled-out text.

    Raises:
        UserError: A method without rollouts was asked for some.
    """
    if args.on_policy_fraction is None:
        return method.on_policy_fraction
    if not method.may_roll_out and args.on_policy_fraction > 0:
        raise UserError(
            f"on_policy_fraction={args.on_policy_fraction} does nothing with method {method.name!r}, whose steps do "
            "not roll out; choose another method, e.g. gkd or switch"
        )
    return args.on_policy_fraction


def rolls_out(method: Method, args: SwitchConfig) -> bool:
    """Return whether steps of the training can train on rolled-out text."""
    return method.may_roll_out and (resolve_fraction(method, args) > 0 or method.adaptive_fraction)


def refuse_idle_options(method: Method, args: SwitchConfig) -> None:
    """Refuse values of options that nothing reads; the value that holds anyway may stand there.

    Raises:
        UserError: Names the option.
    """
    policy, fraction = resolve_policy(method, args), resolve_fraction(method, args)
    objective_name, _ = resolve_objective(method, args)
    steps_roll_out = rolls_out(method, args)
    idle: dict[str, str] = {
        name: f"method {method.name!r} is none that {what}"
        for name, (attribute, what) in OPTIONS_OF_A_KIND.items()
        if not getattr(method, attribute)
    }
    if not steps_roll_out:
        at_0 = " at on_policy_fraction 0" if args.on_policy_fraction == 0 else ""
        why = f"method {method.name!r} rolls nothing out{at_0}"
        idle |= dict.fromkeys(STEP_OPTIONS if method.teacher_text else (*SAMPLING_OPTIONS, *STEP_OPTIONS), why)
        idle |= dict.fromkeys(POLICY_OPTIONS, why)
    elif policy is not None and not policy.needs_teacher:
        without = f"no teacher checks the rollouts of method {method.name!r}"
        idle |= dict.fromkeys(("draft_length", "teacher_token_weight", *HIDDEN_OPTIONS), without)
    if steps_roll_out and (objective_name == objective.CROSS_ENTROPY or not args.reuse_teacher_hidden):
        why = "the loss reads no states of the rollout's teacher"
        idle |= dict.fromkeys(HIDDEN_OPTIONS if args.reuse_teacher_hidden else HIDDEN_OPTIONS[1:], why)
    if method.policy_gradient:
        idle |= dict.fromkeys(("student_token_weight", "teacher_token_weight"), "importance weighs the tokens")
    if not isinstance(policy, SwitchPolicy):
        idle.setdefault("target_teacher_share", f"method {method.name!r} has no threshold to move")
    elif policy.schedule == "constant":
        idle |= dict.fromkeys(("final_ratio", "horizon"), "schedule is constant")
    if objective_name == objective.CROSS_ENTROPY:
        idle["ce_weight"] = "the loss is the cross-entropy already"
    elif fraction == 1:
        idle["ce_weight"] = "every step trains on rolled-out text"
    if not args.log_completions:
        idle.setdefault("num_completions_to_log", "log_completions is off")
    if args.device.type == "cpu":
        idle.setdefault("offload_teacher_hidden", "training runs on the CPU")
        idle.setdefault("offload_teacher", "training runs on the CPU")
    # What holds anyway may be written out, as a run's own resolved config does.
    holds = {option.name: option.default for option in fields(SwitchConfig)} | method.default_options()
    holds["horizon"] = args.max_completion_length
    for name, reason in idle.items():
        if getattr(args, name) not in (None, holds[name]):
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
