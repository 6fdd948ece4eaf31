"""Which option to change where a step does not fit: tried one after the other, those that cost least first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from switchkd.training.footprint import Adapter, Footprint, footprint_of
from switchkd.training.memory import Launch, StepMemory, step_memory


@dataclass(frozen=True)
class Sized:
    """A run with its memory and what its models take."""

    launch: Launch
    memory: StepMemory
    student: Footprint
    teacher: Footprint | None


@dataclass(frozen=True)
class Change:
    """One option of a run that is set to something else.

    Attributes:
        option: As it is written on the command line.
        peak: Highest memory of the run with it, and with the changes before it; bytes.
        launch: The run with it, and with those before it.
    """

    option: str
    peak: float
    launch: Launch


def sized(launch: Launch) -> Sized:
    """Return a run with its memory; models are measured without weights, a second or so for each.

    Raises:
        UserError: A configuration that cannot be built or measured.
    """
    sizes = {"rows": launch.rows, "length": launch.length, "predicted": launch.completion}
    plain = {"int8": "bfloat16", "nf4": "bfloat16"}
    dtype = plain.get(launch.student_dtype, launch.student_dtype)
    # Sharded weights are gathered in the precision of the passes: there is no second copy of them.
    reads_half = launch.bf16 and launch.splits_states
    student = footprint_of(
        launch.student,
        **sizes,
        dtype="bfloat16" if reads_half else dtype,
        autocast=launch.bf16 and not reads_half,
        trains=True,
        adapter=launch.adapter,
        checkpointing=launch.checkpointing,
    )
    if reads_half and dtype == "float32":
        student = replace(
            student,
            weights=4 * student.parameters,
            gradients=4 * student.trained,
            largest=2 * student.largest,
        )
    teacher = None
    if launch.teacher is not None:
        teacher = footprint_of(launch.teacher, **sizes, dtype=plain.get(launch.teacher_dtype, launch.teacher_dtype))
    return Sized(launch, step_memory(launch, student, teacher), student, teacher)


def first_changes(run: Sized, room: float) -> list[Change]:
    """Return what to change so that a run fits: one option if one does it, else several that add up.

    Args:
        run: The run.
        room: Bytes that there are.

    Returns:
        The changes in order, each with the peak that it leaves; the last one's may still exceed the room. Empty where
        the run fits or nothing is left to change.
    """
    if run.memory.peak <= room:
        return []
    for option, change in CHANGES:
        changed = change(run.launch)
        if changed is not None and (peak := sized(changed).memory.peak) <= room:
            return [Change(option_of(option, changed), peak, changed)]
    chosen: list[Named] = []
    now = run
    for named in CHANGES:
        changed = named[1](now.launch)
        if changed is not None and (one := sized(changed)).memory.peak < 0.99 * now.memory.peak:
            now = one
            chosen.append(named)
        if now.memory.peak <= room:
            break
    for named in chosen[:-1]:  # what a later one made unnecessary
        others = [other for other in chosen if other is not named]
        if now.memory.peak <= room and (rest := _changed(run, others)) and rest[-1].peak <= room:
            chosen = others
    return _changed(run, chosen)


def _changed(run: Sized, chosen: Sequence["Named"]) -> list[Change]:
    """The changes one after the other; those that no longer change anything are left out."""
    found, launch = [], run.launch
    for option, change in chosen:
        changed = change(launch)
        if changed is not None:
            launch = changed
            found.append(Change(option_of(option, launch), sized(launch).memory.peak, launch))
    return found


def more_rows(run: Sized, room: float) -> Sized | None:
    """Return the run with more rows decoded at once, which is faster, as far as there is room; None where nothing is.

    Args:
        run: A run that fits.
        room: Bytes that there are.
    """
    rows = run.launch.rows * run.launch.accumulation
    while run.launch.rolls_out and rows > run.memory.rollout_rows:
        more = sized(replace(run.launch, rollout_rows=rows))
        if more.memory.peak <= room:
            return more
        rows //= 2
    return None


def relief_of(run: Sized, phase: str) -> Change | None:
    """Return the first option that lowers a phase by a tenth or more, else the one that lowers it most, if any does.

    Args:
        run: The run.
        phase: One that it has.

    Returns:
        The option, with what the phase then takes as its peak.
    """
    before = run.memory.total(phase)
    found: list[Change] = []
    for option, change in CHANGES:
        changed = change(run.launch)
        if changed is None:
            continue
        memory = sized(changed).memory
        after = memory.total(phase) if phase in memory.phases else before
        if after < before:
            found.append(Change(option_of(option, changed), after, changed))
        if after <= 0.9 * before:
            return found[-1]
    return min(found, key=lambda one: one.peak, default=None)


def option_of(text: str, launch: Launch) -> str:
    """Return an option with the values that a run then has."""
    return text.format(rows=launch.rows, accumulation=launch.accumulation, rollout_rows=launch.rollout_rows)


def _half_precision_teacher(launch: Launch) -> Launch | None:
    return replace(launch, teacher_dtype="bfloat16") if launch.teacher_dtype == "float32" and launch.teacher else None


def _half_states(launch: Launch) -> Launch | None:
    keeps = launch.rolls_out and launch.keeps_states and launch.reads_teacher and launch.teacher_writes
    if not keeps or (launch.states_dtype or launch.teacher_dtype) != "float32":
        return None
    return replace(launch, states_dtype="bfloat16")


def _fewer_decoded(launch: Launch) -> Launch | None:
    prompts = launch.rows * launch.accumulation
    now = min(launch.rollout_rows or prompts, prompts)
    return replace(launch, rollout_rows=max(now // 4, 1)) if launch.rolls_out and now > 1 else None


def _smaller_batches(launch: Launch) -> Launch | None:
    if launch.rows == 1:
        return None
    total = launch.rows * launch.accumulation
    rows = max(launch.rows // 4, 1)
    return replace(launch, rows=rows, accumulation=-(-total // rows))


def _copy_away(launch: Launch) -> Launch | None:
    if launch.copy_dtype is None or launch.offloads_copy or not launch.cuda:
        return None
    return replace(launch, offloads_copy=True)


def _checkpointing(launch: Launch) -> Launch | None:
    return None if launch.checkpointing else replace(launch, checkpointing=True)


def _mixed(launch: Launch) -> Launch | None:
    # Of one GPU alone it saves little: weights, gradients and states keep their precision.
    if launch.bf16 or launch.student_dtype != "float32" or not launch.cuda or not launch.splits_states:
        return None
    return replace(launch, bf16=True, copy_dtype=None if launch.copy_dtype is None else "bfloat16")


def _states_away(launch: Launch) -> Launch | None:
    keeps = launch.rolls_out and launch.keeps_states and launch.reads_teacher and launch.teacher_writes
    return replace(launch, offloads_states=True) if keeps and launch.cuda and not launch.offloads_states else None


def _fully_sharded(launch: Launch) -> Launch | None:
    if launch.gpus == 1 or launch.sharded:
        return None
    return replace(launch, sharding="fsdp2", copy_dtype=launch.copy_dtype or launch.compute_dtype)


def _small_states(launch: Launch) -> Launch | None:
    if launch.optimizer.startswith("adafactor") or launch.adapter is not None:
        return None
    return replace(launch, optimizer="adafactor")


def _adapter(launch: Launch) -> Launch | None:
    if launch.adapter is not None:
        return None
    return replace(launch, adapter=Adapter(), copy_dtype=launch.copy_dtype or launch.compute_dtype)


def _half_base(launch: Launch) -> Launch | None:
    if launch.adapter is None or launch.student_dtype != "float32":
        return None
    return replace(launch, student_dtype="bfloat16", copy_dtype=None if launch.copy_dtype is None else "bfloat16")


def _teacher_away(launch: Launch) -> Launch | None:
    if launch.teacher is None or launch.offloads_teacher or not launch.cuda:
        return None
    return replace(launch, offloads_teacher=True)


def _shared_teacher(launch: Launch) -> Launch | None:
    # The slowest way: its layers travel for every pass.
    if launch.teacher is None or launch.gpus == 1 or launch.shards_teacher or launch.teacher_dtype in ("int8", "nf4"):
        return None
    return replace(launch, shards_teacher=True, offloads_teacher=False)


def _small_teacher(launch: Launch) -> Launch | None:
    if launch.teacher is None or launch.teacher_dtype in ("int8", "nf4") or not launch.cuda:
        return None
    return replace(launch, teacher_dtype="nf4")


Named = tuple[str, Callable[[Launch], Launch | None]]
#: Options with the run that they make of another, None where they change nothing; in the order in which they are tried.
CHANGES: tuple[Named, ...] = (
    ('--teacher_model_init_kwargs \'{{"dtype": "bfloat16"}}\'', _half_precision_teacher),
    ("--teacher_hidden_dtype bfloat16", _half_states),
    ("--rollout_batch_size {rollout_rows}", _fewer_decoded),
    ("--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation}", _smaller_batches),
    ("--offload_teacher_hidden", _states_away),
    ("--offload_rollout_copy", _copy_away),
    ("--gradient_checkpointing", _checkpointing),
    ("--sharding fsdp2", _fully_sharded),
    ("--bf16", _mixed),
    ("--optim adafactor", _small_states),
    ("--use_peft", _adapter),
    ("--dtype bfloat16", _half_base),
    ("--offload_teacher", _teacher_away),
    ('--teacher_model_init_kwargs \'{{"quantization_config": {{"load_in_4bit": true}}}}\'', _small_teacher),
    ("--teacher_sharding fsdp2", _shared_teacher),
)
