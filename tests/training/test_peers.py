"""Two processes end together: whatever happens to one, the other ends within a minute, with one line and a code."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from helpers import faults, seqkd_parts
from torch import distributed
from training.test_distributed import started

from switchkd.cli.main import run
from switchkd.errors import LostProcess, UserError
from switchkd.training import peers

pytestmark = pytest.mark.slow
# Two processes start in each of these, which costs more than what they check; `make test-long` runs them all.
BOTH = [pytest.param(0, marks=pytest.mark.long), 1]


def ended(folder: Path, fault: str, survivor: int) -> tuple[int, str, int, str]:
    """Exit code and what was said, of the survivor and of the victim."""
    running = started(faults.__file__, folder, fault)
    try:
        output = running[survivor].communicate(timeout=60)[0]
        victim = running[1 - survivor]
        if fault.startswith(("stopped", "slow")):
            victim.kill()
        return running[survivor].returncode, output, victim.wait(60), victim.communicate()[0]
    finally:
        for process in running:
            process.kill()


def lines_of(output: str) -> list[str]:
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("switchkd: error:")]


@pytest.mark.parametrize("victim", BOTH)
def test_killing_a_process_ends_the_other_with_one_line(tmp_path, victim):
    """The other ended with a traceback of gloo; on GPUs it waits for half an hour. Process 0 holds the store."""
    code, output, killed, _ = ended(tmp_path, f"killed-{victim}", 1 - victim)
    assert killed == -signal.SIGKILL and code == LostProcess.code == 75
    (line,) = lines_of(output)
    assert f"process {victim}" in line and "is gone" in line and "--resume_from_checkpoint auto" in line
    assert f"process {1 - victim} waited in the rollout of step 3" in line or "the training of step 3" in line


@pytest.mark.long
def test_a_process_that_stands_still_ends_the_other_with_its_number_and_phase(tmp_path):
    """Nothing is closed, so that no collective fails: only the signs of life tell."""
    code, output, *_ = ended(tmp_path, "stopped-1", 0)
    assert code == 75
    (line,) = lines_of(output)
    assert "process 1 of 2 is gone, last in the rollout of step 3" in line


@pytest.mark.parametrize("victim", BOTH)
def test_a_mistake_in_one_process_ends_all_with_that_line(tmp_path, victim):
    code, output, other_code, other_output = ended(tmp_path, f"mistaken-{victim}", 1 - victim)
    assert (code, other_code) == (2, 2)
    assert lines_of(other_output) == ["switchkd: error: this row cannot be read; remove it"]
    assert lines_of(output) == [f"switchkd: error: process {victim} of 2: this row cannot be read; remove it"]


@pytest.mark.long
def test_a_traceback_in_one_process_ends_the_other_with_a_line_that_names_it(tmp_path):
    code, output, other_code, other_output = ended(tmp_path, "broken-1", 0)
    assert code == 2 and other_code != 0 and "ZeroDivisionError: no such number" in other_output
    assert lines_of(output) == ["switchkd: error: process 1 of 2: ZeroDivisionError: no such number"]


@pytest.mark.long
def test_a_process_that_computes_for_long_is_not_lost(tmp_path):
    """It sleeps, or holds no lock: its thread goes on giving signs of life."""
    running = started(faults.__file__, tmp_path, "slow-1")
    try:
        for process in running:
            output = process.communicate(timeout=90)[0]
            assert process.returncode == 0, output[-2000:]
    finally:
        for process in running:
            process.kill()


@pytest.mark.long
def test_processes_that_wait_for_each_other_in_vain_end_with_what_each_does(tmp_path):
    """Both alive, each in a collective of its own: the time-out was a traceback that named nobody."""
    code, output, other_code, other_output = ended(tmp_path, "apart-1", 0)
    assert code == other_code == LostProcess.code
    for (line,) in (lines_of(output), lines_of(other_output)):
        assert "the processes wait for each other in vain" in line and "process 1 is in another room" in line
        assert "process 0 is in the training of step 3" in line or "process 0 is in the rollout of step 3" in line


def test_it_is_said_once_when_nobody_begins_anything_new(capsys, monkeypatch):
    monkeypatch.setattr(peers, "STALLED_AFTER", 5.0)
    watch = peers._Watch(distributed.HashStore(), 0, 2)
    watch.doing = {0: ("the rollout of step 3", 0.0)}
    for now in (1.0, 5.5, 6.5, 7.0):
        watch._note(0, "the rollout of step 3", now)
        watch._note(1, "the training of step 3", now)
    said = capsys.readouterr().err
    assert said.count("nothing new for 6 s") == 1 == said.count("\n")
    assert "process 0 is in the rollout of step 3, process 1 is in the training of step 3" in said


def test_one_process_alone_is_not_watched():
    with peers.together():
        peers.enter("anything")
        assert peers._watch is None


def test_codes_of_errors_are_exit_codes(monkeypatch, capsys):
    class Command:
        def __init__(self, error):
            self.error = error

        def parser(self):
            raise self.error

    for error, code in ((UserError("a"), 2), (LostProcess("b"), 75)):
        monkeypatch.setitem(__import__("sys").modules, "helpers.command", Command(error))
        assert run({"x": ("helpers.command", "x")}, ["x"]) == code
    assert capsys.readouterr().err == "switchkd: error: a\nswitchkd: error: b\n"


# ---- SeqKD: every process writes its part


def texts(folder: Path) -> list[list[int]]:
    return [json.loads(line)["completion_ids"] for line in (folder / "text.jsonl").read_text().splitlines()]


def test_parts_of_several_processes_are_the_text_of_one_and_survive_a_kill(tmp_path):
    """One process wrote everything, and the others waited for it, hours at a barrier."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir()
    both.mkdir()
    seqkd_parts.main(alone, 0, 1, 0)
    running = started(seqkd_parts.__file__, both, "kill")
    for process in running:
        process.wait(120)
    kept = {path.name: path.read_text() for path in both.glob("text-*.jsonl")}
    assert sorted(kept) == ["text-1-of-2.jsonl", "text-2-of-2.jsonl"]
    assert all(len(content.splitlines()) == 4 for content in kept.values())
    assert not (both / "text.jsonl").exists()
    shutil.copytree(both, tmp_path / "again")
    running = started(seqkd_parts.__file__, tmp_path / "again", "go on")
    for process in running:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output[-2000:]
    assert texts(tmp_path / "again") == texts(alone)
    assert sorted(path.name for path in (tmp_path / "again").glob("text*") if path.suffix != ".lock") == [
        "text.json",
        "text.jsonl",
    ]
    written = [json.loads((tmp_path / "again" / f"rollouts-{rank}.json").read_text()) for rank in (0, 1)]
    assert written == [4, 4]  # each went on where it was, with its own half
