"""A disk that takes no more: one line, exit code 74, and what was saved before is still there."""

import resource
import subprocess
import sys

import pytest
from helpers.command_line import environment, train_options

from switchkd.cli.run_folder import RunFolder, read_config
from switchkd.errors import UserError, storage_problem
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


def test_a_folder_whose_new_config_found_no_room_is_still_the_run_s_own(tmp_path, monkeypatch):
    """The same command was refused after it: the old config was gone, and the folder nobody's."""
    folder = RunFolder(str(tmp_path / "run"), "train")
    folder.claim({"max_steps": 1})
    (folder.path / "teacher_text.jsonl").write_text("{}\n")  # kept for the next run

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("switchkd.cli.run_folder.yaml.safe_dump", full)
        with pytest.raises(UserError, match="No space left on device"):
            folder.claim({"max_steps": 2})
    folder.check(overwrite=True)
    folder.claim({"max_steps": 2})
    assert read_config(folder.path) == {"max_steps": 2}


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
