"""`switchkd judge`: any OpenAI-compatible server, both orders, resumed at the row; a key stands in the header alone."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.chat import Answer, StandIn, completion, shown
from helpers.command_line import Run, one_line_error, write_rows
from helpers.pages import Document

from switchkd.evaluation import chat_server
from switchkd.evaluation.judging import estimated_tokens, messages, tally, verdict, winner

KEY = "sk-a-very-secret-key"
VOTE = {"A": 1, "B": -1, "C": 0}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], StandIn]]:
    """`server(answer)` starts a stand-in and points the environment at it; no test waits between two attempts."""
    started: list[StandIn] = []

    def start(answer: Answer) -> StandIn:
        started.append(StandIn(answer))
        monkeypatch.setenv("OPENAI_BASE_URL", started[-1].url + "/")
        return started[-1]

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_MODEL", "judge-1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(chat_server.time, "sleep", lambda seconds: None)
    yield start
    for one in started:
        one.shutdown()
        one.server_close()


def evaluation(folder: Path, answers: list[str], seeds: tuple[int, ...] = (10, 20), prompt: str = "p") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("# Written by switchkd 0: switchkd evaluate\nmodel_name_or_path: S\n")
    rows = [
        {"index": index, "seed": seed, "prompt": f"{prompt}{index}", "completion": f"{text} {seed}", "rouge_l": 1.0}
        for seed in seeds
        for index, text in enumerate(answers)
    ]
    write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Four prompts: the first run is better, worse, equally good, the same."""
    first = evaluation(tmp_path / "a", ["good", "bad", "good", "same"])
    return [first, evaluation(tmp_path / "b", ["bad", "good", "good too", "same"])]


def prefers_good(request: dict[str, Any]) -> tuple[int, dict[str, str], str]:
    a, b = (text.startswith("good") for text in shown(request))
    letter = "C" if a == b else "A" if a else "B"
    return completion(f"I read [[B]] in it. Verdict:\n[[{letter}]]", {"prompt_tokens": 7, "completion_tokens": 3})


def files(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


# ---- rules


def test_who_wins_in_both_orders_wins_and_a_preferred_place_is_a_tie() -> None:
    for forward in "ABC":
        for backward in "ABC":
            total = VOTE[forward] - VOTE[backward]
            assert winner(forward, backward) == ("first" if total > 0 else "second" if total < 0 else "tie")
            # Whoever is called first, the same run wins.
            swapped = {"first": "second", "second": "first", "tie": "tie"}[winner(forward, backward) or ""]
            assert winner(backward, forward) == swapped
    assert winner("A", "A") == winner("B", "B") == "tie" and winner(None, "A") is None


@pytest.mark.parametrize(
    ("reply", "letter"), [("[[A]]", "A"), ("[[A]] but\n[[B]]", "B"), ("[A]", None), ("", None), ("[[D]] [[C]].", "C")]
)
def test_the_last_verdict_of_a_reply_counts(reply: str, letter: str | None) -> None:
    assert verdict(reply) == letter


def test_a_tally_counts_every_pair_once_and_its_rate_is_turned_round_with_the_runs() -> None:
    rows = [
        {"index": 0, "winner": "first", "verdicts": ["A", "B"]},
        {"index": 1, "winner": "first", "verdicts": ["A", "C"]},
        {"index": 2, "winner": "second", "verdicts": ["B", "A"]},
        {"index": 3, "winner": "tie", "verdicts": ["A", "A"]},
        {"index": 4, "winner": "tie", "verdicts": []},
        {"index": 5, "winner": None, "verdicts": [None, "A"]},
    ]
    found = tally(rows)
    assert (found.first, found.second, found.tie) == (2, 1, 2)
    assert (found.contradictions, found.identical, found.unreadable) == (1, 1, 1)
    turned = tally([{**row, "winner": {"first": "second", "second": "first"}.get(row["winner"], row["winner"])}
                    for row in rows])  # fmt: skip
    assert found.win_rate is not None and turned.win_rate is not None
    assert found.win_rate.value == pytest.approx(0.6) == pytest.approx(1 - turned.win_rate.value)
    assert found.p_value == turned.p_value == 1.0 and "no clear winner" in found.said("x", "y")
    nine = [[{**rows[one], "index": index} for index in range(9)] for one in (0, 2)]
    assert "x is ahead" in tally(nine[0]).said("x", "y") and "y is ahead" in tally(nine[1]).said("x", "y")
    assert "no clear winner" in tally(nine[0][:5]).said("x", "y") and tally([rows[-1]]).win_rate is None


def test_the_seeds_of_one_prompt_are_one_observation_and_prompts_weigh_the_same() -> None:
    """Five prompts answered nine times each would be 45 observations, and any preference significant."""
    wins = [{"index": index, "winner": "first", "verdicts": ["A", "B"]} for index in range(5)]
    once, often = tally(wins), tally(wins * 9)
    assert often.first == 45 and (often.win_rate, often.p_value, often.ahead) == (once.win_rate, once.p_value, 5)
    lost = {"index": 5, "winner": "second", "verdicts": ["B", "A"]}
    mixed = tally([*wins * 9, lost, {**wins[0], "index": 5}, lost])
    assert (mixed.ahead, mixed.behind) == (5, 1)
    assert mixed.win_rate is not None and mixed.win_rate.value == pytest.approx((5 + 1 / 3) / 6)


def test_the_judge_reads_the_prompt_and_both_answers_and_about_four_characters_a_token() -> None:
    asked = messages("PROMPT", "ONE", "TWO")
    assert shown({"messages": asked}) == ("ONE", "TWO") and "PROMPT" in asked[1]["content"]
    assert estimated_tokens("PROMPT", "ONE", "TWO") == sum(len(one["content"]) for one in asked) // 4


# ---- the command


def test_nothing_is_sent_before_yes_and_the_estimate_is_what_is_sent(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run
) -> None:
    judge = server(prefers_good)
    code, out, _ = run("judge", *two, "--output_dir", tmp_path / "out", "--prices", "2,4", "--json")
    found = json.loads(out)
    assert code == 0 and judge.requests == [] and not (tmp_path / "out").exists()
    assert found["sent"] is False and found["estimate"]["requests"] == 6  # three different pairs, twice
    code, out, err = run("judge", *two, "--output_dir", tmp_path / "out", "--yes", "--json")
    assert code == 0 and len(judge.requests) == 6, err
    sent = sum(sum(len(one["content"]) for one in request["messages"]) // 4 for _, _, request in judge.requests)
    assert sent == found["estimate"]["prompt_tokens"]
    cost = (found["estimate"]["prompt_tokens"] * 2 + found["estimate"]["completion_tokens"] * 4) / 1e6
    said = run("judge", *two, "--output_dir", tmp_path / "o", "--prices", "2,4")[1]
    assert f"${cost:,.2f}" in said and "nothing was sent" in said


def test_both_orders_ties_and_what_was_used(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run
) -> None:
    judge = server(prefers_good)
    code, out, err = run("judge", *two, "--output_dir", tmp_path / "out", "--yes", "--json")
    assert code == 0, err
    found = json.loads(out)["test_sets"]["test"]
    assert [found[name] for name in ("first", "second", "tie", "identical", "contradictions")] == [1, 1, 2, 1, 0]
    rows = {row["index"]: row for row in map(json.loads, (tmp_path / "out" / "rows.jsonl").read_text().splitlines())}
    assert [rows[index]["winner"] for index in range(4)] == ["first", "second", "tie", "tie"]
    assert rows[0]["verdicts"] == ["A", "B"] and rows[3]["verdicts"] == [] and rows[0]["seed"] == 10
    assert (json.loads(out)["prompt_tokens"], json.loads(out)["completion_tokens"]) == (42, 18)
    for path, headers, request in judge.requests:
        assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
        assert request["model"] == "judge-1" and request["temperature"] == 0
    orders = {shown(request) for _, _, request in judge.requests}
    assert orders == {(b, a) for a, b in orders}


def test_a_report_shows_the_judgement(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run
) -> None:
    server(prefers_good)
    assert run("judge", *two, "--output_dir", tmp_path / "out", "--yes")[0] == 0
    code, _, err = run("report", tmp_path / "out", "--output_file", tmp_path / "page.html")
    assert code == 0, err
    document = Document((tmp_path / "page.html").read_text())
    (line,) = document.files()["judged-out"]
    assert (line["first wins"], line["ties"], line["second wins"]) == ("1", "2", "1")
    assert "no clear winner" in document.text("dd") and "Judged by judge-1" in document.text("figcaption")
    assert str(two[0]) in document.text("strong")
    # Its own config starts it again.
    code, out, err = run("judge", "--config", tmp_path / "out" / "config.yaml", "--output_dir", tmp_path / "again")
    assert code == 0 and "6 requests" in out, err


def test_a_judge_that_prefers_a_place_decides_nothing(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run
) -> None:
    server(lambda request: completion("[[A]]"))
    code, out, _ = run("judge", *two, "--output_dir", tmp_path / "out", "--yes", "--json")
    found = json.loads(out)["test_sets"]["test"]
    assert code == 0 and (found["tie"], found["contradictions"]) == (4, 3)


def test_several_test_sets_another_seed_and_options_of_the_request(
    server: Callable[[Answer], StandIn], tmp_path: Path, run: Run
) -> None:
    for name, text in (("a", "good"), ("b", "bad")):
        for test_set in ("dolly", "vicuna"):
            # The folders of an evaluation, and those of a run of a comparison.
            evaluation(tmp_path / name / (f"evaluate-{test_set}" if name == "b" else test_set), [text, text, text])
    judge = server(prefers_good)
    code, out, err = run(
        *("judge", tmp_path / "a", tmp_path / "b", "--output_dir", tmp_path / "out", "--yes", "--json"),
        *("--decoding_seeds", 20, "--max_samples", 2, "--concurrency", 1),
        *("--request_options", '{"temperature": null, "max_completion_tokens": 99}'),
    )
    assert code == 0, err
    found = json.loads(out)["test_sets"]
    assert {name: one["first"] for name, one in found.items()} == {"dolly": 2, "vicuna": 2}
    assert all(text.endswith(" 20") for _, _, request in judge.requests for text in shown(request))
    assert all("temperature" not in request and request["max_completion_tokens"] == 99
               for _, _, request in judge.requests)  # fmt: skip


def test_all_decoding_seeds_are_judged_and_pooled_by_prompt(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run
) -> None:
    judge = server(prefers_good)
    call = ("judge", *two, "--output_dir", tmp_path / "out", "--yes", "--json", "--decoding_seeds")
    code, out, err = run(*call, "all")
    found = json.loads(out)["test_sets"]["test"]
    assert code == 0 and len(judge.requests) == 12, err
    assert [found[name] for name in ("first", "second", "tie", "ahead", "behind")] == [2, 2, 4, 1, 1]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {(row["seed"], row["index"]) for row in rows} == {(seed, index) for seed in (10, 20) for index in range(4)}
    (tmp_path / "out" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    code, out, _ = run(*call, "all", "--resume")
    assert code == 0 and json.loads(out)["test_sets"]["test"]["ahead"] == 1


def test_a_stopped_judgement_goes_on_at_the_row(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run
) -> None:
    """The server breaks down at the third prompt; then the file ends in half a line, as a kill would leave it."""
    call = ("judge", *two, "--output_dir", tmp_path / "out", "--yes", "--concurrency", 1, "--max_retries", 1)
    judge = server(lambda request: (503, {}, "busy") if "p2" in str(request) else prefers_good(request))
    error = one_line_error(*no_output(run(*call)))
    assert "2 times with status 503 (busy)" in error and "2 of 4 pairs are judged, --resume goes on" in error
    assert "--resume to continue it" in one_line_error(*no_output(run(*call)))
    rows = tmp_path / "out" / "rows.jsonl"
    rows.write_text(rows.read_text() + '{"test_set": "", "ind')
    judge = server(prefers_good)
    code, out, err = run(*call, "--resume", "--json")
    assert code == 0, err
    assert len(judge.requests) == 2 and all("p2" in str(request) for _, _, request in judge.requests)
    assert json.loads(out)["test_sets"]["test"]["tie"] == 2 and "2 of them judged before" in err
    code, out, _ = run(*call, "--resume", "--json")
    assert code == 0 and len(judge.requests) == 2 and json.loads(out)["requests"] == 6


def test_verdicts_on_other_answers_or_by_another_judge_are_never_mixed_in(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    server(prefers_good)
    call = ("judge", *two, "--output_dir", tmp_path / "out", "--yes")
    assert run(*call)[0] == 0
    monkeypatch.setenv("OPENAI_MODEL", "judge-2")
    assert "by judge-1 on answers that are not these" in one_line_error(*no_output(run(*call, "--resume")))
    monkeypatch.setenv("OPENAI_MODEL", "judge-1")
    error = one_line_error(*no_output(run(*call, "--resume", "--decoding_seeds", 20)))
    assert "decoding_seeds=None, now it is ['20']" in error
    (two[0] / "rows.jsonl").write_text((two[0] / "rows.jsonl").read_text().replace("good", "fine"))
    assert "answers that are not these" in one_line_error(*no_output(run(*call, "--resume")))


def test_passing_trouble_is_tried_again_and_the_server_says_how_long_to_wait(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(chat_server.time, "sleep", waits.append)
    trouble = iter([(429, {"Retry-After": "7"}, "slow down"), (500, {}, ""), (503, {"Retry-After": "9999"}, "")])
    judge = server(lambda request: next(trouble, None) or prefers_good(request))
    code, _, err = run("judge", *two, "--output_dir", tmp_path / "out", "--yes", "--concurrency", 1)
    assert code == 0, err
    assert waits == [7.0, 2.0, chat_server.LONGEST_WAIT] and len(judge.requests) == 9


# ---- what goes wrong


def no_output(result: tuple[int, str, str]) -> tuple[int, str, str]:
    """The estimate is no part of the error."""
    return result[0], "", result[2]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (401, {}, json.dumps({"error": {"message": f"Incorrect API key {KEY}"}})),
            "status 401 (Incorrect API key ***",
        ),
        ((403, {}, '{"detail": "no"}'), "status 403 ({'detail': 'no'}); check OPENAI_API_KEY"),
        ((404, {}, "<h1>none</h1>"), "check OPENAI_BASE_URL (with /v1?) and OPENAI_MODEL=judge-1"),
        ((400, {}, '{"error": "temperature: unsupported"}'), "status 400 (temperature: unsupported)"),
        ((429, {}, '{"error": {"message": "quota"}}'), "2 times with status 429 (quota); fewer requests at once"),
        ((302, {"Location": "http://127.0.0.1:9/v1"}, ""), "redirects are not followed"),
        ((200, {}, "<html>login</html>"), "no chat completion: '<html>login</html>'"),
        ((200, {}, '{"choices": []}'), "no chat completion"),
        ((200, {}, "[1]"), "no chat completion"),
        ((200, {}, '{"choices": [{"message": {"content": [1]}}]}'), "no chat completion"),
    ],
)
def test_what_a_server_may_answer_is_one_line(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run, answer: Any, message: str
) -> None:
    server(lambda request: answer)
    call = ("judge", *two, "--output_dir", tmp_path / "out", "--yes", "--max_retries", 1, "--concurrency", 1)
    result = run(*call)
    error = one_line_error(*no_output(result))
    assert message in error and "0 of 4 pairs are judged" in error and KEY not in error


def test_a_key_is_neither_printed_nor_written(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run
) -> None:
    server(lambda request: completion(f"your key is {KEY} [[A]]"))
    code, out, err = run("judge", *two, "--output_dir", tmp_path / "out", "--yes", "--verbose", "--json")
    assert code == 0 and KEY not in out + err + files(tmp_path / "out")
    assert "your key is *** [[A]]" in files(tmp_path / "out")
    assert KEY not in repr(chat_server.ChatServer("http://x/v1", "m", KEY))


def test_a_reply_without_a_verdict_is_counted_and_left_out(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run
) -> None:
    server(lambda request: completion(None) if "p0" in str(request) else prefers_good(request))
    code, out, _ = run("judge", *two, "--output_dir", tmp_path / "out", "--yes", "--json")
    found = json.loads(out)["test_sets"]["test"]
    assert code == 0 and (found["unreadable"], found["second"], found["tie"], found["first"]) == (1, 1, 2, 0)


def test_a_server_that_is_not_there_or_silent_is_one_line(
    server: Callable[[Answer], StandIn], two: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("judge", *two, "--output_dir", tmp_path / "out", "--yes", "--timeout", 0.1, "--max_retries", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}/v1")
        error = one_line_error(*no_output(run(*call)))
        assert "cannot be reached: Connection refused; check OPENAI_BASE_URL" in error
        free.listen()  # it takes the connection and never answers
        error = one_line_error(*no_output(run(*call, "--overwrite_output_dir")))
    assert "did not answer within 0.1 s (2 attempts); a longer --timeout may help" in error


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OPENAI_BASE_URL": ""}, "set OPENAI_BASE_URL to the address"),
        ({"OPENAI_MODEL": ""}, "set OPENAI_MODEL"),
        ({"OPENAI_BASE_URL": "localhost:8000/v1"}, "must be an http or https address"),
        ({"OPENAI_BASE_URL": "file:///etc/passwd"}, "must be an http or https address"),
        ({"OPENAI_BASE_URL": "http://me:secret@host/v1"}, "give the address alone, and a key in OPENAI_API_KEY"),
        ({"OPENAI_BASE_URL": "http://host:port/v1"}, "must be an http or https address"),
        ({"OPENAI_API_KEY": "two\nlines"}, "holds characters that no header can carry"),
    ],
)
def test_a_wrong_environment_is_one_line(
    two: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, environment: Any, message: str
) -> None:
    known = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_MODEL": "m", "OPENAI_API_KEY": ""}
    for name, value in {**known, **environment}.items():
        monkeypatch.setenv(name, value)
    error = one_line_error(*run("judge", *two, "--output_dir", tmp_path / "out"))
    assert message in error and "secret" not in error and "two" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A"], "give two folders of switchkd evaluate, got 1"),
        (["A", "none"], "none holds no answers (rows.jsonl)"),
        (["A", "SETS"], "the two runs answered different test sets"),
        (["A", "OTHER"], "prompt 0 is not the same in both runs"),
        (["A", "SEED"], "no decoding seed is in both runs"),
        (["A", "B", "--decoding_seeds", "10", "7"], "no decoding seed 7 is in both runs"),
        (["A", "B", "--decoding_seeds", "every"], "decoding_seeds must be integers joined by commas"),
        (["A", "B", "--prices", "1"], "prices must be two numbers joined by a comma"),
        (["A", "B", "--prices", "1,-1"], "prices must be two numbers"),
        (["A", "B", "--timeout", "0"], "timeout must be a number of seconds > 0"),
        (["A", "B", "--concurrency", "0"], "concurrency must be"),
        (["A", "B", "--request_options", "x"], "request_options must be a JSON object"),
        (["A", "B", "--request_options", '{"stream": true}'], "stream is set by this command"),
        (["A", "DAMAGED"], "is damaged"),
    ],
)
def test_wrong_calls_are_one_line(
    two: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_MODEL", "m")
    folders = {"A": two[0], "B": two[1], "SETS": tmp_path / "sets"}
    evaluation(tmp_path / "sets" / "dolly", ["x"])
    folders["OTHER"] = evaluation(tmp_path / "other", ["good"] * 4, prompt="q")
    folders["SEED"] = evaluation(tmp_path / "seed", ["good"] * 4, seeds=(30,))
    folders["DAMAGED"] = evaluation(tmp_path / "damaged", ["x"])
    (tmp_path / "damaged" / "rows.jsonl").write_text('{"seed": 1}\n')
    given = [folders.get(word, word) for word in words]
    assert message in one_line_error(*run("judge", *given, "--output_dir", tmp_path / "out"))
