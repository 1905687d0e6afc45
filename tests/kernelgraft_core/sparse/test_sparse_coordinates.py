"""Coordinates and sparse tensors: what is refused, what is found again, to dense and back."""

import gc
import weakref

import pytest
import torch

from kernelgraft_core.sparse.coordinates import Coordinates
from kernelgraft_core.sparse.geometry import ConvGeometry
from kernelgraft_core.sparse.kernel_map import KernelMap
from kernelgraft_core.sparse.tensor import SparseTensor

from .clouds import random_sites


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([[0, 1, 2, 3], [0, 5, 5, 5], [0, 1, 2, 3]], {}, r"rows 0 and 2 .* both \[0, 1, 2, 3\]"),
        ([[0, 1, 2], [0, -1, 2]], {}, r"row 1 .* \[0, -1, 2\], expected none below 0"),
        ([[0, 1, 2], [3, 1, 2]], {"batch_size": 2}, r"row 1 .* \[3, 1, 2\], which is beyond batch_size = 2"),
        ([[0, 1, 9]], {"spatial_shape": (4, 9)}, r"row 0 .* \[0, 1, 9\], which is beyond .* \(4, 9\)"),
        ([[0, 1, 2]], {"spatial_shape": (4, 4, 4)}, r"spatial_shape is \(4, 4, 4\), expected one whole number or 2"),
        ([[0, 1, 2]], {"stride": 0}, "stride is 0"),
        ([[0] * 6], {}, r"\(1, 6\), expected \(N, 1 \+ D\)"),
        ([[0, 1.5, 2]], {}, "float32, expected integers"),
        ([[0, 2**31 - 2, 2**31 - 2, 2**31 - 2]], {}, r"more than 2\^62"),
        ([[0, 3_000_000_000], [0, 5]], {}, r"spatial_shape \(3000000001,\), at most 2147483647"),
        ([[0, 1, 2]], {"stride": (2.5, 1)}, r"stride is \(2\.5, 1\), expected one whole number"),
    ],
)
def test_what_is_wrong_is_named(rows, options, message):
    with pytest.raises(ValueError, match=message):
        Coordinates(torch.tensor(rows), **options)


def test_features_belong_to_sites():
    sites = random_sites(3)
    with pytest.raises(ValueError, match=r"feats is torch.float32 \(3, 4\), expected floating point"):
        SparseTensor(torch.zeros(3, 4), sites)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        SparseTensor(torch.zeros(len(sites), 4, dtype=torch.int64), sites)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_dense_and_back(dimensions):
    sites = random_sites(dimensions)
    x = SparseTensor(torch.randn(len(sites), 3), sites)
    dense = x.to_dense()
    assert dense.shape == (2, 3, *sites.spatial_shape)
    again = SparseTensor.from_dense(dense)
    assert torch.equal(again.to_dense(), dense)
    rows = sites.find(again.coords)
    assert torch.equal(x.feats[rows], again.feats)


def test_gradients_go_through_dense():
    sites = random_sites(2)
    feats = torch.randn(len(sites), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: SparseTensor(f, sites).to_dense(), (feats,))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_bird_eye_view(axis):
    sites = random_sites(3)
    x = SparseTensor(torch.randn(len(sites), 5), sites)
    dense = x.to_dense()
    bev = x.to_bev(axis)
    moved = dense.movedim(2 + axis % 3, 2)
    assert torch.equal(bev, moved.reshape(2, -1, *moved.shape[3:]))


def test_sites_are_found_or_not():
    sites = random_sites(3)
    assert torch.equal(sites.find(sites.indices), torch.arange(len(sites)))
    beyond = torch.tensor([[0, 9, 0, 0], [2, 0, 0, 0], [0, -1, 0, 0], [0, 0, 11, 0]])
    assert sites.find(beyond).tolist() == [-1] * 4
    assert random_sites(3, density=0.0).find(beyond).tolist() == [-1] * 4


def test_sums_are_those_of_dense_tensors():
    a, b = random_sites(3, 1), random_sites(3, 2)
    x, y = (SparseTensor(torch.randn(len(s), 4, dtype=torch.float64, requires_grad=True), s) for s in (a, b))
    total = x + y
    torch.testing.assert_close(total.to_dense(), x.to_dense() + y.to_dense())
    assert len(total.feats) == len({tuple(row) for row in (*a.indices.tolist(), *b.indices.tolist())})
    total.feats.sum().backward()
    assert x.feats.grad.eq(1).all()
    assert y.feats.grad.eq(1).all()
    same = x + SparseTensor(torch.ones_like(x.feats), a)
    assert same.coordinates is a
    with pytest.raises(ValueError, match="cannot be added"):
        x + SparseTensor(torch.zeros(len(b), 3, dtype=torch.float64), b)


def test_channels_side_by_side():
    sites = random_sites(3)
    x, y = (SparseTensor(torch.randn(len(sites), c), sites) for c in (2, 3))
    assert torch.equal(x.cat(y).feats, torch.cat((x.feats, y.feats), 1))
    copy = SparseTensor(y.feats, sites.indices.clone(), spatial_shape=sites.spatial_shape, batch_size=2)
    assert x.cat(copy).channels == 5
    with pytest.raises(ValueError, match="not at the sites"):
        x.cat(SparseTensor(torch.zeros(1, 3), torch.zeros(1, 4, dtype=torch.int32)))


def test_pruning_and_cropping_keep_what_is_inside():
    sites = random_sites(3)
    x = SparseTensor(torch.randn(len(sites), 2), sites)
    inside = x.crop((2, 0, 1), (6, 11, 4))
    wanted = torch.zeros_like(x.to_dense())
    wanted[:, :, 2:6, :, 1:4] = x.to_dense()[:, :, 2:6, :, 1:4]
    assert torch.equal(inside.to_dense(), wanted)
    assert len(x.prune(torch.zeros(len(sites), dtype=torch.bool)).feats) == 0
    with pytest.raises(ValueError, match=r"torch.int64 .* expected torch.bool"):
        x.prune(torch.zeros(len(sites), dtype=torch.int64))


def test_collating_keeps_grids_apart():
    tensors = [SparseTensor(torch.randn(len(s), 2), s) for s in (random_sites(3, 1), random_sites(3, 2, batch=1))]
    tensors.insert(1, SparseTensor(torch.zeros(0, 2), Coordinates(torch.zeros(0, 4, dtype=torch.int64), (3, 3, 3), 1)))
    whole = SparseTensor.collate(tensors)
    assert whole.batch_size == 4
    dense = whole.to_dense()
    assert torch.equal(dense[:2], tensors[0].to_dense())
    assert not dense[2].any()
    assert torch.equal(dense[3:], tensors[2].to_dense())
    with pytest.raises(ValueError, match="nothing to collate"):
        SparseTensor.collate([])
    with pytest.raises(ValueError, match="does not go with"):
        SparseTensor.collate([tensors[0], SparseTensor(torch.zeros(1, 3), torch.zeros(1, 4, dtype=torch.int32))])


def test_maps_are_shared_and_leave_with_their_tensors():
    sites = random_sites(3)
    same, down = ConvGeometry.of(3, 3, submanifold=True), ConvGeometry.of(3, 3, 2, 1)
    assert KernelMap.of(same, sites).neighbors is KernelMap.of(same, sites).neighbors
    first = KernelMap.of(down, sites)
    assert KernelMap.of(down, sites).outputs is first.outputs
    for other in (ConvGeometry.of(3, 3, 2, 0), ConvGeometry.of(3, 3, 1, 1), ConvGeometry.of(3, 3, 2, 1, 2)):
        assert KernelMap.of(other, sites).neighbors is not first.neighbors
    assert first.outputs.made_by.inputs is sites
    alive = weakref.ref(first.outputs.indices), weakref.ref(sites.indices)
    gc.disable()
    try:
        del first, sites
        assert [ref() for ref in alive] == [None, None], "tensors are left to the garbage collector"
    finally:
        gc.enable()
