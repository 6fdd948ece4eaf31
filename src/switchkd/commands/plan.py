"""`switchkd plan`: what a training would take, from the configurations of its models alone."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.cli.console import Console
from switchkd.cli.options import integers
from switchkd.commands.train_options import (
    RunArguments,
    TrainParser,
    add_training_options,
    check_quantization,
    fields_of,
)
from switchkd.errors import UserError, check_choice, json_object

if TYPE_CHECKING:
    from switchkd.training.advice import Change, Sized
    from switchkd.training.cost import Card
    from switchkd.training.memory import Launch

#: Short names of options of `switchkd train`.
SHORT = {
    "student": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "batch": "per_device_train_batch_size",
    "length": "max_completion_length",
}
#: What the help lists of the options of `switchkd train`; all others are accepted too.
SHOWN = (
    *("model_name_or_path", "teacher_model_name_or_path", "student_config", "dtype", "teacher_model_init_kwargs"),
    *("method", "max_prompt_length", "max_completion_length", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "rollout_batch_size", "bf16", "gradient_checkpointing", "optim", "use_peft"),
    *("lora_r", "load_in_4bit", "teacher_hidden_dtype", "offload_teacher", "teacher_sharding"),
)


def parser() -> TrainParser:
    """Return the options of `switchkd plan`."""
    result = TrainParser(
        prog="switchkd plan",
        usage="switchkd plan --student STUDENT --teacher TEACHER [--gpus N] [--batch B] [--length L] [--config FILE]",
        description="Say what a training step takes on each GPU, part by part, how long it takes, and what to change "
        "where it does not fit. Only the configurations of the models are read, never their weights. A config of "
        "switchkd train is one of switchkd plan.",
    )
    run = result.add_argument_group("where it runs")
    run.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs, 8 to a machine")
    run.add_argument("--card", default="h100", metavar="NAME", help="GPU: a name of the table; here: this machine")
    run.add_argument(
        "--sharding", metavar="NAME", help="none, ddp, fsdp2, zero2 or zero3; ddp on several GPUs if not given"
    )
    run.add_argument(
        "--memory", type=float, metavar="GB", help="memory of a GPU, in 10^9 bytes, instead of the table's"
    )
    run.add_argument("--bandwidth", type=float, metavar="GB/S", help="memory bandwidth that is reached, 10^9 bytes/s")
    run.add_argument("--flops", type=float, metavar="TFLOP/S", help="operations that are reached, 10^12 per second")
    short = result.add_argument_group("short names", ", ".join(f"{key} is {name}" for key, name in SHORT.items()))
    add_training_options(result)
    for name, long in SHORT.items():
        action = result._known()[f"--{long}"]
        result._option_string_actions[f"--{name}"] = action
    shown = argparse._ArgumentGroup(result, "of the training: every option of switchkd train, and among them")
    shown._group_actions = [result._known()[f"--{name}"] for name in SHOWN]
    result._action_groups = [run, short, shown, result._action_groups[-1]]
    result.rare = argparse._ArgumentGroup(result)  # no other option decides about memory
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print what the training takes, and return it."""
    _check(options)
    from switchkd.cli.console import quiet_libraries
    from switchkd.training.advice import first_changes, more_rows, sized
    from switchkd.training.cost import CARDS, step_seconds

    quiet_libraries(options.verbose)
    card = _card(options)
    launch = launch_of(options)
    found = sized(launch)
    share = 0.5 if options.target_teacher_share is None else options.target_teacher_share

    def seconds_of(run: "Sized") -> dict[str, float]:
        rows = run.memory.rollout_rows
        return step_seconds(run.launch, run.student, run.teacher, card, rollout_rows=rows, teacher_share=share)

    seconds = seconds_of(found)
    changes = first_changes(found, card.memory)
    faster = more_rows(found, card.memory) if not changes else None
    fitting = [name for name, one in CARDS.items() if found.memory.peak <= one.memory]
    for text in _text(found, seconds, changes, card, options, fitting, console):
        console.say(text)
    if faster is not None:
        console.say(
            f"there is room for --rollout_batch_size {faster.launch.rollout_rows}, {faster.memory.peak / 1e9:,.1f} GB: "
            f"a step then takes about {sum(seconds_of(faster).values()):.2g} s"
        )
    rollout = launch.rows * launch.accumulation * launch.completion
    return {
        "phases": found.memory.phases,
        "peak_bytes": found.memory.peak,
        "largest_phase": found.memory.largest,
        "memory_bytes": card.memory,
        "fits": found.memory.peak <= card.memory,
        "changes": [{"option": change.option, "peak": change.peak} for change in changes],
        "fits_on": fitting,
        "faster": None if faster is None else {"rollout_batch_size": faster.launch.rollout_rows},
        "rollout_rows": found.memory.rollout_rows,
        "seconds": seconds,
        "step_seconds": sum(seconds.values()),
        "tokens_per_s": launch.gpus * rollout / sum(seconds.values()),
        "card": {**dataclasses.asdict(card), "name": options.card},
        "parameters": {
            "student": found.student.parameters,
            "trained": found.student.trained,
            "teacher": None if found.teacher is None else found.teacher.parameters,
        },
        "launch": {
            name: value for name, value in dataclasses.asdict(launch).items() if name not in ("student", "teacher")
        },
    }


def launch_of(options: argparse.Namespace) -> "Launch":
    """Return the run that options of `switchkd train` with those of this command describe.

    Raises:
        UserError: Options that do nothing or do not fit together, or a configuration that cannot be read.
    """
    from switchkd.training.footprint import Adapter
    from switchkd.training.memory import Launch, copy_dtype

    plan = _plan(options)
    of_student = {"dtype": options.dtype, **_json("model_init_kwargs", options)}
    of_teacher = {"dtype": options.dtype, **_json("teacher_model_init_kwargs", options)}
    student = _student(options)
    source = options.teacher_model_name_or_path
    if plan.needs_teacher and source is None and not plan.method.own_teacher:
        raise UserError(f"method {plan.method.name!r} needs a teacher; give --teacher_model_name_or_path")
    teacher = None
    if plan.needs_teacher:
        teacher = student if source is None else _config(source)
    student_dtype = _dtype(of_student, student, "float32")
    if options.load_in_4bit or options.load_in_8bit:
        student_dtype = "nf4" if options.load_in_4bit else "int8"
    # Mixed precision of weights that are in half precision already changes nothing.
    bf16 = bool(options.bf16 or options.fp16) and student_dtype == "float32"
    adapter = None
    if options.use_peft:
        targets = options.lora_target_modules
        adapter = Adapter(
            rank=16 if options.lora_r is None else options.lora_r,
            target_modules=targets[0] if targets == ["all-linear"] else tuple(targets) if targets else None,
            modules_to_save=tuple(options.lora_modules_to_save or ()),
        )
    sharding = _sharding(options)
    writes = copy_dtype(
        options.rollout_copy,
        options.rollout_dtype,
        student_dtype=student_dtype,
        bf16=bf16,
        sharded=sharding in ("fsdp2", "zero3"),
        adapter=adapter is not None,
    )
    return Launch(
        student.to_json_string(use_diff=False),
        None if teacher is None else teacher.to_json_string(use_diff=False),
        prompt=options.max_prompt_length,
        completion=options.max_completion_length,
        rows=options.per_device_train_batch_size,
        accumulation=options.gradient_accumulation_steps,
        student_dtype=student_dtype,
        teacher_dtype=_dtype(of_teacher, teacher, "float32", saved=True) if teacher is not None else "float32",
        bf16=bf16,
        adapter=adapter,
        checkpointing=bool(options.gradient_checkpointing or getattr(options, "activation_checkpointing", None)),
        optimizer=options.optim if isinstance(options.optim, str) else "adamw_torch_fused",
        gpus=options.gpus,
        sharding=sharding,
        rolls_out=plan.rolls_out,
        teacher_writes=plan.teacher_writes,
        reads_teacher=plan.objective.reads_teacher,
        objective=plan.objective.name,
        keeps_states=options.reuse_teacher_hidden,
        states_dtype=options.teacher_hidden_dtype,
        offloads_states=options.offload_teacher_hidden,
        offloads_teacher=options.offload_teacher,
        shards_teacher=options.teacher_sharding != "none" and options.gpus > 1,
        static=bool(options.cuda_graphs),
        rollout_rows=options.rollout_batch_size,
        draft=None if options.draft_length == "auto" else int(options.draft_length),
        copy_dtype=writes if plan.rolls_out else None,
        offloads_copy=options.offload_rollout_copy,
        cuda=not _on_cpu(options),
    )


def _check(options: argparse.Namespace) -> None:
    if options.model_name_or_path is None and options.student_config is None:
        raise UserError("give --model_name_or_path (or --student), the student; or --student_config")
    for name in ("gpus", "max_prompt_length", "max_completion_length", "per_device_train_batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"{name} must be >= 1, got {getattr(options, name)}")
    for name in ("memory", "bandwidth", "flops"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} must be > 0, got {value}")
    check_choice("teacher_sharding", options.teacher_sharding, ("none", "fsdp2"))
    if options.teacher_sharding != "none" and options.gpus == 1:
        raise UserError("teacher_sharding does not go with gpus=1: there is nobody to share it with")
    if options.sharding is not None:
        check_choice("sharding", options.sharding, ("none", "ddp", "fsdp2", "zero2", "zero3"))
        if (options.sharding == "none") != (options.gpus == 1):
            raise UserError(f"sharding={options.sharding} does not go with gpus={options.gpus}")
    check_quantization(RunArguments(**fields_of(RunArguments, options)))


def _plan(options: argparse.Namespace) -> Any:
    """What the method and its options mean; whatever speaks of the device is left out, because it is another one."""
    from switchkd.training.config import SwitchConfig
    from switchkd.training.options import DistillationOptions
    from switchkd.training.resolve import resolve

    of_device = {"offload_teacher", "offload_teacher_hidden", "offload_rollout_copy", "rollout_copy", "rollout_dtype"}
    of_device.add("teacher_sharding")
    values = fields_of(DistillationOptions, options)
    values = {name: value for name, value in values.items() if name not in of_device}
    return resolve(SwitchConfig(output_dir="runs", use_cpu=True, report_to="none", **values))


def _student(options: argparse.Namespace) -> Any:
    from switchkd.models.untrained import student_config

    source = options.model_name_or_path or options.teacher_model_name_or_path
    if options.student_config is not None:
        overrides = json_object("student_config", options.student_config)
        named = options.tokenizer_name_or_path or source
        tokenizer = None
        if "model_type" in overrides and "vocab_size" not in overrides and named is not None:
            from switchkd.models.loading import load_tokenizer

            tokenizer = load_tokenizer(named)
        return student_config(overrides, base=source, tokenizer=tokenizer)
    config = _config(source)
    if options.student_layers is not None:
        layers = integers(options.student_layers, "student_layers") or []
        values = {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(layers)}
        return student_config(values, base=source)
    return config


def _config(name: str) -> Any:
    from switchkd.models.loading import local_folder
    from switchkd.models.untrained import load_config

    config = load_config(str(local_folder(name, "model") or name))
    return config.get_text_config()


def _dtype(kwargs: dict[str, Any], config: Any, default: str, *, saved: bool = False) -> str:
    """The precision of weights: given, or as saved."""
    quantized = kwargs.get("quantization_config") or {}
    for name, dtype in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if kwargs.get(name) or (isinstance(quantized, dict) and quantized.get(name)):
            return dtype
    given = kwargs.get("dtype") or kwargs.get("torch_dtype")
    if given == "auto" or (given is None and saved):
        given = str(getattr(config, "dtype", None) or default)
    dtype = str(given or default).removeprefix("torch.")
    check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
    return dtype


def _json(name: str, options: argparse.Namespace) -> dict[str, Any]:
    value = getattr(options, name)
    return {} if value is None else json_object(name, value)


def _sharding(options: argparse.Namespace) -> str:
    """How the launch spreads the student: as given, as the config's `fsdp` or `deepspeed` says, else DDP."""
    if options.sharding is not None:
        return str(options.sharding)
    if options.gpus == 1:
        return "none"
    if isinstance(options.fsdp, str) and options.fsdp not in ("", "false"):
        return "fsdp2"
    if isinstance(options.deepspeed, str) and options.deepspeed:
        text = options.deepspeed
        try:
            values = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
            stage = int(values["zero_optimization"]["stage"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"deepspeed: cannot read the ZeRO stage of {text}: {error}; give --sharding") from error
        return {2: "zero2", 3: "zero3"}.get(stage, "ddp")
    return "ddp"


def _on_cpu(options: argparse.Namespace) -> bool:
    if options.card != "here":
        return bool(options.use_cpu is True)
    from switchkd.models.loading import default_device

    return bool(options.use_cpu is True) or default_device().type == "cpu"


def _card(options: argparse.Namespace) -> "Card":
    from switchkd.training.cost import card_of, measured_card

    card = measured_card() if options.card == "here" else card_of(options.card)
    shares = list(card.reached)
    given: dict[str, Any] = {}
    if options.memory is not None:
        given["memory"] = options.memory * 1e9
    if options.bandwidth is not None:
        given["bandwidth"], shares[0] = options.bandwidth * 1e9, 1.0
    if options.flops is not None:
        given["half"] = given["single"] = options.flops * 1e12
        shares[1] = 1.0
    if given:
        given["source"] = f"{card.source}; {', '.join(name for name in SPEEDS if getattr(options, name))} as given"
    return dataclasses.replace(card, **given, reached=(shares[0], shares[1]))


SPEEDS = ("memory", "bandwidth", "flops")


def _text(
    found: "Sized",
    seconds: dict[str, float],
    changes: "list[Change]",
    card: "Card",
    options: argparse.Namespace,
    fitting: list[str],
    console: Console,
) -> list[str]:
    """The table and the sentences under it."""
    memory, launch = found.memory, found.launch
    phases = list(memory.phases)
    rows = [[part, *(_gigabytes(memory.phases[phase].get(part, 0.0)) for phase in phases)] for part in memory.parts]
    rows.append(["all", *(_gigabytes(memory.total(phase)) for phase in phases)])
    who = f"student {_millions(found.student.parameters)}"
    if found.student.trained != found.student.parameters:
        who += f", {_millions(found.student.trained)} of them trained"
    if found.teacher is not None:
        who += f"; teacher {_millions(found.teacher.parameters)}, {launch.teacher_dtype}"
    where = f"{launch.gpus} x {options.card}" if launch.gpus > 1 else f"one {options.card}"
    if launch.gpus > 1:
        where += f", {launch.sharding}"
    peak = f"{memory.peak / 1e9:,.1f} of {card.memory / 1e9:,.0f} GB, in phase {memory.largest!r}"
    lines = [
        f"{who}; {where}; {launch.rows} x {launch.accumulation} rows of {launch.prompt} + {launch.completion} tokens",
        "",
        console.table(rows, ["GB on each GPU", *phases]),
        "",
    ]
    if memory.peak <= card.memory:
        lines.append(f"fits: {peak}")
    elif not changes:
        lines.append(f"does not fit: {peak}; no option is left that would change it: take smaller models or more GPUs")
    else:
        lines.append(f"does not fit: {peak}; change")
        lines += [f"  {change.option}    then {change.peak / 1e9:,.1f} GB" for change in changes]
        if changes[-1].peak > card.memory:
            lines.append("  and then it still does not fit: take smaller models or more GPUs")
    lines.append(f"cards of the table with room for it: {', '.join(fitting) or 'none'}")
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.2g} s" for name, value in seconds.items() if value >= 0.005 * total)
    rate = launch.gpus * launch.rows * launch.accumulation * launch.completion / total
    lines.append(f"a step takes about {total:.2g} s ({parts}): {rate:,.0f} tokens of completions a second")
    lines.append(
        f"arithmetic, from {card.bandwidth / 1e9:,.0f} GB/s and "
        f"{(card.single if launch.compute_dtype == 'float32' else card.half) / 1e12:,.0f} TFLOP/s ({card.source}), of "
        f"which {card.reached[0]:.0%} and {card.reached[1]:.0%} are taken to be reached"
    )
    return lines


def _gigabytes(size: float) -> str:
    if size == 0:
        return "-"
    return f"{size / 1e9:,.1f}" if size >= 1e10 else f"{size / 1e9:.2f}" if size >= 1e7 else "0.01"


def _millions(count: int) -> str:
    return f"{count / 1e9:,.2f}B" if count >= 1e9 else f"{count / 1e6:,.1f}M"
