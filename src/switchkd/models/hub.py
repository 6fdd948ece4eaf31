"""Whether the Hugging Face hub can be reached: asked once, instead of waiting for the retries of every file."""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

#: How long to wait for the hub, seconds. `huggingface_hub` asks for every file six times, which takes half a minute.
PATIENCE = 4.0
#: What `huggingface_hub` raises without an answer; the library that its client is from has changed before.
NO_ANSWER: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)


def problem() -> str | None:
    """Return why the hub cannot be reached, None where it can; the answer holds for a minute."""
    if constants.is_offline_mode():
        return "offline mode, HF_HUB_OFFLINE"
    return _asked(constants.ENDPOINT, int(time.monotonic() // 60))


@functools.lru_cache(maxsize=1)
def _asked(endpoint: str, minute: int) -> str | None:
    try:
        get_session().head(endpoint, timeout=PATIENCE)
    except HfHubHTTPError:
        return None  # an answer, whatever it says
    except NO_ANSWER as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


@contextlib.contextmanager
def cache_only_if_unreachable() -> Iterator[None]:
    """Inside, files of the hub come from the cache alone where the hub cannot be reached."""
    if constants.is_offline_mode() or problem() is None:
        yield
        return
    # `datasets` keeps a copy of the switch.
    places = [constants, *(module for name, module in sys.modules.items() if name == "datasets.config")]
    for place in places:
        place.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place in places:
            place.HF_HUB_OFFLINE = False  # type: ignore[attr-defined]


def unreachable_reason(error: BaseException) -> str | None:
    """Return what to say where reading failed because the hub cannot be reached, None for any other error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConnectionError | LocalEntryNotFoundError):
        cause = cause.__cause__ or cause.__context__
    why = problem() if cause is not None else None
    if why is None:
        return None
    return f"it is not in the cache, and the hub {constants.ENDPOINT} cannot be reached ({why}); give a local path"
