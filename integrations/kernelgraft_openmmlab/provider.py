"""``mmcv._ext`` without a compiler: mmcv looks for its ops in that module, and nowhere else."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from kernelgraft_core.runtime.patching import Patches

from .beside import is_ours
from .imports import bindings_of, spec_from_others

log = logging.getLogger("kernelgraft")
NAME = "mmcv._ext"
MARK = "kernelgraft_ops"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``mmcv._ext`` before others do, so that what a compiled one lacks can be filled in."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(NAME, self) if name == NAME else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return extension_of(_compiled(self))

    def exec_module(self, module: ModuleType) -> None:
        """It is complete."""


_finder: _Finder | None = None


def install() -> Callable[[], None]:
    """Answer to ``import mmcv._ext``; the returned function undoes it. Nothing happens when that is so already.

    Modules of mmcv that are imported in between keep ours until the process ends.
    """
    global _finder
    if _finder is not None:
        return lambda: None
    finder = _finder = _Finder()
    sys.meta_path.insert(0, finder)

    def undo() -> None:
        global _finder
        _finder = None
        sys.meta_path.remove(finder)
        found = sys.modules.get(NAME)
        if hasattr(found, MARK):
            del sys.modules[NAME]
            if getattr(sys.modules.get("mmcv"), "_ext", None) is found:
                del sys.modules["mmcv"]._ext

    return undo


def graft(patches: Patches) -> None:
    """:func:`install`, and where a compiled mmcv was imported before, fill in what it lacks there, too."""
    compiled = sys.modules.get(NAME)
    patches.on_undo(f"import of {NAME}", install())
    if compiled is None or hasattr(compiled, MARK) or is_ours(getattr(compiled, "__file__", None) or ""):
        return
    filled = extension_of(compiled)
    patches.item(sys.modules, NAME, filled)
    for holder, name in bindings_of(compiled):
        patches.attr(holder, name, filled)


def extension_of(compiled: ModuleType | None) -> ModuleType:
    """What answers to ``mmcv._ext``, and a line in the log that says whose ops these are."""
    from .ext import extension

    module = extension(compiled)
    if compiled is None:
        log.info("mmcv's compiled ops are kernelgraft's: %d names", len(getattr(module, MARK)))
    else:
        log.info("mmcv's ops are those of %s; kernelgraft fills in what it lacks", compiled.__file__)
    return module


def _compiled(me: _Finder) -> ModuleType | None:
    """The module that is found without us; None when there is none, or it is the file that leads to us."""
    spec = spec_from_others(me, NAME, getattr(sys.modules.get("mmcv"), "__path__", None))
    if spec is None or (spec.origin is not None and is_ours(spec.origin)):
        return None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:  # built for another torch, most of the time
        log.warning("the compiled mmcv at %s does not load (%s): all ops are kernelgraft's", spec.origin, error)
        return None
    return module
