"""What both models thought at every token of a finished rollout: their likeliest tokens and how far they differ."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.divergences import generalized_jsd
from switchkd.models.forward import device_of, eval_mode
from switchkd.models.vocabulary import model_vocabulary_size
from switchkd.rollout import Rollout, token_texts
from switchkd.sampling import Warping


@torch.no_grad()
def top_tokens(
    student: nn.Module,
    teacher: nn.Module | None,
    rollout: Rollout,
    tokenizer: Any,
    *,
    count: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    excluded_ids: Sequence[int] = (),
    teacher_prompts: Sequence[list[int]] | None = None,
) -> list[list[dict[str, Any]]]:
    """Return for every token of every completion what each model found likeliest there.

    Each model reads the finished text once, row by row and without a cache: nothing of the rollout's drafting is used.
    The distributions are those that were sampled and compared, hence the options of the rollout.

    Args:
        student: The student of the rollout.
        teacher: Its teacher, or None.
        rollout: A finished rollout.
        tokenizer: The student's.
        count: Likeliest tokens of each model; fewer where sampling excludes the others.
        temperature: As for the rollout, likewise `top_k`, `top_p` and `excluded_ids`.
        top_k: See there.
        top_p: See there.
        excluded_ids: See there.
        teacher_prompts: What the teacher read instead of the prompts, where it saw others.

    Returns:
        One list per completion with a dict per token: `student` and `teacher`, each a list of `{token, id,
        probability}`, and with a teacher `jsd_nats`, the Jensen-Shannon divergence of the two, in [0, ln 2].
    """
    readers = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    size = min(model_vocabulary_size(model) for model in readers.values())
    warping = Warping(temperature, top_k, top_p, size, tuple(excluded_ids))
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask.bool(), strict=True)]
    given = {"student": prompts, "teacher": prompts if teacher_prompts is None else teacher_prompts}
    result = []
    with eval_mode(student, teacher):
        for row, (prompt, completion) in enumerate(zip(prompts, rollout.completions(), strict=True)):
            log_probs = {
                name: _read(model, list(given[name][row]), completion, warping) for name, model in readers.items()
            }
            likeliest = {
                name: _likeliest(values, prompt + completion, len(prompt), tokenizer, count)
                for name, values in log_probs.items()
            }
            tokens: list[dict[str, Any]] = [
                {name: lists[place] for name, lists in likeliest.items()} for place in range(len(completion))
            ]
            if teacher is not None:
                divergence = generalized_jsd(log_probs["student"], log_probs["teacher"])
                for token, value in zip(tokens, divergence.tolist(), strict=True):
                    token["jsd_nats"] = value
            result.append(tokens)
    return result


def _read(model: nn.Module, prompt: list[int], completion: list[int], warping: Warping) -> Tensor:
    """Log-probabilities of a model at every token of the completion, `[C, V]`, on the CPU."""
    ids = torch.tensor([prompt + completion], device=device_of(model))
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return warping(logits).cpu()


def _likeliest(log_probs: Tensor, ids: list[int], start: int, tokenizer: Any, count: int) -> list[list[dict[str, Any]]]:
    values, chosen = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    return [
        [
            {"token": token_texts(tokenizer, [index], ids[: start + place])[0], "id": index, "probability": probability}
            for index, probability in zip(indices, probabilities, strict=True)
            if probability > 0.0
        ]
        for place, (indices, probabilities) in enumerate(zip(chosen.tolist(), values.exp().tolist(), strict=True))
    ]
