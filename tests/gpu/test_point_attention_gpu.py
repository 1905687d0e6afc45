"""Attention in groups on a GPU: against the reference, forward and gradients, in a model, and in a CUDA graph."""

import pytest
import torch

from kernelgraft_core.point_attention import TAILS, FlatFormer, WindowKey, cut, group_points, grouped_attention
from kernelgraft_core.point_attention.attention import reference
from kernelgraft_core.point_attention.attention.ops import ATTENTION, GRAD
from kernelgraft_core.point_attention.norm_ffn import reference as norm_reference
from kernelgraft_core.point_attention.norm_ffn.ops import NORM_FFN
from kernelgraft_core.runtime.testing import assert_close

RATIO = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=["fp16", "bf16", "fp32"])


def some_groups(counts, size, tail, device):
    bounds = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    return cut(torch.randperm(sum(counts)), bounds, size, tail).to(device)


def some_pillars(counts, size=468):
    cells = [torch.randperm(size * size)[:count] for count in counts]
    return torch.cat(
        [torch.stack((0 * c + b, 0 * c, c // size, c % size), 1) for b, c in enumerate(cells)]
    ).int()  # fmt: skip


@DTYPES
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("size", "channels", "heads"),
    [(69, 128, 8), (144, 128, 8), (36, 192, 8), (1024, 64, 1), (48, 30, 3), (256, 128, 1)],
    ids=str,
)  # fmt: skip
def test_attention_and_its_gradient_are_the_references(size, channels, heads, tail, dtype, device):
    groups = some_groups([3000, 5, 0, 1100], size, tail, device)
    qkv = torch.randn(groups.rows, 3 * channels, device=device).to(dtype)
    grad = torch.randn(groups.rows, channels, device=device).to(dtype)
    rest = *groups.tensors, heads, groups.size
    found, gradient = ATTENTION(qkv, *rest), GRAD(grad, qkv, *rest)
    assert_close("y", reference.grouped_attention(qkv.double(), *rest), found, RATIO[dtype])
    wanted = reference.grouped_attention_grad(grad.double(), qkv.double(), *rest)
    assert_close("qkv", wanted, gradient, 2 * RATIO[dtype])
    assert torch.equal(found, ATTENTION(qkv, *rest))
    assert torch.equal(gradient, GRAD(grad, qkv, *rest))


@DTYPES
@pytest.mark.parametrize(
    ("rows", "channels", "hidden"), [(5000, 128, 256), (1, 64, 128), (777, 192, 384), (333, 30, 70), (100, 512, 64)],
    ids=str,
)  # fmt: skip
def test_norm_ffn_is_the_reference(rows, channels, hidden, dtype, device):
    c, h = channels, hidden
    shapes = (rows, c), (rows, c), (c,), (c,), (h, c), (h,), (c, h), (c,), (c,), (c,)
    tensors = [torch.randn(s, device=device).mul(0.2 if len(s) == 2 else 1).to(dtype) for s in shapes]
    wanted = norm_reference.norm_ffn(*(each.double() for each in tensors), 1e-5)
    assert_close("y", wanted, NORM_FFN(*tensors, 1e-5), RATIO[dtype])


@pytest.mark.parametrize("tail", TAILS)
def test_groups_are_those_of_a_cpu(tail, device):
    coords = some_pillars([4000, 0, 31])
    for shifted in (False, True):
        key = WindowKey((13, 13, 1), "y", shifted)
        wanted = group_points(coords, (468, 468, 1), 3, key, 144, tail)
        found = group_points(coords.to(device), (468, 468, 1), 3, key, 144, tail)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found.tensors, wanted.tensors, strict=True))


@pytest.mark.parametrize("parity", [False, True])
@DTYPES
def test_a_model_is_that_of_a_cpu(dtype, parity, device):
    torch.manual_seed(0)
    model, coords = FlatFormer(parity=parity), some_pillars([2000, 300])
    feats = torch.randn(len(coords), 128)
    with torch.no_grad():
        wanted = model.double()(feats.double(), coords, 2)
        found = model.to(device, dtype)(feats.to(device, dtype), coords.to(device), 2)
    assert_close("y", wanted, found, {torch.float32: 1e-4}.get(dtype, 3e-2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_model_trains_under_autocast(dtype, device):
    torch.manual_seed(0)
    coords = some_pillars([1000, 200]).to(device)
    model, feats = FlatFormer(64, 4, 1).to(device), torch.randn(1200, 64, device=device)
    target, losses = torch.randn(1200, 64, device=device), []
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(10):
        with torch.autocast("cuda", dtype):
            out = model(feats, coords, 2)
        loss = (out.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_a_cuda_graph_replays_it(device):
    groups = some_groups([3000, 100], 69, "balanced", device)
    qkv = torch.randn(3100, 384, device=device, dtype=torch.float16)
    grouped_attention(qkv, groups, 8)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_attention(qkv, groups, 8)
    qkv.copy_(torch.randn_like(qkv))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, grouped_attention(qkv, groups, 8))


def test_nothing_waits_for_the_gpu(device):
    model, coords = FlatFormer(64, 4, 1).to(device).half(), some_pillars([1000, 200]).to(device)
    feats = torch.randn(1200, 64, device=device).half()
    model(feats, coords, 2)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(feats, coords, 2).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
