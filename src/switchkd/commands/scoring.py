"""Scoring one model on one test set after another, and going on where that was stopped."""

import argparse
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from switchkd.cli.console import Console
from switchkd.cli.options import is_terminal
from switchkd.cli.run_folder import NOT_KEPT, RunFolder, plain, read_config
from switchkd.cli.sealed import append_sealed, read_sealed
from switchkd.commands.data import prepare_data
from switchkd.commands.engine import rows_per_call, writer
from switchkd.commands.pair import read_excluded_ids, read_model, read_tokenizer
from switchkd.commands.score_tables import score_tables
from switchkd.data.prepared import prepared_facts
from switchkd.data.protocol import PREPARED
from switchkd.errors import UserError
from switchkd.evaluation import evaluate, reference_losses, sequence_divergences
from switchkd.evaluation.answers import check_answerable
from switchkd.evaluation.losses import samples_the_model
from switchkd.evaluation.scorers import load_scorer
from switchkd.training.inputs import of_weights

#: The answers so far, a line each; the last thing an evaluation does is to replace it by rows.jsonl.
ANSWERS = "answers.jsonl"
# What a resumed evaluation may change: its answers do not depend on it.
_MAY_CHANGE = ("output_dir", "batch_size", "resume", "vllm_python", "vllm_gpu_memory_utilization", *NOT_KEPT)


class Scoring:
    """Scores one model; it is read once, when the first answer is needed.

    Args:
        options: Of `switchkd evaluate`.
        seeds: Decoding seeds.
        console: Where the tables go.
    """

    def __init__(self, options: argparse.Namespace, seeds: Sequence[int], console: Console) -> None:
        self.options, self.seeds, self.console = options, list(seeds), console
        self.tokenizer = read_tokenizer(options, options.tokenizer_name_or_path)
        self._models: tuple[Any, Any, list[int]] | None = None
        self._data: dict[int, Any] = {}
        self._longest = 0  # tokens of a prompt and its answer
        self._write: Callable[..., Any] | None = None
        self._ends = contextlib.ExitStack()

    def close(self) -> None:
        """End the engine that writes the answers, if one was started."""
        self._ends.close()

    def read(self, sets: Sequence[argparse.Namespace]) -> None:
        """Read and prepare the data of several test sets.

        Raises:
            UserError: One of them cannot be read.
        """
        for options in sets:
            self._prepared(options)

    def score(self, options: argparse.Namespace, folder: RunFolder) -> dict[str, Any]:
        """Return the summary of a test set, and leave it, rows and config in the folder.

        Args:
            options: Of `switchkd evaluate`, for this test set.
            folder: Its own.

        Raises:
            UserError: The data cannot be scored, or the folder holds answers written with other options.
        """
        config = {**vars(options), "decoding_seeds": self.seeds}
        resumes = options.resume and folder.holds_run("switchkd evaluate")
        if resumes:
            _check_same(folder, config)
            if (folder.path / "summary.json").is_file():
                summary: dict[str, Any] = json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))
                self.console.say(f"finished before\n\n{score_tables(summary, self.console)}")
                return summary
        scorer = load_scorer(options.scorer) if options.scorer is not None else None
        data, report = self._prepared(options)
        self.console.say(f"data: {report}")
        digest = hashlib.sha256(json.dumps(list(data["prompt_ids"])).encode()).hexdigest()
        header, written, found = _read_answers(folder, digest, self.seeds) if resumes else (None, {}, {})
        if written:
            self.console.say(f"{len(written):,} of {len(data) * len(self.seeds):,} answers are there already")
        model, teacher, excluded_ids = self._read_models()
        models = {role: of_weights(one) for role, one in (("model", model), ("teacher", teacher)) if one is not None}
        if header is not None and header.get("models", models) != models:
            raise UserError(
                f"resume: the answers in {folder.path} were written with other weights of the same names; give another "
                "output_dir"
            )
        lengths = (options.max_completion_length, options.batch_size, options.no_repeat_ngram_size)
        check_answerable(model, data, self.seeds, *lengths)  # before anything is computed or written
        by_engine: dict[str, Any] = {}
        if options.rollout_engine == "vllm":
            by_engine = {"writer": self._answer, "rows_per_call": rows_per_call(options)}
            if len(written) < len(data) * len(self.seeds):
                self._started(model)  # what is wrong with it is said before anything is computed
        claimed = resumes

        def write(rows: list[dict[str, Any]]) -> None:
            if folder.writes:
                append_sealed(folder.path / ANSWERS, rows)

        def claim() -> None:
            nonlocal claimed
            if not claimed:
                folder.claim(config)
            if not (folder.path / ANSWERS).exists():
                write([{"prompts": digest, "models": models}])
            claimed = True

        def keep(seed: int, answers: Mapping[int, list[int]]) -> None:
            claim()
            write([{"seed": seed, "index": index, "ids": ids} for index, ids in answers.items()])

        def keep_pass(name: str, rows: Mapping[int, Any]) -> None:
            claim()
            write([{"pass": name, "index": index, "values": values} for index, values in rows.items()])

        started, progress = time.perf_counter(), is_terminal(self.console.stream)
        shared: dict[str, Any] = {"batch_size": options.batch_size, "progress": progress}
        passes: dict[str, Any] = {**shared, "excluded_ids": excluded_ids, "found": found, "keep": keep_pass}
        losses = reference_losses(model, self.tokenizer, data, teacher=teacher, **passes)
        result = evaluate(
            model,
            self.tokenizer,
            data,
            decoding_seeds=self.seeds,
            max_completion_length=options.max_completion_length,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            scorer=scorer,
            written=written,
            keep=keep,
            **by_engine,
            **shared,
        )
        summary = {
            "model_name_or_path": options.model_name_or_path,
            "dataset_name": options.dataset_name,
            **result.summary(),
            "reference_losses": losses,
            "data": vars(report),
        }
        if teacher is not None:
            divergences = sequence_divergences(
                model,
                teacher,
                self.tokenizer,
                data,
                [(row["index"], ids) for row, ids in zip(result.rows, result.completion_ids, strict=True)],
                max_completion_length=options.max_completion_length,
                seed=self.seeds[0],
                **passes,
            )
            for row, value in zip(result.rows, divergences["reverse_sequence_kl"].pop("of_answers"), strict=True):
                row["reverse_sequence_kl"] = value
            summary["sequence_divergences"] = {
                "answers_sample_the_model": samples_the_model(result.decoding),
                **divergences,
            }
        summary["seconds"] = time.perf_counter() - started  # the passes over references and answers as well
        self.console.say("\n" + score_tables(summary, self.console))
        facts = prepared_facts([options.dataset_name])
        claim()
        if facts:
            folder.write_json(PREPARED, facts)
        folder.write_rows("rows.jsonl", result.rows)
        scores = zip(self.seeds, result.scores, strict=True)
        folder.write_rows("metrics.jsonl", [{"seed": seed, "rouge_l": score} for seed, score in scores])
        folder.write_json("summary.json", summary)
        if folder.writes:
            (folder.path / ANSWERS).unlink(missing_ok=True)
        return summary

    def _prepared(self, options: argparse.Namespace) -> Any:
        if id(options) not in self._data:
            self._data[id(options)] = prepare_data(
                options,
                options.dataset_test_split,
                self.tokenizer,
                max_prompt_length=options.max_prompt_length,
                max_completion_length=options.max_completion_length,
            )
            longest = max(map(len, self._data[id(options)][0]["prompt_ids"]))
            self._longest = max(self._longest, longest + options.max_completion_length)
        return self._data[id(options)]

    def _answer(self, model: Any, *given: Any, **options: Any) -> Any:
        return self._started(model)(model, *given, **options)

    def _started(self, model: Any) -> Callable[..., Any]:
        """The engine that writes the answers to all test sets; it starts with the first answers that are missing."""
        if self._write is None:
            self._write = self._ends.enter_context(writer(self.options, model, None, self._longest))
        return self._write

    def _read_models(self) -> tuple[Any, Any, list[int]]:
        if self._models is None:
            teacher, excluded_ids = None, []
            if self.options.teacher_model_name_or_path is not None:
                excluded_ids = read_excluded_ids(self.options, self.tokenizer)
                teacher = read_model(self.options, "teacher")
            self._models = read_model(self.options, "model"), teacher, excluded_ids
        return self._models


def _check_same(folder: RunFolder, config: Mapping[str, Any]) -> None:
    """Refuse to go on with other options than those of the answers that are there."""
    saved = read_config(folder.path) or {}
    for name, value in config.items():
        if name in saved and name not in _MAY_CHANGE and saved[name] != plain(value):
            raise UserError(
                f"resume: the answers in {folder.path} were written with {name}={saved[name]!r}, now it is {value!r}; "
                "give the same options, or another output_dir"
            )


def _read_answers(
    folder: RunFolder, digest: str, seeds: Sequence[int]
) -> tuple[dict[str, Any] | None, dict[tuple[int, int], list[int]], dict[str, dict[int, Any]]]:
    """What a stopped evaluation left: what it was of, (seed, index) -> tokens of answers, pass -> row -> values."""
    rows = read_sealed(folder.path / ANSWERS, "resume")
    if not rows:
        return None, {}, {}
    if rows[0].get("prompts") != digest:
        raise UserError(f"resume: the answers in {folder.path} are to other prompts; give another output_dir")
    found: dict[str, dict[int, Any]] = {}
    for row in rows:
        if "pass" in row:
            found.setdefault(row["pass"], {})[row["index"]] = row["values"]
    return rows[0], {(row["seed"], row["index"]): row["ids"] for row in rows if row.get("seed") in seeds}, found
