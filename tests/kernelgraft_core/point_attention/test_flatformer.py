"""FlatFormer: the original's parameters and arithmetic, samples and rows on their own, and what training asks."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernelgraft_core.point_attention import (
    FlatFormer,
    FlatFormerLayer,
    HilbertKey,
    WindowKey,
    ZOrderKey,
    group_points,
    sine_position,
    to_bev,
)
from kernelgraft_core.runtime.testing import assert_close

from .point_clouds import random_coords

GRID = (40, 30, 1)


def small(**options):
    options = {"in_channels": 32, "num_heads": 2, "grid_shape": GRID, "group_size": 16} | options
    return FlatFormer(**options).eval()


def inputs(counts, channels=32, seed=0):
    coords = random_coords(counts, GRID, seed)
    return torch.randn(len(coords), channels, generator=torch.Generator().manual_seed(seed)), coords


def straight(model, feats, coords, batch_size):
    """Group by group with torch's own modules, in float64."""
    model, feats, half = model.double(), feats.double(), feats.shape[1] // 2
    angles = 10_000.0 ** -(torch.arange(half) // 2 * 2 / half).double()
    columns = [(coords[:, axis, None] * angles) for axis in (3, 2)]
    position = torch.cat([torch.where(torch.arange(half) % 2 == 0, c.sin(), c.cos()) for c in columns], 1)
    for block in model.block_list:
        for layer, key in zip(block.block, model.keys, strict=True):
            tail = "parity" if model.parity else "balanced"
            groups = group_points(coords, model.grid_shape, batch_size, key, model.group_size, tail)
            attention = nn.MultiheadAttention(feats.shape[1], layer.attn.num_heads, batch_first=True).double()
            attention.load_state_dict(layer.attn.attn.state_dict())
            update, bounds = torch.zeros_like(feats), groups.starts.tolist()
            for first, last, own in zip(bounds, bounds[1:], groups.owned.tolist(), strict=False):
                if last > first:
                    rows = groups.members[first:last].long()
                    moved = (feats + position)[rows].unsqueeze(0)
                    out = attention(moved, moved, feats[rows].unsqueeze(0), need_weights=False)[0][0]
                    update[rows[:own]] = out[:own]
            feats = layer.norm1(feats + update)
            feats = layer.norm2(feats + layer.fc2(F.gelu(layer.fc1(feats))))
    return feats


def test_parameters_are_those_of_the_original():
    model = FlatFormer()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_059_840
    parts = ["attn.attn.in_proj_weight", "attn.attn.in_proj_bias"]
    parts += [f"{name}.{kind}" for name in ("attn.attn.out_proj", "fc1", "fc2", "norm1", "norm2")
              for kind in ("weight", "bias")]  # fmt: skip
    wanted = {f"block_list.{i}.block.{j}.{part}" for i in range(2) for j in range(4) for part in parts}
    assert set(model.state_dict()) == wanted
    assert [(key.axis, key.shifted, key.window_shape) for key in model.keys] == [
        (axis, shifted, (9, 9, 1)) for axis in "xy" for shifted in (False, True)
    ]


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("counts", [[50, 7, 0, 33], [16], [1]], ids=str)
def test_is_its_definition(parity, counts):
    model = small(parity=parity)
    feats, coords = inputs(counts)
    with torch.no_grad():
        found = model(feats, coords, len(counts))
        assert_close("y", straight(model, feats, coords, len(counts)), found, 3e-6)


@pytest.mark.parametrize("parity", [False, True])
def test_samples_and_order_of_rows_do_not_matter(parity):
    model = small(in_channels=128, num_heads=8, parity=parity)
    feats, coords = inputs([90, 5, 61], 128)
    with torch.no_grad():
        whole = model(feats, coords, 3)
        for sample in range(3):
            mine = coords[:, 0] == sample
            alone = coords[mine].clone()
            alone[:, 0] = 0
            assert_close("alone", whole[mine], model(feats[mine], alone, 1), 1e-6)
        turned = torch.randperm(len(feats))
        assert_close("turned", whole[turned], model(feats[turned], coords[turned], 3), 1e-6)


def test_gradients_are_those_of_the_definition():
    model = small(num_blocks=1)
    feats, coords = inputs([30, 11])
    grad = torch.randn_like(feats)
    leaves = [feats.requires_grad_(), *model.parameters()]
    found = torch.autograd.grad(model(feats, coords, 2), leaves, grad)
    exact = small(num_blocks=1).double()
    exact.load_state_dict(model.state_dict())
    wide = feats.detach().double().requires_grad_()

    position = sine_position(coords, 32, GRID).double()
    y = wide
    for layer, key in zip(exact.block_list[0].block, exact.keys, strict=True):
        groups = group_points(coords, GRID, 2, key, 16)
        bounds = groups.starts.tolist()
        update = torch.zeros_like(y)
        attn = layer.attn.attn
        for first, last in itertools.pairwise(bounds):
            if last > first:
                rows = groups.members[first:last].long()
                moved = (y + position)[rows].unsqueeze(1)
                out, _ = F.multi_head_attention_forward(
                    moved, moved, y[rows].unsqueeze(1), 32, 2, attn.in_proj_weight, attn.in_proj_bias, None, None,
                    False, 0.0, attn.out_proj.weight, attn.out_proj.bias, need_weights=False,
                )  # fmt: skip
                update = update.index_copy(0, rows, out.squeeze(1))
        y = layer.norm1(y + update)
        y = layer.norm2(y + layer.fc2(F.gelu(layer.fc1(y))))
    wanted = torch.autograd.grad(y, [wide, *exact.parameters()], grad.double())
    for name, right, value in zip(["feats", *dict(model.named_parameters())], wanted, found, strict=True):
        assert_close(name, right, value, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def test_other_types(dtype):
    model = small()
    feats, coords = inputs([70, 20])
    with torch.no_grad():
        wanted = model(feats, coords, 2)
        found = model.to(dtype)(feats.to(dtype), coords, 2)
    assert found.dtype == dtype
    assert_close("y", wanted, found, 3e-2)


def test_trains_within_autocast_and_checkpoints():
    model = small()
    feats, coords = inputs([70, 20])
    feats.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        model(feats, coords, 2).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    groups = [group_points(coords, GRID, 2, key, 16) for key in model.keys]
    position = sine_position(coords, 32, GRID)
    kept = model.block_list[0](feats, position, groups)
    again = checkpoint(model.block_list[0], feats, position, groups, use_reentrant=False)
    weight = torch.randn_like(kept)
    leaves = [feats, *model.block_list[0].parameters()]
    for a, b in zip(torch.autograd.grad(kept, leaves, weight), torch.autograd.grad(again, leaves, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("counts", [[0], [0, 0], []], ids=str)
def test_no_rows(counts):
    model = small()
    feats, coords = torch.zeros(0, 32, requires_grad=True), torch.zeros(0, 4, dtype=torch.int32)
    out = model(feats, coords, len(counts))
    assert out.shape == (0, 32)
    out.sum().backward()
    assert to_bev(out, coords, len(counts), (30, 40)).shape == (len(counts), 32, 30, 40)


@pytest.mark.slow
@pytest.mark.parametrize("parity", [False, True])
def test_compiles_whole_for_any_number_of_rows(parity):
    model = small(num_blocks=1, parity=parity)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for seed, counts in enumerate(([50, 20], [33, 60], [100, 1])):
        feats, coords = inputs(counts, seed=seed)
        assert_close("y", model(feats, coords, 2), compiled(feats, coords, 2), 1e-5)
        weight, out = torch.randn_like(feats), compiled(feats.requires_grad_(), coords, 2)
        found = torch.autograd.grad(out, feats, weight)[0]
        wanted = torch.autograd.grad(model(feats, coords, 2), feats, weight)[0]
        assert_close("feats", wanted, found, 1e-4)


def test_other_orders_and_group_sizes():
    """As PointTransformer V3 orders its points, and with one layer for each."""
    coords = random_coords([200, 90], (16, 16, 16))
    feats = torch.randn(290, 48)
    keys = [ZOrderKey(), HilbertKey(), WindowKey((4, 4, 16))]
    model = FlatFormer(48, 3, 1, (16, 16, 16), group_size=48, keys=keys).eval()
    assert len(model.block_list[0].block) == 3
    with torch.no_grad():
        assert_close("y", straight(model, feats, coords, 2), model.float()(feats, coords, 2), 3e-6)


def test_a_picture_from_above():
    feats, coords = inputs([40, 9])
    feats.requires_grad_()
    picture = to_bev(feats, coords, 2, (30, 40))
    assert picture.shape == (2, 32, 30, 40)
    assert picture.is_contiguous()
    sample, _, y, x = coords.long().unbind(1)
    assert torch.equal(picture[sample, :, y, x], feats)
    assert picture.count_nonzero() == feats.count_nonzero()
    weight = torch.randn_like(picture)
    (picture * weight).sum().backward()
    assert torch.equal(feats.grad, weight[sample, :, y, x])


def test_positions_are_sines_and_cosines():
    coords = torch.tensor([[0, 0, 5, 17], [1, 0, 29, 39]], dtype=torch.int32)
    found = sine_position(coords, 12, GRID)
    for row, (_, _, y, x) in zip(found.tolist(), coords.tolist(), strict=True):
        wanted = [f(place / 10_000 ** (2 * i / 6)) for place in (x, y) for i in range(3) for f in (math.sin, math.cos)]
        assert row == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: FlatFormer(30), "in_channels is 30"),
        (lambda: FlatFormer(32, 5), "32 channels do not split into 5 heads"),
        (lambda: FlatFormer(32, group_size=0), "group_size is 0"),
        (lambda: FlatFormer(32, window_shape=(9, 9)), r"window_shape is \(9, 9\)"),
        (lambda: FlatFormerLayer(32, 0), "do not split into 0 heads"),
        (lambda: small()(torch.zeros(3, 32), torch.zeros(2, 4).int(), 1), r"feats is \(3, 32\), coords \(2, 4\)"),
        (lambda: small()(torch.zeros(1, 32), torch.tensor([[0, 0, 0, 40]]), 1), "x of coords goes from 40 to 40"),
        (lambda: small()(torch.zeros(1, 32), torch.tensor([[1, 0, 0, 0]]), 1), "sample of coords goes from 1 to 1"),
        (lambda: to_bev(torch.zeros(2, 3), torch.zeros(1, 4).int(), 1, (4, 4)), r"coords is torch\.int32 \(1, 4\)"),
        (lambda: to_bev(torch.zeros(1, 3), torch.tensor([[0, 0, 4, 0]]), 1, (4, 4)), "y of coords goes from 4 to 4"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_weights_that_an_average_puts_in_place_are_used():
    """By ``.data.copy_``, as mmengine's EMAHook does it: no version of a tensor tells."""
    net = FlatFormer(16, 2, 1, (20, 20, 1), group_size=8).eval()
    coords = torch.tensor([[0, 0, i // 20, i % 20] for i in range(50)], dtype=torch.int32)
    feats = torch.randn(50, 16)
    with torch.no_grad():
        before = net(feats, coords, 1)
        for parameter in net.parameters():
            parameter.data.copy_(parameter.data * 1.5 + 0.01)
        after = net(feats, coords, 1)
        expected = copy.deepcopy(net)(feats, coords, 1)
    assert torch.equal(after, expected)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(
    "arguments",
    [{"grid_shape": (0, 20, 1)}, {"window_shape": (9, 0, 1)}, {"num_blocks": 0}, {"hidden": 0}, {"keys": []}],
    ids=str,
)
def test_sizes_of_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        FlatFormer(16, **arguments)


def test_places_are_the_same_in_small_and_large_grids():
    coords = torch.tensor([[0, 0, 3, 11], [0, 0, 5, 2]], dtype=torch.int32)
    torch.testing.assert_close(sine_position(coords, 16, (12, 12, 1)), sine_position(coords, 16, (1 << 20, 12, 1)))
