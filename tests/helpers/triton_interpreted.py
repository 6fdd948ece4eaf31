"""As `sitecustomize`: vLLM's CPU build takes Triton for installed, and its kernels run in Triton's interpreter.

Slow, but it runs vLLM's V2 model runner without a GPU.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
if any(name in " ".join(sys.orig_argv) for name in ("switchkd.engine.vllm", "multiprocessing")):
    from triton.backends import backends

    class Driver:
        """A driver that is not there."""

        @staticmethod
        def is_active():
            return False

    class Backend:
        """A backend for the name of the device only."""

        driver, compiler = Driver, None

    backends.setdefault("cpu", Backend)
