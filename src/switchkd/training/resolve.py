"""What a configuration means: the `Plan`, computed once and read by everybody; options that would do nothing."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from switchkd.errors import UserError
from switchkd.methods import Method, get_method
from switchkd.objective import Objective
from switchkd.policies import Policy, ThresholdPolicy, find_policy
from switchkd.policies.find import make_policy
from switchkd.policy_options import DEFAULT_TEACHER_SHARE, POLICY_OPTIONS
from switchkd.training.config import SwitchConfig


@dataclass(frozen=True)
class Plan:
    """What a training does, as its configuration says.

    Attributes:
        method: The method.
        policy: Who writes at the start of training; None where the text is the data set's.
        policy_options: Options of the policy with the values that hold.
        fraction: Share of optimizer steps on rolled-out text, in [0, 1]; distillm: the starting value.
        truncation_start: Length limit of rollouts at the start, as a share of the full one, in (0, 1].
        objective: What is learned at a token.
        minillm: `(mixture_weight, clip_range)` of MiniLLM's policy gradient, None for every other method.
        target_teacher_share: Where the teacher's share of the rolled-out tokens is kept, in (0, 1); None leaves the
            policy's threshold as it is.
        finds_threshold: Whether the threshold that gives that share is searched for before the first step.
    """

    method: Method
    policy: Policy | None
    policy_options: dict[str, Any]
    fraction: float
    truncation_start: float
    objective: Objective
    minillm: tuple[float, float] | None
    target_teacher_share: float | None = None
    finds_threshold: bool = False

    @property
    def rolls_out(self) -> bool:
        """Whether steps can train on rolled-out text."""
        return self.method.may_roll_out and (self.fraction > 0 or self.method.adaptive_fraction)

    @property
    def writes_text(self) -> bool:
        """Whether rollouts are made, in the steps or before them."""
        return self.rolls_out or self.method.teacher_text

    @property
    def teacher_writes(self) -> bool:
        """Whether those rollouts ask the teacher."""
        return self.writes_text and self.policy is not None and self.policy.needs_teacher

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective or a rollout reads the teacher."""
        return self.objective.reads_teacher or self.teacher_writes


def resolve(args: SwitchConfig, policy: Policy | None = None) -> Plan:
    """Return what a configuration means.

    Args:
        args: The configuration.
        policy: Who writes rolled-out text instead of the method's own policy.

    Raises:
        UserError: An unknown method or objective, an option outside its range, or one that would do nothing.
    """
    method = get_method(args.method)
    own_policy, options = _policy(method, args, policy)
    plan = Plan(
        method=method,
        policy=own_policy,
        policy_options=options,
        fraction=_fraction(method, args),
        truncation_start=method.truncation_start if args.truncation_start is None else args.truncation_start,
        objective=_objective(method, args),
        minillm=_minillm(method, args, options),
    )
    if plan.rolls_out and isinstance(own_policy, ThresholdPolicy):
        given = policy is not None or _threshold_is_given(method, args)
        share = args.target_teacher_share
        share = DEFAULT_TEACHER_SHARE if share is None and not given else share
        plan = replace(plan, target_teacher_share=share, finds_threshold=share is not None and not given)
    if policy is not None and not plan.rolls_out:
        raise UserError(f"policy does nothing: {_steps_that_roll_out(plan, args)}; remove it")
    holds = held_values(plan, args)
    for name, reasons in USED_BY.items():
        value = getattr(args, name)
        if value is None or value == holds[name]:
            continue
        for reason in reasons:
            why = reason(plan, args)
            if why is not None:
                raise UserError(f"{name}={value} does nothing: {why}; remove it")
    return plan


def written_out(plan: Plan) -> dict[str, Any]:
    """Return the options that a method decides where the configuration is silent; with them it means the same plan."""
    options = {**plan.objective.options, **plan.policy_options}
    if plan.finds_threshold:
        options.pop("initial_threshold", None)
    if plan.target_teacher_share is not None:
        options["target_teacher_share"] = plan.target_teacher_share
    return options | {"divergence": plan.objective.name, "on_policy_fraction": plan.fraction}


def _threshold_is_given(method: Method, args: SwitchConfig) -> bool:
    kwargs = args.policy_kwargs if isinstance(args.policy_kwargs, dict) else {}
    defaults = method.policy_defaults if args.policy is None else {}
    return args.initial_threshold is not None or "initial_threshold" in kwargs or "initial_threshold" in defaults


def held_values(plan: Plan, args: SwitchConfig) -> dict[str, Any]:
    """Return option -> the value that holds where the config is silent; it may be written out even where it is idle."""
    holds = {option.name: option.default for option in fields(SwitchConfig)}
    holds["truncation_start"] = plan.method.truncation_start
    return holds | plan.method.default_options(args.max_completion_length)


def _policy(method: Method, args: SwitchConfig, given: Policy | None) -> tuple[Policy | None, dict[str, Any]]:
    """The policy, and its options that are fields of the configuration."""
    options = args.options_set(*POLICY_OPTIONS)
    kwargs = args.policy_kwargs if isinstance(args.policy_kwargs, dict) else {}
    limit = args.max_completion_length
    if given is None and args.policy is None:
        for name, value in options.items():
            if name not in method.policy_options:
                raise UserError(
                    f"{name}={value} does nothing with method {method.name!r}; remove it or use another method"
                )
        own_class = method.policy_class()
        if own_class is None:
            if kwargs:
                raise UserError(f"policy_kwargs={kwargs} does nothing: method {method.name!r} rolls nothing out")
            return None, {}
        own = make_policy(
            own_class,
            method.name,
            length_limit=limit,
            options=options,
            policy_kwargs=kwargs,
            defaults=method.policy_defaults,
        )
        return own, method.default_options(limit) | options
    if not isinstance(given, Policy | None):
        raise UserError(f"policy must be a switchkd.Policy or, in the configuration, a name; got {given!r}")
    name = type(given).__name__ if args.policy is None else args.policy
    if given is not None and (args.policy is not None or kwargs):
        raise UserError("policy is given as an object and in the configuration too; remove it and policy_kwargs there")
    if not method.may_roll_out or method.policy_gradient:
        why = "weighs tokens by its own mixture" if method.policy_gradient else "has no steps that roll out"
        raise UserError(f"policy {name} does nothing: method {method.name!r} {why}; use another method, e.g. switch")
    if options:
        option, value = next(iter(options.items()))
        where = "give it to the policy" if given is not None else "put it into policy_kwargs"
        raise UserError(f"{option}={value} belongs to the policy of method {method.name!r}, not to {name}; {where}")
    if given is None:
        given = make_policy(find_policy(name), name, length_limit=limit, options={}, policy_kwargs=kwargs)
    return given, {}


def _fraction(method: Method, args: SwitchConfig) -> float:
    if args.on_policy_fraction is None:
        return method.on_policy_fraction
    if not method.may_roll_out and args.on_policy_fraction > 0:
        raise UserError(
            f"on_policy_fraction={args.on_policy_fraction} does nothing with method {method.name!r}, whose steps do "
            "not roll out; choose another method, e.g. gkd or switch"
        )
    return args.on_policy_fraction


def _objective(method: Method, args: SwitchConfig) -> Objective:
    name = args.divergence or method.objective
    options = dict(method.objective_options) if name == method.objective else {}
    options |= args.options_set("teacher_weight", "skew", "head_mass")
    if method.policy_gradient and (name != method.objective or args.loss_temperature != 1.0):
        wrong = f"divergence={name}" if name != method.objective else f"loss_temperature={args.loss_temperature}"
        raise UserError(f"{wrong} does not belong to method {method.name!r}: its gradient is that of the reverse KL")
    return Objective(name, options, args.loss_temperature)


def _minillm(method: Method, args: SwitchConfig, options: dict[str, Any]) -> tuple[float, float] | None:
    if not method.policy_gradient:
        return None
    if (args.temperature, args.top_k, args.top_p) != (1.0, 0, 1.0):
        raise UserError(
            f"method {method.name!r} weighs tokens by the probability they were sampled with: it needs temperature 1, "
            f"top_k 0 and top_p 1, got {args.temperature}, {args.top_k} and {args.top_p}"
        )
    return options["mixture_weight"], 0.2 if args.clip_range is None else args.clip_range


# ---- options that would do nothing: for each reader of options, why it does not read, or None where it does

Reason = Callable[[Plan, SwitchConfig], str | None]


def _steps_that_roll_out(plan: Plan, args: SwitchConfig) -> str | None:
    if plan.rolls_out:
        return None
    setting = " at on_policy_fraction 0" if args.on_policy_fraction == 0 else ""
    return f"method {plan.method.name!r} rolls nothing out{setting}"


def _any_rollout(plan: Plan, args: SwitchConfig) -> str | None:
    return None if plan.method.teacher_text else _steps_that_roll_out(plan, args)


def _teacher_in_rollouts(plan: Plan, args: SwitchConfig) -> str | None:
    if plan.rolls_out and not plan.teacher_writes:
        return f"no teacher checks the rollouts of method {plan.method.name!r}"
    return None


def _loss_that_reads_states(plan: Plan, args: SwitchConfig) -> str | None:
    return None if plan.objective.reads_teacher else "the loss reads no states of the rollout's teacher"


def _kept_states(plan: Plan, args: SwitchConfig) -> str | None:
    return None if args.reuse_teacher_hidden else "the loss reads no states of the rollout's teacher"


def _states_that_come_back(plan: Plan, args: SwitchConfig) -> str | None:
    return "vLLM keeps the teacher's states to itself" if args.rollout_engine == "vllm" else None


def _transformers(plan: Plan, args: SwitchConfig) -> str | None:
    return f"rollout_engine is {args.rollout_engine}" if args.rollout_engine != "transformers" else None


def _vllm(plan: Plan, args: SwitchConfig) -> str | None:
    return None if args.rollout_engine == "vllm" else "rollout_engine is transformers"


def _server(plan: Plan, args: SwitchConfig) -> str | None:
    return None if args.vllm_mode == "server" else "vllm_mode is colocate"


def _colocated(plan: Plan, args: SwitchConfig) -> str | None:
    return "the server has its own" if args.vllm_mode == "server" else None


def _weights_by_author(plan: Plan, args: SwitchConfig) -> str | None:
    return "importance weighs the tokens" if plan.method.policy_gradient else None


def _threshold(plan: Plan, args: SwitchConfig) -> str | None:
    if isinstance(plan.policy, ThresholdPolicy):
        return None
    who = f"method {plan.method.name!r}" if args.policy is None else f"policy {args.policy}"
    return f"{who} has no threshold to move"


def _schedule(plan: Plan, args: SwitchConfig) -> str | None:
    return "schedule is constant" if plan.policy_options.get("schedule") == "constant" else None


def _dataset_steps(plan: Plan, args: SwitchConfig) -> str | None:
    if not plan.objective.reads_teacher:
        return "the loss is the cross-entropy already"
    return "every step trains on rolled-out text" if plan.fraction == 1 else None


def _dataset_answers(plan: Plan, args: SwitchConfig) -> str | None:
    if plan.method.teacher_text or plan.fraction == 1:
        return f"method {plan.method.name!r} trains on no answers of the data set"
    return None


def _truncated(plan: Plan, args: SwitchConfig) -> str | None:
    return "rollouts have their full length from the start" if plan.truncation_start == 1 else None


def _logged_completions(plan: Plan, args: SwitchConfig) -> str | None:
    return None if args.log_completions else "log_completions is off"


def _copied_student(plan: Plan, args: SwitchConfig) -> str | None:
    return "rollout_copy is never" if args.rollout_copy == "never" else None


def _accelerator(plan: Plan, args: SwitchConfig) -> str | None:
    return "training runs on the CPU" if args.device.type == "cpu" else None


def _some_teacher(plan: Plan, args: SwitchConfig) -> str | None:
    return None if plan.needs_teacher else "no teacher is used"


def _several_processes(plan: Plan, args: SwitchConfig) -> str | None:
    return "there is one process" if args.world_size == 1 else None


def _replay_store(plan: Plan, args: SwitchConfig) -> str | None:
    return None if plan.method.replay else f"method {plan.method.name!r} does not store rollouts"


def _policy_gradient(plan: Plan, args: SwitchConfig) -> str | None:
    return None if plan.method.policy_gradient else f"method {plan.method.name!r} does not take a policy gradient"


def _teacher_text(plan: Plan, args: SwitchConfig) -> str | None:
    if plan.method.teacher_text:
        return None
    return f"method {plan.method.name!r} does not train on text that the teacher wrote before"


# What must be there for a loss to read the states of a rollout's teacher.
_STATES = (_steps_that_roll_out, _teacher_in_rollouts, _loss_that_reads_states, _states_that_come_back)

#: Option -> everything that must be there for it to do something.
USED_BY: dict[str, tuple[Reason, ...]] = {
    **dict.fromkeys(POLICY_OPTIONS, (_steps_that_roll_out,)),
    "policy": (_steps_that_roll_out,),
    "policy_kwargs": (_any_rollout,),
    "final_ratio": (_steps_that_roll_out, _schedule),
    "horizon": (_steps_that_roll_out, _schedule),
    "truncation_start": (_steps_that_roll_out,),
    "truncation_warmup": (_steps_that_roll_out, _truncated),
    "target_teacher_share": (_steps_that_roll_out, _threshold),
    "temperature": (_any_rollout,),
    "top_k": (_any_rollout,),
    "top_p": (_any_rollout,),
    "draft_length": (_any_rollout, _teacher_in_rollouts, _colocated),
    "rollout_batch_size": (_any_rollout, _colocated),
    "cuda_graphs": (_any_rollout, _transformers),
    "rollout_engine": (_any_rollout,),
    "vllm_mode": (_vllm,),
    "vllm_server_host": (_vllm, _server),
    "vllm_server_port": (_vllm, _server),
    "vllm_python": (_vllm, _colocated),
    "vllm_gpu_memory_utilization": (_vllm, _colocated, _accelerator),
    "vllm_tensor_parallel_size": (_vllm, _colocated),
    "vllm_enable_sleep_mode": (_vllm, _colocated, _accelerator),
    "reuse_teacher_hidden": _STATES,
    "teacher_hidden_dtype": (*_STATES, _kept_states),
    "offload_teacher_hidden": (*_STATES, _kept_states, _accelerator),
    "offload_teacher": (_accelerator,),
    "teacher_sharding": (_some_teacher, _several_processes, _transformers),
    "rollout_copy": (_any_rollout,),
    "rollout_dtype": (_any_rollout, _copied_student),
    "offload_rollout_copy": (_any_rollout, _copied_student, _accelerator),
    "student_token_weight": (_steps_that_roll_out, _weights_by_author),
    "teacher_token_weight": (_steps_that_roll_out, _teacher_in_rollouts, _weights_by_author),
    "log_completions": (_steps_that_roll_out,),
    "num_completions_to_log": (_steps_that_roll_out, _logged_completions),
    "log_top_tokens": (_steps_that_roll_out, _logged_completions),
    "ce_weight": (_dataset_steps,),
    "supervise": (_dataset_answers,),
    "replay_capacity": (_replay_store,),
    "clip_range": (_policy_gradient,),
    "teacher_text_file": (_teacher_text,),
}
