"""mmcv's compiled ops without a compiler, and OpenMMLab on current libraries."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from kernelgraft.builtin import close_door
from kernelgraft.hookspecs import Check, HostRequirement, PluginInfo, hookimpl
from kernelgraft.hosts import inspect_host
from kernelgraft.patches import PatchSet

log = logging.getLogger("kernelgraft")
MMCV = HostRequirement("mmcv", ("mmcv", "mmcv-lite"), ">=2.0,<2.2")
ON_TOP = (
    HostRequirement("mmengine", ("mmengine",), ">=0.10,<0.11"),
    HostRequirement("mmdet", ("mmdet",), ">=3.3,<3.4"),
    HostRequirement("mmdet3d", ("mmdet3d",), ">=1.4,<1.5"),
    HostRequirement("mmseg", ("mmsegmentation",), ">=1.2,<1.3"),
)
"""What runs on mmcv, in the versions that the repairs were made for."""


@hookimpl
def kernelgraft_info() -> PluginInfo:
    return PluginInfo(
        name="mmcv",
        summary="mmcv's compiled ops in Python and Triton: mmdet, mmdet3d and mmseg on any torch, also without a GPU",
        hosts=(MMCV,),
    )


@hookimpl
def kernelgraft_apply(patches: PatchSet, options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - {"host"})
    if unknown:
        raise ValueError(f"plugin 'mmcv' has no option {', '.join(map(repr, unknown))}; it takes host")
    for host in ON_TOP:
        found = inspect_host(host)
        if found.version is not None and not found.ok:
            log.warning(
                "%s %s is %s, %s: repairs that do not fit it are left out, with an error in the log",
                found.distribution, found.version, found.problem, found.specifier,
            )  # fmt: skip
    from kernelgraft_openmmlab import provide_mmcv_ops

    provide_mmcv_ops(patches)
    # The next import of the door is to open it again.
    patches.on_undo("door kernelgraft.mmcv", close_door("kernelgraft.mmcv"))


@hookimpl
def kernelgraft_doctor() -> Iterator[Check]:
    from kernelgraft.families import FAMILIES, compare_with_reference
    from kernelgraft_openmmlab.beside import status
    from kernelgraft_openmmlab.ext import NAMES, provided

    for family in FAMILIES:
        if any(part in family for part in (".boxes.", ".points.", ".vision.")):
            yield from compare_with_reference(family)

    yield Check("names of mmcv._ext", True, f"{len(provided())} of {len(NAMES)} provided, the others raise by name")
    try:
        now = status()
    except FileNotFoundError:
        return
    found = f", {now.found}" if now.found else ""
    yield Check("mmcv._ext beside mmcv", now.state != "foreign", f"{now.state}{found}")
