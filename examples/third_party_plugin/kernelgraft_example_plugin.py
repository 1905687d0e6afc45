"""A kernelgraft plugin in one module: its own CPU kernel for the 4-bit linear layer, wherever that op is called.

The "kernel" here logs the shape and calls the reference, to show the way in rather than to be fast.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelgraft.hookspecs import Check, Kernel, PluginInfo, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


@hookimpl
def kernelgraft_info() -> PluginInfo:
    return PluginInfo(name="example", summary="a W4A16 kernel that tells when it runs")


@hookimpl
def kernelgraft_register_kernels() -> Iterator[Kernel]:
    # Imported here and not above: plugins are imported to be listed, and that must not start torch.
    from kernelgraft_core.runtime.op import Implementation

    yield Kernel(
        op="w4a16_linear",
        module="kernelgraft_core.quant.w4a16.ops",
        implementation=Implementation("example", linear, ("cpu",), priority=99, supports=supports),
    )


@hookimpl
def kernelgraft_doctor() -> Iterator[Check]:
    import torch

    from kernelgraft_core.quant.w4a16.examples import example_args

    args = example_args("cpu")["w4a16_linear"]
    out, rows = linear(*args), args[1].shape[0]
    yield Check("linear", out.shape[-1] == rows and bool(torch.isfinite(out).all()), f"{rows} finite output features")


def supports(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> str | None:
    """Why this kernel cannot run a call, or None; the router then asks the next backend."""
    return None if x.is_floating_point() else f"x is {x.dtype}, not floating point"


def linear(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    from kernelgraft_core.quant.w4a16 import reference

    log.info("x %s, weight %d x %d", tuple(x.shape), qweight.shape[0], qweight.shape[1] * 8)
    return reference.w4a16_linear(x, qweight, scales, zeros, bias)
