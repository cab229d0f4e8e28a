"""A model hub that cannot be reached is asked once: its own client tries for 22 seconds a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@contextmanager
def asked_once(path: str | Path) -> Iterator[None]:
    """In here what is no local `path` comes from the cache alone, if there is no hub."""
    from huggingface_hub import constants

    kept = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = kept or not (Path(path).exists() or _answers())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = kept


@cache
def _answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of requests or httpx, by version
        return False
    return True  # whatever it says
