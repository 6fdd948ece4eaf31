"""A vLLM process of one's own: started, asked over a local socket, and ended."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import switchkd
from switchkd.errors import UserError

# Long enough to let go of a GPU's memory in order.
SECONDS_TO_END = 20
#: What tells a process that it is one of several in training; vLLM's is none of them.
OF_A_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Child:
    """A Python process with vLLM in it, possibly of another environment.

    That environment needs nothing of this package: the process gets a folder with it alone on its path, so that both
    sides are always of one version, and nothing else of this environment.

    Args:
        python: Path of a Python.
        environment: Variables to set for it, besides those of this process.

    Raises:
        UserError: It cannot be started.
    """

    def __init__(self, python: str, environment: dict[str, str] | None = None) -> None:
        self.python = python
        self.folder = Path(tempfile.mkdtemp(prefix="switchkd-vllm-"))
        self.log = self.folder / "vllm.log"
        site = alone(self.folder / "site")
        path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        inherited = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCH}
        ours, its = socket.socketpair()
        try:
            with its, self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [python, "-m", "switchkd.engine.vllm.process", str(its.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[its.fileno()],
                    env={**inherited, **(environment or {}), "PYTHONPATH": path},
                    start_new_session=True,  # an interrupt on the terminal is for the trainer, which saves first
                )
        except OSError as error:
            ours.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(f"vllm_python: cannot run {python}: {error.strerror}; give the path of a Python") from error
        self.connection, self.answers = ours, ours.makefile("r", encoding="utf-8")
        self._end = weakref.finalize(self, _end, self.process, ours, self.folder)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Return what a method of `process.Answers` returns.

        Raises:
            UserError: It refused or failed, or the process has ended; one line, with the place of its log.
        """
        try:
            self.connection.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
            line = self.answers.readline()
        except (OSError, ValueError):
            line = ""
        if not line:
            raise self._died()
        answer = json.loads(line)
        if "refused" in answer:
            raise UserError(answer["refused"])
        if "failed" in answer:
            raise UserError(f"vllm: {do} failed: {answer['failed']}; its log: {self._kept_log()}")
        return answer["result"]

    def _died(self) -> UserError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_END)
        code = self.process.poll()
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return UserError(
            f"vllm: the engine's process ended {how}: {said[:200]}; what was saved before is still there; its log: "
            f"{self._kept_log()}"
        )

    def _kept_log(self) -> Path:
        """The log, where it stays after this process has ended."""
        kept = self.folder.with_suffix(".log")
        with contextlib.suppress(OSError):
            shutil.copyfile(self.log, kept)
        return kept

    def close(self) -> None:
        """End the process."""
        self.answers.close()
        self._end()


def alone(folder: Path) -> Path:
    """Return a folder that has this package and nothing else, made here: one for `PYTHONPATH`."""
    facts = folder / f"switchkd-{switchkd.__version__}.dist-info"
    facts.mkdir(parents=True)
    facts.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: switchkd\nVersion: {switchkd.__version__}\n", encoding="utf-8"
    )
    (folder / "switchkd").symlink_to(Path(switchkd.__file__).parent, target_is_directory=True)
    return folder


def default_python() -> str:
    """Return the Python that runs vLLM where none is named: this one."""
    return sys.executable


def _end(process: subprocess.Popen[bytes], connection: socket.socket, folder: Path) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.terminate()
    # Workers of tensor parallelism are in the same session; none may keep a GPU.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)
