"""Replace a function wherever OpenMMLab's modules have bound it by name."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from kernelgraft_core.runtime.patching import Patches
from kernelgraft_openmmlab.imports import bindings_of


def replace_everywhere(
    patches: Patches, module: ModuleType, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """``module.name`` becomes ``make(module.name)``, also where it was imported by name before.

    Raises:
        AttributeError: the module has no such function.
    """
    before = getattr(module, name)
    after = make(before)

    def restore() -> None:
        for holder, key in bindings_of(after):
            setattr(holder, key, before)

    # Recorded first, so undone last: what modules that were imported in between have bound.
    patches.on_undo(f"later bindings of {module.__name__}.{name}", restore)
    for holder, key in bindings_of(before) or [(module, name)]:
        patches.attr(holder, key, after)
