"""Two rows at the start of an engine: what vLLM writes must be what the reference decoder writes."""

import math
from typing import Any

import torch
from torch import nn

from switchkd.engine.entry import roll_out
from switchkd.errors import UserError
from switchkd.models.loading import load_model
from switchkd.policies import StudentPolicy, SwitchPolicy
from switchkd.rollout import Rollout

#: Rows, tokens of a prompt, tokens of a completion, and how far divergences may lie from
#: the reference's, nats, where the engine computes in float32 and where it does not.
TEST_ROWS, TEST_PROMPT, TEST_TOKENS = 2, 6, 12
TEST_TOLERANCE = {True: 1e-3, False: 0.1}


def require_reference_text(
    engine: Any, student: nn.Module | str, teacher: nn.Module | str | None, init_kwargs: dict[str, Any]
) -> None:
    """Refuse an engine that writes another text than the reference; in bfloat16 only what it measures is compared.

    Args:
        engine: A `switchkd.vllm.Engine`.
        student: Its student, a model or a name.
        teacher: Its teacher, likewise; None for a student alone.
        init_kwargs: With which models are loaded that are given by name.

    Raises:
        UserError: Says where the two part.
    """
    models = [
        model if isinstance(model, nn.Module) else load_model(model, {**init_kwargs, "dtype": engine.dtype}, role=role)
        for role, model in (("student", student), ("teacher", teacher))
        if model is not None
    ]
    ids = torch.arange(TEST_ROWS * TEST_PROMPT).view(TEST_ROWS, TEST_PROMPT) * 7 % engine.vocabulary_size
    options: dict[str, Any] = {"max_new_tokens": TEST_TOKENS, "seed": 1}
    if teacher is None:
        alone: dict[str, Any] = {"policy": StudentPolicy(), **options}
        found, wanted = engine.roll_out(ids, **alone), roll_out(models[0], None, ids, draft_length=1, **alone)
        compare_texts(found, wanted, exact=engine.dtype == "float32", facts=engine.facts)
        return
    # First where the two differ: a threshold in their midst has both write.
    seen = engine.roll_out(ids, policy=SwitchPolicy(initial_threshold=0.0, schedule="constant"), **options)
    threshold = min(float(seen.divergence.median()), SwitchPolicy.largest_threshold[0])
    policy = SwitchPolicy(initial_threshold=threshold, schedule="constant")
    found = engine.roll_out(ids, policy=policy, **options)
    wanted = roll_out(models[0], models[1], ids, policy=policy, draft_length=1, **options)
    compare(found, wanted, exact=engine.dtype == "float32", facts=engine.facts)


def compare_texts(found: Rollout, wanted: Rollout, *, exact: bool, facts: dict[str, Any]) -> None:
    """Refuse a student alone whose texts are not the reference's; arguments as in `compare`.

    Where they need not be equal, one of them must begin as the reference's does.

    Raises:
        UserError: Says where they part.
    """
    same = found.completion_ids.cpu() == wanted.completion_ids.cpu()
    if not (same.all() if exact else same[:, 0].any()):
        raise UserError(
            f"vllm: the self-test failed: vLLM {facts['version']} (runner {facts['runner']}, {facts['dtype']}) parts "
            f"from the reference's text at token {int(same.cumprod(-1).sum(-1).min())}; use the transformers engine, "
            "and report it"
        )


def compare(found: Rollout, wanted: Rollout, *, exact: bool, facts: dict[str, Any]) -> None:
    """Refuse an engine whose rollout is not the reference's.

    Args:
        found: The engine's.
        wanted: The reference's, as long as the first.
        exact: Whether tokens must be equal; else only what was measured up to the first that differs.
        facts: `version` and `runner`, for the message.

    Raises:
        UserError: Says where they part.
    """
    ids = [rollout.completion_ids.cpu() for rollout in (found, wanted)]
    same_text = bool((ids[0] == ids[1]).all())
    # The first token that differs was still decided on the same text.
    alike = (ids[0] == ids[1]).cumprod(-1).roll(1, -1)
    alike[:, 0] = 1
    gaps = (found.divergence.cpu() - wanted.divergence.cpu()).abs().nan_to_num(math.inf)[alike.bool()]
    gap = float(gaps.max())
    if (exact and not same_text) or gap > TEST_TOLERANCE[exact]:
        where = "" if same_text else f", and parts from its text at token {int(alike.sum(-1).min()) - 1}"
        raise UserError(
            f"vllm: the self-test failed: vLLM {facts['version']} (runner {facts['runner']}, {facts['dtype']}) "
            f"measures divergences up to {gap:.2g} nats off the reference{where}; use the transformers engine, and "
            "report it"
        )
