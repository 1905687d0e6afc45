"""The kernels of sparse convolution for four architectures: what decides their speed is there, without a GPU."""

import functools
import math

import pytest
import torch

from kernelgraft_core.runtime.aot import AotReport, report
from kernelgraft_core.sparse.conv import triton, triton_kernels, triton_tiles
from kernelgraft_core.sparse.maps import triton as maps_triton

ARCHS = pytest.mark.parametrize("arch", [80, 89, 90, 100], ids="sm{}".format)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CHANNELS = [16, 32, 64, 128, 256]


def tiles_of(kernel, channels, dtype):
    direction = "wgrad" if kernel == "weight_gradient" else "forward"
    size = DTYPES[dtype].itemsize
    product = triton_tiles.Product.of(direction, kernel, 100_000, channels, channels, size, "any")
    return triton_tiles.candidates(product).values()


@functools.cache
def compiled(kernel, arch, tile, channels, dtype, split=False) -> AotReport:
    c, pointer = channels, f"*{dtype}"
    out = "*fp32" if split or kernel != "implicit_gemm" else pointer
    shared = {"x": pointer, "starts": "*i32", "out": out, "in_channels": c, "out_channels": c, "x_row": c}
    weight = {"weight": pointer, "weight_tap": c * c, "weight_group": c * c, "weight_in": c, "weight_out": 1}
    pairs = {"inputs": "*i32", "outputs": "*i32"}
    made = {"implicit_gemm": triton.constants, "fetch_on_demand": triton.constants}.get(
        kernel, triton.gradient_constants
    )
    constants = made(tile, c, c, DTYPES[dtype])
    if kernel == "implicit_gemm":
        own = {"bias": pointer, "entries": "*i32", "taps": "*i32", "order": "*i32", "out_rows": 99_999, "tiles": 801}
        arguments = shared | weight | own
        constants |= {"SPLIT": split, "HAS_BIAS": not split, "RELU": not split}
    elif kernel == "fetch_on_demand":
        arguments = shared | weight | pairs | {"tap": 5, "pair_tiles": 1500}
        constants |= {"ALL": split, "ATOMIC": split}
    else:
        arguments = shared | pairs | {"grad": pointer, "groups": 1, "grad_row": c}
        constants |= {"PARTS": 32}
    found = getattr(triton_kernels, f"{kernel}_kernel")
    return report(found, arguments, constants, arch, warps=tile.warps, stages=tile.stages)


def check_sound(found: AotReport) -> None:
    assert (found.stack, found.local) == (0, 0), "registers spill"
    assert found.launchable, f"{found.shared} bytes of shared memory do not fit"
    assert found.matrix, "no matrix instruction"


def check_prefetched(found: AotReport) -> None:
    """Rows are gathered while others are multiplied: two tiles of both operands at least, and none is waited for that
    was just begun."""
    assert len(found.buffers) >= 2
    assert min(found.buffers) >= 2, f"{found.buffers} tiles in flight"
    assert found.waits, "the loop waits for the copies that it has just started"


@ARCHS
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("kernel", ["implicit_gemm", "weight_gradient"])
def test_rows_are_gathered_while_others_are_multiplied(kernel, arch, channels):
    found = compiled(kernel, arch, next(iter(tiles_of(kernel, channels, "fp16"))), channels, "fp16")
    check_sound(found)
    check_prefetched(found)
    assert found.resident >= 2
    if arch == 90:
        assert all("wgmma" in name for name in found.matrix)
    if arch == 100:
        assert all("tcgen05" in name for name in found.matrix)


@ARCHS
def test_pairs_of_one_tap_do_not_spill(arch):
    for atomic in (False, True):
        check_sound(
            compiled("fetch_on_demand", arch, next(iter(tiles_of("fetch_on_demand", 64, "fp16"))), 64, "fp16", atomic)
        )


@ARCHS
def test_maps_and_sums_do_not_spill(arch):
    arguments = dict.fromkeys(("in_keys", "in_order", "out_keys", "out_order", "lines"), "*i64")
    arguments |= {"found": "*i32", "in_rows": 99_999, "out_rows": 99_999, "apart": 1}
    constants = {
        "TAPS": 3, "ROUNDS": 17, "IN_ORDER": True, "OUT_ORDER": True, "ADJACENT": True, "BLOCK": maps_triton.BLOCK
    }  # fmt: skip
    found = report(maps_triton.neighbors_kernel, arguments, constants, arch, warps=4, stages=3)
    assert (found.stack, found.local) == (0, 0)
    arguments = {"neighbors": "*i32", "found": "*i32", "count": 99_999, "taps": 27}
    found = report(maps_triton.transpose_kernel, arguments, {"BLOCK": 4 * maps_triton.BLOCK}, arch, warps=4, stages=3)
    assert (found.stack, found.local) == (0, 0)
    arguments = {"parts": "*fp32", "bias": "*fp16", "out": "*fp16", "count": 6_400_000, "width": 64}
    constants = {"PARTS": 4, "HAS_BIAS": True, "RELU": True, "BLOCK": triton.SUM_BLOCK}
    found = report(triton_kernels.sum_parts_kernel, arguments, constants, arch, warps=4, stages=3)
    assert (found.stack, found.local) == (0, 0)


@pytest.mark.slow
@ARCHS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kernel", ["implicit_gemm", "weight_gradient", "fetch_on_demand"])
def test_every_tile_that_can_be_chosen(kernel, arch, channels, dtype):
    for tile in tiles_of(kernel, channels, dtype):
        for split in (False, True) if kernel != "weight_gradient" else (False,):
            found = compiled(kernel, arch, tile, channels, dtype, split)
            check_sound(found)
            if kernel != "fetch_on_demand":  # whose loop goes over channels alone, often once
                check_prefetched(found)
            if arch == 90 and tile.rows >= 64 and tile.warps >= 4:
                assert all("wgmma" in name for name in found.matrix)


def test_tiles_fit_what_is_multiplied():
    for channels in (1, 5, 16, 40, 100, 512):
        for tile in tiles_of("implicit_gemm", channels, "fp16"):
            assert 16 <= tile.depth <= max(16, 1 << math.ceil(math.log2(channels)))
            assert tile.columns < 2 * max(16, channels)
