"""QoQ checkpoints on our W4A8 kernels, in Transformers (Lin et al., arXiv 2405.04532)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kernelgraft.hookspecs import Check, HostRequirement, PluginInfo, hookimpl
from kernelgraft.patches import PatchSet


@hookimpl
def kernelgraft_info() -> PluginInfo:
    return PluginInfo(
        name="qoq",
        summary="QoQ checkpoints (W4A8) on kernelgraft's kernels",
        paper="arXiv 2405.04532",
        hosts=(HostRequirement("transformers", ("transformers",), ">=5.17,<5.24"),),
    )


@hookimpl
def kernelgraft_apply(patches: PatchSet, options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - {"host", "cpu_weight"})
    if unknown:
        raise ValueError(f"plugin 'qoq' has no option {', '.join(map(repr, unknown))}; it takes host and cpu_weight")
    from kernelgraft_transformers.qoq import graft

    graft(patches, options.get("cpu_weight", "int4"))


@hookimpl
def kernelgraft_doctor() -> Iterator[Check]:
    from kernelgraft.families import compare_with_reference

    yield from compare_with_reference("kernelgraft_core.quant.w4a8")
