"""What a user is told once, however often it happens."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("kernelgraft")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless the same one was logged before."""
    log.warning("%s", message)
