"""Evaluation: sampled answers scored with ROUGE-L over several decoding seeds."""

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig

from switchkd.engine import roll_out
from switchkd.engine.readable import require_readable
from switchkd.errors import UserError, check_count, check_warping
from switchkd.evaluation.losses import check_prepared, reference_ids
from switchkd.evaluation.metrics import (
    bucket_names,
    distinct_ngrams,
    exact_match,
    length_bucket,
    mean_and_std,
    mean_with_interval,
    repetition,
    rouge_l,
    unseen_by_rouge,
    word_bucket,
    word_bucket_names,
)
from switchkd.evaluation.scorers import Scorer
from switchkd.models.forward import context_length, device_of, eval_mode
from switchkd.models.vocabulary import readable_pad_id, require_eos
from switchkd.policies import StudentPolicy
from switchkd.rollout import Prompts, Rollout


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model on one data set.

    Attributes:
        rows: One dict per seed and example, by seed, then by example: `index` (of the data set), `seed`, `prompt`,
            `completion`, `references`, `rouge_l`, `exact_match`, `completion_tokens` (the end of sequence included),
            `finished` (whether it ended with an end of sequence), `reference_tokens` and `reference_words` (of the
            first reference), `repetition` (share of its 4-grams that occurred before in it), and under the name of a
            scorer its score in [0, 100].
        completion_ids: The tokens of each row, the end of sequence included.
        decoding_seeds: The seeds that the answers were sampled with.
        scores: Mean ROUGE-L of each seed, in the order of `decoding_seeds`, in [0, 100].
        rouge_l: Their mean.
        rouge_l_std: Their sample standard deviation (divisor n - 1; 0 for one seed).
        exact_match: Exact matches, percent of all rows.
        by_length: For every length of the first reference that occurs, in tokens: `examples`, mean `rouge_l` and the
            scorer's, and with `_interval` their 95% intervals over prompts.
        by_words: The same by its length in words.
        by_scorer: Name of the scorer -> mean over all rows; empty without one.
        intervals: `rouge_l` and the scorer -> ends of the 95% interval over prompts; None for a single prompt.
        diversity: `distinct_1`, `distinct_2`, `distinct_3` (means over seeds of what all answers of a seed hold),
            `repetition` (mean over rows), and the same of the first references with `reference_` before the name.
        seconds: Time spent on generating.
        decoding: The settings that made the text.
    """

    rows: list[dict[str, Any]]
    completion_ids: list[list[int]]
    decoding_seeds: list[int]
    scores: list[float]
    rouge_l: float
    rouge_l_std: float
    exact_match: float
    by_length: dict[str, dict[str, Any]]
    by_words: dict[str, dict[str, Any]]
    by_scorer: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    diversity: dict[str, float]
    seconds: float
    decoding: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Return everything but the rows, ready for JSON."""
        return {
            "rouge_l": self.rouge_l,
            "rouge_l_std": self.rouge_l_std,
            "intervals": self.intervals,
            "scores": {str(seed): score for seed, score in zip(self.decoding_seeds, self.scores, strict=True)},
            "exact_match": self.exact_match,
            "examples": len(self.rows) // len(self.decoding_seeds),
            "completion_tokens": sum(row["completion_tokens"] for row in self.rows) / len(self.rows),
            "finished_share": sum(row["finished"] for row in self.rows) / len(self.rows),
            "by_length": self.by_length,
            "by_words": self.by_words,
            "by_scorer": self.by_scorer,
            "diversity": self.diversity,
            "seconds": self.seconds,
            "decoding": self.decoding,
        }


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    *,
    decoding_seeds: Sequence[int] = (10, 20, 30, 40, 50),
    max_completion_length: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 8,
    no_repeat_ngram_size: int = 0,
    scorer: Scorer | None = None,
    progress: bool = True,
    written: Mapping[tuple[int, int], list[int]] | None = None,
    keep: Callable[[int, Mapping[int, list[int]]], None] | None = None,
    writer: Callable[..., Rollout] = roll_out,
    rows_per_call: int | None = None,
) -> EvaluationResult:
    """Return the scores of the model's own answers to every prompt, once per decoding seed.

    The text of an example depends on the seed and its index only, not on `batch_size` or on the other examples. With
    `no_repeat_ngram_size` that does not hold: there transformers' `generate` decodes, seeded once per seed.

    Args:
        model: A causal language model; its train or eval mode is restored.
        tokenizer: Its tokenizer.
        dataset: Made by `switchkd.data.prepare`, with at least one reference in every row.
        decoding_seeds: All different. Greedy decoding gives the same text for each: one is enough.
        max_completion_length: Length limit of an answer, tokens.
        temperature: 0 is greedy.
        top_p: In (0, 1].
        top_k: 0 keeps every id.
        batch_size: Prompts decoded at once.
        no_repeat_ngram_size: No n-gram of this length may occur twice in prompt and answer; 0 allows all. MiniLLM and
            DistiLLM score with 6.
        scorer: One more measure, see `switchkd.evaluation.scorers.load_scorer`.
        progress: Whether to show a progress bar on standard error.
        written: (seed, index) -> tokens of answers that an earlier call wrote with the same settings: they are not
            written again. With `no_repeat_ngram_size` only seeds that are complete count.
        keep: Called with the seed and index -> tokens as soon as a batch of answers is there.
        writer: Called in place of `roll_out`, with the same arguments; `write` of a `switchkd.vllm.Engine` without a
            teacher. Not with `no_repeat_ngram_size`.
        rows_per_call: Prompts that a writer is handed at once, where it batches by itself; `batch_size` if None.

    Raises:
        UserError: A row has no reference, the longest prompt and `max_completion_length` exceed the model's context,
            no end-of-sequence token is known, or a setting is out of range.
    """
    check_answerable(model, dataset, decoding_seeds, max_completion_length, batch_size, no_repeat_ngram_size)
    check_warping(temperature, top_k, top_p)
    if no_repeat_ngram_size and writer is not roll_out:
        raise UserError(f"no_repeat_ngram_size={no_repeat_ngram_size}: only transformers' own generate blocks n-grams")
    unseen = unseen_by_rouge(dataset["references"])
    if unseen > len(dataset) / 10:
        warnings.warn(
            f"{unseen} of {len(dataset)} references have no letter a-z and no digit: ROUGE-L scores any answer to them "
            "0; read exact_match, or give a scorer"
        )
    eos = require_eos(tokenizer, model)
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
    at_once = rows_per_call or batch_size
    batches = [order[start : start + at_once] for start in range(0, len(order), at_once)]
    answers = {place: list(ids) for place, ids in (written or {}).items()}
    started = time.perf_counter()
    with tqdm(
        total=len(order) * len(decoding_seeds), desc="answers", unit="row", disable=not progress, leave=False
    ) as bar:
        for seed in decoding_seeds:
            missing = [batch for batch in batches if any((seed, index) not in answers for index in batch)]
            if blocked is not None and missing:
                missing = batches  # one stream of random numbers for all of them
            bar.update(len(order) - sum(map(len, missing)))
            with _seeded(model, seed, enabled=blocked is not None):
                for batch in missing:
                    read = [prompts[index] for index in batch]
                    if blocked is not None:
                        texts = _generate(model, Prompts.of(read, pad), blocked, eos)
                    else:
                        texts = _sample(writer, model, read, batch, seed, settings, eos, pad)
                    of_batch = dict(zip(batch, texts, strict=True))
                    answers.update({(seed, index): ids for index, ids in of_batch.items()})
                    if keep is not None:
                        keep(seed, of_batch)
                    bar.update(len(batch))
    seconds = time.perf_counter() - started
    own = "roll_out" if writer is roll_out else "vllm"
    decoder = own if blocked is None else "transformers.generate"
    settings["max_completion_length"] = settings.pop("max_new_tokens")
    decoding = {"decoder": decoder, **settings, "decoding_seeds": list(decoding_seeds), "batch_size": batch_size}
    return _score(answers, tokenizer, dataset, list(decoding_seeds), set(eos), seconds, decoding, scorer)


def write_rows(result: EvaluationResult, path: str | Path) -> None:
    """Write the rows of a result to a JSON Lines file; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in result.rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _sample(
    writer: Callable[..., Rollout],
    model: nn.Module,
    prompts: list[list[int]],
    row_ids: list[int],
    seed: int,
    settings: dict[str, Any],
    eos: list[int],
    pad: int,
) -> list[list[int]]:
    rollout = writer(
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
    return rollout.completions()


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
    of_reference = reference_ids(tokenizer, dataset)
    rows: list[dict[str, Any]] = []
    written: dict[int, list[list[int]]] = {seed: [] for seed in seeds}
    for seed in seeds:
        for index, accepted in enumerate(references):
            ids = answers[seed, index]
            finished = bool(ids) and ids[-1] in eos
            written[seed].append(ids[:-1] if finished else ids)
            text = tokenizer.decode(written[seed][-1], skip_special_tokens=True)
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
                    "reference_tokens": len(of_reference[index]),
                    "reference_words": len(accepted[0].split()),
                    "repetition": repetition(written[seed][-1]),
                    **({scorer.name: scorer(prompts[index], text, accepted)} if scorer is not None else {}),
                }
            )
    scores = [mean_and_std([row["rouge_l"] for row in rows if row["seed"] == seed])[0] for seed in seeds]
    mean, std = mean_and_std(scores)
    measures = ["rouge_l", *([scorer.name] if scorer is not None else [])]

    def means(chosen: list[dict[str, Any]]) -> dict[str, float]:
        return {measure: mean_and_std([row[measure] for row in chosen])[0] for measure in measures}

    def intervals(chosen: list[dict[str, Any]]) -> dict[str, tuple[float, float] | None]:
        """Over prompts: the answers to one prompt are not independent. Every seed answers every prompt."""
        found = {}
        for measure in measures:
            by_prompt = np.array([row[measure] for row in chosen]).reshape(len(seeds), -1).mean(0)
            found[measure] = mean_with_interval(by_prompt).interval
        return found

    def parts(length: str, bucket: Callable[[int], str], names: list[str]) -> dict[str, dict[str, Any]]:
        found = {}
        for name in names:
            chosen = [row for row in rows if bucket(row[length]) == name]
            if chosen:
                ends = {f"{measure}_interval": pair for measure, pair in intervals(chosen).items()}
                found[name] = {"examples": len(chosen) // len(seeds), **means(chosen), **ends}
        return found

    by_scorer = {measure: value for measure, value in means(rows).items() if measure != "rouge_l"}
    matches = 100.0 * sum(row["exact_match"] for row in rows) / len(rows)
    diversity = {
        **{f"distinct_{n}": mean_and_std([distinct_ngrams(written[s], n) for s in seeds])[0] for n in (1, 2, 3)},
        "repetition": mean_and_std([row["repetition"] for row in rows])[0],
        **{f"reference_distinct_{n}": distinct_ngrams(of_reference, n) for n in (1, 2, 3)},
        "reference_repetition": mean_and_std([repetition(ids) for ids in of_reference])[0],
    }
    return EvaluationResult(
        rows=rows,
        completion_ids=[answers[row["seed"], row["index"]] for row in rows],
        decoding_seeds=seeds,
        scores=scores,
        rouge_l=mean,
        rouge_l_std=std,
        exact_match=matches,
        by_length=parts("reference_tokens", length_bucket, bucket_names()),
        by_words=parts("reference_words", word_bucket, word_bucket_names()),
        by_scorer=by_scorer,
        intervals=intervals(rows),
        diversity=diversity,
        seconds=seconds,
        decoding=decoding,
    )


def check_answerable(
    model: nn.Module, dataset: Dataset, seeds: Sequence[int], max_completion_length: int, batch_size: int, ngram: int
) -> None:
    """Refuse what `evaluate` cannot answer or score.

    Args:
        model: As `evaluate` takes it.
        dataset: Likewise.
        seeds: `decoding_seeds`.
        max_completion_length: Likewise, tokens.
        batch_size: Likewise.
        ngram: `no_repeat_ngram_size`.

    Raises:
        UserError: Names the option or the row.
    """
    check_prepared(dataset)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"decoding_seeds must be one or more different integers, got {list(seeds)}")
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
