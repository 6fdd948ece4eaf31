"""`switchkd judge`: which of two runs answers better, as a chat model behind an OpenAI-compatible server judges it."""

import argparse
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from switchkd.cli.console import Console
from switchkd.cli.options import OptionParser, flag, integers, is_terminal
from switchkd.cli.run_folder import RunFolder, read_config
from switchkd.errors import UserError, check_count, json_object

if TYPE_CHECKING:
    from switchkd.evaluation.chat_server import ChatServer

#: A stopped judgement goes on by the same call with this.
RESUME = "--resume "
#: A verdict a line, written as it comes in.
ROWS = "rows.jsonl"
# What a stopped judgement may change when it goes on: no verdict depends on it.
_MAY_CHANGE = ("output_dir", "resume", "yes", "prices", "concurrency", "timeout", "max_retries")


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    test_set: str
    index: int
    seed: int
    prompt: str
    first: str
    second: str

    @property
    def key(self) -> tuple[str, int, int]:
        """What it is called in the rows."""
        return self.test_set, self.seed, self.index

    @property
    def digest(self) -> str:
        """Changes with every word that the judge would read."""
        return hashlib.sha256(json.dumps([self.prompt, self.first, self.second]).encode()).hexdigest()[:16]


def parser() -> OptionParser:
    """Return the options of `switchkd judge`."""
    result = OptionParser(
        prog="switchkd judge",
        usage="switchkd judge RUN OTHER_RUN --output_dir DIR [--yes]",
        description="Let a chat model say which of two runs answers better, prompt by prompt and in both orders. The "
        "server is any that speaks OpenAI's protocol: OPENAI_BASE_URL, OPENAI_MODEL and, where it needs one, "
        "OPENAI_API_KEY name it. Without --yes nothing is sent: the call says what it would cost.",
    )
    inputs = result.add_argument_group("what to judge")
    folders: dict[str, Any] = {"metavar": "RUN", "help": "output_dir of switchkd evaluate; of both the same prompts"}
    inputs.add_argument("runs", nargs="*", default=argparse.SUPPRESS, **folders)
    inputs.add_argument("--runs", nargs="+", default=[], **(folders | {"help": "the same, as a key of a config file"}))
    inputs.add_argument(
        "--decoding_seeds",
        nargs="+",
        metavar="N,N,...",
        help="which answers, or all; every seed costs as much again (default: the first one that both runs have)",
    )
    inputs.add_argument("--max_samples", type=int, metavar="N", help="only the first N prompts of each test set")
    server = result.add_argument_group("server")
    server.add_argument("--yes", **flag("send the requests"))
    server.add_argument(
        "--prices", metavar="IN,OUT", help="dollars for a million tokens read and written, to say the cost in money"
    )
    server.add_argument(
        "--request_options",
        default='{"temperature": 0}',
        metavar="JSON",
        help="more of each request; null leaves one out: some models take no temperature",
    )
    server.add_argument("--concurrency", type=int, default=4, metavar="N", help="prompts judged at once")
    server.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="longest wait for an answer")
    server.add_argument(
        "--max_retries", type=int, default=5, metavar="N", help="repetitions of a request that may succeed later"
    )
    server.add_argument("--resume", **flag("go on with a stopped judgement; its verdicts are not asked for again"))
    result.add_shared_options("where to write (default: the first free one of runs/judge, runs/judge-2, ...)")
    return result


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Say what the judgement costs, with `--yes` make it, and return what was found."""
    prices, request_options = _check(options)

    from switchkd.evaluation.chat_server import ChatServer
    from switchkd.evaluation.judging import REPLY_TOKENS, estimated_tokens

    server = ChatServer.from_environment(
        os.environ, timeout=options.timeout, max_retries=options.max_retries, request_options=request_options
    )
    pairs = _pairs(options)
    folder = RunFolder(options.output_dir, "judge")
    resumes = options.resume and folder.holds_run("switchkd judge")
    if not resumes:
        folder.check(overwrite=options.overwrite_output_dir)
    done = _read_rows(folder, options, server.model, pairs) if resumes else {}
    asked = [pair for pair in pairs if pair.key not in done and pair.first != pair.second]
    read = sum(2 * estimated_tokens(pair.prompt, pair.first, pair.second) for pair in asked)
    estimate = {"requests": 2 * len(asked), "prompt_tokens": read, "completion_tokens": 2 * len(asked) * REPLY_TOKENS}
    of_them = f", {len(done):,} of them judged before" if done else ""
    console.say(f"{' against '.join(options.runs)}: {len(pairs):,} pairs of answers{of_them}; judge {server.model}")
    console.say(f"about {_cost(estimate, prices)}")
    judge = {"base_url": server.base_url, "model": server.model}
    if not options.yes:
        console.say("nothing was sent; --yes sends it")
        return {"judge": judge, "estimate": estimate, "sent": False}
    folder.claim(vars(options), keep=resumes)
    started = time.perf_counter()
    rows = dict(done)
    try:
        for row in _judged(pairs, done, server, options.concurrency, console):
            folder.append(ROWS, [row])
            rows[row["test_set"], row["seed"], row["index"]] = row
    except UserError as error:
        kept = f"; {len(rows):,} of {len(pairs):,} pairs are judged, --resume goes on with {folder.path}"
        raise UserError(f"{error}{kept}") from error
    summary = {**_summary([rows[pair.key] for pair in pairs], options), "judge": judge, "sent": True}
    summary["seconds"] = time.perf_counter() - started
    folder.write_json("summary.json", summary)
    console.say(f"\n{_text(summary, options, prices, console)}\n\nsummary.json, {ROWS}, config.yaml in {folder.path}")
    return {**summary, "output_dir": str(folder.path)}


def _check(options: argparse.Namespace) -> tuple[list[float] | None, dict[str, Any]]:
    """Refuse options out of range; return the prices and what is added to every request."""
    if len(options.runs) != 2:
        raise UserError(f"give two folders of switchkd evaluate, got {len(options.runs)}: switchkd judge RUN OTHER_RUN")
    for name, least in (("concurrency", 1), ("max_retries", 0), ("max_samples", 1)):
        if getattr(options, name) is not None:
            check_count(name, getattr(options, name), least)
    if not 0 < options.timeout < float("inf"):
        raise UserError(f"timeout must be a number of seconds > 0, got {options.timeout}")
    request_options = json_object("request_options", options.request_options)
    for name in ("model", "messages", "stream", "n"):
        if name in request_options:
            raise UserError(f"request_options: {name} is set by this command; remove it")
    if options.prices is None:
        return None, request_options
    try:
        prices = [float(price) for price in options.prices.split(",")]
    except ValueError:
        prices = []
    if len(prices) != 2 or not all(0 <= price < float("inf") for price in prices):
        raise UserError(f"prices must be two numbers joined by a comma, dollars for a million tokens read and written, "
                        f"such as 0.15,0.60; got {options.prices}")  # fmt: skip
    return prices, request_options


def _pairs(options: argparse.Namespace) -> list[Pair]:
    """The answers of both runs to the prompts that they share."""
    first, second = (_answers(Path(run).expanduser()) for run in options.runs)
    if first.keys() != second.keys():
        raise UserError(
            f"the two runs answered different test sets: {', '.join(first)} and {', '.join(second)}; judge those of "
            "one evaluation, or the folder of one set in each of them"
        )
    found: list[Pair] = []
    for test_set, rows in first.items():
        others = {(row["seed"], row["index"]): row for row in second[test_set]}
        shared = [row["seed"] for row in rows if (row["seed"], row["index"]) in others]
        for seed in _seeds(options.decoding_seeds, list(dict.fromkeys(shared)), test_set):
            chosen = [row for row in rows if row["seed"] == seed and (seed, row["index"]) in others]
            for row in chosen[: options.max_samples]:
                other = others[seed, row["index"]]
                if other["prompt"] != row["prompt"]:
                    raise UserError(
                        f"prompt {row['index']}{f' of {test_set}' if test_set else ''} is not the same in both runs; "
                        "judge evaluations of the same data, with the same template and tokenizer"
                    )
                found.append(Pair(test_set, row["index"], seed, row["prompt"], row["completion"], other["completion"]))
    return found


def _seeds(given: list[str] | None, shared: list[int], test_set: str) -> list[int]:
    """The decoding seeds whose answers are judged, of those that both runs have."""
    wanted = shared if given == ["all"] else integers(given, "decoding_seeds") or shared[:1]
    missing = [seed for seed in wanted if seed not in shared]
    if missing or not wanted:
        raise UserError(f"no decoding seed{f' {missing[0]}' if missing else ''} is in both runs"
                        f"{f' ({test_set})' if test_set else ''}")  # fmt: skip
    return list(dict.fromkeys(wanted))


def _answers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Test set -> the rows of an evaluation; the name is empty where there is one without."""
    files = {"": folder / ROWS} if (folder / ROWS).is_file() else {}
    if not files:  # a run of a comparison has `evaluate`, or `evaluate-dolly` and others
        found_in = {path.parent.name.removeprefix("evaluate"): path for path in sorted(folder.glob(f"*/{ROWS}"))}
        files = {name.removeprefix("-"): path for name, path in found_in.items()}
    found = {}
    for name, path in files.items():
        if not RunFolder(str(path.parent), "evaluate").holds_run("switchkd evaluate"):
            continue
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = [{key: row[key] for key in ("seed", "index", "prompt", "completion")} for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error!r}") from error
    if not found:
        raise UserError(f"{folder} holds no answers (rows.jsonl); give the output_dir of a finished switchkd evaluate")
    return found


def _read_rows(
    folder: RunFolder, options: argparse.Namespace, model: str, pairs: Sequence[Pair]
) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The verdicts that a stopped judgement left."""
    saved = read_config(folder.path) or {}
    for name, value in vars(options).items():
        if name in saved and name not in _MAY_CHANGE and saved[name] != value:
            raise UserError(
                f"resume: the verdicts in {folder.path} were asked for with {name}={saved[name]!r}, now it is "
                f"{value!r}; give the same options, or another output_dir"
            )
    path = folder.path / ROWS
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:  # the line at which it was stopped
        path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
    known = {pair.key: pair for pair in pairs}
    found = {}
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            key = row["test_set"], row["seed"], row["index"]
            same = key in known and known[key].digest == row["digest"] and row["model"] == model
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is damaged; remove that line to go on") from error
        if not same:
            raise UserError(
                f"resume: the verdicts in {folder.path} are by {row['model']} on answers that are not these; give "
                "another output_dir"
            )
        found[key] = row
    return found


def _judged(
    pairs: Sequence[Pair],
    done: Mapping[tuple[str, int, int], Any],
    server: "ChatServer",
    concurrency: int,
    console: Console,
) -> Iterator[dict[str, Any]]:
    """The rows of the pairs that are not done, as they come in; the first failure ends all."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    asked = [pair for pair in pairs if pair.key not in done]
    tasks: SimpleQueue[Pair] = SimpleQueue()
    results: SimpleQueue[dict[str, Any] | BaseException] = SimpleQueue()

    def work() -> None:
        while True:
            try:
                results.put(_row(tasks.get(), server))
            except BaseException as error:
                results.put(error)

    # Daemons, so that Ctrl-C does not wait for a server that takes its time.
    for _ in range(min(concurrency, len(asked))):
        Thread(target=work, daemon=True).start()
    waiting = iter(asked)
    # No more than are asked at once are handed in: after a failure nothing else is sent.
    for pair in itertools.islice(waiting, concurrency):
        tasks.put(pair)
    bar = tqdm(total=len(pairs), initial=len(done), desc="judged", disable=not is_terminal(console.stream))
    with bar:
        for _ in asked:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
            bar.update()
            for pair in itertools.islice(waiting, 1):
                tasks.put(pair)


def _row(pair: Pair, server: "ChatServer") -> dict[str, Any]:
    """One pair, judged in both orders; equal answers are a tie that nobody is asked about."""
    from switchkd.evaluation.judging import messages, verdict, winner

    replies = []
    if pair.first != pair.second:
        orders = ((pair.first, pair.second), (pair.second, pair.first))
        replies = [server.complete(messages(pair.prompt, a, b)) for a, b in orders]
    verdicts = [verdict(reply.text) for reply in replies]
    return {
        "test_set": pair.test_set,
        "index": pair.index,
        "seed": pair.seed,
        "winner": winner(*verdicts) if verdicts else "tie",
        "verdicts": verdicts,
        "replies": [reply.text for reply in replies],
        "prompt": pair.prompt,
        "first": pair.first,
        "second": pair.second,
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "completion_tokens": sum(reply.completion_tokens for reply in replies),
        "model": server.model,
        "digest": pair.digest,
    }


def _summary(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    from switchkd.evaluation.judging import tally

    sets = list(dict.fromkeys(row["test_set"] for row in rows))
    found: dict[str, Any] = {}
    for name in sets:
        counted = tally([row for row in rows if row["test_set"] == name])
        found[name or "test"] = {**asdict(counted), "said": counted.said(*options.runs)}
    return {
        "first": options.runs[0],
        "second": options.runs[1],
        "test_sets": found,
        "requests": 2 * sum(bool(row["verdicts"]) for row in rows),
        **{name: sum(row[name] for row in rows) for name in ("prompt_tokens", "completion_tokens")},
    }


def _text(
    summary: Mapping[str, Any], options: argparse.Namespace, prices: Sequence[float] | None, console: Console
) -> str:
    rows = []
    for name, found in summary["test_sets"].items():
        rate = found["win_rate"]
        share = "" if rate is None else f"{rate['value']:.0%} ({rate['interval'][0]:.0%} to {rate['interval'][1]:.0%})"
        counts = ("first", "tie", "second", "contradictions", "identical", "unreadable")
        rows.append((name, *(found[count] for count in counts), share))
    heads = ("test set", "first wins", "ties", "second wins", "contradictory", "identical", "unreadable", "win rate")
    return "\n".join(
        [
            f"first: {options.runs[0]}, second: {options.runs[1]}",
            console.table(rows, heads),
            "contradictory (the judge preferred a place, not an answer) and identical answers are ties; win rate of "
            "the first over prompts, ties counted half, with its 95% interval; answers to one prompt by several seeds "
            "count as one",
            *(f"{name}: {found['said']}" for name, found in summary["test_sets"].items()),
            f"used {_cost(summary, prices)}",
        ]
    )


def _cost(counts: Mapping[str, Any], prices: Sequence[float] | None) -> str:
    read, written = counts["prompt_tokens"], counts["completion_tokens"]
    said = f"{counts['requests']:,} requests, {read:,} tokens to read and {written:,} to write"
    if prices is None:
        return f"{said}; --prices IN,OUT says it in money"
    return f"{said}: ${(read * prices[0] + written * prices[1]) / 1e6:,.2f}"
