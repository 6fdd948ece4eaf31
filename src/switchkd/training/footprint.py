"""What a model takes, found without its weights: its passes run on tensors that have a shape and no content."""

import contextlib
import functools
import json
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM

from switchkd.engine.lean import LLAMA_LIKE, MOST_COPIED_BYTES
from switchkd.errors import UserError
from switchkd.models.forward import disable_dropout
from switchkd.models.heads import hidden_states_of
from switchkd.models.loading import with_adapter
from switchkd.objective import Objective
from switchkd.objective.chunked import TEMPORARIES


@dataclass(frozen=True)
class Footprint:
    """What one model takes beside optimizer and caches; bytes unless said otherwise.

    Attributes:
        parameters: Numbers in its weights, tied ones once.
        weights: Bytes of its weights.
        trained: Numbers that an optimizer updates.
        gradients: Bytes of their gradients.
        largest: Bytes of the largest weight that is updated, 0 where none is.
        linear: Numbers in the linear layers that 4 and 8 bits replace: all but the output layer.
        layers: Decoder layers.
        layer: Numbers of the largest of them.
        outside: Numbers outside the decoder layers: embeddings and output layer.
        key_values: Numbers that the cache keeps for a token.
        hidden: Width of the states that enter the output layer.
        states: Decoder layers times their hidden width.
        vocabulary: Ids that it scores.
        head_gradient: Bytes of the gradient of the output layer's weight, 0 where it is not trained.
        copied: Bytes of the joint weights that the shorter forward of small models makes for a rollout.
        kept: Bytes that stay between the forward and the backward pass of a micro-batch; 0 without training.
        first_pass: Most bytes of a training pass, the gradients that it makes included.
        next_pass: The same where gradients are there already: those are not counted.
        forward: Most bytes of a pass without gradients.
    """

    parameters: int
    weights: int
    trained: int
    gradients: int
    largest: int
    linear: int
    layers: int
    layer: int
    outside: int
    key_values: int
    hidden: int
    states: int
    vocabulary: int
    head_gradient: int
    copied: int
    kept: int
    first_pass: int
    next_pass: int
    forward: int


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, as `switchkd train` takes it.

    Attributes:
        rank: `lora_r`.
        target_modules: `lora_target_modules`; None takes those of peft, one word such as `all-linear` stands for many.
        modules_to_save: `lora_modules_to_save`.
    """

    rank: int = 16
    target_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] = ()


@functools.lru_cache(maxsize=64)
def footprint_of(
    config: str,
    *,
    rows: int,
    length: int,
    predicted: int,
    dtype: str = "float32",
    autocast: bool = False,
    trains: bool = False,
    adapter: Adapter | None = None,
    checkpointing: bool = False,
) -> Footprint:
    """Return what a model takes for passes over a micro-batch; no weight is read or made.

    Args:
        config: The model's configuration as JSON (`config.to_json_string(use_diff=False)`), with `model_type`.
        rows: Rows of the micro-batch.
        length: Tokens of a row, prompt and completion.
        predicted: How many of them are predicted: the completion's, at most `length - 1`.
        dtype: Of the weights.
        autocast: Whether passes compute in bfloat16 from weights of another precision.
        trains: Whether it is the student.
        adapter: Of a student of which nothing else trains.
        checkpointing: `gradient_checkpointing`.

    Raises:
        UserError: The model's own code needs to look at numbers, or peft is missing.
    """
    shape = _config(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype))
            if adapter is not None:
                model = with_adapter(model, _lora(adapter))
    except (ValueError, TypeError, ZeroDivisionError, KeyError) as error:
        raise UserError(f"this configuration of a {shape.model_type} model cannot be built: {error}") from error
    if not trains:
        model.requires_grad_(False)
    elif checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions of transformers have a new name for it
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    disable_dropout(model)
    model.train(trains)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        _without_content(model)
        run = _Passes(model, rows, length, predicted, autocast)
        try:
            kept, first, following = run.training() if trains else (0, 0, 0)
            forward = run.forward()
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"the passes of a {shape.model_type} model cannot be measured without weights: {reason}"
            ) from error
        return Footprint(**_counted(model), kept=kept, first_pass=first, next_pass=following, forward=forward)


@functools.lru_cache(maxsize=32)
def blocks_of(objective: str) -> float:
    """Return how much comparing two models and its gradient take beside both models' logits, in blocks of them.

    Args:
        objective: A name in `switchkd.objective_names.OBJECTIVES`.
    """
    with FakeTensorMode(), _Storages() as storages:
        student, teacher = torch.empty(8, 1024, requires_grad=True), torch.empty(8, 1024)
        labels = torch.zeros(8, dtype=torch.int64)
        before = storages.now
        try:
            losses = Objective(objective)(student, teacher, labels)
            torch.autograd.grad(losses.sum(), student)
        except DataDependentOutputException:
            return float(TEMPORARIES)  # its loops depend on the numbers
        return (storages.peak - before) / (student.numel() * student.element_size())


def _without_content(model: nn.Module) -> None:
    """Replace a model's tensors on the meta device by ones that claim to lie on the CPU, whose kernels have shapes."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Storages(TorchDispatchMode):
    """Counts the bytes of the storages that live and were made inside.

    Attributes:
        now: Bytes.
        peak: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def leave_out(self, tensors: Any) -> None:
        """Do not count these tensors."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return result

    def _meet(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._part, key, size)

    def _part(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Passes:
    """The passes of a model over one micro-batch, measured."""

    def __init__(self, model: nn.Module, rows: int, length: int, predicted: int, autocast: bool) -> None:
        self.model, self.predicted = model, predicted
        self.autocast: Callable[[], Any] = contextlib.nullcontext
        if autocast:
            self.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
        # Rows of different lengths are padded: the mask is a tensor, as in training.
        self.inputs = {
            "input_ids": torch.zeros(rows, length, dtype=torch.int64),
            "attention_mask": torch.ones(rows, 1, length, length, dtype=torch.bool),
            "position_ids": torch.zeros(rows, length, dtype=torch.int64),
            "use_cache": False,
            "logits_to_keep": predicted + 1,
        }
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]

    @contextlib.contextmanager
    def _counting(self) -> Iterator[_Storages]:
        storages = _Storages()
        storages.leave_out(self.model.parameters())
        storages.leave_out(self.model.buffers())
        storages.leave_out(value for value in self.inputs.values() if isinstance(value, Tensor))
        gradients = (parameter.grad for parameter in self.model.parameters())
        storages.leave_out(gradient for gradient in gradients if gradient is not None)
        with storages:
            yield storages

    def forward(self) -> int:
        """Return the most bytes of a pass without gradients."""
        with self._counting() as storages, torch.no_grad(), self.autocast():
            hidden_states_of(self.model, **self.inputs)
        return storages.peak

    def training(self) -> tuple[int, int, int]:
        """Return what stays between forward and backward, and the peaks of a first pass and of one that follows."""
        kept, first = self._train_once()
        return kept, first, self._train_once()[1]

    def _train_once(self) -> tuple[int, int]:
        with self._counting() as storages:
            with self.autocast():
                states = hidden_states_of(self.model, **self.inputs)
            kept = storages.now
            # The loss gives two gradients: of the states, and of the output layer's weight where that is trained.
            roots, given = [states], [torch.empty_like(states)]
            weight = getattr(self.head, "weight", None)
            if isinstance(weight, Tensor) and weight.requires_grad:
                roots.append(weight)
                given.append(torch.empty_like(weight))
            del states
            torch.autograd.backward(roots, given)
            del roots, given
        return kept, storages.peak


def _counted(model: Any) -> dict[str, int]:
    """The numbers of a footprint that need no pass."""
    config = model.config.get_text_config()
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    head = model.get_output_embeddings()
    linear = [part for part in model.modules() if isinstance(part, nn.Linear) and part is not head]
    layers = _layers(model)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    total = sum(parameter.numel() for parameter in parameters)
    weight = head.weight if head is not None else model.get_input_embeddings().weight
    return {
        "parameters": total,
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "trained": sum(parameter.numel() for parameter in trained),
        "gradients": sum(parameter.numel() * parameter.element_size() for parameter in trained),
        "largest": max((parameter.numel() * parameter.element_size() for parameter in trained), default=0),
        "linear": sum(part.weight.numel() for part in linear),
        "layers": config.num_hidden_layers,
        "layer": max(sizes, default=0),
        "outside": total - sum(sizes),
        "key_values": key_values_of(config),
        "hidden": weight.shape[1],
        "states": config.num_hidden_layers * config.hidden_size,
        "vocabulary": weight.shape[0],
        "head_gradient": 4 * weight.numel() if weight.requires_grad else 0,
        "copied": _copied(model, config.model_type, parameters),
    }


def key_values_of(config: Any) -> int:
    """Return how many numbers the cache of a model keeps for a token.

    Args:
        config: Of its text part.
    """
    # As a dict: a config whose layers differ refuses to say what they have in common.
    values, names = config.to_dict(), config.attribute_map
    heads, groups, width = (
        values.get(names.get(name, name)) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if not heads:  # states in place of attention, which do not grow: its width stands for them
        return int(2 * config.num_hidden_layers * config.hidden_size)
    return int(2 * config.num_hidden_layers * (groups or heads) * (width or config.hidden_size // heads))


def _layers(model: Any) -> list[nn.Module]:
    """The decoder layers: the longest list of modules."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def _copied(model: Any, kind: str, parameters: list[Any]) -> int:
    """Bytes of `engine.lean`'s joint weights: queries, keys and values, and the two ways into a gated feed-forward."""
    if sum(one.numel() * one.element_size() for one in parameters) > MOST_COPIED_BYTES:
        return 0
    names = {"opt": ("q_proj", "k_proj", "v_proj")} | dict.fromkeys(
        LLAMA_LIKE, ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    )
    joined = [part for name, part in model.named_modules() if name.rpartition(".")[2] in names.get(kind, ())]
    return sum(one.numel() * one.element_size() for part in joined for one in part.parameters())


def _config(text: str) -> Any:
    from transformers import CONFIG_MAPPING

    values = json.loads(text)
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def _lora(adapter: Adapter) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("use_peft needs the peft package: pip install 'switchkd[peft]'") from None
    targets = adapter.target_modules
    return LoraConfig(
        r=adapter.rank,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        modules_to_save=list(adapter.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
