"""A disk that takes no more: one line, exit code 74, and what was saved before is still there."""

import resource
import subprocess
import sys

import pytest
from helpers.command_line import environment, train_options

from switchkd.errors import storage_problem
from switchkd.training.checkpoints import newest_whole


def limited(size):
    """No file may grow beyond this many bytes, as if the disk were full; the signal for it is ignored."""

    def limit():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("size", [20_000, 150_000])
def test_a_disk_that_is_full_in_training_is_one_line_and_the_checkpoints_before_stand(models, tmp_path, run, size):
    folder = tmp_path / "run"
    words = train_options(models, folder, "--initial_threshold", 0.3)
    words[words.index("--save_steps") + 1] = 1
    assert run(*words)[0] == 0
    before = newest_whole(folder)[0]
    more = [*words, "--max_steps", 4, "--resume_from_checkpoint", "true"]
    done = subprocess.run(
        [sys.executable, "-m", "switchkd", *map(str, more)],
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=limited(size),
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode in (2, 74) and "Traceback" not in done.stderr, done.stderr
    assert (len(lines) == 1 and "File too large" in lines[0]) or "no room" in lines[0]
    assert newest_whole(folder)[0] == before
    assert run(*more)[0] == 0  # with room again
    assert newest_whole(folder)[0].name == "checkpoint-4"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/data/x.pt"), "cannot write /data/x.pt: No space left on device"),
        (
            RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file"),
            "no room",
        ),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
        (ValueError("something else"), None),
    ],
)
def test_what_libraries_say_of_a_full_disk_is_understood(error, says):
    found = storage_problem(error)
    assert found is None if says is None else says in found
