"""The kernels of the 4-bit cache for four architectures: what decides their speed is there, without a GPU.

Rows of a cache are ``D + 8`` bytes, so that every other one begins between multiples of sixteen: eight bytes are the
widest load of them.
"""

import functools

import pytest
import torch

from kernelgraft_core.quant.kv4 import triton, triton_kernels
from kernelgraft_core.runtime.aot import AotReport, report

ARCHS = pytest.mark.parametrize("arch", [80, 89, 90, 100], ids="sm{}".format)
PHASES = pytest.mark.parametrize("is_decode", [True, False], ids=["decode", "prefill"])
POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}
KV_HEADS = 8


def query_arguments(group: int, head_size: int, dtype: torch.dtype) -> dict:
    heads = KV_HEADS * group
    return {
        "query": POINTER[dtype], "query_start": "*i32", "sums": "*fp32", "state": "*fp32", "tokens": 256, "batch": 256,
        "heads": heads, "query_token": heads * head_size, "query_head": head_size, "factor": "fp32", "cap": "fp32",
        "window": 1024,
    }  # fmt: skip


@functools.cache
def cached(
    arch, head_size=128, group=4, is_decode=True, block_size=16, dtype=torch.float16, has_own=True, causal=True,
    window=None, softcap=None,
) -> AotReport:  # fmt: skip
    row = (head_size + 8) // 8
    arguments = query_arguments(group, head_size, dtype) | {
        "cache": "*i64", "tables": "*i32", "context_lens": "*i32", "table_width": 256, "row_stride": row,
        "head_stride": block_size * row, "block_stride": KV_HEADS * block_size * row,
    }  # fmt: skip
    tile = triton.choose_cached_tile(group, head_size, is_decode)
    constants = triton.constants(group, head_size, tile, causal, window, softcap)
    constants |= {"BLOCK_SIZE": block_size, "SPLITS": 4, "HAS_OWN": has_own}
    return compiled(triton_kernels.cached_kernel, arguments, constants, arch, tile)


@functools.cache
def own(arch, head_size=128, group=4, is_decode=True, dtype=torch.float16, window=None, softcap=None) -> AotReport:
    arguments = query_arguments(group, head_size, dtype) | {
        "key": POINTER[dtype], "value": POINTER[dtype], "slot": 4, "key_head": head_size, "value_head": head_size,
        "key_token": KV_HEADS * head_size, "value_token": KV_HEADS * head_size,
    }  # fmt: skip
    tile = triton.choose_own_tile(group, head_size, is_decode)
    constants = triton.constants(group, head_size, tile, True, window, softcap) | {"INTERPRETED": False}
    return compiled(triton_kernels.own_kernel, arguments, constants, arch, tile)


def compiled(kernel, arguments, constants, arch, tile) -> AotReport:
    limits = {"warps": tile.warps, "stages": tile.stages, "registers": tile.registers or None}
    return report(kernel, arguments, constants, arch, **limits)


def check_sound(found: AotReport) -> None:
    assert (found.stack, found.local) == (0, 0), "registers spill"
    assert found.launchable, f"{found.shared} bytes of shared memory do not fit"
    assert found.matrix, "no tensor cores"


@ARCHS
@PHASES
@pytest.mark.parametrize("head_size", [64, 128])
def test_the_cache_is_prefetched_eight_bytes_at_a_time(arch, head_size, is_decode):
    found = cached(arch, head_size, is_decode=is_decode)
    check_sound(found)
    assert min(found.buffers) >= 2, "one tile in flight"
    assert found.waits, "the loop waits for the copies it has just started"
    assert any(name.startswith("LDGSTS.E.64") for name in found.loop), found.loop
    # What is narrower are entries of the block table, one for each token.
    assert found.count("LDG") == 0, "a load of the loop is not prefetched"


@ARCHS
def test_decoding_leaves_time_to_load(arch):
    found = cached(arch)
    assert found.resident >= 3
    nibbles = 2 * 128 * 64  # of a tile of 64 tokens
    # One shift and one mask for two nibbles in a thread of 32 lanes, and as much again for everything else.
    arithmetic = found.count("LOP3", "SHF", "PRMT") * found.warps * 32
    assert arithmetic <= 2 * nibbles


@ARCHS
@PHASES
@pytest.mark.parametrize("head_size", [64, 128])
def test_own_keys_are_loaded_sixteen_bytes_at_a_time(arch, head_size, is_decode):
    found = own(arch, head_size, is_decode=is_decode)
    check_sound(found)
    assert any(name.startswith("LDGSTS") and ".128" in name for name in found.loop), found.loop


@pytest.mark.slow
@ARCHS
@PHASES
@pytest.mark.parametrize("group", [1, 32])
@pytest.mark.parametrize("head_size", [32, 80, 128, 256])
def test_no_head_size_or_group_spills(arch, is_decode, group, head_size):
    check_sound(cached(arch, head_size, group, is_decode))
    check_sound(own(arch, head_size, group, is_decode))


@pytest.mark.slow
@ARCHS
@PHASES
@pytest.mark.parametrize("options", [{"window": 64}, {"window": 64, "softcap": 30.0}], ids=str)
def test_neither_do_windows_and_soft_caps(arch, is_decode, options):
    dtype = torch.bfloat16
    check_sound(cached(arch, is_decode=is_decode, dtype=dtype, **options))
    check_sound(cached(arch, is_decode=is_decode, dtype=dtype, has_own=False, **options))
    check_sound(own(arch, is_decode=is_decode, dtype=dtype, **options))


@ARCHS
def test_storing_and_merging_do_not_spill(arch):
    arguments = {"sums": "*fp32", "state": "*fp32", "query_start": "*i32", "out": "*fp16", "tokens": 8, "batch": 8}
    constants = {"D": 128, "BD": 128, "SLOTS": 9}
    merge = report(triton_kernels.merge_kernel, arguments | {"heads": 32}, constants, arch, warps=1, stages=3)
    assert (merge.stack, merge.local) == (0, 0)
    assert merge.loop["LDG.E.128"] >= 9  # all parts are asked for before the first is used
    arguments = {
        "key": "*bf16", "value": "*bf16", "cache": "*i32", "slots": "*i64", "slot_count": 4096, "key_token": 1024,
        "key_head": 128, "value_token": 1024, "value_head": 128, "block_stride": 4352, "head_stride": 544,
        "row_stride": 34, "block_size": 16,
    }  # fmt: skip
    append = report(triton_kernels.append_kernel, arguments, {"D": 128, "BD": 128}, arch, warps=1, stages=3)
    assert (append.stack, append.local) == (0, 0)
    assert append.resident >= 16
