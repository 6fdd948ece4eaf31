"""Evaluation: sampled answers scored with ROUGE-L over several decoding seeds, and losses on the reference text."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig

from switchkd.data.batches import Rows, padded_batch
from switchkd.engine import roll_out
from switchkd.engine.readable import require_readable
from switchkd.errors import UserError, check_count
from switchkd.evaluation.metrics import bucket_names, exact_match, length_bucket, mean_and_std, rouge_l
from switchkd.evaluation.scorers import Scorer
from switchkd.models.forward import context_length, device_of, eval_mode
from switchkd.models.vocabulary import readable_pad_id, require_eos
from switchkd.objective import CROSS_ENTROPY, Objective
from switchkd.objective.step import StepLoss
from switchkd.policies import StudentPolicy
from switchkd.rollout import Prompts
from switchkd.sampling import check_warping


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model on one data set.

    Attributes:
        rows: One dict per seed and example, by seed, then by example: `index` (of the data set), `seed`, `prompt`,
            `completion`, `references`, `rouge_l`, `exact_match`, `completion_tokens` (the end of sequence included),
            `finished` (whether it ended with an end of sequence), `reference_tokens` (of the first reference), and
            under the name of a scorer its score in [0, 100].
        seeds: The decoding seeds.
        scores: Mean ROUGE-L of each seed, in the order of `seeds`, in [0, 100].
        rouge_l: Their mean.
        rouge_l_std: Their sample standard deviation (divisor n - 1; 0 for one seed).
        exact_match: Exact matches, percent of all rows.
        by_length: For every length of the first reference that occurs: `examples`, mean `rouge_l` and the scorer's.
        by_scorer: Name of the scorer -> mean over all rows; empty without one.
        seconds: Time spent on generating.
        decoding: The settings that made the text.
    """

    rows: list[dict[str, Any]]
    seeds: list[int]
    scores: list[float]
    rouge_l: float
    rouge_l_std: float
    exact_match: float
    by_length: dict[str, dict[str, float]]
    by_scorer: dict[str, float]
    seconds: float
    decoding: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Return everything but the rows, ready for JSON."""
        return {
            "rouge_l": self.rouge_l,
            "rouge_l_std": self.rouge_l_std,
            "scores": {str(seed): score for seed, score in zip(self.seeds, self.scores, strict=True)},
            "exact_match": self.exact_match,
            "examples": len(self.rows) // len(self.seeds),
            "completion_tokens": sum(row["completion_tokens"] for row in self.rows) / len(self.rows),
            "finished_share": sum(row["finished"] for row in self.rows) / len(self.rows),
            "by_length": self.by_length,
            "by_scorer": self.by_scorer,
            "seconds": self.seconds,
            "decoding": self.decoding,
        }


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    *,
    seeds: Sequence[int] = (10, 20, 30, 40, 50),
    max_completion_length: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 8,
    no_repeat_ngram_size: int = 0,
    scorer: Scorer | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Return the scores of the model's own answers to every prompt, once per decoding seed.

    The text of an example depends on the seed and its index only, not on `batch_size` or on the other examples. With
    `no_repeat_ngram_size` that does not hold: there transformers' `generate` decodes, seeded once per seed.

    Args:
        model: A causal language model; its train or eval mode is restored.
        tokenizer: Its tokenizer.
        dataset: Made by `switchkd.data.prepare`, with at least one reference in every row.
        seeds: Decoding seeds, all different. Greedy decoding gives the same text for each: one is enough.
        max_completion_length: Length limit of an answer, tokens.
        temperature: 0 is greedy.
        top_p: In (0, 1].
        top_k: 0 keeps every id.
        batch_size: Prompts decoded at once.
        no_repeat_ngram_size: No n-gram of this length may occur twice in prompt and answer; 0 allows all. MiniLLM and
            DistiLLM score with 6.
        scorer: One more measure, see `switchkd.evaluation.scorers.load_scorer`.
        device: Where the model is moved to; None leaves it.
        progress: Whether to show a progress bar on standard error.

    Raises:
        UserError: A row has no reference, the longest prompt and `max_completion_length` exceed the model's context,
            no end-of-sequence token is known, or a setting is out of range.
    """
    _check(model, dataset, seeds, max_completion_length, batch_size, no_repeat_ngram_size)
    try:
        check_warping(temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from error
    eos = require_eos(tokenizer, model)
    if device is not None:
        model.to(device)
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "max_new_tokens": max_completion_length,
        "no_repeat_ngram_size": no_repeat_ngram_size,
    }
    pad = readable_pad_id(tokenizer.pad_token_id, eos, model)
    require_readable(model, "model", padded=batch_size > 1)
    blocked = _blocked_options(settings, eos, pad)
    prompts = list(dataset["prompt_ids"])
    # Longest first: a batch holds prompts of one length or nearly so, and too little memory shows at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers: dict[tuple[int, int], list[int]] = {}
    started = time.perf_counter()
    with tqdm(total=len(order) * len(seeds), desc="answers", unit="row", disable=not progress, leave=False) as bar:
        for seed in seeds:
            with _seeded(model, seed, enabled=blocked is not None):
                for batch in batches:
                    read = [prompts[index] for index in batch]
                    if blocked is not None:
                        texts = _generate(model, Prompts.of(read, pad), blocked, eos)
                    else:
                        texts = _sample(model, read, batch, seed, settings, eos, pad)
                    answers.update({(seed, index): ids for index, ids in zip(batch, texts, strict=True)})
                    bar.update(len(batch))
    seconds = time.perf_counter() - started
    decoder = "roll_out" if blocked is None else "transformers.generate"
    settings["max_completion_length"] = settings.pop("max_new_tokens")
    decoding = {"decoder": decoder, **settings, "seeds": list(seeds), "batch_size": batch_size}
    return _score(answers, tokenizer, dataset, list(seeds), set(eos), seconds, decoding, scorer)


def write_rows(result: EvaluationResult, path: str | Path) -> None:
    """Write the rows of a result to a JSON Lines file; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in result.rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@torch.no_grad()
def reference_losses(
    model: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    *,
    teacher: nn.Module | None = None,
    batch_size: int = 8,
    excluded_ids: Sequence[int] = (),
) -> dict[str, float]:
    """Return losses on the reference completions, means over their tokens, the end of sequence included, in nats.

    Args:
        model: The student, or any causal language model.
        tokenizer: Its tokenizer.
        dataset: Made by `switchkd.data.prepare`, with a completion in every row.
        teacher: Compared with the model at every token, on the ids both have.
        batch_size: Rows read at once; affects only speed.
        excluded_ids: Left out of the comparison, see `switchkd.models.vocabulary.check_tokenizers`.

    Returns:
        `cross_entropy`, `tokens` (their number), and with a teacher `forward_kl` = KL(teacher, student) and
        `jsd`, the symmetric Jensen-Shannon divergence, at most ln 2.

    Raises:
        UserError: A row has no completion, a row exceeds a model's context, or a model cannot read padded rows.
    """
    _check_prepared(dataset)
    prompts, completions = list(dataset["prompt_ids"]), list(dataset["completion_ids"])
    empty = next((row for row, ids in enumerate(completions, start=1) if not len(ids)), None)
    if empty is not None:
        raise UserError(f"row {empty} of the prepared data set has no reference completion: losses need an answer")
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    for role, reader in (("model", model), ("teacher", teacher)):
        limit = context_length(reader) if reader is not None else None
        if limit is not None and max(lengths) > limit:
            raise UserError(
                f"the longest prompt and reference have {max(lengths)} tokens, the {role}'s context is {limit}; "
                "lower max_prompt_length or max_completion_length"
            )
    pad = readable_pad_id(tokenizer.pad_token_id, require_eos(tokenizer, model), model, teacher)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    totals: dict[str, float] = {}
    with eval_mode(model, teacher):
        for role, reader in (("model", model), ("teacher", teacher)):
            require_readable(reader, role, padded=batch_size > 1)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = [{"prompt_ids": prompts[i], "completion_ids": completions[i]} for i in batch]
            losses = _batch_losses(model, teacher, rows, pad, tuple(excluded_ids))
            for name, total in losses.items():
                totals[name] = totals.get(name, 0.0) + total
    tokens = sum(len(ids) for ids in completions)
    return {**{name: total / tokens for name, total in totals.items()}, "tokens": tokens}


def _batch_losses(
    model: nn.Module, teacher: nn.Module | None, rows: list[dict[str, Any]], pad: int, excluded_ids: tuple[int, ...]
) -> dict[str, float]:
    """Sums over the reference tokens of a batch, by the trainer's own way from states to losses."""
    device = device_of(model)
    inputs = {name: value.to(device) for name, value in padded_batch(Rows(rows), pad).items()}
    of_divergence = {
        name: StepLoss(Objective(objective, excluded_ids=excluded_ids))
        for name, objective in (("forward_kl", "forward_kl"), ("jsd", "generalized_jsd"))
        if teacher is not None
    }
    reading = of_divergence.get("forward_kl", StepLoss(Objective(CROSS_ENTROPY)))
    of_model, of_teacher = reading.predictions(model, teacher, inputs)
    losses = {"cross_entropy": reading.cross_entropy(of_model, inputs)}
    losses |= {name: loss.compare(of_model, of_teacher, inputs) for name, loss in of_divergence.items()}
    # Tokens without supervision have a loss of 0.
    return {name: float(loss.token_losses[inputs["completion_mask"]].double().sum()) for name, loss in losses.items()}


def _sample(
    model: nn.Module,
    prompts: list[list[int]],
    row_ids: list[int],
    seed: int,
    settings: dict[str, Any],
    eos: list[int],
    pad: int,
) -> list[list[int]]:
    rollout = roll_out(
        model,
        None,
        prompts,
        policy=StudentPolicy(),
        seed=seed,
        eos_token_id=eos,
        pad_token_id=pad,
        row_ids=torch.tensor(row_ids),
        **{name: value for name, value in settings.items() if name != "no_repeat_ngram_size"},
    )
    return [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int, *, enabled: bool) -> Iterator[None]:
    """Seed torch's global generators, which `generate` draws from, and give them their state back afterwards."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=enabled):
        if enabled:
            torch.manual_seed(seed)
        yield


def _blocked_options(settings: dict[str, Any], eos: list[int], pad: int) -> GenerationConfig | None:
    """Options of transformers' `generate` with an n-gram block, or None where nothing is blocked.

    Every option that changes text is set: what stays None would come from the model's own configuration.
    """
    if not settings["no_repeat_ngram_size"]:
        return None
    options = dict(settings)
    if options["temperature"] == 0:
        options = {name: options[name] for name in ("max_new_tokens", "no_repeat_ngram_size")}
    return GenerationConfig(
        **options,
        do_sample="temperature" in options,
        repetition_penalty=1.0,
        num_beams=1,
        use_cache=True,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _generate(model: Any, prompts: Prompts, options: GenerationConfig, eos: list[int]) -> list[list[int]]:
    prompts = prompts.to(device_of(model))
    with eval_mode(model):
        whole = model.generate(prompts.ids, attention_mask=prompts.mask.long(), generation_config=options)
    texts: list[list[int]] = whole[:, prompts.width :].tolist()
    ends = [next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids)) for ids in texts]
    return [ids[:end] for ids, end in zip(texts, ends, strict=True)]


def _score(
    answers: dict[tuple[int, int], list[int]],
    tokenizer: Any,
    dataset: Dataset,
    seeds: list[int],
    eos: set[int],
    seconds: float,
    decoding: dict[str, Any],
    scorer: Scorer | None,
) -> EvaluationResult:
    references, prompts = list(dataset["references"]), list(dataset["prompt"])
    first = [accepted[0] for accepted in references]
    plain = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
    reference_tokens = [len(ids) for ids in tokenizer(first, **plain)["input_ids"]]
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for index, accepted in enumerate(references):
            ids = answers[seed, index]
            finished = bool(ids) and ids[-1] in eos
            text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
            rows.append(
                {
                    "index": index,
                    "seed": seed,
                    "prompt": prompts[index],
                    "completion": text,
                    "references": accepted,
                    "rouge_l": rouge_l(text, accepted),
                    "exact_match": exact_match(text, accepted),
                    "completion_tokens": len(ids),
                    "finished": finished,
                    "reference_tokens": reference_tokens[index],
                    **({scorer.name: scorer(prompts[index], text, accepted)} if scorer is not None else {}),
                }
            )
    scores = [mean_and_std([row["rouge_l"] for row in rows if row["seed"] == seed])[0] for seed in seeds]
    mean, std = mean_and_std(scores)
    measures = ["rouge_l", *([scorer.name] if scorer is not None else [])]

    def means(chosen: list[dict[str, Any]]) -> dict[str, float]:
        return {measure: mean_and_std([row[measure] for row in chosen])[0] for measure in measures}

    by_length = {}
    for name in bucket_names():
        chosen = [row for row in rows if length_bucket(row["reference_tokens"]) == name]
        if chosen:
            by_length[name] = {"examples": len(chosen) // len(seeds), **means(chosen)}
    by_scorer = {measure: value for measure, value in means(rows).items() if measure != "rouge_l"}
    matches = 100.0 * sum(row["exact_match"] for row in rows) / len(rows)
    return EvaluationResult(rows, seeds, scores, mean, std, matches, by_length, by_scorer, seconds, decoding)


def _check_prepared(dataset: Dataset) -> None:
    missing = {"prompt_ids", "completion_ids", "references", "prompt"} - set(dataset.column_names)
    if missing:
        raise UserError(f"the data set lacks {', '.join(sorted(missing))}: make it with switchkd.data.prepare")
    if len(dataset) == 0:
        raise UserError("the data set holds no records: there is nothing to evaluate")


def _check(
    model: nn.Module, dataset: Dataset, seeds: Sequence[int], max_completion_length: int, batch_size: int, ngram: int
) -> None:
    _check_prepared(dataset)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds must be one or more different integers, got {list(seeds)}")
    check_count("max_completion_length", max_completion_length, 1)
    check_count("batch_size", batch_size, 1)
    check_count("no_repeat_ngram_size", ngram, 0)
    bare = next((row for row, accepted in enumerate(dataset["references"], start=1) if not accepted), None)
    if bare is not None:
        raise UserError(
            f"row {bare} of the prepared data set has no reference to score against: evaluation needs answers "
            "(`output`, `completion` or a chat that ends with the assistant)"
        )
    longest, limit = max(len(ids) for ids in dataset["prompt_ids"]), context_length(model)
    if limit is not None and longest + max_completion_length > limit:
        raise UserError(
            f"the longest prompt has {longest} tokens and max_completion_length is {max_completion_length}, together "
            f"more than the model's context of {limit}: lower max_completion_length, or "
            "max_prompt_length when the data are prepared"
        )
