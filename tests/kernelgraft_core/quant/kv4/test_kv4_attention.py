"""Attention over a 4-bit cache: every backend against float64 on the values that the bytes stand for."""

import math

import pytest
import torch
from torch.library import opcheck

from kernelgraft_core.quant.kv4 import kv4_append, kv4_attention
from kernelgraft_core.runtime.testing import assert_close

from .kv4_cases import decoded, expected, make_batch, poisoned_cache

RATIO = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [pytest.param(t, id=str(t).removeprefix("torch.")) for t in RATIO])


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def check(batch, ratio=1e-4, **options):
    out = batch.run(**options)
    assert (out.dtype, out.shape) == (batch.query.dtype, batch.query.shape)
    assert out.is_contiguous()
    assert_close(f"{options}", expected(batch, **options), out, ratio)


@DTYPES
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "cached"])
def test_one_query_for_each_sequence(backend, dtype, group, chunk, monkeypatch):
    if dtype == torch.float64:
        monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    contexts = [1, 17, 64, 130] if not chunk else [0, 1, 33, 129]
    check(make_batch(contexts, [1] * 4, group=group, dtype=dtype, chunk=chunk), RATIO[dtype])


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_every_head_and_block_size(backend, head_size, block_size):
    check(make_batch([70, 3, 0], [1, 1, 1], head_size=head_size, block_size=block_size, group=2))
    check(make_batch([70, 5], [3, 2], head_size=head_size, block_size=block_size, group=2))


@DTYPES
@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "cached"])
def test_chunks_of_prompts_beside_single_queries(backend, dtype, chunk, monkeypatch):
    if dtype == torch.float64:
        monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    queries = [1, 40, 2, 0, 7]
    contexts = [20, 33, 0, 0, 150] if chunk else [20, 70, 2, 0, 150]
    check(make_batch(contexts, queries, dtype=dtype, chunk=chunk), RATIO[dtype])


@pytest.mark.parametrize("options", [
    {"window": 1}, {"window": 9}, {"window": 64}, {"window": 1000}, {"softcap": 2.0}, {"softcap": 50.0, "window": 20},
    {"causal": False}, {"causal": False, "window": 12},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "cached"])
def test_windows_soft_caps_and_bidirectional_chunks(backend, options, chunk):
    check(make_batch([60, 45, 80, 200], [1, 25, 3, 1], chunk=chunk), **options)


@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "cached"])
def test_slices_of_a_joint_projection_and_a_cache_between_others(backend, chunk):
    check(make_batch([40, 7, 90], [1, 5, 30], padding=3, chunk=chunk))
    check(make_batch([40, 7, 90], [1, 5, 30], padding=3, chunk=chunk, dtype=torch.bfloat16), 1e-2)


def test_a_long_context_on_any_number_of_threads_is_the_same(backend):
    batch = make_batch([3000], [1], kv_heads=1, group=4, head_size=32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        check(batch, 5e-4)  # 3,000 values that almost cancel
        results.append(batch.run())
    assert_close("threads", results[0].double(), results[1], 5e-4)
    assert torch.equal(results[1], batch.run())


def test_no_sequence_and_no_query(backend):
    assert make_batch([], []).run().shape == (0, 6, 64)
    assert make_batch([5, 9], [0, 0]).run().shape == (0, 6, 64)


def test_queries_behind_the_last_sequence_give_zeros(backend):
    batch = make_batch([5, 9], [1, 3])
    batch.query = torch.cat((batch.query, torch.full((2, 6, 64), torch.nan)))
    batch.key, batch.value = (torch.cat((x, torch.full((2, 2, 64), torch.nan))) for x in (batch.key, batch.value))
    out = batch.run()
    assert torch.equal(out[4:], torch.zeros(2, 6, 64))
    batch.query, batch.key, batch.value = batch.query[:4], batch.key[:4], batch.value[:4]
    assert torch.equal(out[:4], batch.run())


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_those_who_see_it_alone(backend, queries, part, bad):
    batch = make_batch([50, 20], [queries, 1])
    spoilt = [torch.randn(1, 2, 64), torch.randn(1, 2, 64)]
    spoilt[part][0, 1, 7] = bad  # head 1 of 2
    kv4_append(*spoilt, batch.cache, torch.tensor([batch.history[0][11]]))
    out = batch.run()
    assert out[:queries, :3].isfinite().all()
    assert out[:queries, 3:].isnan().all()
    assert out[queries:].isfinite().all()
    windowed = batch.run(window=30)
    assert windowed[0].isfinite().sum() == (3 if 50 - 11 < 30 else 0) * 64 + (0 if 50 - 11 < 30 else 6 * 64)


@pytest.mark.parametrize("queries", [1, 40])
def test_a_query_that_is_not_finite_spoils_its_head_alone(backend, queries):
    batch = make_batch([50], [queries])
    batch.query[0, 4, 3] = torch.nan
    out = batch.run()
    assert out[0, 4].isnan().all()
    assert out.isnan().sum() == 64


@pytest.mark.parametrize("queries", [1, 2, 40])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 3e4])
def test_sizes_of_every_order(backend, queries, scale):
    batch = make_batch([70], [queries])
    slots = torch.tensor(batch.history[0])
    kv4_append(torch.randn(70, 2, 64), torch.randn(70, 2, 64) * scale, batch.cache, slots)
    batch.value = batch.value * scale
    check(batch)
    batch.query = batch.query * min(scale, 100.0)  # one key takes it all
    check(batch, 2e-3)


def test_a_softmax_that_rests_on_one_far_token(backend):
    batch = make_batch([1500], [1], head_size=32)
    key, _ = decoded(batch.cache, batch.history[0], 2, 32)
    batch.query = (key[3].repeat_interleave(3, 0) * 40).float().unsqueeze(0)
    check(batch)


def test_rows_of_equal_values_come_back_exactly(backend):
    batch = make_batch([9], [1])
    value = torch.full((9, 2, 64), 1.25)
    kv4_append(torch.randn(9, 2, 64), value, batch.cache, torch.tensor(batch.history[0]))
    batch.value = torch.full_like(batch.value, 1.25)
    assert_close("constant", torch.full((1, 6, 64), 1.25).double(), batch.run(), 1e-6)


def test_blocks_may_be_shared_and_tables_of_64_bits(backend):
    batch = make_batch([40, 40], [1, 1])
    batch.block_tables[1] = batch.block_tables[0]
    batch.history[1] = batch.history[0]
    check(batch)
    out = batch.run()
    batch.block_tables, batch.context_lens, batch.query_start = (
        x.long() for x in (batch.block_tables, batch.context_lens, batch.query_start)
    )
    assert torch.equal(batch.run(), out)


def test_there_is_no_gradient(backend):
    batch = make_batch([4], [2])
    batch.query.requires_grad_()
    with pytest.raises(NotImplementedError, match="kv4_attention"):
        batch.run().sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 5, 64)}, r"query is \(2, 5, 64\), expected \(T, a multiple of 2, 64\)"),
        ({"query": torch.zeros(2, 6, 32)}, r"query is torch.float32 \(2, 6, 32\), expected torch.float32 \(2, 6, 64\)"),
        ({"query": torch.zeros(2, 6, 64, dtype=torch.int32)}, "query is torch.int32"),
        ({"key": None}, r"key is None and value \(2, 2, 64\), expected both or neither"),
        ({"key": torch.zeros(2, 2, 64).half()}, r"key is torch.float16 \(2, 2, 64\), expected torch.float32"),
        ({"value": torch.zeros(3, 2, 64)}, r"value is torch.float32 \(3, 2, 64\), expected .* \(2, 2, 64\)"),
        ({"cache": torch.zeros(4, 2, 16, 72)}, r"cache is torch.float32 \(4, 2, 16, 72\)"),
        ({"cache": torch.zeros(4, 2, 16, 8, dtype=torch.uint8)}, r"cache is \(4, 2, 16, 8\), expected .* even D"),
        ({"cache": torch.zeros(4, 2, 72, 16, dtype=torch.uint8).mT}, r"strides .*expected rows to be contiguous"),
        ({"block_tables": torch.zeros(1, 3)}, r"block_tables is torch.float32 \(1, 3\)"),
        ({"block_tables": torch.zeros(3, dtype=torch.int32)}, r"block_tables is \(3,\), expected \(B, blocks\)"),
        ({"context_lens": torch.zeros(2, dtype=torch.int32)}, r"context_lens is torch.int32 \(2,\), expected .*\(1,\)"),
        ({"query_start": torch.zeros(1, dtype=torch.int32)}, r"query_start is torch.int32 \(1,\), expected .*\(2,\)"),
        ({"softmax_scale": math.nan}, "softmax_scale is nan"),
        ({"window": 0}, "window is 0, expected at least 1 or None"),
        ({"softcap": -1.0}, "softcap is -1.0, expected a positive number or None"),
        ({"context_lens": torch.tensor([-1])}, r"context_lens\[0\] is -1, expected 0 to 48"),
        ({"context_lens": torch.tensor([49])}, r"context_lens\[0\] is 49, expected 0 to 48"),
        ({"query_start": torch.tensor([0, 3])}, r"query_start is \[0, 3\], expected to ascend from 0 to at most 2"),
        ({"query_start": torch.tensor([1, 2])}, r"query_start is \[1, 2\]"),
        ({"block_tables": torch.tensor([[0, 4, 1]])}, r"block_tables\[0, 1\] is 4, the cache has blocks 0 to 3"),
        ({"block_tables": torch.tensor([[0, -1, 1]])}, r"block_tables\[0, 1\] is -1"),
        ({"key": None, "value": None, "context_lens": torch.tensor([1])}, r"context_lens\[0\] is 1, expected 2 to 48"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(backend, change, message):
    arguments = {
        "query": torch.zeros(2, 6, 64), "key": torch.zeros(2, 2, 64), "value": torch.zeros(2, 2, 64),
        "cache": torch.zeros(4, 2, 16, 72, dtype=torch.uint8), "block_tables": torch.tensor([[0, 2, 9999]]).int(),
        "context_lens": torch.tensor([20]).int(), "query_start": torch.tensor([0, 2]).int(), "softmax_scale": 1.0,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        kv4_attention(**arguments)


@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "cached"])
def test_passes_torchs_own_checks_and_compiles_whole(backend, chunk):
    batch = make_batch([20, 30], [1, 3], chunk=chunk, dtype=torch.bfloat16, padding=3)
    opcheck(torch.ops.kernelgraft.kv4_attention.default, (*batch.tensors, True, 8, 30.0))

    def step(query):
        return kv4_attention(query * 2, *batch.tensors[1:]) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(batch.query), step(batch.query))


def test_appending_and_attending_compile_as_one(backend):
    def step(query, key, value, cache, slots, tables, lengths, starts):
        kv4_append(key, value, cache, slots)
        return kv4_attention(query, None, None, cache, tables, lengths, starts, 0.125)

    def arguments():
        generator = torch.Generator().manual_seed(1)
        query, key, value = (torch.randn(3, heads, 64, generator=generator) for heads in (4, 2, 2))
        tables, lengths, starts = torch.tensor([[1, 0]]), torch.tensor([3]), torch.tensor([0, 3])
        return query, key, value, poisoned_cache(2, 2, 16, 64), torch.tensor([16, 17, 18]), tables, lengths, starts

    eager, compiled = arguments(), arguments()
    wanted = step(*eager)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(found, wanted)
    assert torch.equal(compiled[3], eager[3])
