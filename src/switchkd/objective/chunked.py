"""The objective from hidden states and output heads: logits exist for one chunk of positions at a time.

Only supervised positions are projected. The gradient is computed in the forward, chunk by chunk, while the chunk's
logits are there; the backward scales it. Values and gradients are those of `switchkd.objective` up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchkd.models.heads import OutputHead
from switchkd.objective.loss import Objective, at_least_float32, per_token

#: What logits and their temporaries may take, bytes; the gradient of the head's weight comes on top.
MEMORY_BUDGET = 256 * 2**20
# Temporaries of a divergence and its gradient, counted in blocks of float32 logits (the largest: generalised JSD).
TEMPORARIES = 14
# On a CPU, temporaries that fit its caches are several times faster than those that do not.
CACHED_BLOCK = 4 * 2**20


class ChunkedLoss(NamedTuple):
    """What `chunked_loss` returns.

    Attributes:
        loss: The weighted sum over a count, a scalar with its gradient.
        token_losses: The loss of every token before weighting, nats, detached, 0 where nothing is supervised; of the
            mask's shape.
    """

    loss: Tensor
    token_losses: Tensor


class ChunkSizes(NamedTuple):
    """How many positions are projected at once, and how many of them are compared at once; block <= rows."""

    rows: int
    block: int


def chunk_sizes(
    width: int, *, memory_budget: int = MEMORY_BUDGET, element_size: int = 4, cached: bool = True
) -> ChunkSizes:
    """Return how many positions fit the budget: both models' logits for the rows, and the temporaries of a block.

    Args:
        width: Ids compared, V.
        memory_budget: Bytes.
        element_size: Bytes of one projected logit.
        cached: Compare in blocks that fit a CPU's caches; projections stay large, because many narrow ones would
            read and write the gradient of the head's weight again and again.

    Returns:
        At least one row each, whatever the budget.
    """
    projected = 2 * width * element_size
    compared = TEMPORARIES * width * max(element_size, 4)
    if not cached:
        rows = max(memory_budget // (projected + compared), 1)
        return ChunkSizes(rows, rows)
    block = max(min(CACHED_BLOCK // (width * 4), memory_budget // (projected + compared)), 1)
    rows = max((memory_budget - block * compared) // projected, block)
    return ChunkSizes(rows, block)


def chunked_loss(
    student_hidden: Tensor,
    student_head: OutputHead,
    *,
    mask: Tensor,
    objective: Objective | str,
    teacher_hidden: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> ChunkedLoss:
    """Return `reduce_losses(weights * token_losses(logits, ...), mask, denominator)` without ever holding all logits.

    Args:
        student_hidden: The states that predict each token, `[B, C, H]`.
        student_head: Its parameters get their gradients too, where they want them.
        mask: True at supervised tokens, `[B, C]`.
        objective: What is learned, or its name where it has no options.
        teacher_hidden: `[B, C, H']`, in any precision and on any device: it is moved chunk by chunk. No gradient
            reaches it.
        teacher_head: May score more or fewer ids: both sides are cut to the shared ones and renormalised.
        labels: int64 `[B, C]`, for the cross-entropy.
        weights: Multiply the losses, `[B, C]`, e.g. by author; None is 1 everywhere. They do not enter the count.
        denominator: How many tokens share one optimizer step; the mask's own count if None.
        memory_budget: Bytes for logits and their temporaries.

    Raises:
        ValueError: Shapes that do not fit together, or an input that the objective needs and lacks.
    """
    for name, value, shape in (
        ("student_hidden", student_hidden, student_hidden.shape[:-1]),
        ("teacher_hidden", teacher_hidden, None if teacher_hidden is None else teacher_hidden.shape[:-1]),
        ("labels", labels, None if labels is None else labels.shape),
        ("weights", weights, None if weights is None else weights.shape),
    ):
        if value is not None and shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the mask {tuple(mask.shape)}")
    objective = Objective.of(objective)
    compares = objective.reads_teacher
    if compares and (teacher_hidden is None or teacher_head is None):
        raise ValueError(f"{objective.name} needs teacher_hidden and teacher_head")
    if not compares and labels is None:
        raise ValueError("cross_entropy needs labels")

    positions = mask.flatten().nonzero().squeeze(1)
    states = student_hidden.flatten(0, -2).index_select(0, positions)
    task = _Task(
        student_head=student_head,
        teacher_head=teacher_head if compares else None,
        teacher_states=teacher_hidden.flatten(0, -2) if compares and teacher_hidden is not None else None,
        positions=positions,
        labels=None if compares or labels is None else labels.flatten()[positions],
        weights=None if weights is None else weights.flatten()[positions].detach(),
        objective=objective,
        memory_budget=memory_budget,
        learns=torch.is_grad_enabled(),
    )
    learned = [parameter for parameter in student_head.module.parameters() if parameter.requires_grad]
    total, losses = _ChunkedTotal.apply(task, states, *learned)  # type: ignore[no-untyped-call]
    loss = per_token(total, len(positions) if denominator is None else denominator)
    token_losses = losses.new_zeros(mask.numel()).index_copy_(0, positions, losses)
    return ChunkedLoss(loss, token_losses.view(mask.shape))


@dataclass(frozen=True)
class _Task:
    """Everything but the student's states and parameters, which autograd must see; N supervised positions."""

    student_head: OutputHead
    teacher_head: OutputHead | None
    teacher_states: Tensor | None  # [B * C, H']
    positions: Tensor  # [N], rows of teacher_states
    labels: Tensor | None  # [N]
    weights: Tensor | None  # [N]
    objective: Objective
    memory_budget: int
    learns: bool

    def losses(self, student_raw: Tensor, teacher_raw: Tensor | None, rows: slice) -> Tensor:
        """Return the losses of some positions, from what the two output layers give for them, `[n, V]`."""
        student_logits = self.student_head.logits(at_least_float32(student_raw))
        teacher_logits = None
        if teacher_raw is not None:
            assert self.teacher_head is not None
            teacher_logits = self.teacher_head.logits(at_least_float32(teacher_raw.to(student_raw.device)))
        return self.objective(student_logits, teacher_logits, None if self.labels is None else self.labels[rows])

    def read_teacher(self, projection: "_Projection | None", rows: slice) -> Tensor | None:
        if projection is None:
            return None
        assert self.teacher_states is not None
        states = self.teacher_states.index_select(0, self.positions[rows].to(self.teacher_states.device))
        return projection.project(states.to(projection.device, projection.dtype))


class _ChunkedTotal(torch.autograd.Function):
    """The weighted sum of all losses, and the losses; the gradient of the sum is ready when the forward returns."""

    @staticmethod
    def forward(ctx: Any, task: _Task, states: Tensor, *learned: Tensor) -> tuple[Tensor, Tensor]:
        learns = task.learns and any(ctx.needs_input_grad)
        heads = [head for head in (task.student_head, task.teacher_head) if head is not None]
        width = min(head.width for head in heads)
        student = _projection(task.student_head, width, learned if learns else (), learns=learns)
        teacher = None if task.teacher_head is None else _projection(task.teacher_head, width)
        sizes = chunk_sizes(
            width,
            memory_budget=task.memory_budget,
            element_size=student.dtype.itemsize,
            cached=states.device.type == "cpu",
        )
        d_states = torch.zeros_like(states) if learns and ctx.needs_input_grad[1] else None
        # One buffer from the start: small tensors that outlive their block would leave holes in a CPU's heap.
        losses = states.new_zeros(len(states), dtype=torch.promote_types(states.dtype, torch.float32))
        for start in range(0, len(states), sizes.rows):
            rows = slice(start, min(start + sizes.rows, len(states)))
            student_raw = student.project(states[rows])
            teacher_raw = task.read_teacher(teacher, rows)
            for first in range(rows.start, rows.stop, sizes.block):
                block = slice(first, min(first + sizes.block, rows.stop))
                inside = slice(block.start - rows.start, block.stop - rows.start)
                losses[block] = _losses_and_gradient(
                    task, student_raw[inside], None if teacher_raw is None else teacher_raw[inside], block, learns
                )
            if learns:
                student.pull_back(student_raw, None if d_states is None else d_states[rows])
        total = losses if task.weights is None else losses * task.weights
        ctx.gradients = (d_states, *student.gradients)
        ctx.dtypes = (states.dtype, *(parameter.dtype for parameter in learned))
        ctx.mark_non_differentiable(losses)
        return total.sum(), losses

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a chunked loss has no second derivative (create_graph=True); use the plain objective")
        if ctx.gradients is None:
            raise RuntimeError(
                "a chunked loss can be differentiated once: its gradient is gone; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(d_total).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (None, *scaled)


def _losses_and_gradient(
    task: _Task, student_raw: Tensor, teacher_raw: Tensor | None, rows: slice, learns: bool
) -> Tensor:
    """Return the losses of a block, and write their gradient over the student's projected logits."""
    if not learns:
        return task.losses(student_raw, teacher_raw, rows)
    leaf = at_least_float32(student_raw).detach().requires_grad_()
    with torch.enable_grad():
        losses = task.losses(leaf, teacher_raw, rows)
        weighted = losses if task.weights is None else losses * task.weights[rows]
        (gradient,) = torch.autograd.grad(weighted.sum(), leaf)
    student_raw.copy_(gradient)
    return losses.detach()


class _Projection:
    """An output layer at work, through its module: `[n, H] -> [n, V]`, and gradients back.

    Args:
        head: The output layer.
        width: Leading ids wanted, V.
        learned: Parameters whose gradients are wanted; they are summed in float32 at least, in `gradients`.
        learns: Whether gradients are pulled back at all.
    """

    def __init__(self, head: OutputHead, width: int, learned: Sequence[Tensor] = (), *, learns: bool = False) -> None:
        self.module: Any = head.module
        self.width, self.learned, self.learns = width, learned, learns
        weight: Any = head.module.weight
        self.device = weight.device
        if torch.is_autocast_enabled(self.device.type):
            self.dtype = torch.get_autocast_dtype(self.device.type)
        else:
            self.dtype = weight.dtype if weight.is_floating_point() else torch.float32
        self.gradients = [
            torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for parameter in learned
        ]

    def project(self, states: Tensor) -> Tensor:
        """Return what the layer gives; the caller may write over it."""
        if not self.learns:
            return self.module(states)[:, : self.width]
        with torch.enable_grad():
            self._states = states.detach().requires_grad_()
            self._raw = self.module(self._states)[:, : self.width]
        return self._raw.detach().clone()

    def pull_back(self, d_raw: Tensor, d_states: Tensor | None) -> None:
        """Add the gradients of the parameters and write that of the states, for the last projection."""
        leaves = [self._states, *self.learned]
        found = torch.autograd.grad(self._raw, leaves, d_raw, allow_unused=True)
        for total, gradient in zip((d_states, *self.gradients), found, strict=True):
            if total is not None and gradient is not None:
                total.add_(gradient)
        del self._raw


class _PlainProjection(_Projection):
    """The same for a bare `nn.Linear`: only the wanted rows, one buffer, products accumulated in place."""

    def __init__(self, head: OutputHead, width: int, learned: Sequence[Tensor] = (), *, learns: bool = False) -> None:
        super().__init__(head, width, learned, learns=learns)
        bias = self.module.bias
        self._weight = self.module.weight.detach()[:width].to(self.dtype)
        self._bias = None if bias is None else bias.detach()[:width].to(self.dtype)
        self._buffer: Tensor | None = None

    def project(self, states: Tensor) -> Tensor:
        self._states = states.detach().to(self.dtype)
        if self._buffer is None:
            # The first chunk is the largest. A fresh buffer for each would cost as much as the arithmetic on it.
            self._buffer = self._states.new_empty(len(states), self.width)
        raw = self._buffer[: len(states)]
        if self._bias is None:
            return torch.mm(self._states, self._weight.t(), out=raw)
        return torch.addmm(self._bias, self._states, self._weight.t(), out=raw)

    def pull_back(self, d_raw: Tensor, d_states: Tensor | None) -> None:
        if d_states is not None:
            d_states.copy_(d_raw @ self._weight)
        for parameter, total in zip(self.learned, self.gradients, strict=True):
            if parameter is self.module.bias:
                total[: self.width].add_(d_raw.sum(0, dtype=total.dtype))
            elif total.dtype == d_raw.dtype:
                total[: self.width].addmm_(d_raw.t(), self._states)
            else:
                total[: self.width].add_(d_raw.t() @ self._states)


def _projection(head: OutputHead, width: int, learned: Sequence[Tensor] = (), *, learns: bool = False) -> _Projection:
    return (_PlainProjection if head.is_plain else _Projection)(head, width, learned, learns=learns)
