"""Orders and tiles of GPU dataflows: every pair is there once, and no more taps than are needed."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.sparse.conv.dataflow import ConvConfig, Dataflow
from kernelgraft_core.sparse.conv.gather import batches
from kernelgraft_core.sparse.conv.macs import executed_rows, overhead, useful_rows
from kernelgraft_core.sparse.conv.packing import bitmasks, make_tap_pairs, mask_order, pack, packed_map, tap_parts
from kernelgraft_core.sparse.geometry import ConvGeometry
from kernelgraft_core.sparse.kernel_map import KernelMap
from kernelgraft_core.sparse.voxels import voxelize

from .clouds import random_sites


def a_map(rows, taps, seed, density=0.3):
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(rows, taps, generator=generator) < density
    return torch.where(there, torch.randint(50, (rows, taps), generator=generator), -1).int()


maps = st.builds(a_map, st.integers(0, 40), st.integers(1, 130), st.integers(0, 99), st.sampled_from([0.0, 0.05, 0.5]))


def unpacked(packed, rows, taps):
    """The map again, and how often each entry was there."""
    found, seen = torch.full((rows, taps), -1, dtype=torch.int32), torch.zeros(rows, taps)
    height = packed.entries.shape[1]
    for tile in range(packed.tiles * packed.splits):
        order = packed.order[tile * height : (tile + 1) * height].long()
        for slot in range(int(packed.starts[tile]), int(packed.starts[tile + 1])):
            tap, entry = int(packed.taps[slot]), packed.entries[slot]
            assert (entry >= 0).any(), "a tap that no row of the tile has"
            there = entry >= 0
            assert (order[there] < rows).all()
            found[order[there], tap] = entry[there]
            seen[order[there], tap] += 1
    return found, seen


@settings(max_examples=60, deadline=None)
@given(maps, st.integers(0, 4), st.sampled_from([1, 4, 16]))
def test_packed_maps_hold_every_pair_once(neighbors, splits, height):
    packed = pack(neighbors, splits, height)
    found, seen = unpacked(packed, *neighbors.shape)
    assert torch.equal(found, neighbors)
    assert seen.max().item() <= 1 if seen.numel() else True
    assert packed.splits == len(tap_parts(neighbors.shape[1], splits))
    for part in packed.order.view(packed.splits, -1):
        assert sorted(row for row in part.tolist() if row < len(neighbors)) == list(range(len(neighbors)))


@settings(max_examples=60, deadline=None)
@given(maps)
def test_pairs_by_tap_hold_every_pair_once_in_order(neighbors):
    pairs = make_tap_pairs(neighbors)
    for tap in range(neighbors.shape[1]):
        first, last = pairs.starts[tap : tap + 2].tolist()
        outputs = (neighbors[:, tap] >= 0).nonzero().squeeze(1)
        assert torch.equal(pairs.outputs[first:last].long(), outputs)
        assert torch.equal(pairs.inputs[first:last], neighbors[outputs, tap])
    assert pairs.starts[-1] == useful_rows(neighbors)


@settings(max_examples=60, deadline=None)
@given(maps)
def test_rows_with_the_same_taps_stand_together(neighbors):
    words = bitmasks(neighbors)
    bits = (words.unsqueeze(2) >> torch.arange(62)) & 1
    assert torch.equal(bits.flatten(1)[:, : neighbors.shape[1]], (neighbors >= 0).long())
    numbers = [sum(word << (62 * w) for w, word in enumerate(row)) for row in words[mask_order(neighbors)].tolist()]
    assert numbers == sorted(numbers, reverse=True)


def test_maps_are_packed_once():
    neighbors = a_map(30, 27, 0)
    assert packed_map(neighbors, 2, 16) is packed_map(neighbors, 2, 16)
    assert packed_map(neighbors, 2, 16) is not packed_map(neighbors, 1, 16)


def test_sorting_and_splits_leave_less_to_do():
    sites = random_sites(3, density=0.08, shape=(60, 60, 10))
    neighbors = KernelMap.of(ConvGeometry.of(3, 3, submanifold=True), sites).neighbors
    costs = [overhead(neighbors, Dataflow("implicit_gemm", splits), 32) for splits in range(5)]
    assert costs == sorted(costs, reverse=True)
    assert 1 < costs[4] < 2 < costs[0]
    useful = useful_rows(neighbors)
    assert useful < executed_rows(neighbors, Dataflow("fetch_on_demand"), 32) < useful + 27 * 32
    assert overhead(neighbors[:0], Dataflow("implicit_gemm"), 32) == 1


def test_dataflows_are_read_as_they_are_written():
    for text in ("auto", "implicit_gemm", "implicit_gemm:4", "gather_scatter", "fetch_on_demand_atomic"):
        assert str(Dataflow.parse(text)) == text
    config = ConvConfig.parse("implicit_gemm:2,auto,gather_scatter")
    assert config.forward.splits == 2
    assert ConvConfig.parse(str(config)) == config
    assert ConvConfig.parse("gather_scatter").wgrad.kind == "gather_scatter"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "dataflow is 'fast', expected one of auto, implicit_gemm"),
        ("implicit_gemm:x", "dataflow is 'implicit_gemm:x'"),
        ("implicit_gemm:5", "splits = 5, expected 0..4"),
        ("gather_scatter:1", "'gather_scatter' has splits = 1"),
        ("auto,auto", "expected one, or three"),
    ],
)
def test_other_dataflows_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        ConvConfig.parse(text)


def test_taps_are_batched_where_little_is_filled_up():
    assert batches([5, 100, 99, 5, 98], 0.25) == [[1, 2, 4], [0, 3]]
    assert batches([5, 100, 99], 0.0) == [[1], [2], [0]]
    assert batches([], 0.25) == []


def test_three_splits_waste_little_on_a_real_scan():
    path = Path(os.environ.get("KERNELGRAFT_TEST_DATA", "../shared/data")) / "lidar/kitti/000008.bin"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    points = torch.from_numpy(np.fromfile(path, np.float32)).view(-1, 4)
    x, _ = voxelize(points[:, :3].contiguous(), points, (0.05, 0.05, 0.1))
    neighbors = KernelMap.of(ConvGeometry.of(3, 3, submanifold=True), x.coordinates).neighbors
    assert overhead(neighbors, Dataflow("implicit_gemm", 3), 128) <= 1.7
