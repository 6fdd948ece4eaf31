"""What graphs need to stay where it is, kept for a pair of models between rollouts: readers, places, captures."""

import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.engine.capture import Captures, host_read
from switchkd.engine.readers import LeanReader
from switchkd.engine.request import Request
from switchkd.engine.rounds import Places, Sizes, check, draft, settle
from switchkd.models.known import known
from switchkd.policies import Policy, Positions
from switchkd.sampling import Warping


class Session:
    """What stays where it is between rollouts of a pair: readers with their caches, places, captured functions.

    Args:
        request: The rollout it is made for.
        sizes: How large.
    """

    def __init__(self, request: Request, sizes: Sizes) -> None:
        self.sizes, device = sizes, request.row_ids.device
        teacher: Any = request.teacher
        self.student = _reader(request.student, sizes.rows, sizes.slots)
        self.teacher = None if teacher is None else _reader(teacher, sizes.rows, sizes.teacher_slots)
        hidden_dtype = torch.float32 if teacher is None else teacher.get_output_embeddings().weight.dtype
        self.places = Places(sizes, self.student.log_dtype, hidden_dtype, device)
        self.captures = Captures(device)
        self.report = torch.empty_like(self.places.report, device="cpu", pin_memory=device.type == "cuda")
        self.addresses = _addresses(request)
        self._teacher = None if request.teacher is None else weakref.ref(request.teacher)
        self._policy: Policy | None = None
        self._host_read: str | None = None
        self._warping: Warping | None = None
        self._constants: list[Tensor] = []

    @classmethod
    def of(cls, request: Request, sizes: Sizes) -> "Session":
        """Return the session of a pair, a new one where the last does not serve, and make it ready."""
        record = known(request.student)
        last: Session | None = record.session
        if last is not None and not last._serves(request, sizes):
            # Dropped before the next takes memory.
            sizes = last.sizes.joined(sizes)
            record.session = last = None
        if last is None:
            record.session = last = cls(request, sizes)
            if request.teacher is not None:
                # What was taken apart of a teacher must not outlive it.
                gone = weakref.finalize(request.teacher, _forget, weakref.ref(request.student), weakref.ref(last))
                gone.atexit = False
        last._prepare(request)
        return last

    def _serves(self, request: Request, sizes: Sizes) -> bool:
        teacher = None if self._teacher is None else self._teacher()
        same = teacher is request.teacher and self.places.active.device == request.row_ids.device
        return same and self.sizes.hold(sizes) and self.addresses == _addresses(request)

    def _prepare(self, request: Request) -> None:
        """Empty everything and write down what holds for one rollout."""
        places, policy, device = self.places, request.policy, request.row_ids.device
        self.student.clear()
        if self.teacher is not None:
            self.teacher.clear()
        places.active.zero_()
        places.emitted.zero_()
        places.limit.fill_(request.max_new_tokens)
        places.ends.copy_(torch.tensor(request.eos, dtype=torch.int64))
        if request.warping != self._warping:
            self._warping, self._constants = request.warping, request.warping.constants(device)
            self.captures.forget(lambda key: request.warping in key)
        if policy is not self._policy:
            if self._policy is None or policy != self._policy:
                # A policy that changes from step to step, as annealed ones do, must not pile up graphs.
                self.captures.forget(lambda key: key[0] != "settle")
                self._host_read = _policy_host_read(policy, self.sizes.vocabulary, device)
                if self._host_read is not None:
                    warnings.warn(f"{type(policy).__name__} decides outside of CUDA graphs: {self._host_read}")
            self._policy = policy
        state, last = policy.initial_state(self.sizes.rows, device), places.state
        if state is not None and last is not None and (state.shape, state.dtype) == (last.shape, last.dtype):
            last.copy_(state)
        elif state is not last:
            places.state = state
            self.captures.forget(lambda key: key[0] != "settle")

    def functions(
        self, rows: int, length: int, shown: int, teacher_shown: int
    ) -> tuple[Callable[[], Any], Callable[[], Any] | None, Callable[[], Any]]:
        """Return draft, check (None without a teacher) and settle of a round; the keys name every number in them."""
        places, warping, policy = self.places, self._warping, self._policy
        assert warping is not None and policy is not None
        drafting = self.captures.get(
            ("draft", warping, rows, length, shown),
            functools.partial(draft, places, self.student, warping, rows, length, shown),
            reads=self._reads(),
        )
        checking = None
        if self.teacher is not None:
            checking = self.captures.get(
                ("check", warping, rows, length, teacher_shown),
                functools.partial(check, places, self.teacher, warping, rows, length, teacher_shown),
                reads=self._reads(),
            )
        settling: Callable[[], Any] = functools.partial(settle, places, policy, rows, length)
        if self._host_read is None:
            settling = self.captures.get(
                ("settle", warping, rows, length, policy),
                settling,
                changed=places.changed(),
                reads=[*self._reads(), *([] if places.state is None else [places.state])],
            )
        return drafting, checking, settling

    def _reads(self) -> Iterator[Tensor]:
        yield from self.places.all()
        yield from self._constants
        yield from self.student.tensors()
        if self.teacher is not None:
            yield from self.teacher.tensors()


def _reader(model: Any, rows: int, slots: int) -> LeanReader:
    reader = LeanReader.of(model, rows, slots, live=True)
    assert reader is not None  # `unserved_static` has made one
    return reader


def _addresses(request: Request) -> list[int]:
    """Where every weight lies: graphs hold the addresses."""
    models: list[nn.Module] = [model for _, model, _ in request.readers()]
    return [tensor.data_ptr() for model in models for tensor in (*model.parameters(), *model.buffers())]


def _forget(student: weakref.ref[nn.Module], session: weakref.ref[Session]) -> None:
    """Drop a session with its teacher."""
    model = student()
    if model is not None and known(model).session is session():
        known(model).session = None


def _policy_host_read(policy: Policy, vocabulary: int, device: torch.device) -> str | None:
    """Why a policy's decisions cannot be captured, or None where they can."""
    parameters = getattr(policy, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        return "it is no frozen dataclass, so that its numbers may change"
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, vocabulary, generator=generator).to(device).log_softmax(-1) for _ in range(2))
    drafted = torch.arange(3, device=device)
    uniform = torch.linspace(0.2, 0.8, 3, dtype=torch.float64, device=device)

    def ask() -> None:
        measure = torch.full_like(student[:, 0], math.nan)
        if policy.needs_teacher:
            measure = policy.measure(student, teacher, drafted)
            policy.behaviour(student, teacher)
        state = policy.initial_state(3, drafted.device)
        policy.decide(Positions(measure, drafted, state, uniform if policy.random else None))

    found = host_read(ask)
    return None if found is None else f"it asks the device for something ({found})"
