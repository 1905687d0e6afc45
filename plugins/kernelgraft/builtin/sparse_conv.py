"""Sparse convolution, also under the names of other libraries (TorchSparse++, arXiv 2311.12862)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from kernelgraft.builtin import close_door
from kernelgraft.hookspecs import Check, HostRequirement, PluginInfo, hookimpl
from kernelgraft.patches import PatchSet


@hookimpl
def kernelgraft_info() -> PluginInfo:
    return PluginInfo(
        name="sparse-conv",
        summary="sparse convolution on CPU and GPU, also under the names of spconv and torchsparse",
        paper="arXiv 2311.12862",
        hosts=(HostRequirement("mmcv", ("mmcv", "mmcv-lite"), ">=2.0,<2.2", optional=True),),
    )


@hookimpl
def kernelgraft_apply(patches: PatchSet, options: Mapping[str, Any]) -> object:
    """The handle offers what :mod:`kernelgraft_core.sparse` has.

    With ``host="mmcv"`` the layers ``SubMConv3d``, ``SparseConv3d`` and their kin in mmengine's registry are ours.
    """
    unknown = sorted(options.keys() - {"facade", "host"})
    if unknown:
        raise ValueError(
            f"plugin 'sparse-conv' has no option {', '.join(map(repr, unknown))}; it takes facade and host"
        )
    from kernelgraft_core import sparse

    if options.get("host") == "mmcv":
        from kernelgraft_openmmlab.sparse_layers import override_sparse_layers

        override_sparse_layers(patches)
        # The next config that imports the door is to open it again.
        patches.on_undo("door kernelgraft.openmmlab", close_door("kernelgraft.openmmlab"))
    if (facade := options.get("facade")) is not None:
        from kernelgraft_core.sparse.compat.modules import facade_modules

        modules = facade_modules(facade)
        if taken := [name for name in modules if name in sys.modules]:
            raise ValueError(
                f"{taken[0]} is imported already, from {getattr(sys.modules[taken[0]], '__file__', None)}: load the "
                "facade before anything imports it"
            )
        for name, module in modules.items():
            patches.item(sys.modules, name, module)
    return sparse


@hookimpl
def kernelgraft_doctor() -> Iterator[Check]:
    from kernelgraft.families import FAMILIES, compare_with_reference

    for family in FAMILIES:
        if ".sparse." in family:
            yield from compare_with_reference(family)
