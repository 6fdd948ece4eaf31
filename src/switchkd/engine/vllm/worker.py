"""The extension of vLLM's workers: the methods that an engine calls in every one of them.

vLLM mixes `SwitchWorker` into its worker class (`worker_extension_cls`). Arguments and results are JSON, so that they
pass vLLM's own process border and its HTTP server alike.
"""

import json
from pathlib import Path
from typing import Any

from switchkd.engine.vllm.described import packed
from switchkd.engine.vllm.private import runner_of, writes_alone
from switchkd.engine.vllm.sampler_alone import AloneV1, AloneV2
from switchkd.engine.vllm.sampler_v1 import SamplerV1
from switchkd.engine.vllm.sampler_v2 import SamplerV2
from switchkd.engine.vllm.writing import Writing

#: How vLLM finds it.
EXTENSION = "switchkd.engine.vllm.worker.SwitchWorker"


class SwitchWorker:
    """What vLLM's worker gains; `self` is that worker."""

    def switch_prepare(self) -> str:
        """Replace the sampler of this worker, once; return which model runner it has, "v1" or "v2"."""
        worker: Any = self
        if not hasattr(worker, "switch_sampler"):
            worker.switch_runner = runner_of(worker)
            of_pairs: dict[str, Any] = {"v1": SamplerV1, "v2": SamplerV2}
            samplers = {"v1": AloneV1, "v2": AloneV2} if writes_alone(worker) else of_pairs
            worker.switch_sampler = samplers[worker.switch_runner](worker.model_runner)
            worker.switch_sampler.begin(None)
        return worker.switch_runner

    def switch_facts(self) -> dict[str, Any]:
        """Return what vLLM's configuration came to."""
        worker: Any = self
        config, speculative = worker.vllm_config, worker.vllm_config.speculative_config
        return {
            "runner": self.switch_prepare(),
            "max_model_len": config.model_config.max_model_len,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "vocabulary_size": config.model_config.get_vocab_size(),
            "draft_length": 0 if speculative is None else speculative.num_speculative_tokens,
        }

    def switch_begin(self, job: str) -> None:
        """Start a rollout; see `Writing` for what a job holds."""
        worker: Any = self
        self.switch_prepare()
        worker.switch_sampler.begin(Writing(json.loads(job), worker.model_runner.device))

    def switch_take(self) -> dict[str, Any]:
        """Return the record since the last call, its columns packed, and the counts so far."""
        worker: Any = self
        columns, counts = worker.switch_sampler.writing.take()
        return {"columns": packed(columns), "counts": counts}

    def switch_end(self) -> None:
        """Give vLLM its own sampling back."""
        worker: Any = self
        worker.switch_sampler.begin(None)

    def switch_load_student(self, file: str) -> int:
        """Load weights into the student, in place; return how many tensors it took.

        By the steps of vLLM's own weight updates: plain `load_weights` fails on a CPU, whose build packs weights after
        they were loaded.

        Args:
            file: A safetensors file with the names of transformers, which every worker can read.
        """
        from safetensors.torch import load_file
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.layerwise import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        worker: Any = self
        config = worker.vllm_config
        if writes_alone(worker):
            student, of_student = worker.get_model(), config.model_config
        else:
            student, of_student = worker.get_draft_model(), config.speculative_config.draft_model_config
        weights = load_file(Path(file))
        with set_current_vllm_config(config):
            initialize_layerwise_reload(student)
            loaded = student.load_weights(iter(weights.items()))
            finalize_layerwise_reload(student, of_student)
        return len(loaded)
