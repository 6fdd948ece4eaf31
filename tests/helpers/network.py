"""No test, and no process that a test starts, reaches anything but this machine."""

import os
import runpy
import tempfile
from pathlib import Path

#: Python runs the `sitecustomize.py` of this folder first in every process.
OFFLINE = Path(__file__).parent / "offline"


def guard() -> Path:
    """Begin to watch, here and in every process started from here; return the file that lists what was tried."""
    file, name = tempfile.mkstemp(prefix="switchkd-tried-")
    os.close(file)
    os.environ["SWITCHKD_TRIED"] = name
    os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), *filter(None, [os.environ.get("PYTHONPATH")])])
    runpy.run_path(str(OFFLINE / "sitecustomize.py"))
    return Path(name)
