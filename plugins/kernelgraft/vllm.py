"""The door vLLM knocks on: its entry-point group ``vllm.general_plugins`` calls :func:`register`."""

from __future__ import annotations

import logging

log = logging.getLogger("kernelgraft")
_registered = False


def register() -> None:
    """Give vLLM what the installed plugins offer it; called by vLLM in each of its processes.

    Cheap, free of CUDA, and done once per process however often it is called. It never raises, because that would kill
    the engine: what cannot be loaded is logged as an error and left out. Keep a plugin out of vLLM with
    ``KERNELGRAFT_PLUGINS``; a third party's enters only when it is named there, its kernels included. vLLM has no way
    to unregister: taking a plugin off changes the engines built later in the process, and is complete in the next one.
    """
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from .manager import manager

        manager().graft_onto("vllm")
    except Exception:  # an engine without our plugins beats no engine
        log.exception("kernelgraft could not be loaded into vLLM")
