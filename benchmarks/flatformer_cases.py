"""FlatFormer on pillars of real scans beside the same mathematics in eager torch; importing this registers the cases.

Two peers. ``torch, equal groups`` is what a good implementation in plain torch does: gather groups of one size, SDPA on
them, scatter, everything else by torch's own layers. ``torch, equal windows`` is SST's way (arXiv 2112.06375): rows are
grouped by window, windows of similar occupancy are padded to one size, and attention is masked. Both share weights with
ours; the second has other neighbours, so it is compared with itself in float64. Mapping is part of what is timed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernelgraft_core.point_attention import (
    FlatFormer,
    FlatFormerBlock,
    FlatFormerLayer,
    WindowKey,
    group_points,
    order_rows,
    sine_position,
)
from kernelgraft_core.runtime.testing import assert_close

from .cases import Case, Prepared, Shape, UnavailableError, Variant, register

GRID, PILLAR, ORIGIN = (468, 468, 1), 0.32, -74.88
SCANS = {
    "kitti": ("lidar/kitti/000008.bin", 4),
    "kitti_whole": ("lidar/kitti/000001.bin", 4),
    "nuscenes": ("lidar/nuscenes/LIDAR_TOP__1532402927647951.pcd.bin", 5),
}
SHAPES = ({"window": 9, "group": 69}, {"window": 13, "group": 144})
CHANNELS, HEADS = 128, 8
BUCKETS = (
    30,
    60,
    100,
)  # tokens of a window, as SST's configuration has them; fuller ones are padded to the whole window
PEER = "torch, equal groups"


@functools.cache
def load_pillars(scan: str) -> Tensor:
    """Coordinates int32 ``(N, 4)`` of the pillars that have points, in the order of a voxelizer's hash: none.

    Raises:
        UnavailableError: the scan is not there.
    """
    name, columns = SCANS[scan]
    path = Path(os.environ.get("KERNELGRAFT_TEST_DATA", "../shared/data")) / name
    if not path.is_file():
        raise UnavailableError(f"{path} is not there: set KERNELGRAFT_TEST_DATA")
    points = torch.from_numpy(np.fromfile(path, np.float32)).view(-1, columns)[:, :2]
    cells = ((points - ORIGIN) / PILLAR).floor().int()
    cells = cells[((cells >= 0) & (cells < GRID[0])).all(1)].unique(dim=0)
    cells = cells[torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))]
    zeros = torch.zeros(len(cells), dtype=torch.int32)
    return torch.stack((zeros, zeros, cells[:, 1], cells[:, 0]), 1)


# -- peers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Padded:
    """Rows ``(groups, size)`` of groups of one size, and, row by row, where each row's own result is."""

    rows: Tensor
    back: Tensor
    mask: Tensor | None


def equal_groups(coords: Tensor, model: FlatFormer) -> list[list[_Padded]]:
    """For each layer, groups as the original makes them: of one size, so that no mask is needed."""
    found = []
    for key in model.keys:
        order, _ = order_rows(key, coords, GRID, 1)
        count, size = len(order), model.group_size
        padded = -(-count // size) * size
        places = torch.arange(padded)
        places[count:] -= size  # the same place of the group before
        back = torch.empty_like(order).scatter_(0, order, torch.arange(count))
        found.append([_Padded(order[places].view(-1, size), back, None)])
    return found


def equal_windows(coords: Tensor, model: FlatFormer) -> list[list[_Padded]]:
    """For each layer, windows in buckets of similar occupancy, each padded to its bucket's size."""
    found = []
    for key in model.keys:
        assert isinstance(key, WindowKey)
        values, order = key(coords, GRID).sort()
        area = key.window_shape[0] * key.window_shape[1]
        counts = torch.unique_consecutive(values // area, return_counts=True)[1]
        starts, layer, low = counts.cumsum(0) - counts, [], 0
        for size in (*(size for size in BUCKETS if size < area), area):
            mine = (counts > low) & (counts <= size)
            low = size
            if not bool(mine.any()):
                continue
            there = torch.arange(size) < counts[mine].unsqueeze(1)
            places = torch.where(there, starts[mine].unsqueeze(1) + torch.arange(size), 0)
            rows = order[places]
            layer.append(_Padded(rows, rows[there], there))
        found.append(layer)
    return found


def attend_padded(layer: FlatFormerLayer, x: Tensor, position: Tensor, groups: list[_Padded]) -> Tensor:
    """Attention of a layer in plain torch. Projections are of rows, not of padded groups: that spares some of them."""
    attn, (count, channels) = layer.attn.attn, x.shape
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    two = 2 * channels
    qk = F.linear(x + position, weight[:two], bias[:two])
    qkv = torch.cat((qk, F.linear(x, weight[two:], bias[two:])), 1)
    out = None
    for each in groups:
        query, key, value = qkv[each.rows].unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mask = None if each.mask is None else each.mask[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        if each.mask is None:
            out = attended.flatten(0, 1)[each.back]
        else:
            out = x.new_empty((count, channels)) if out is None else out
            out[each.back] = attended[each.mask]
    assert out is not None
    return F.linear(out, attn.out_proj.weight, attn.out_proj.bias)


def run_padded(model: FlatFormer, x: Tensor, coords: Tensor, mapping: Callable[..., list[list[_Padded]]]) -> Tensor:
    """The whole of the model in plain torch, mapping included."""
    layers, position = mapping(coords, model), sine_position(coords, x.shape[1], GRID).to(x.dtype)
    for block in model.block_list:
        assert isinstance(block, FlatFormerBlock)
        for layer, groups in zip(block.block, layers, strict=True):
            assert isinstance(layer, FlatFormerLayer)
            x = layer.norm1(x + attend_padded(layer, x, position, groups))
            x = layer.norm2(x + layer.fc2(F.gelu(layer.fc1(x))))
    return x


# -- cases ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _inference(threads: int | None = None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def _model(shape: Shape, dtype: torch.dtype) -> FlatFormer:
    torch.manual_seed(0)
    window = shape["window"]
    model = FlatFormer(
        CHANNELS, HEADS, grid_shape=GRID, window_shape=(window, window, 1), group_size=shape["group"], parity=True
    )
    return model.eval().to(dtype)


def _prepare(scan: str, dtype: torch.dtype, shape: Shape) -> Prepared:
    """Two blocks of four layers with their mapping, ours and plain torch's; the original's groups in both."""
    coords, model = load_pillars(scan), _model(shape, dtype)
    x = torch.randn(len(coords), CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, wide = copy.deepcopy(model).double(), x.double()
    with _inference():
        reference = run_padded(exact, wide, coords, equal_groups)
    name = str(dtype).removeprefix("torch.")
    ratio = 1e-5 if dtype == torch.float32 else 3e-2
    variant: Any = functools.partial(Variant, ratio=ratio, dtype=name, context=_inference)
    variants = {
        "kernelgraft": variant(lambda: model(x, coords, 1), backend="cpu"),
        PEER: variant(lambda: run_padded(model, x, coords, equal_groups), backend="torch"),
    }
    return Prepared(reference, variants)


def _prepare_windows(scan: str, dtype: torch.dtype, shape: Shape) -> Prepared:
    """Ours, in groups of nearly one size, beside windows padded to a few sizes. Each is right by its own exact result:
    the peer's neighbours are others by design, so it may differ from ours by as much as exact results do.
    """
    coords, model = load_pillars(scan), _model(shape, dtype)
    model.parity = False
    x = torch.randn(len(coords), CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)
    name = str(dtype).removeprefix("torch.")
    ratio = 1e-5 if dtype == torch.float32 else 3e-2
    with _inference():
        exact = copy.deepcopy(model).double()
        ours = exact(x.double(), coords, 1)
        theirs = run_padded(exact, x.double(), coords, equal_windows)
        found = run_padded(model, x, coords, equal_windows)
    assert_close("torch, equal windows", theirs, found, ratio)
    apart = float((theirs - ours).norm() / ours.norm())
    variants = {
        "kernelgraft": Variant(lambda: model(x, coords, 1), ratio, "cpu", name, context=_inference),
        "torch, equal windows": Variant(
            lambda: run_padded(model, x, coords, equal_windows), apart + ratio, "torch", name, context=_inference
        ),
    }
    return Prepared(ours, variants)


def _prepare_training(scan: str, shape: Shape) -> Prepared:
    """Forward and all gradients; the gradients are what is compared."""
    coords, model = load_pillars(scan), _model(shape, torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(len(coords), CHANNELS, generator=generator) for _ in range(2))

    def train(run: Callable[..., Tensor], of: FlatFormer, feats: Tensor) -> Tensor:
        leaves = [feats.detach().requires_grad_(), *of.parameters()]
        found = torch.autograd.grad(run(of, leaves[0]), leaves, grad.to(feats.dtype))
        return torch.cat([each.flatten() for each in found])

    def ours(of: FlatFormer, feats: Tensor) -> Tensor:
        out: Tensor = of(feats, coords, 1)
        return out

    def theirs(of: FlatFormer, feats: Tensor) -> Tensor:
        return run_padded(of, feats, coords, equal_groups)

    variants = {
        "kernelgraft": Variant(lambda: train(ours, model, x), 1e-4, "cpu", "float32"),
        PEER: Variant(lambda: train(theirs, model, x), 1e-4, "torch", "float32"),
    }
    return Prepared(train(theirs, copy.deepcopy(model).double(), x.double()), variants)


def _prepare_mapping(scan: str, shape: Shape) -> Prepared:
    """Keys, sorting and groups of the four kinds of layers; the result compared is how many groups there are."""
    coords, model = load_pillars(scan), _model(shape, torch.float32)

    def ours() -> Tensor:
        made = [group_points(coords, GRID, 1, key, model.group_size, "parity") for key in model.keys]
        return torch.stack([(each.owned > 0).sum() for each in made])

    def theirs() -> Tensor:
        return torch.tensor([len(groups.rows) for (groups,) in equal_groups(coords, model)])

    variants = {
        "kernelgraft": Variant(ours, 0.0, "torch", "int64"),
        PEER: Variant(theirs, 0.0, "torch", "int64"),
    }
    return Prepared(theirs().double(), variants)


def _flops(scan: str, shape: Shape) -> float:
    per_row = 131_072 + 2 * CHANNELS * shape["group"]
    return 2.0 * 8 * len(load_pillars(scan)) * per_row


for _scan in SCANS:
    for _suffix, _dtype in (("", torch.float32), ("_bfloat16", torch.bfloat16)):
        register(
            Case(
                f"flatformer{_suffix}_{_scan}", "grouped_self_attention", "cpu", PEER, SHAPES,
                functools.partial(_prepare, _scan, _dtype), functools.partial(_flops, _scan),
            )
        )  # fmt: skip
        register(
            Case(
                f"flatformer_windows{_suffix}_{_scan}", "grouped_self_attention", "cpu", "torch, equal windows", SHAPES,
                functools.partial(_prepare_windows, _scan, _dtype), functools.partial(_flops, _scan),
            )
        )  # fmt: skip
    register(
        Case(
            f"flatformer_training_{_scan}", "grouped_self_attention", "cpu", PEER, SHAPES,
            functools.partial(_prepare_training, _scan),
        )
    )  # fmt: skip
    register(
        Case(
            f"flatformer_mapping_{_scan}", "grouped_self_attention", "cpu", PEER, SHAPES,
            functools.partial(_prepare_mapping, _scan),
        )
    )  # fmt: skip
