"""Something to do as soon as a module has been imported, so that nothing is imported for its sake."""

from __future__ import annotations

import importlib.abc
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger("kernelgraft")
Then = Callable[[ModuleType], None]


HOSTS = ("mmengine", "mmcv", "mmdet", "mmdet3d", "mmseg", "projects")
"""Packages whose modules may hold what is replaced, by names of their own."""


def spec_from_others(
    me: importlib.abc.MetaPathFinder, name: str, path: Sequence[str] | None, target: ModuleType | None = None
) -> ModuleSpec | None:
    """What the first of the other finders finds that can be loaded.

    They are asked one by one: ``importlib.util.find_spec`` imports, which within a finder makes two threads wait for
    each other.
    """
    for finder in tuple(sys.meta_path):
        if finder is not me and hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                return spec
    return None


class _Watcher(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and comes back when it has been executed."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Then]] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        spec = spec_from_others(self, name, path, target)
        if spec is not None:
            assert spec.loader is not None
            spec.loader = _ThenLoader(spec.loader, self)
        return spec


class _ThenLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, watcher: _Watcher) -> None:
        self._loader, self._watcher = loader, watcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for then in tuple(self._watcher.waiting.get(module.__name__, ())):
            _do(then, module)


_watcher = _Watcher()
_lock = threading.Lock()


def when_imported(name: str, then: Then) -> Callable[[], None]:
    """Call ``then(module)`` once the module ``name`` has been executed: now, if it has been already.

    What ``then`` raises is logged and does not fail the import. The returned function withdraws the wish.
    """
    module = sys.modules.get(name)
    with _lock:
        if not _watcher.waiting:
            sys.meta_path.insert(0, _watcher)
        _watcher.waiting.setdefault(name, []).append(then)
    if module is not None and getattr(module.__spec__, "_initializing", False):
        log.warning("%s is being imported at this moment: kernelgraft cannot adapt it any more", name)
    elif module is not None:
        _do(then, module)

    def undo() -> None:
        with _lock:
            waiting = _watcher.waiting.get(name, [])
            if then in waiting:
                waiting.remove(then)
            if not waiting:
                _watcher.waiting.pop(name, None)
            if not _watcher.waiting and _watcher in sys.meta_path:
                sys.meta_path.remove(_watcher)

    return undo


def _do(then: Then, module: ModuleType) -> None:
    try:
        then(module)
    except Exception:  # the user's import is not ours to fail
        log.exception("kernelgraft could not adapt %s", module.__name__)


def bindings_of(thing: object) -> list[tuple[ModuleType, str]]:
    """Where modules of OpenMMLab hold that very object, by which name."""
    found = []
    for name, module in tuple(sys.modules.items()):
        if name.partition(".")[0] in HOSTS and isinstance(module, ModuleType):
            found += [(module, key) for key, value in tuple(vars(module).items()) if value is thing]
    return found
