"""What a trainer needs before its first step: models, data that both can read, and what the configuration means."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.utils import logging

from switchkd.data import prepare
from switchkd.data.batches import check_readable
from switchkd.data.containers import Mixture, as_dataset
from switchkd.data.plain_text import PlainText
from switchkd.data_options import parse_columns
from switchkd.errors import UserError
from switchkd.methods import Method
from switchkd.models.loading import excluded_with, load_model, load_tokenizer, set_chat_template
from switchkd.models.vocabulary import model_vocabulary_size
from switchkd.objective.step import StepLoss
from switchkd.policies import ThresholdPolicy
from switchkd.rollout import Author
from switchkd.training.config import SwitchConfig
from switchkd.training.footprint import key_values_of
from switchkd.training.log import ShareWatch
from switchkd.training.memory import rows_that_fit
from switchkd.training.resolve import Plan
from switchkd.training.text import TextSource

logger = logging.get_logger("switchkd")

# Where `draft_length="auto"` would follow the clock and `full_determinism` forbids it.
STEADY_DRAFT_LENGTH = 4


def load_models(
    model: nn.Module | str,
    teacher_model: nn.Module | str | None,
    tokenizer: Any,
    args: SwitchConfig,
    *,
    plan: Plan,
    quantization_config: Any = None,
) -> tuple[nn.Module, nn.Module | None, list[int]]:
    """Return student and teacher, loaded where they are names, and the ids that only one of them knows.

    The teacher is None where nothing asks it. Models given as objects bring no tokenizer: nothing is known of them.

    Args:
        model: The student, a model or its name.
        teacher_model: The teacher, likewise, or None.
        tokenizer: The student's.
        args: The configuration.
        plan: What it means.
        quantization_config: For a student that is loaded here.

    Raises:
        UserError: A teacher is missing, is the student itself, or has another tokenizer.
    """
    copies_student = plan.method.own_teacher and teacher_model is None
    if not plan.needs_teacher:
        teacher_model = None
    elif teacher_model is None and not copies_student:
        raise UserError(f"method {args.method!r} needs a teacher; give teacher_model")
    elif teacher_model is model and not isinstance(model, str):
        raise UserError("model and teacher_model are the same object; pass copy.deepcopy(model) as the teacher")
    if args.teacher_model_init_kwargs and not isinstance(teacher_model, str):
        why = "the teacher is given as an object"
        if teacher_model is None:
            why = "the teacher is a copy of the student" if copies_student else "no teacher is used"
        raise UserError(f"teacher_model_init_kwargs={args.teacher_model_init_kwargs} does nothing: {why}; remove it")
    for role, given in (("model", model), ("teacher_model", teacher_model)):
        if isinstance(given, nn.Module) and any(hasattr(parameter, "ds_id") for parameter in given.parameters()):
            raise UserError(f"{role} was loaded under ZeRO-3, which shards it too early: give its name instead")
    excluded_ids: list[int] = []
    if isinstance(teacher_model, str):
        excluded_ids = excluded_with(tokenizer, teacher_model, init_kwargs=tokenizer_place(args, "teacher"))
    # Weights that an optimizer updates are float32 unless asked otherwise, whatever the checkpoint holds.
    if isinstance(model, str):
        kwargs = {"dtype": "float32", **trusted(args), **_as_dict(args.model_init_kwargs)}
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        with _loaded_whole(args):
            student: nn.Module = load_model(model, kwargs, role="student")
    elif quantization_config is not None:
        raise UserError("quantization_config does nothing: the student is given as an object; load it with it")
    else:
        student = model
    if copies_student:
        return student, copy.deepcopy(student), excluded_ids
    if not isinstance(teacher_model, str):
        return student, teacher_model, excluded_ids
    kwargs = {**trusted(args), **_as_dict(args.teacher_model_init_kwargs)}
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    with _loaded_whole(args):
        return student, load_model(teacher_model, kwargs, role="teacher"), excluded_ids


@contextlib.contextmanager
def _loaded_whole(args: SwitchConfig) -> Iterator[None]:
    """Let transformers load whole models: under ZeRO-3 it would shard them, the teacher too, and none could be read."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin: Any = args.deepspeed_plugin
        set_hf_deepspeed_config(plugin.hf_ds_config)


def trusted(args: SwitchConfig) -> dict[str, Any]:
    """Return the keyword arguments of loading that say what may run code here."""
    pickled = {"use_safetensors": None} if args.allow_pickled_weights else {}
    return {"trust_remote_code": args.trust_remote_code, **pickled}


def find_tokenizer(model: nn.Module | str, processing_class: Any, args: SwitchConfig) -> Any:
    """Return the student's tokenizer: the one that is given, or that of the student's name.

    Raises:
        UserError: The student is an object without a name, or its tokenizer cannot be read.
    """
    tokenizer = processing_class
    if tokenizer is None:
        config = getattr(model, "config", None)
        name = model if isinstance(model, str) else getattr(config, "_name_or_path", None)
        if not name:
            raise UserError(
                "give processing_class, the tokenizer: the student is an object that names no folder or hub id"
            )
        return load_tokenizer(name, init_kwargs=tokenizer_place(args, "student"), template=args.chat_template_path)
    set_chat_template(tokenizer, args.chat_template_path)
    return tokenizer


def tokenizer_place(args: SwitchConfig, role: str) -> dict[str, Any]:
    """Return the keyword arguments with which the tokenizer of a role is loaded, `student` or `teacher`."""
    model_kwargs = _as_dict(args.model_init_kwargs if role == "student" else args.teacher_model_init_kwargs)
    revision = model_kwargs.get("revision") or (args.teacher_model_revision if role == "teacher" else None)
    place = {"trust_remote_code": args.trust_remote_code, "revision": revision}
    return {**place, **_as_dict(args.tokenizer_kwargs)}


def frozen(teacher: nn.Module, device: torch.device, *, offload: bool) -> nn.Module:
    """Return the teacher without trainable parameters, in eval mode, on the device where it waits.

    Args:
        teacher: A model; one that is spread over devices already stays where it is.
        device: Where training runs.
        offload: Keep it in main memory between uses.
    """
    teacher.requires_grad_(False)
    if hasattr(teacher, "hf_device_map"):
        return teacher.eval()
    return teacher.to("cpu" if offload else device).eval()


@contextlib.contextmanager
def at_hand(teacher: nn.Module | None, device: torch.device, *, offload: bool) -> Iterator[Any]:
    """Give the teacher on the training device, and put it back into main memory afterwards where it is offloaded."""
    if teacher is None or not offload:
        yield teacher
        return
    try:
        yield teacher.to(device)
    finally:
        teacher.to("cpu")


def prepare_data(
    train: Any,
    evaluation: Any,
    tokenizer: Any,
    args: SwitchConfig,
    readers: dict[str, nn.Module | None],
    *,
    plan: Plan,
) -> tuple[Dataset | None, Any, dict[str, Any]]:
    """Return training and evaluation data with token ids, checked, and the reports of what was prepared here.

    Args:
        train: Raw or prepared data, a `Mixture` of them, or None.
        evaluation: Likewise, or several by name.
        tokenizer: The student's.
        args: The configuration.
        readers: Role, named in errors, to model.
        plan: What the training does.

    Raises:
        UserError: Columns or answers are missing, or a text exceeds a context.
    """
    reports: dict[str, Any] = {}

    def prepared(name: str, data: Any, part: str = "") -> Dataset:
        trains = name == "train"
        replaced = plan.method.teacher_text or plan.fraction == 1
        data, report = _prepare_set(
            name,
            data,
            tokenizer,
            args,
            readers,
            method=plan.method,
            answers=not (trains and replaced),
            continued=trains and plan.writes_text,
        )
        if report is not None:
            title = f"{name} ({part})" if part else name
            reports[title] = report
            logger.info(f"{title} data: {report}")
        return data

    if isinstance(train, Mixture):
        parts = {name: prepared("train", data, name) for name, data in train.parts.items()}
        train = train.joined(parts, args.seed)
    elif train is not None:
        train = prepared("train", train)
    if isinstance(evaluation, dict):
        evaluation = {name: prepared(name, data) for name, data in evaluation.items()}
    elif evaluation is not None:
        evaluation = prepared("eval", evaluation)
    return train, evaluation, reports


def _prepare_set(
    name: str,
    data: Any,
    tokenizer: Any,
    args: SwitchConfig,
    readers: dict[str, nn.Module | None],
    *,
    method: Method,
    answers: bool,
    continued: bool,
) -> tuple[Dataset, Any]:
    """Return data with token ids, checked against everything that will read it, and the report of its preparation.

    Args:
        name: train, eval or the name of an evaluation set, for messages.
        data: Raw or prepared.
        tokenizer: The student's.
        args: The configuration.
        readers: Role, named in errors, to model.
        method: The method.
        answers: Whether the data set's own answers are read.
        continued: Whether its prompts are continued.

    Raises:
        UserError: Columns or answers are missing, or a text exceeds a context.
    """
    report = None
    data = as_dataset(data, f"{name}_dataset", records=_records_read(args) if name == "train" else None)
    if "prompt_ids" not in data.column_names:
        data, report = prepare(
            data,
            tokenizer,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            columns=parse_columns(args.columns),
            template=args.template,
            supervise=args.supervise,
            split_special_tokens=args.split_special_tokens,
            chat_template_kwargs=_as_dict(args.chat_template_kwargs),
            plain_text=answers and not continued and args.eval_rouge_l_samples == 0,
        )
        if not answers:
            report = replace(report, truncated_completions=None)
    own_prompts = "teacher_prompt_ids" in data.column_names
    if readers["teacher"] is None:
        data = data.remove_columns("teacher_prompt_ids") if own_prompts else data
    elif own_prompts and method.replay:
        raise UserError(
            f"the {name} data have a teacher_prompt, which the store of method {method.name!r} does not keep; remove "
            "the column"
        )
    elif method.own_teacher and not own_prompts:
        raise UserError(
            f"method {method.name!r} needs a column teacher_prompt in the {name} data: what the teacher sees instead "
            "of the prompt"
        )
    if answers:
        earlier = data["earlier_answers"] if "earlier_answers" in data.column_names else [()] * len(data)
        answered = zip(data["completion_ids"], earlier, strict=True)
        empty = next((row for row, (ids, before) in enumerate(answered) if not ids and not before), None)
        if empty is not None:
            reader = f"method {method.name!r}" if name == "train" else "evaluation"
            raise UserError(f"{reader} reads dataset answers, but row {empty} of the {name} data has none")
    check_readable(data, readers, answers=answers, new_tokens=args.max_completion_length if continued else 0)
    return data, report


def _records_read(args: SwitchConfig) -> int | None:
    """How many records all steps of a training read; None where their number is not set."""
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps * rows if args.max_steps > 0 else None


def make_text_source(plan: Plan, args: SwitchConfig) -> TextSource:
    """Return where the text of each step comes from, as the configuration says."""
    method = plan.method
    capacity = 1000 if args.replay_capacity is None else args.replay_capacity
    return TextSource(
        plan.policy if method.may_roll_out else None,
        fraction=plan.fraction,
        truncation_start=plan.truncation_start,
        truncation_warmup=args.truncation_warmup,
        seed=args.seed,
        adaptive=method.adaptive_fraction,
        replay_capacity=capacity if method.replay else None,
        target_teacher_share=plan.target_teacher_share,
    )


def make_step_loss(plan: Plan, args: SwitchConfig, excluded_ids: Sequence[int] = ()) -> StepLoss:
    """Return what is learned from a micro-batch, as the configuration says; ids that only one model knows left out."""
    return StepLoss(
        replace(plan.objective, excluded_ids=tuple(excluded_ids)),
        author_weights={
            int(Author.STUDENT): args.student_token_weight,
            int(Author.TEACHER): args.teacher_token_weight,
        },
        ce_weight=args.ce_weight,
        lm_weight=args.lm_weight,
        minillm=plan.minillm,
    )


def make_share_watch(plan: Plan) -> ShareWatch | None:
    """Return what watches the teacher's share of a policy that compares something; None for every other."""
    if not plan.teacher_writes or plan.policy is None or plan.policy.measured is None:
        return None
    if plan.target_teacher_share is not None:
        return ShareWatch(
            f"no threshold reaches the {plan.target_teacher_share:.0%} of target_teacher_share; the two models agree "
            "or differ nearly everywhere, look at both with `switchkd diagnose`"
        )
    if isinstance(plan.policy, ThresholdPolicy):
        return ShareWatch(
            f"initial_threshold {plan.policy.initial_threshold:.4g} does not fit this pair; remove it, so that "
            "target_teacher_share finds one, or look for one with `switchkd calibrate`"
        )
    options = ", ".join(plan.policy_options) or "its options"
    return ShareWatch(f"the policy leaves every token to one writer; change {options}")


def make_plain_text(data: Dataset | None, tokenizer: Any, args: SwitchConfig) -> PlainText | None:
    """Return the plain text of `lm_weight` in blocks as long as a prompt and its completion may be, or None.

    Raises:
        UserError: One of the two is missing.
    """
    if (data is not None) != (args.lm_weight > 0):
        raise UserError(f"lm_weight={args.lm_weight} and lm_dataset must be set together")
    return None if data is None else PlainText(data, tokenizer, args.max_prompt_length + args.max_completion_length)


def rollout_rows(student: Any, teacher: Any | None, args: SwitchConfig) -> int:
    """Return how many rows are decoded at once, see `switchkd.training.memory.rows_that_fit`.

    Args:
        student: The model that trains.
        teacher: The model that checks, or None.
        args: `rollout_batch_size` decides where it is given.
    """
    if args.rollout_batch_size is not None:
        return args.rollout_batch_size
    shapes = [model.config.get_text_config() for model in (student, teacher) if model is not None]
    states = shapes[0].num_hidden_layers * shapes[0].hidden_size
    readers = [key_values_of(shape) for shape in shapes]
    length = args.max_prompt_length + args.max_completion_length
    return rows_that_fit(
        args.train_batch_size, length, states, readers, model_vocabulary_size(student), static=args.cuda_graphs
    )


def sampling_options(args: SwitchConfig, excluded_ids: Sequence[int] = ()) -> dict[str, Any]:
    """Return the options of `roll_out` that the configuration sets, and the ids that only one model knows."""
    auto: int | str = STEADY_DRAFT_LENGTH if args.full_determinism else "auto"
    return {
        "max_new_tokens": args.max_completion_length,
        "seed": args.seed,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "draft_length": auto if args.draft_length == "auto" else int(args.draft_length),
        # Named only where there are some: what describes a file of teacher text stays what it was.
        **({"excluded_ids": list(excluded_ids)} if excluded_ids else {}),
        **({"cuda_graphs": True} if args.cuda_graphs else {}),
    }


def _as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    assert not isinstance(value, str)  # SwitchConfig has read the JSON
    return value or {}
