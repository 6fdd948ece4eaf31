"""One of two processes fails in some way while both train; not a test, `test_peers.py` starts it."""

import datetime
import os
import signal
import sys
import time
from pathlib import Path

from torch import distributed

from helpers.tiny import build_gpt2, build_trainer
from switchkd.cli.main import run
from switchkd.errors import UserError
from switchkd.training import peers


class Fails:
    """Stands for a module with a command, which the command line runs; `fault` names what happens and to whom."""

    def __init__(self, folder: Path, fault: str) -> None:
        self.folder, (self.fault, _, victim) = folder, fault.partition("-")
        self.mine = victim == os.environ["RANK"]

    def parser(self):
        from switchkd.cli.options import OptionParser

        result = OptionParser(prog="switchkd fails", usage="", description="")
        result.add_shared_options(None, overwrite=False)
        return result

    def run(self, options, console):
        trainer = build_trainer(
            self.folder,
            build_gpt2(),
            build_gpt2(seed=1),
            per_device_train_batch_size=2,
            max_steps=50,
            initial_threshold=0.42,
            schedule="constant",
            ddp_backend="gloo",
        )
        write, limit = trainer.text.write, datetime.timedelta(seconds=4)
        if self.fault == "apart":
            self.elsewhere = distributed.new_group(timeout=limit)
            distributed.distributed_c10d._set_pg_timeout(limit)

        def writes(*args, **kwargs):
            if self.mine and trainer.state.global_step == 2:
                self.happens()
            return write(*args, **kwargs)

        trainer.text.write = writes
        with peers.together():
            trainer.train()
        return {}

    def happens(self) -> None:
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fault == "mistaken":
            raise UserError("this row cannot be read; remove it")
        if self.fault == "broken":
            raise ZeroDivisionError("no such number")
        if self.fault == "apart":  # alive, in a collective that the other never comes to
            peers.enter("another room")
            distributed.barrier(group=self.elsewhere)
        if self.fault == "slow":
            time.sleep(4 * peers.LOST_AFTER)


def main(folder: Path, fault: str) -> int:
    """Run the command line with this command, and signs of life that are missed soon."""
    peers.BEAT, peers.LOST_AFTER, peers.LOST_AFTER_FAILURE = 0.2, 3.0, 1.0
    sys.modules["helpers.failing_command"] = Fails(folder, fault)  # type: ignore[assignment]
    return run({"fails": ("helpers.failing_command", "fails")}, ["fails"])


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2])
    sys.stderr.flush()
    os._exit(code)
