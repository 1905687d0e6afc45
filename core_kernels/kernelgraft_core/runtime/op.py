"""One schema per op; which backend runs is decided at call time, in Python, so that it can be replaced and put back.

``torch.library`` gives each op its schema, its fake implementation and its gradient, so that
``torch.compile(fullgraph=True)`` and ``opcheck`` work; below the dispatcher a small table picks the backend and can say
why another one was not taken.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .errors import NoBackendError

NAMESPACE = "kernelgraft"
log = logging.getLogger("kernelgraft")
_library = torch.library.Library(NAMESPACE, "DEF")
_ops: dict[str, Op] = {}

# Why an implementation cannot run this call, or None when it can.
Supports = Callable[..., str | None]


@dataclass(frozen=True)
class Implementation:
    """One way to run an op on some device types; the highest priority that supports a call runs it."""

    backend: str
    run: Callable[..., Any]
    devices: tuple[str, ...]
    priority: int = 0
    supports: Supports | None = None


class Op:
    """An op ``kernelgraft::<name>`` and its table of implementations.

    Args:
        schema: torch schema without namespace, positional arguments only and no defaults (torch strips trailing
            defaults before the implementation sees them), e.g. ``"scale(Tensor x, float s) -> Tensor"``.
        fake: shapes, strides and dtypes of the result, for ``torch.compile``; same arguments as the op.
        gradient: ``(backward, setup_context)`` as for ``torch.library.register_autograd``; backward calls other ops, so
            that it has backends of its own. Without it, asking for a gradient raises: backends must not differ in that.

    Calling the op dispatches through torch. It raises :class:`NoBackendError` when nothing can run the call.
    """

    def __init__(
        self,
        schema: str,
        fake: Callable[..., Any],
        gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self._table: tuple[Implementation, ...] = ()
        self._by_device: dict[tuple[str, str | None], tuple[Implementation, ...]] = {}
        self._lock = threading.Lock()
        self._told: set[tuple[str, str]] = set()
        _library.define(schema)
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, partial(self._dispatch, key.lower()), key)
        qualified = f"{NAMESPACE}::{self.name}"
        torch.library.register_fake(qualified, fake, lib=_library)
        backward, setup_context = gradient or (self._refuse_gradient, None)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
        self._overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        _ops[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args)

    def register(self, implementation: Implementation) -> Callable[[], None]:
        """Add an implementation; the returned function takes it out again."""
        self._change(lambda table: (*table, implementation))
        return lambda: self._change(lambda table: tuple(i for i in table if i is not implementation))

    def explain(self, device: str, *args: Any) -> dict[str, str]:
        """For each backend on a device type: ``"runs"``, ``"ready"`` or why not. Used by ``kernelgraft doctor``."""
        verdicts: dict[str, str] = {}
        for implementation in self._candidates(device):
            reason = implementation.supports(*args) if implementation.supports else None
            taken = "runs" not in verdicts.values()
            verdicts[implementation.backend] = reason or ("runs" if taken else "ready")
        return verdicts

    def _change(self, edit: Callable[[tuple[Implementation, ...]], tuple[Implementation, ...]]) -> None:
        with self._lock:
            self._table = tuple(sorted(edit(self._table), key=lambda i: -i.priority))
            self._by_device = {}  # a new dict: a reader that still holds the old one writes into nobody's table

    def _candidates(self, device: str) -> tuple[Implementation, ...]:
        forced = os.environ.get("KERNELGRAFT_BACKEND")
        known = self._by_device
        found = known.get((device, forced))
        if found is None:
            found = tuple(i for i in self._table if device in i.devices and forced in (None, i.backend))
            known[device, forced] = found
        return found

    def _dispatch(self, device: str, *args: Any) -> Any:
        for implementation in self._candidates(device):
            reason = implementation.supports(*args) if implementation.supports else None
            if reason is None:
                return implementation.run(*args)
            self._tell_once(implementation.backend, reason)
        reasons = "; ".join(f"{k}: {v}" for k, v in self.explain(device, *args).items()) or "none registered"
        raise NoBackendError(f"{self.name} cannot run on {device}: {reasons}")

    def _refuse_gradient(self, *_: Any) -> None:
        raise NotImplementedError(f"{self.name} has no gradient")

    def _tell_once(self, backend: str, reason: str) -> None:
        """A slower backend is about to run: say so, once per backend and reason, never on every call."""
        if (backend, reason) not in self._told:
            self._told.add((backend, reason))
            log.warning("%s: backend %s passed over: %s", self.name, backend, reason)


def registered_ops() -> dict[str, Op]:
    """All ops by name, for reports and for tests that go over every op."""
    return dict(_ops)


def deferred(module: str, name: str) -> Callable[..., Any]:
    """A function that imports ``module`` at its first call and is ``module.name`` from then on."""
    found: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(module), name)
        return found(*args)

    return call
