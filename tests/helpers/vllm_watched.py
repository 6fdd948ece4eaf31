"""A worker whose V2 sampler may ask the device nothing between a draft and what is written: a question is an error."""

from typing import Any

from switchkd.engine.capture import NoHostReads
from switchkd.engine.vllm.worker import SwitchWorker


class WatchedWorker(SwitchWorker):
    """What vLLM's worker gains instead of `SwitchWorker`."""

    def switch_prepare(self) -> str:
        worker: Any = self
        is_new = not hasattr(worker, "switch_sampler")
        runner = super().switch_prepare()
        if is_new:
            decide = worker.switch_sampler.decide

            def watched(*given: Any) -> Any:
                with NoHostReads():
                    return decide(*given)

            worker.switch_sampler.decide = watched
        return runner
