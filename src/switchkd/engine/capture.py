"""Functions of static shape, captured as CUDA graphs and replayed: who may be captured, and under which key.

A graph repeats the very kernels of its capture: every address and every number of Python that went in stays. A function
that is captured therefore reads and writes tensors that stay where they are, asks nothing of the device, and has a key
that names each number. On CPU nothing is captured, but the rules are kept: a key's *first* function is called again, so
that a number missing from the key, or a tensor made anew, gives wrong text in tests that need no GPU.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Runs before a capture: libraries take their workspaces in the first.
WARM_UPS = 2
# On CPU: warm up as a capture would, and compare all addresses at each call. Tests switch it on.
VERIFY = False

#: Operations that ask the device for a number, or whose result has a shape that only the data decide; and tensors made
#: from numbers of Python, which a GPU would have to fetch from the host.
_READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "bincount", "lift_fresh")
_READS_WITH = ("unique", "_unique", "nonzero")


class Captures:
    """Functions by key, captured once on CUDA and replayed.

    Args:
        device: Where they run; on CPU they are called as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._captured: dict[Hashable, Callable[[], Any]] = {}
        self._addresses: dict[Hashable, list[int]] = {}
        self._held: list[Any] = []
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._captured)

    def __iter__(self) -> Iterator[Any]:
        """The keys."""
        return iter(self._captured)

    def get(
        self, key: Hashable, function: Callable[[], None], *, changed: Sequence[Tensor] = (), reads: Iterable[Tensor]
    ) -> Callable[[], Any]:
        """Return what to call: the function of this key that came first, or the replay of its graph.

        Args:
            key: Names the function and every number in it.
            function: Reads and writes tensors that stay where they are.
            changed: Tensors that a second call would change further; a warm-up leaves them as they were.
            reads: Every tensor it reads, for `VERIFY`.
        """
        if VERIFY:
            addresses = [tensor.data_ptr() for tensor in reads]
            if self._addresses.setdefault(key, addresses) != addresses:
                raise RuntimeError(f"a tensor that {key} reads has moved since it was captured")
        if key not in self._captured:
            if self.device.type == "cuda":
                self._captured[key] = self._capture(function, changed)
            else:
                if VERIFY:
                    _warm_up(function, changed, 1)
                self._captured[key] = function
        return self._captured[key]

    def forget(self, wanted: Callable[[Any], bool]) -> None:
        """Drop the functions whose key is `wanted` no longer."""
        for key in [key for key in self._captured if not wanted(key)]:
            del self._captured[key]
            self._addresses.pop(key, None)

    def _capture(self, function: Callable[[], None], changed: Sequence[Tensor]) -> Callable[[], Any]:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                _warm_up(function, changed, WARM_UPS)
            torch.cuda.current_stream().wait_stream(side)
            if self._pool is None:
                # One pool for all: results leave a graph in tensors of ours, so that the next may use its memory.
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads, a data loader's or NCCL's, may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                function()
        return _Replay(graph, function)


@dataclasses.dataclass
class _Replay:
    """A graph, and the function whose tensors it reads and writes: they live as long as it does."""

    graph: Any
    function: Callable[[], None]

    def __call__(self) -> None:
        self.graph.replay()


def _warm_up(function: Callable[[], None], changed: Sequence[Tensor], times: int) -> None:
    before = [tensor.clone() for tensor in changed]
    for _ in range(times):
        function()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)


class HostReadError(RuntimeError):
    """A function asked the device for a number, or for a shape that only the data decide."""


class NoHostReads(TorchDispatchMode):
    """Inside this context such a question is a `HostReadError` that names the operation, on every device.

    Use it under `torch.no_grad()`, not in inference mode, which hides operations inside others.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in _READS or name.startswith(_READS_WITH):
            raise HostReadError(name)
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise HostReadError(f"{name} with a mask")
        kwargs = kwargs or {}
        other = kwargs.get("device") if name == "_to_copy" else args[1].device if name == "copy_" else None
        if other is not None and torch.device(other).type != args[0].device.type:
            raise HostReadError(f"{name} between devices")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise HostReadError(name)
        return func(*args, **kwargs)


def host_read(function: Callable[[], Any]) -> str | None:
    """Return the operation by which a function asks the device for something, or None where it asks nothing.

    It is called twice: what it keeps for all later calls it may make in the first.
    """
    with torch.no_grad():
        function()
        try:
            with NoHostReads():
                function()
        except HostReadError as error:
            return str(error)
    return None
