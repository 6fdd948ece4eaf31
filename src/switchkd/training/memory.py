"""The memory of an optimizer step, part by part and phase by phase: arithmetic on what two models take.

Peaks differ from phase to phase: a rollout has caches but no gradients, a backward pass the other way round. What a
model takes is in a `Footprint`; everything else follows from the options of the run, a `Launch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from switchkd.errors import UserError
from switchkd.objective.chunked import MEMORY_BUDGET, chunk_sizes
from switchkd.training.footprint import Adapter, Footprint, blocks_of

# What a row of a rollout takes, counted in numbers: this many drafted positions, each with so many rows of the
# vocabulary (both models' logits and log-probabilities, the noise and a temporary).
DRAFTED_POSITIONS, VOCABULARY_ROWS = 8, 6
# What training keeps of a position in a layer, counted in hidden states: inputs, projections, the wide feed-forward.
KEPT_STATES = 16

SHARDINGS = ("none", "ddp", "fsdp2", "zero2", "zero3")
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.5625}
#: Start of the optimizer's name -> bytes of its states for each updated number of four bytes.
STATES = {
    "adamw_bnb_8bit": 2.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "ademamix_8bit": 3.0, "lion_8bit": 1.0,
    "paged_lion_8bit": 1.0, "rmsprop_bnb_8bit": 1.0, "adamw": 8.0, "paged_adamw": 8.0, "ademamix": 12.0, "lion": 4.0,
    "paged_lion": 4.0, "adafactor": 0.05, "sgd": 0.0, "adagrad": 4.0, "rmsprop": 4.0,
}  # fmt: skip
# Elements that DeepSpeed reduces at once (reduce_bucket_size).
ZERO_BUCKET = 5e8
#: Parts of a rollout that stay where its shapes are fixed.
HELD = ("student key/values", "teacher key/values", "drafts")
PHASES = ("rollout", "teacher pass", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Launch:
    """A run as far as memory and time depend on it; names of options where there is one.

    Attributes:
        student: Configuration of the student as JSON.
        teacher: Of the teacher; None where nothing asks one.
        prompt: `max_prompt_length`, tokens.
        completion: `max_completion_length`, tokens.
        rows: `per_device_train_batch_size`.
        accumulation: `gradient_accumulation_steps`.
        student_dtype: Of the student's weights: a key of `BYTES`.
        teacher_dtype: Of the teacher's.
        bf16: Whether training computes in bfloat16 from weights of another precision.
        adapter: Of a student of which nothing else trains.
        checkpointing: `gradient_checkpointing`.
        optimizer: `optim`.
        gpus: Processes, one for each GPU.
        sharding: One of `SHARDINGS`.
        rolls_out: Whether steps train on rolled-out text.
        teacher_writes: Whether the teacher takes part in rollouts.
        reads_teacher: Whether the loss compares with the teacher.
        objective: What is learned, a name in `switchkd.objective_names.OBJECTIVES`.
        keeps_states: `reuse_teacher_hidden`, where the loss can use it.
        states_dtype: `teacher_hidden_dtype`; None is the teacher's.
        offloads_states: `offload_teacher_hidden`.
        offloads_teacher: `offload_teacher`.
        shards_teacher: Whether `teacher_sharding` spreads the teacher's weights over the processes.
        static: `cuda_graphs`: what a rollout decodes with has fixed shapes and stays between rollouts.
        rollout_rows: `rollout_batch_size`; None as many as fit into the memory of a micro-batch.
        draft: Tokens of a draft; None where the run chooses.
        copy_dtype: Precision of the inference copy that rollouts are written by; None without a copy.
        offloads_copy: `offload_rollout_copy`.
        cuda: Whether it is a GPU.
    """

    student: str
    teacher: str | None
    prompt: int = 256
    completion: int = 256
    rows: int = 8
    accumulation: int = 1
    student_dtype: str = "float32"
    teacher_dtype: str = "bfloat16"
    bf16: bool = False
    adapter: Adapter | None = None
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    gpus: int = 1
    sharding: str = "none"
    rolls_out: bool = True
    teacher_writes: bool = True
    reads_teacher: bool = True
    objective: str = "reverse_kl"
    keeps_states: bool = True
    states_dtype: str | None = None
    offloads_states: bool = False
    offloads_teacher: bool = False
    shards_teacher: bool = False
    static: bool = False
    rollout_rows: int | None = None
    draft: int | None = None
    copy_dtype: str | None = None
    offloads_copy: bool = False
    cuda: bool = True

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.completion

    @property
    def sharded(self) -> bool:
        """Whether the student's weights are spread over the processes."""
        return self.sharding in ("fsdp2", "zero3")

    @property
    def splits_states(self) -> bool:
        """Whether the optimizer's states are."""
        return self.sharding in ("fsdp2", "zero2", "zero3")

    @property
    def compute_dtype(self) -> str:
        """What the student's passes compute in."""
        own = self.student_dtype if self.student_dtype in ("bfloat16", "float16") else "float32"
        return "bfloat16" if self.bf16 else own


@dataclass(frozen=True)
class StepMemory:
    """Bytes of each part in each phase of an optimizer step, on one GPU.

    Attributes:
        phases: Phase -> part -> bytes; only phases that the run has.
        rollout_rows: Rows decoded at once.
    """

    phases: dict[str, dict[str, float]]
    rollout_rows: int

    def total(self, phase: str) -> float:
        """Return the bytes of a phase."""
        return sum(self.phases[phase].values())

    @property
    def largest(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        """The highest of all phases, bytes."""
        return self.total(self.largest)

    @property
    def parts(self) -> list[str]:
        """The parts that take something in any phase, in the order of a table."""
        named = [part for parts in self.phases.values() for part, size in parts.items() if size > 0]
        return list(dict.fromkeys(named))


def step_memory(launch: Launch, student: Footprint, teacher: Footprint | None) -> StepMemory:
    """Return what each part takes in each phase of a step.

    Args:
        launch: The run.
        student: Measured for a training micro-batch of the launch.
        teacher: Measured for the same micro-batch, without training; None without a teacher.
    """
    rows = decoded_rows(launch, student, teacher)
    in_rollout = _standing(launch, student, teacher)
    decoding = _rollout(launch, student, teacher, rows) if launch.rolls_out else {}
    if launch.static:
        in_rollout |= {name: size for name, size in decoding.items() if name in HELD}
    standing = in_rollout | ({"inference copy": 0.0} if launch.offloads_copy else {})
    away = standing | ({"teacher weights": 0.0} if launch.offloads_teacher else {})
    gradients = _gradients(launch, student)
    own = BYTES[_plain(launch.teacher_dtype)]
    phases = {}
    states = _kept_states(launch, teacher)
    carried = {"kept teacher states": 0.0}
    if launch.rolls_out:
        # What the rounds filled is cut to the longest row at the end: a copy.
        phases["rollout"] = in_rollout | {"kept teacher states": 2 * states * own} | decoding
    if states:
        kept = states * (own if launch.states_dtype is None else BYTES[launch.states_dtype])
        carried["kept teacher states"] = kept / launch.accumulation if launch.offloads_states else kept
    carried["gradients"] = gradients if launch.accumulation > 1 or launch.sharding.startswith("zero") else 0.0
    kept_by_student = {"activations": float(student.kept), "gathered weights": _gathered(launch, student)}
    if launch.reads_teacher and not states and teacher is not None:
        phases["teacher pass"] = standing | carried | kept_by_student
        phases["teacher pass"]["activations"] += teacher.forward
        phases["teacher pass"] |= _gathered_teacher(launch, teacher)
        carried["kept teacher states"] = launch.rows * launch.completion * teacher.hidden * own
    phases["loss"] = away | carried | kept_by_student | _loss(launch, student, teacher)
    if launch.reads_teacher:
        phases["loss"] |= _gathered_teacher(launch, teacher, layers=0)
    phases["backward"] = away | carried | kept_by_student
    if carried["gradients"] or launch.sharded:  # sharded ones are made whole for a layer at a time
        phases["backward"] |= {"gradients": gradients, "activations": float(student.next_pass)}
    else:
        phases["backward"] |= {"gradients": gradients, "activations": max(student.first_pass - gradients, 0.0)}
    updating = {"gradients": gradients, "temporaries": _update_temporaries(launch, student)}
    phases["optimizer"] = away | carried | updating
    return StepMemory(phases, rows)


def _kept_states(launch: Launch, teacher: Footprint | None) -> float:
    """How many numbers of the teacher's states a rollout keeps for the loss."""
    if teacher is None or not (launch.rolls_out and launch.teacher_writes and launch.reads_teacher):
        return 0.0
    return float(launch.keeps_states * launch.rows * launch.accumulation * launch.completion * teacher.hidden)


def copy_dtype(
    wanted: str, dtype: str | None, *, student_dtype: str, bf16: bool, sharded: bool, adapter: bool
) -> str | None:
    """Return the precision of the student's inference copy, None where the student itself writes its rollouts.

    Args:
        wanted: `rollout_copy`: auto, always or never.
        dtype: `rollout_dtype`; None takes that of training.
        student_dtype: Of the student's weights.
        bf16: Whether training computes in bfloat16 from weights of another precision.
        sharded: Whether those weights are spread over the processes.
        adapter: Whether only an adapter trains.
    """
    own = "bfloat16" if bf16 or student_dtype in ("int8", "nf4") else student_dtype
    needed = sharded or bf16 or adapter or dtype not in (None, student_dtype)
    return (dtype or own) if wanted == "always" or (wanted == "auto" and needed) else None


def decoded_rows(launch: Launch, student: Footprint, teacher: Footprint | None) -> int:
    """Return how many rows of a rollout are decoded at once."""
    prompts = launch.rows * launch.accumulation
    if launch.rollout_rows is not None:
        return min(launch.rollout_rows, prompts)
    models = [one for one in (student, teacher) if one is not None]
    fit = rows_that_fit(
        launch.rows,
        launch.length,
        student.states,
        [one.key_values for one in models],
        student.vocabulary,
        static=launch.static,
    )
    return min(fit, prompts)


def rows_that_fit(
    rows: int, length: int, student: int, readers: Sequence[int], vocabulary: int, *, static: bool = False
) -> int:
    """Return how many rows are decoded at once: as many as fit into what training one micro-batch takes.

    An estimate from the models' shapes: training keeps `KEPT_STATES` states of every position and layer of the
    student and the loss's blocks of logits; a row of a rollout takes keys and values of both models, and rows of the
    vocabulary for a draft. At least a micro-batch's rows.

    Args:
        rows: Rows of a micro-batch.
        length: Tokens of a row.
        student: Layers times hidden width of the student.
        readers: Numbers that the cache of each model that reads keeps for a token.
        vocabulary: Ids that the student scores.
        static: Whether shapes are fixed, see `slots_of`: rows then are a power of two.
    """
    length = slots_of(length) if static else length
    trained = rows * length * student * KEPT_STATES * 4
    cached = sum(length * numbers * 4 for numbers in readers)
    drafted = DRAFTED_POSITIONS * VOCABULARY_ROWS * vocabulary * 4
    fit = (trained + MEMORY_BUDGET) // (cached + drafted)
    return max(1 << (fit.bit_length() - 1) if static and fit else fit, rows)


def slots_of(length: int) -> int:
    """Return how many tokens a row of fixed shape has room for: its own and a draft beyond, a power of two."""
    return 1 << (length + DRAFTED_POSITIONS - 1).bit_length()


def weight_bytes(model: Footprint, dtype: str) -> float:
    """Return the bytes of a model's weights; of 8 and 4 bits the linear layers have them, bfloat16 the rest."""
    if dtype in ("int8", "nf4"):
        return model.linear * BYTES[dtype] + (model.parameters - model.linear) * BYTES["bfloat16"]
    return float(model.weights)


def optimizer_bytes(optimizer: str) -> float:
    """Return the bytes of states for each updated number of four bytes.

    Raises:
        UserError: The optimizer is not known here.
    """
    names = sorted((name for name in STATES if optimizer.startswith(name)), key=len)
    if not names:
        raise UserError(
            f"the states of optim {optimizer!r} are not known here; plan with adamw_torch, or sgd, adafactor"
        )
    return STATES[names[-1]]


def _plain(dtype: str) -> str:
    """What a model in 8 or 4 bits computes in."""
    return "bfloat16" if dtype in ("int8", "nf4") else dtype


def _standing(launch: Launch, student: Footprint, teacher: Footprint | None) -> dict[str, float]:
    """What is there in every phase."""
    parts = launch.gpus
    weights, per_number = weight_bytes(student, launch.student_dtype), optimizer_bytes(launch.optimizer)
    # States of PyTorch's optimizers have the precision of the weights.
    states = student.trained * per_number
    if launch.student_dtype in ("bfloat16", "float16") and per_number >= 4.0 and launch.adapter is None:
        states /= 2
    if launch.sharding in ("zero2", "zero3") and launch.bf16:
        # DeepSpeed computes with bfloat16 weights, and keeps those in float32 with the states.
        weights, states = weights / 2, student.trained * (per_number + 4.0)
    return {
        "student weights": weights / parts if launch.sharded else weights,
        "optimizer states": states / parts if launch.splits_states else states,
        "inference copy": 0.0 if launch.copy_dtype is None else student.parameters * BYTES[launch.copy_dtype],
        # What DDP reduces is a copy, which stays.
        "gradient buckets": float(student.gradients) if launch.sharding == "ddp" else 0.0,
        "teacher weights": 0.0
        if teacher is None
        else weight_bytes(teacher, launch.teacher_dtype) / (parts if launch.shards_teacher else 1),
    }


def _gradients(launch: Launch, student: Footprint) -> float:
    size = float(student.gradients)
    if launch.sharding in ("zero2", "zero3") and launch.bf16:
        size /= 2
    if launch.sharding in ("zero2", "zero3"):
        number = 2.0 if launch.bf16 else 4.0
        return size / launch.gpus + min(2 * ZERO_BUCKET * number, 2 * size)
    return size / launch.gpus if launch.sharding == "fsdp2" else size


def _gathered(launch: Launch, student: Footprint) -> float:
    """Weights that stand whole for a while: two layers, and what lies outside the layers."""
    if not launch.sharded:
        return 0.0
    return (2 * student.layer + student.outside) * BYTES[launch.compute_dtype]


def _gathered_teacher(launch: Launch, teacher: Footprint | None, *, layers: int = 2) -> dict[str, float]:
    """The same of a sharded teacher; what lies outside of its layers is there twice while it is gathered."""
    if teacher is None or not launch.shards_teacher:
        return {}
    numbers = teacher.outside + (max(layers * teacher.layer, teacher.outside) if layers else 0)
    return {"gathered teacher weights": numbers * BYTES[launch.teacher_dtype]}


def _rollout(launch: Launch, student: Footprint, teacher: Footprint | None, rows: int) -> dict[str, float]:
    """Caches and drafts while text is written."""
    reading = launch.copy_dtype or launch.compute_dtype
    wide, rows = (slots_of(launch.length), 1 << (rows - 1).bit_length()) if launch.static else (launch.length, rows)
    numbers = {"student": BYTES[reading], "teacher": BYTES[_plain(launch.teacher_dtype)]}
    if not launch.cuda:
        numbers = dict.fromkeys(numbers, 4.0)  # on a CPU caches of half precision are slower
    parts = {"student key/values": rows * wide * student.key_values * numbers["student"]}
    drafted = launch.draft or DRAFTED_POSITIONS
    writes = launch.teacher_writes and teacher is not None
    size = rows * drafted * student.vocabulary
    # Log-probabilities of both models in float32, the teacher's logits; and on a GPU what warping and comparing
    # make of them, which a CPU does in small pieces.
    vocabulary = size * 4.0
    prefill = student.forward / (launch.rows * launch.length)
    if writes and teacher is not None:
        parts["teacher key/values"] = rows * wide * teacher.key_values * numbers["teacher"]
        vocabulary += size * (4.0 + BYTES[_plain(launch.teacher_dtype)])
        prefill = max(prefill, teacher.forward / (launch.rows * launch.length))
        parts |= _gathered_teacher(launch, teacher)
    if launch.cuda:
        vocabulary += size * 12.0
    parts["drafts"] = max(vocabulary, prefill * rows * launch.prompt)
    if launch.copy_dtype is None:
        parts["temporaries"] = float(student.copied)
        if launch.bf16:
            parts["temporaries"] += 2.0 * student.parameters  # autocast keeps what it has cast
    if teacher is not None and not launch.shards_teacher:
        parts["temporaries"] = parts.get("temporaries", 0.0) + teacher.copied
    if launch.sharded:
        # Before it the copy takes over one whole tensor after the other, each there twice while it is gathered.
        parts["gathered weights"] = max(2.0 * student.largest - sum(parts.values()), 0.0)
    return parts


def _loss(launch: Launch, student: Footprint, teacher: Footprint | None) -> dict[str, float]:
    """Pieces of logits and what is made of them, and the gradient of the output layer."""
    number = BYTES[launch.compute_dtype]
    width, positions = student.vocabulary, launch.rows * launch.completion
    sizes = chunk_sizes(width, element_size=int(number), cached=not launch.cuda)
    sides = 2 if launch.reads_teacher and teacher is not None else 1
    logits = sides * min(positions, sizes.rows) * width * number
    raised = sides if number < 4.0 else 0  # comparing starts from float32
    compared = min(positions, sizes.block) * width * 4.0 * (blocks_of(launch.objective) + raised)
    states = positions * student.hidden * 3 * 4.0
    return {"loss": logits + compared + states + student.head_gradient}


def _update_temporaries(launch: Launch, student: Footprint) -> float:
    if launch.optimizer in ("adamw_torch_fused", "sgd"):
        return 0.0
    if launch.cuda:
        return student.gradients / (launch.gpus if launch.splits_states else 1)
    return 2.0 * student.largest
