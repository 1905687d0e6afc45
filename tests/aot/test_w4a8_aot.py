"""The kernels of W4A8 and W8A8 for four architectures: what decides their speed is there, without a GPU."""

import functools

import pytest

from kernelgraft_core.quant.w4a8 import triton, triton_kernels, triton_tiles
from kernelgraft_core.runtime.aot import AotReport, report

ARCHS = pytest.mark.parametrize("arch", [80, 89, 90, 100], ids="sm{}".format)
FORMS = {"groups": (0, 128), "groups of 32": (0, 32), "exact": (1, 128), "channel": (2, 4096), "bytes": (3, 4096)}
# Matrix products per clock and multiprocessor, int8.
MACS = {80: 2048, 89: 1024, 90: 4096, 100: 8192}


@functools.cache
def product(arch, tokens, form="groups", split=False) -> AotReport:
    number, group = FORMS[form]
    tile = triton_tiles.choose_tile(tokens, 4096, 90 if arch == 90 else 80)
    arguments = {
        "x": "*i8", "weight": "*i8" if form == "bytes" else "*i32", "group_scale": "*u8", "group_zero": "*u8",
        "scale": "*fp16", "zero": "*u8", "x_scale": "*fp32", "x_sums": "*i32", "bias": "*fp16",
        "out": "*i32" if split else "*fp16", "tokens": tokens, "rows": 4096, "k_size": 4096, "group_stride": 4096,
        "k_split": 4096,
    }  # fmt: skip
    constants = triton.constants(tile, number, group, split, True)
    return report(triton_kernels.product_kernel, arguments, constants, arch, warps=tile.warps, stages=tile.stages)


def work(found: AotReport, arch: int, tokens: int) -> tuple[float, float]:
    """Arithmetic for unpacking, and all instructions, as shares of the time that matrix products take."""
    tile = triton_tiles.choose_tile(tokens, 4096, 90 if arch == 90 else 80)
    clocks = tile.rows * tile.tokens * tile.columns / MACS[arch]
    arithmetic = found.count("LOP3", "SHF", "PRMT", "IADD3", "VIADD") * tile.warps / 2
    return arithmetic / clocks, sum(found.loop.values()) * tile.warps / 4 / clocks


def check_sound(found: AotReport) -> None:
    assert (found.stack, found.local) == (0, 0), "registers spill"
    assert found.launchable, f"{found.shared} bytes of shared memory do not fit"
    assert any("s8" in name or "i8" in name for name in found.matrix), found.matrix


@ARCHS
@pytest.mark.parametrize("tokens", [1, 128], ids=["M1", "M128"])
def test_weights_are_prefetched_and_expanded_beside_the_products(arch, tokens):
    found = product(arch, tokens)
    check_sound(found)
    assert min(found.buffers) >= 3, "too few tiles in flight"
    assert found.waits, "the loop waits for the copies it has just started"
    if arch < 100:  # whose loop is not told from the rest of the kernel
        assert found.count("LDG") == 0, "a load of the loop is not prefetched"
    if arch == 90:
        assert found.register_operand, "weights go through shared memory"
        assert any("wgmma" in name and "s32.s8.s8" in name for name in found.matrix)
        assert found.count("STS") == 0
    if arch < 90:
        assert all("mma.sync" in name for name in found.matrix)
        assert found.count("PRMT") == 0, "bytes are taken apart and put together"


# Shares of the matrix products' time; half of it for arithmetic is what one would like. On sm_100 Triton 3.9 writes
# expanded weights to shared memory and waits for every product: the issue rate limits it, and W4A16 or FP8 are better
# there.
LIMITS = {80: (0.8, 0.9), 89: (0.4, 0.5), 90: (0.55, 0.7)}


@pytest.mark.parametrize("arch", LIMITS, ids="sm{}".format)
def test_large_tiles_leave_the_tensor_cores_the_limit(arch):
    arithmetic, issued = work(product(arch, 128), arch, 128)
    most_arithmetic, most_issued = LIMITS[arch]
    assert arithmetic <= most_arithmetic
    assert issued <= most_issued


@ARCHS
def test_few_tokens_leave_room_for_many_programs(arch):
    assert product(arch, 1).resident >= 4


@pytest.mark.slow
@ARCHS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
def test_nothing_spills(arch, form, tokens):
    check_sound(product(arch, tokens, form))
    if tokens == 16:
        check_sound(product(arch, tokens, form, split=True))


@ARCHS
def test_quantizing_and_summing_do_not_spill(arch):
    arguments = {"x": "*bf16", "weight": "*bf16", "q": "*i8", "scales": "*fp32", "sums": "*i32", "k_size": 4096}
    arguments |= {"x_stride": 4096, "eps": "fp32"}
    for kind in range(3):
        constants = {"KIND": kind, "BLOCK": 2048}
        found = report(triton_kernels.quantize_kernel, arguments, constants, arch, warps=4, stages=3)
        assert (found.stack, found.local) == (0, 0)
    arguments = {
        "parts": "*i32", "scale": "*fp16", "zero": "*u8", "x_scale": "*fp32", "x_sums": "*i32", "bias": "*fp16",
        "out": "*fp16", "tokens": 8, "rows": 4096,
    }  # fmt: skip
    constants = {"SPLITS": 8, "BLOCK": 512, "HAS_ZERO": True, "HAS_BIAS": True}
    found = report(triton_kernels.sum_splits_kernel, arguments, constants, arch, warps=4, stages=3)
    assert (found.stack, found.local) == (0, 0)
