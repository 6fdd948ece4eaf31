"""A rollout as requests to vLLM: ask for every text, and ask on where a request ended before its text did."""

import json
from typing import Any, Protocol

import numpy as np

from switchkd.engine.vllm.described import COLUMNS, Columns, unpacked
from switchkd.errors import UserError
from switchkd.rollout import Author

# So many rounds in which no text grows mean that something else is wrong than one preempted step.
MOST_IDLE_ROUNDS = 8


class Host(Protocol):
    """A vLLM engine that can be asked: in this process, or a server."""

    def call(self, method: str, *arguments: str) -> Any:
        """Return what a method of `SwitchWorker` returns in the first worker, after it ran in all of them."""

    def generate(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        """Run requests to their ends; return what vLLM says that each has written.

        Args:
            requests: `prompt_token_ids`, `max_tokens`, `stop_token_ids` and `extra_args` of each.
        """
        ...


def drive(host: Host, job: dict[str, Any], prompts: list[list[int]], eos: list[int]) -> tuple[Columns, dict[str, int]]:
    """Return the record of a rollout, ordered by row and position, and its counts, `requests` among them.

    Args:
        host: The engine.
        job: As `Writing` takes it.
        prompts: Ids of every prompt, at least two each.
        eos: End-of-sequence ids, possibly none.

    Raises:
        UserError: vLLM wrote something else than it was told to: not the version this was made for.
    """
    limit, size = job["max_new_tokens"], job["vocabulary_size"]
    host.call("switch_begin", json.dumps(job))
    try:
        texts: list[list[int]] = [[] for _ in prompts]  # completion ids so far
        pieces: list[Columns] = []
        waiting, asked, idle = list(range(len(prompts))), 0, 0
        counts: dict[str, int] = {}
        while waiting:
            host.generate([request(row, prompts[row], texts[row], limit, eos, size) for row in waiting])
            asked += len(waiting)
            taken = host.call("switch_take")
            counts = taken["counts"]
            found = _ordered(unpacked(taken["columns"]))
            before = sum(map(len, texts))
            pieces.append(_kept(found, texts, limit, eos))
            waiting = [row for row in waiting if not _is_whole(texts[row], limit, eos)]
            idle = idle + 1 if sum(map(len, texts)) == before else 0
            if idle > MOST_IDLE_ROUNDS:
                raise UserError(
                    f"vllm: {len(waiting)} texts do not go on, the first at token {len(texts[waiting[0]])}; more "
                    "memory for vLLM's cache (gpu_memory_utilization) or fewer rows at once (max_num_seqs) may help"
                )
        columns = _ordered({name: np.concatenate([piece[name] for piece in pieces]) for name in COLUMNS})
        return columns, {**counts, "requests": asked}
    finally:
        host.call("switch_end")


def drive_alone(
    host: Host, job: dict[str, Any], prompts: list[list[int]], eos: list[int]
) -> tuple[Columns, dict[str, int]]:
    """Return what `drive` does where a student writes alone.

    Args:
        host: An engine without a draft model.
        job: As `Writing` takes it.
        prompts: Ids of every prompt.
        eos: End-of-sequence ids, possibly none.
    """
    host.call("switch_begin", json.dumps(job))
    try:
        texts = host.generate(
            [
                {
                    "prompt_token_ids": prompt,
                    "max_tokens": job["max_new_tokens"],
                    "stop_token_ids": eos,
                    "extra_args": {"row": row},
                }
                for row, prompt in enumerate(prompts)
            ]
        )
        counts = host.call("switch_take")["counts"]
    finally:
        host.call("switch_end")
    written = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
    lengths = [len(text) for text in texts]
    columns = {
        "row": np.repeat(np.arange(len(texts)), lengths),
        "position": np.concatenate([np.arange(length) for length in lengths]),
        "token": written,
        "drafted": written,
        "author": np.full(len(written), Author.STUDENT),
        "divergence": np.full(len(written), np.nan),
        "threshold": np.full(len(written), np.nan),
    }
    return columns, {**counts, "drafted": len(written), "kept": len(written), "requests": len(prompts)}


def request(
    row: int, prompt: list[int], text: list[int], limit: int, eos: list[int], vocabulary_size: int
) -> dict[str, Any]:
    """Return the request that goes on with a text.

    Its prompt is the text without its last token, which the sampler writes first: vLLM samples one token after the
    prefill, before anything is drafted. The request can be ended from inside by an id that a text rarely holds; where
    one does, the text is asked on from there.

    Args:
        row: Its place in the rollout.
        prompt: Ids.
        text: Completion ids so far.
        limit: Of completions, tokens.
        eos: End-of-sequence ids.
        vocabulary_size: V.
    """
    whole = prompt + text
    first = whole[-1]
    stop = next(one for one in range(vocabulary_size - 1, -1, -1) if one not in eos and one != first)
    return {
        "prompt_token_ids": whole[:-1],
        "max_tokens": limit - len(text) + 1,
        # vLLM looks for these from the first token on, which is the prompt's own.
        "stop_token_ids": [*(one for one in eos if one != first), stop],
        "extra_args": {
            "row": row,
            "offset": len(text),
            "first": first,
            "stop": stop,
            "end": first if first in eos else -2,
        },
    }


def _ordered(columns: Columns) -> Columns:
    order = np.lexsort((columns["position"], columns["row"]))
    return {name: column[order] for name, column in columns.items()}


def _kept(found: Columns, texts: list[list[int]], limit: int, eos: list[int]) -> Columns:
    """Add to the texts what was written, and return the columns of those tokens: up to the limit and the first EOS."""
    keep = np.zeros(len(found["row"]), dtype=bool)
    for row in np.unique(found["row"]).tolist():
        low, high = np.searchsorted(found["row"], [row, row + 1])
        begun = len(texts[row])
        expected = np.arange(begun, begun + high - low)
        if not np.array_equal(found["position"][low:high], expected):
            raise UserError(
                f"vllm: the record of row {row} is not in order at token {begun}; this build of vLLM writes otherwise "
                "than the one this was made for"
            )
        tokens = found["token"][low : min(high, low + limit - begun)].tolist()
        end = next((place + 1 for place, token in enumerate(tokens) if token in eos), len(tokens))
        texts[row] += tokens[:end]
        keep[low : low + end] = True
    return {name: column[keep] for name, column in found.items()}


def _is_whole(text: list[int], limit: int, eos: list[int]) -> bool:
    return len(text) >= limit or bool(text and text[-1] in eos)
