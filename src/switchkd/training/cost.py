"""Seconds of an optimizer step: what must be read and computed, over what a card gives.

Every pass takes the longer of two times, reading weights and caches or computing, and the time to launch its kernels.
This is arithmetic: of a published peak only a share is reached, which differs from model to model.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from switchkd.errors import UserError, nearest_name
from switchkd.training.footprint import Footprint
from switchkd.training.memory import BYTES, Launch, optimizer_bytes, weight_bytes


@dataclass(frozen=True)
class Card:
    """What a device gives.

    Attributes:
        memory: Bytes.
        bandwidth: Bytes a second between memory and processor.
        half: Floating-point operations a second in bfloat16 (float16 where the card has no other), without sparsity.
        single: The same in float32.
        link: Bytes a second to each other card of the machine, in one direction.
        reached: Shares of bandwidth and of the operations that are reached.
        call: Seconds from one kernel to the next where the host launches them one by one.
        source: Where the figures are from.
    """

    memory: float
    bandwidth: float
    half: float
    single: float
    link: float
    reached: tuple[float, float] = (0.6, 0.4)
    call: float = 8e-6
    source: str = "data sheet of the vendor"


#: Published peaks. A card's memory is counted in powers of ten, as it is sold: what the driver takes is then left over.
CARDS = {
    "t4": Card(16e9, 320e9, 65e12, 8.1e12, 16e9),
    "v100-32gb": Card(32e9, 900e9, 125e12, 15.7e12, 150e9),
    "rtx3090": Card(24e9, 936e9, 71e12, 35.6e12, 16e9),
    "rtx4090": Card(24e9, 1008e9, 165e12, 82.6e12, 32e9),
    "a10": Card(24e9, 600e9, 125e12, 31.2e12, 32e9),
    "l4": Card(24e9, 300e9, 121e12, 30.3e12, 32e9),
    "l40s": Card(48e9, 864e9, 362e12, 91.6e12, 32e9),
    "a100-40gb": Card(40e9, 1555e9, 312e12, 19.5e12, 300e9),
    "a100-80gb": Card(80e9, 2039e9, 312e12, 19.5e12, 300e9),
    "h100-pcie": Card(80e9, 2000e9, 756e12, 51e12, 64e9),
    "h100": Card(80e9, 3350e9, 989e12, 67e12, 450e9),
    "h200": Card(141e9, 4800e9, 989e12, 67e12, 450e9),
    "b200": Card(180e9, 7700e9, 2250e12, 75e12, 900e9),
    "mi300x": Card(192e9, 5300e9, 1307e12, 163e12, 64e9),
}
#: Between machines, for each card: a port of 400 Gbit/s.
NODE_LINK = 50e9
GPUS_OF_A_NODE = 8
# Kernels of a decoder layer in the shorter forward that rollouts take.
KERNELS = 20
# Teacher's share -> how likely a drafted token is kept, from the tokens emitted per teacher pass that
# docs/exactness.md reports for drafts of 8: 6.5, 4.9, 4.0, 3.3 at 10, 30, 53, 80%.
KEEP_RATES = ((0.0, 1.0), (0.10, 0.94), (0.30, 0.86), (0.53, 0.78), (0.80, 0.71), (1.0, 0.66))
LONGEST_DRAFT = 16


def card_of(name: str) -> Card:
    """Return a card of the table.

    Raises:
        UserError: There is none of that name: the nearest is named.
    """
    key = name.lower().replace(" ", "-").replace("_", "-")
    if key not in CARDS:
        raise UserError(
            f"card {name!r} is not in the table ({', '.join(CARDS)}); the nearest is {nearest_name(key, CARDS)!r}. For "
            "any other give --memory, --bandwidth and --flops, or --card here to measure this machine"
        )
    return CARDS[key]


def keep_rate(teacher_share: float) -> float:
    """Return how likely a drafted token is kept where the teacher writes a share of the tokens, both in [0, 1]."""
    for (low, kept), (high, next_kept) in itertools.pairwise(KEEP_RATES):
        if teacher_share <= high:
            return kept + (next_kept - kept) * (teacher_share - low) / (high - low)
    return KEEP_RATES[-1][1]


def step_seconds(
    launch: Launch,
    student: Footprint,
    teacher: Footprint | None,
    card: Card,
    *,
    rollout_rows: int,
    teacher_share: float = 0.5,
) -> dict[str, float]:
    """Return the seconds of each part of an optimizer step, all completions running to the length limit.

    Args:
        launch: The run.
        student: As `step_memory` takes it.
        teacher: Likewise.
        card: The device.
        rollout_rows: Rows decoded at once.
        teacher_share: Share of the rolled-out tokens that the teacher writes, in [0, 1].

    Returns:
        Part -> seconds: rollout, teacher pass, forward and backward, update, communication.
    """
    reading = launch.copy_dtype or launch.compute_dtype
    rows = launch.rows * launch.accumulation
    of_student = _pass(student, BYTES[reading], reading, card, launch)
    link = card.link if launch.gpus <= GPUS_OF_A_NODE else min(card.link, NODE_LINK)
    of_teacher = None
    if teacher is not None:
        plain = "bfloat16" if launch.teacher_dtype in ("int8", "nf4") else launch.teacher_dtype
        number = weight_bytes(teacher, launch.teacher_dtype) / teacher.parameters
        of_teacher = _pass(teacher, number, plain, card, launch)
        if launch.shards_teacher:  # its layers are gathered for every pass
            of_teacher = _after(of_teacher, (launch.gpus - 1) / launch.gpus * teacher.parameters * number / link)
    seconds = {}
    tokens = rows * launch.length
    if launch.rolls_out:
        seconds["rollout"] = _rollout(launch, of_student, of_teacher, rows, rollout_rows, teacher_share)
    reuses = launch.rolls_out and launch.teacher_writes and launch.keeps_states
    if launch.reads_teacher and of_teacher is not None and not reuses:
        seconds["teacher pass"] = launch.accumulation * of_teacher(launch.rows, launch.length)
    # Two operations for each weight and token forward, twice that backward; of frozen weights only half of that.
    operations = 2.0 * student.parameters * tokens * (1 + (1 if launch.adapter is not None else 2))
    if launch.checkpointing:
        operations += 2.0 * student.parameters * tokens
    seconds["forward, backward"] = operations / (_speed(card, launch.compute_dtype) * card.reached[1])
    per_number = 4.0 * 3 + 2 * optimizer_bytes(launch.optimizer)  # weight read and written, gradient, states likewise
    parts = launch.gpus if launch.splits_states else 1
    seconds["update"] = student.trained * per_number / parts / (card.bandwidth * card.reached[0])
    seconds["communication"] = communicated_bytes(launch, student) / link
    return seconds


def communicated_bytes(launch: Launch, student: Footprint) -> float:
    """Return the bytes of the student that one process sends in an optimizer step."""
    if launch.gpus == 1:
        return 0.0
    share = (launch.gpus - 1) / launch.gpus
    number = BYTES[launch.compute_dtype]
    total = 2 * share * student.trained * (number if launch.sharding.startswith("zero") else 4.0)
    if launch.sharded:
        # Weights are gathered for every forward and backward pass, and once for the copy that writes rollouts.
        total += share * student.parameters * number * 2 * launch.accumulation
        total += share * student.parameters * 4.0 * (launch.copy_dtype is not None)
    return total


Pass = Callable[[int, int], float]


def _speed(card: Card, dtype: str) -> float:
    return card.single if dtype == "float32" else card.half


def _pass(model: Footprint, number: float, dtype: str, card: Card, launch: Launch) -> Pass:
    """Seconds of a forward pass over n tokens in each of A rows, with caches half full."""
    cache = model.key_values * BYTES[dtype] * (launch.prompt + launch.completion / 2)

    def seconds(rows: int, tokens: int) -> float:
        read = model.parameters * number + (rows * cache if tokens < launch.prompt else 0.0)
        computed = 2.0 * model.parameters * rows * tokens
        busy = max(read / (card.bandwidth * card.reached[0]), computed / (_speed(card, dtype) * card.reached[1]))
        return max(busy, model.layers * KERNELS * card.call)

    return seconds


def _after(one: Pass, before: float) -> Pass:
    """The same pass with seconds before it."""
    return lambda rows, tokens: one(rows, tokens) + before


def _rollout(launch: Launch, student: Pass, teacher: Pass | None, rows: int, at_once: int, share: float) -> float:
    """Seconds of a rollout, with the draft length that takes the least time."""
    turns = -(-rows // at_once)
    prefill = student(at_once, launch.prompt) + (teacher(at_once, launch.prompt) if teacher is not None else 0.0)
    if teacher is None or not launch.teacher_writes:
        return turns * (student(at_once, launch.prompt) + launch.completion * student(at_once, 1))
    rate = keep_rate(share)

    def of_draft(length: int) -> float:
        emitted = sum(rate**place for place in range(length))
        return launch.completion / emitted * (length * student(at_once, 1) + teacher(at_once, length))

    lengths = range(1, LONGEST_DRAFT + 1) if launch.draft is None else [launch.draft]
    return turns * (prefill + min(map(of_draft, lengths)))


def measured_card(*, seconds: float = 0.2) -> Card:
    """Return what the machine at hand gives, measured: torch's device, one thread pool, large tensors.

    Args:
        seconds: How long each figure is measured.
    """
    import time

    import torch

    from switchkd.models.loading import default_device

    device = default_device()
    on_gpu = device.type != "cpu"
    size = 64 << 20 if on_gpu else 16 << 20
    source, target = (torch.ones(size, device=device) for _ in range(2))
    edge = 4096 if on_gpu else 768

    def best(work: Callable[[], object]) -> float:
        started, found = time.perf_counter(), float("inf")
        while time.perf_counter() - started < seconds:
            before = time.perf_counter()
            work()
            if on_gpu:
                torch.accelerator.synchronize()
            found = min(found, time.perf_counter() - before)
        return found

    def product(dtype: torch.dtype) -> float:
        matrix = torch.ones(edge, edge, device=device, dtype=dtype)
        return 2 * edge**3 / best(lambda: matrix @ matrix)

    half, single = product(torch.bfloat16), product(torch.float32)
    small = torch.ones(8, 8, device=device)
    calls = 64
    call = best(lambda: [small + small for _ in range(calls)]) / calls
    if on_gpu:
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        import os

        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    bandwidth = 2 * 4 * size / best(lambda: target.copy_(source))
    return Card(memory, bandwidth, half, single, bandwidth, (1.0, 1.0), call, "measured on this machine")
