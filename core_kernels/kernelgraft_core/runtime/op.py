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
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._C import _any_requires_grad, _are_functorch_transforms_active, _AutoDispatchBelowAutograd
from torch.autograd import forward_ad

from .errors import NoBackendError

NAMESPACE = "kernelgraft"
log = logging.getLogger("kernelgraft")
_library = torch.library.Library(NAMESPACE, "DEF")
_ops: dict[str, Op] = {}
_REASONS_LOGGED = 16
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)

# Why an implementation cannot run this call, or None when it can.
Supports = Callable[..., str | None]


@dataclass(frozen=True, eq=False)
class Implementation:
    """One way to run an op on some device types; the highest priority that supports a call runs it.

    Attributes:
        backend: its name, unique in an op for each device type; what ``KERNELGRAFT_BACKEND`` is compared with.
        run: takes the op's arguments. Must not change or return them unless the schema says so.
        devices: ``"cpu"``, ``"cuda"``.
        supports: takes the op's arguments; why this implementation cannot run them, or None.
    """

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
            An op that writes to an argument, ``Tensor(a!)`` in the schema, has none, and asking does not raise: torch
            registers no gradient for such ops.
        autocast: arguments that ``torch.autocast`` converts to its dtype, as it does for ``F.linear``; float64 stays.
            Without it the op takes its arguments as they are.

    Calling the op dispatches through torch. It raises :class:`NoBackendError` when nothing can run the call,
    TypeError when an argument is a ``DTensor``, and NotImplementedError for forward-mode gradients.

    Raises:
        ValueError: the schema has defaults or keyword-only arguments, autocast names no argument of it, or an op that
            writes to an argument is given a gradient.
    """

    def __init__(
        self,
        schema: str,
        fake: Callable[..., Any],
        gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
        autocast: Sequence[str] = (),
    ) -> None:
        arguments = torch._C.parse_schema(f"{NAMESPACE}::{schema}").arguments
        self.name = schema.partition("(")[0]
        self._arguments = tuple(argument.name for argument in arguments)
        if special := [a.name for a in arguments if a.has_default_value() or a.kwarg_only]:
            raise ValueError(
                f"{self.name}: arguments {special} have defaults or are keyword-only; the router has neither"
            )
        if unknown := set(autocast) - set(self._arguments):
            raise ValueError(f"{self.name}: autocast names {sorted(unknown)}, its arguments are {self._arguments}")
        self.mutates = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
        if self.mutates and gradient is not None:
            written = [self._arguments[i] for i in self.mutates]
            raise ValueError(f"{self.name} writes to {written}: it cannot have a gradient")
        self._table: tuple[Implementation, ...] = ()
        self._by_device: dict[tuple[str, str | None], tuple[Implementation, ...]] = {}
        self._lock = threading.Lock()
        self._told: set[tuple[str, str]] = set()
        self._announced: set[tuple[str, Implementation]] = set()

        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, partial(self._dispatch, key.lower()), key)
            if autocast:
                _library.impl(self.name, self._autocast_rule(key, autocast), f"Autocast{key}")
        qualified = f"{NAMESPACE}::{self.name}"
        torch.library.register_fake(qualified, fake, lib=_library)
        if not self.mutates:
            backward, setup_context = gradient or (self._refuse_gradient, None)
            torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
        self._overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        _ops[self.name] = self

    def __call__(self, *args: Any) -> Any:
        for argument in args:
            # By name: importing DTensor costs half a second, and whoever has one has imported it.
            if type(argument).__name__ == "DTensor":
                raise TypeError(f"{self.name} takes no DTensor ({self._name_of(argument, args)}): pass its .to_local()")
        if forward_ad._current_level >= 0:
            self._refuse_forward_mode(args)
        if (
            torch.compiler.is_compiling()
            or _are_functorch_transforms_active()
            or (torch.is_grad_enabled() and _any_requires_grad(*args))
        ):
            return self._overload(*args)
        with _AutoDispatchBelowAutograd():  # nothing to differentiate: spare the autograd layer, 5 µs of Python
            return self._overload(*args)

    def __repr__(self) -> str:
        return f"<Op {NAMESPACE}::{self.name}: {', '.join(i.backend for i in self._table) or 'no backend'}>"

    def register(self, implementation: Implementation) -> Callable[[], None]:
        """Add an implementation; the returned function takes it out again, and may be called more than once.

        Raises:
            ValueError: the op has a backend of that name on one of its devices already.
        """

        def add(table: tuple[Implementation, ...]) -> tuple[Implementation, ...]:
            for other in table:
                if other.backend == implementation.backend and set(other.devices) & set(implementation.devices):
                    raise ValueError(f"{self.name} has a backend {other.backend!r} on {other.devices} already")
            return (*table, implementation)

        self._change(add)
        return lambda: self._change(lambda table: tuple(i for i in table if i is not implementation))

    def backends(self, device: str) -> tuple[str, ...]:
        """Names of the backends on a device type, the preferred one first, whatever ``KERNELGRAFT_BACKEND`` says."""
        return tuple(i.backend for i in self._table if device in i.devices)

    def explain(self, device: str, *args: Any) -> dict[str, str]:
        """For each backend on a device type: ``"runs"``, ``"ready"`` or why not. Used by ``kernelgraft doctor``."""
        forced = _forced_backend()
        verdicts: dict[str, str] = {}
        for implementation in self._table:
            if device not in implementation.devices:
                continue
            if forced not in (None, implementation.backend):
                reason: str | None = f"KERNELGRAFT_BACKEND is {forced}"
            else:
                reason = implementation.supports(*args) if implementation.supports else None
            taken = "runs" in verdicts.values()
            verdicts[implementation.backend] = reason or ("ready" if taken else "runs")
        return verdicts

    def _change(self, edit: Callable[[tuple[Implementation, ...]], tuple[Implementation, ...]]) -> None:
        with self._lock:
            self._table = tuple(sorted(edit(self._table), key=lambda i: -i.priority))
            self._by_device = {}  # a new dict: a reader that still holds the old one writes into nobody's table
            self._announced = set()

    def _candidates(self, device: str) -> tuple[Implementation, ...]:
        forced = _forced_backend()
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
                if (device, implementation) not in self._announced:
                    self._announce(device, implementation)
                if torch._C._is_any_autocast_enabled():  # gradients computed inside the context: types are settled
                    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
                        return _without_base(implementation.run(*args))
                return _without_base(implementation.run(*args))
            self._tell_once(implementation.backend, reason)
        reasons = "; ".join(f"{k}: {v}" for k, v in self.explain(device, *args).items()) or "none registered"
        raise NoBackendError(f"{self.name} cannot run on {device}: {reasons}")

    def _autocast_rule(self, key: str, names: Sequence[str]) -> Callable[..., Any]:
        device = key.lower()
        convert = [name in names for name in self._arguments]
        this_layer = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{key}"))

        def rule(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            converted = [
                arg.to(dtype) if wanted and isinstance(arg, torch.Tensor) and _autocast_converts(arg) else arg
                for wanted, arg in zip(convert, args, strict=True)
            ]
            with torch._C._ExcludeDispatchKeyGuard(this_layer):
                return self._overload(*converted)

        return rule

    def _refuse_gradient(self, *_: Any) -> None:
        raise NotImplementedError(f"{self.name} has no gradient")

    def _refuse_forward_mode(self, args: tuple[Any, ...]) -> None:
        # torch would drop the tangent in silence: register_autograd knows reverse mode only.
        for argument in args:
            if isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
                raise NotImplementedError(f"{self.name} has no forward-mode gradient ({self._name_of(argument, args)})")

    def _name_of(self, argument: Any, args: tuple[Any, ...]) -> str:
        return next(name for name, arg in zip(self._arguments, args, strict=False) if arg is argument)

    def _announce(self, device: str, implementation: Implementation) -> None:
        with self._lock:
            if (device, implementation) not in self._announced:
                self._announced.add((device, implementation))
                log.info("%s: backend %s runs on %s", self.name, implementation.backend, device)

    def _tell_once(self, backend: str, reason: str) -> None:
        """A slower backend is about to run: say so, once per backend and reason, never on every call."""
        if (backend, reason) in self._told or len(self._told) >= _REASONS_LOGGED:
            return
        with self._lock:
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


# os.environ translates every name that is looked up and raises inside for one that is not set: 1.5 µs of each call. The
# dict that it keeps answers whether one is set.
_FORCED = "KERNELGRAFT_BACKEND"
_is_set: Container[Any] = getattr(os.environ, "_data", os.environ)
_forced_key = _FORCED if _is_set is os.environ else os.environ.encodekey(_FORCED)


def _forced_backend() -> str | None:
    return os.environ.get(_FORCED) or None if _forced_key in _is_set else None


def _without_base(result: Any) -> Any:
    """Results that are views of a kernel's own buffer as tensors in their own right.

    torch would otherwise refuse that a caller writes to them: in place on a view made within a function of autograd, or
    without gradients.
    """
    if isinstance(result, torch.Tensor):
        return result.data if result._is_view() else result
    if isinstance(result, tuple | list):
        return type(result)(map(_without_base, result))
    return result


def _autocast_converts(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64
