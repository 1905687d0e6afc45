"""The Triton kernels of the 4-bit cache in Triton's interpreter, on CPU tensors: small shapes, every branch."""

import os

import pytest
import torch

from kernelgraft_core.quant.kv4 import new_cache, pack_rows, reference
from kernelgraft_core.runtime.testing import assert_close

from .kv4_cases import expected, make_batch, poisoned_cache

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_interpreter.py"),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernelgraft_core.quant.kv4 import triton
else:
    triton = None

RATIO = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def run(batch, causal=True, window=None, softcap=None):
    return triton.kv4_attention(*batch.tensors, causal, window, softcap)


def check(batch, ratio=2e-3, **options):
    out = run(batch, **options)
    assert (out.dtype, out.shape) == (batch.query.dtype, batch.query.shape)
    assert_close(f"{options}", expected(batch, **options), out, ratio)


@pytest.mark.parametrize("dtype", RATIO, ids=["fp16", "bf16"])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "cached"])
def test_one_query_for_each_sequence(dtype, group, chunk):
    contexts = [0, 1, 70] if chunk else [1, 17, 70]
    check(make_batch(contexts, [1, 1, 1], kv_heads=1, group=group, dtype=dtype, chunk=chunk), RATIO[dtype])


@pytest.mark.parametrize("head_size", [32, 80, 128, 256])
@pytest.mark.parametrize("block_size", [1, 16])
def test_head_and_block_sizes(head_size, block_size):
    sizes = {"kv_heads": 1, "group": 2, "head_size": head_size, "block_size": block_size, "dtype": torch.float16}
    check(make_batch([40], [1], **sizes))
    check(make_batch([40, 3], [2, 1], **sizes))


@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "cached"])
def test_chunks_of_prompts_beside_single_queries(chunk):
    queries = [1, 40, 0, 3]
    contexts = [20, 33, 0, 70] if chunk else [20, 70, 0, 70]
    check(make_batch(contexts, queries, dtype=torch.float16, chunk=chunk, padding=8))


@pytest.mark.parametrize("options", [
    {"window": 1}, {"window": 20}, {"softcap": 2.0}, {"softcap": 50.0, "window": 20}, {"causal": False},
    {"causal": False, "window": 12},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "cached"])
def test_windows_soft_caps_and_bidirectional_chunks(options, chunk):
    check(make_batch([60, 45], [1, 25], kv_heads=1, chunk=chunk, dtype=torch.float16), **options)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_any_number_of_splits_gives_the_same(splits, monkeypatch):
    monkeypatch.setattr(triton, "choose_splits", lambda *_: splits)
    check(make_batch([150, 3], [1, 2], kv_heads=1, dtype=torch.float16))
    check(make_batch([150, 3], [1, 2], kv_heads=1, dtype=torch.float16), window=70)


def test_the_number_of_splits_fills_a_gpu_and_no_more():
    assert triton.choose_splits(16384, 8, 132) == 32
    assert triton.choose_splits(16384, 8, 16) == 8
    assert triton.choose_splits(512, 8, 132) == 2
    assert triton.choose_splits(16384, 4096, 132) == 1
    assert triton.choose_splits(0, 8, 132) == 1


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_a_row_that_is_not_finite_spoils_those_who_see_it_alone(part):
    batch = make_batch([50, 20], [3, 1], dtype=torch.float16)
    spoilt = [torch.randn(1, 2, 64), torch.randn(1, 2, 64)]
    spoilt[part][0, 1, 7] = torch.nan
    reference.kv4_append(*spoilt, batch.cache, torch.tensor([batch.history[0][11]]))
    out = run(batch)
    assert out[:3, :3].isfinite().all()
    assert out[:3, 3:].isnan().all()
    assert out[3:].isfinite().all()
    windowed = run(batch, window=41)  # the first two queries see the row, the third does not
    assert windowed[:2, 3:].isnan().all()
    assert windowed[2].isfinite().all()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 3e4])
def test_sizes_of_every_order(scale):
    batch = make_batch([70], [2], dtype=torch.bfloat16)
    slots = torch.tensor(batch.history[0])
    reference.kv4_append(torch.randn(70, 2, 64), torch.randn(70, 2, 64) * scale, batch.cache, slots)
    batch.value = batch.value * scale
    check(batch, 1e-2)


def test_queries_behind_the_last_sequence_give_zeros():
    batch = make_batch([5], [2], dtype=torch.float16)
    batch.query = torch.cat((batch.query, torch.full((2, 6, 64), torch.nan).half()))
    batch.key, batch.value = (
        torch.cat((x, torch.full((2, 2, 64), torch.nan).half())) for x in (batch.key, batch.value)
    )
    assert torch.equal(run(batch)[2:], torch.zeros(2, 6, 64).half())


def test_no_sequence_and_no_query():
    assert run(make_batch([], [], dtype=torch.float16)).shape == (0, 6, 64)
    assert run(make_batch([5], [0], dtype=torch.float16)).shape == (0, 6, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_stored_rows_are_those_of_the_definition(dtype, head_size):
    key, value = torch.randn(2, 6, 2, head_size).to(dtype)
    key[2, 0] = 0.5
    cache = poisoned_cache(3, 2, 4, head_size)
    slots = torch.tensor([4, -1, 11, 0, 12, 7])  # one is skipped, one beyond the cache
    triton.kv4_append(key, value, cache, slots)
    rows = pack_rows(key, value)
    for t, slot in enumerate(slots.tolist()):
        if 0 <= slot < 12:
            assert torch.equal(cache[slot // 4, :, slot % 4], rows[t])
            cache[slot // 4, :, slot % 4] = 255
    assert (cache == 255).all()


def test_stored_rows_that_are_not_finite_are_nan():
    key, value = torch.randn(2, 2, 1, 32)
    key[0, 0, 3], value[1, 0, 0] = torch.inf, torch.nan
    cache = new_cache(1, 1, 2, 32)
    triton.kv4_append(key, value, cache, torch.tensor([0, 1]))
    from kernelgraft_core.quant.kv4 import unpack_rows

    found = unpack_rows(cache[0, 0], torch.float32)
    assert found[0][0].isnan().all()
    assert found[1][1].isnan().all()
    assert found[0][1].isfinite().all()
    assert found[1][0].isfinite().all()


def test_what_is_not_supported_is_named():
    batch = make_batch([4], [1])
    assert "torch.float32" in triton.supports_kv4_attention(*batch.tensors)
    batch = make_batch([4], [1], head_size=24, dtype=torch.float16)
    assert "head size 24" in triton.supports_kv4_attention(*batch.tensors)
    batch = make_batch([4], [1], dtype=torch.float16, padding=3)
    assert "multiples of 8 bytes" in triton.supports_kv4_attention(*batch.tensors)
    assert triton.supports_kv4_attention(*make_batch([4], [1], dtype=torch.float16).tensors) is None
