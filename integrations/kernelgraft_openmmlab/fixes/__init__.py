"""What of mmengine, mmcv and mmdet3d fails or crawls on current libraries or without a GPU, repaired on import.

Each repair is a change recorded in the patch set, and taken back with it. A module that is never imported is never
looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from kernelgraft_core.runtime.patching import Patches
from kernelgraft_openmmlab.imports import when_imported

from . import attention, checkpoints, devices, packages, sparse_tensors, voxels


def repair_hosts(patches: Patches) -> None:
    """Repair what is imported from now on, and what has been imported."""
    for family in (packages, checkpoints, devices, sparse_tensors, voxels, attention):
        for name, repair in family.REPAIRS.items():
            _watch(patches, name, repair)


def _watch(patches: Patches, name: str, repair: Callable[[Patches, ModuleType], None]) -> None:
    undo = when_imported(name, lambda module: repair(patches, module))
    patches.on_undo(f"wait for {name}", undo)
