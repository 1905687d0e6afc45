"""The kernels of attention in groups for four architectures: nothing spills, and tensor cores do the products."""

import functools
import math

import pytest
import torch

from kernelgraft_core.point_attention.attention import triton, triton_kernels
from kernelgraft_core.point_attention.norm_ffn import triton as norm_triton
from kernelgraft_core.point_attention.norm_ffn import triton_kernels as norm_kernels
from kernelgraft_core.runtime.aot import AotReport, report

ARCHS = pytest.mark.parametrize("arch", [80, 89, 90, 100], ids="sm{}".format)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = ("attention", "query_gradient", "key_gradient")
SCALE = "fp32"


@functools.cache
def attention(kernel, arch, head_size, dtype, direct=True) -> AotReport:
    pointer, heads = f"*{dtype}", 8
    tile = triton.tile_for(1 << math.ceil(math.log2(head_size)), DTYPES[dtype].itemsize, kernel != "attention")
    made = pointer if direct or kernel != "key_gradient" else "*fp32"
    arguments = {
        "qkv": pointer, "grad": pointer, "out": pointer, "found": pointer, "keys_found": made, "values_found": made,
        "members": "*i32", "starts": "*i32", "owned": "*i32", "sums": "*fp32", "deltas": "*fp32", "scale": SCALE,
        "channels": heads * head_size, "places": 6700, "step": 3 * heads * head_size,
    }  # fmt: skip
    constants = triton.constants(head_size, tile, DTYPES[dtype])
    if kernel == "key_gradient":
        constants |= {"DIRECT": direct}
    found = getattr(triton_kernels, f"{kernel}_kernel")
    return report(found, arguments, constants, arch, warps=tile.warps, stages=tile.stages)


@functools.cache
def norm_ffn(arch, channels, hidden, dtype) -> AotReport:
    tile, names = norm_triton.tile_for(channels), [p.name for p in norm_kernels.norm_ffn_kernel.params]
    arguments = dict.fromkeys(names, f"*{dtype}") | {
        "rows": 6655, "channels": channels, "hidden": hidden, "eps": SCALE
    }  # fmt: skip
    constants = norm_triton.constants(channels, hidden, tile, DTYPES[dtype])
    return report(norm_kernels.norm_ffn_kernel, arguments, constants, arch, warps=tile.warps, stages=tile.stages)


def check(found: AotReport) -> None:
    assert (found.stack, found.local) == (0, 0), "registers spill"
    assert found.launchable, f"{found.shared} bytes of shared memory do not fit"
    assert found.matrix, "no matrix instruction"


@ARCHS
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_of_the_released_models(kernel, arch):
    found = attention(kernel, arch, 16, "fp16")
    check(found)
    assert found.resident * found.warps >= 16, f"only {found.resident} programs of {found.warps} warps"


@ARCHS
def test_norm_ffn_of_the_released_models(arch):
    found = norm_ffn(arch, 128, 256, "fp16")
    check(found)
    assert found.resident * found.warps >= 8
    assert found.waits, "the loop waits for the copies that it has just started"


@pytest.mark.slow
@ARCHS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [16, 24, 32, 64, 128])
@pytest.mark.parametrize("kernel", [*KERNELS, "key_gradient of borrowed members"])
def test_any_attention(kernel, head_size, dtype, arch):
    name, _, borrowed = kernel.partition(" ")
    check(attention(name, arch, head_size, dtype, direct=not borrowed))


@pytest.mark.slow
@ARCHS
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("channels", "hidden"), [(32, 64), (64, 128), (96, 200), (128, 256), (128, 512), (192, 384), (256, 512)]
)
def test_any_norm_ffn(channels, hidden, dtype, arch):
    check(norm_ffn(arch, channels, hidden, dtype))
