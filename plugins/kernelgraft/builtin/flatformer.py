"""FlatFormer: attention in equal groups of sorted points (Liu et al., arXiv 2301.08739), also in mmdet3d."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kernelgraft.hookspecs import Check, HostRequirement, PluginInfo, hookimpl
from kernelgraft.patches import PatchSet


@hookimpl
def kernelgraft_info() -> PluginInfo:
    return PluginInfo(
        name="flatformer",
        summary="attention in equal groups of sorted pillars, in plain PyTorch and as a middle encoder of mmdet3d",
        paper="arXiv 2301.08739",
        hosts=(HostRequirement("mmdet3d", ("mmdet3d",), ">=1.4,<1.5", optional=True),),
    )


@hookimpl
def kernelgraft_apply(patches: PatchSet, options: Mapping[str, Any]) -> object:
    """The handle offers what :mod:`kernelgraft_core.point_attention` has.

    Configs of mmdet3d find ``type="kernelgraft.FlatFormer"`` without this plugin being loaded. With ``host="mmdet3d"``
    they find it as ``"FlatFormer"``, too, which the configs of the original have.
    """
    unknown = sorted(options.keys() - {"host"})
    if unknown:
        raise ValueError(f"plugin 'flatformer' has no option {', '.join(map(repr, unknown))}; it takes host")
    from kernelgraft_core import point_attention

    if options.get("host") == "mmdet3d":
        from mmengine.registry import MODELS

        from kernelgraft.registry import MODELS as OURS

        patches.item(MODELS._module_dict, "FlatFormer", OURS.get("FlatFormer"))
    return point_attention


@hookimpl
def kernelgraft_doctor() -> Iterator[Check]:
    from kernelgraft.families import FAMILIES, compare_with_reference

    for family in FAMILIES:
        if ".point_attention." in family:
            yield from compare_with_reference(family)
