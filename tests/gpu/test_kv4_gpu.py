"""The 4-bit cache on a GPU: the kernels against the reference in float64, and what serving needs of them."""

import pytest
import torch

from kernelgraft_core.quant.kv4 import kv4_append, kv4_attention, new_cache, reference
from kernelgraft_core.runtime.testing import assert_close

RATIO = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "triton")


def make_call(contexts, queries, device, dtype, *, group=4, head_size=128, block_size=16, chunk=True):
    """Positional arguments of ``kv4_attention`` over sequences of ``contexts`` cached tokens, drawn on the CPU."""
    kv_heads, tokens = 2, sum(queries)
    needed = [-(-context // block_size) for context in contexts]
    cache = new_cache(sum(needed) + 1, kv_heads, block_size, head_size, device).fill_(255)
    order = torch.randperm(sum(needed) + 1).tolist()
    tables = torch.zeros(len(contexts), max([*needed, 1]), dtype=torch.int32)
    for row, (context, count) in enumerate(zip(contexts, needed, strict=True)):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        slots = [int(tables[row, t // block_size]) * block_size + t % block_size for t in range(context)]
        key, value = (torch.randn(context, kv_heads, head_size).to(device, dtype) for _ in range(2))
        kv4_append(key + 1, value, cache, torch.tensor(slots, dtype=torch.int64, device=device))
    query, key, value = (
        torch.randn(tokens, heads, head_size).to(device, dtype) for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    lengths = torch.tensor(contexts).int()
    own = (key, value) if chunk else (None, None)
    return query, *own, cache, *(x.to(device) for x in (tables, lengths, starts)), head_size**-0.5


def check(call, ratio, causal=True, window=None, softcap=None):
    out = kv4_attention(*call, causal, window, softcap)
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in call]
    assert_close("out", reference.kv4_attention(*wide, causal, window, softcap), out, ratio)
    assert torch.equal(out, kv4_attention(*call, causal, window, softcap))


@DTYPES
@pytest.mark.parametrize("head_size", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "cached"])
def test_decoding_equals_the_reference(dtype, head_size, group, chunk, device):
    contexts = [0, 1, 700, 5000] if chunk else [1, 17, 700, 5000]
    check(make_call(contexts, [1] * 4, device, dtype, group=group, head_size=head_size, chunk=chunk), 2 * RATIO[dtype])


@DTYPES
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 30.0}, {"causal": False}], ids=str)
@pytest.mark.parametrize("chunk", [True, False], ids=["chunk", "cached"])
def test_chunks_of_prompts_equal_the_reference(dtype, options, chunk, device):
    queries = [1, 300, 0, 65]
    contexts = [500, 40, 0, 1000] if chunk else [500, 340, 0, 1065]
    for block_size in (1, 16, 64):
        check(
            make_call(contexts, queries, device, dtype, block_size=block_size, chunk=chunk), 2 * RATIO[dtype], **options
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_stored_bytes_are_those_of_the_reference(dtype, head_size, device):
    key, value = (torch.randn(50, 2, head_size).to(device, dtype) for _ in range(2))
    slots = torch.randperm(64)[:50].to(device)
    slots[7] = -1
    caches = [new_cache(4, 2, 16, head_size, device) for _ in range(2)]
    kv4_append(key, value, caches[0], slots)
    reference.kv4_append(key, value, caches[1], slots)
    assert torch.equal(*caches)


def test_a_decoding_step_is_captured_as_a_graph(device):
    call = make_call([100, 900], [1, 1], device, torch.float16)
    kv4_attention(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kv4_attention(*call)
    call[5].copy_(torch.tensor([50, 800]))
    graph.replay()
    assert torch.equal(out, kv4_attention(*call))
