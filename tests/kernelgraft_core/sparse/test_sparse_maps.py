"""Kernel maps: every backend finds what the definition says, for any geometry and order of rows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.sparse.coordinates import Coordinates
from kernelgraft_core.sparse.geometry import ConvGeometry
from kernelgraft_core.sparse.kernel_map import KernelMap
from kernelgraft_core.sparse.maps.ops import sparse_neighbors

from .clouds import random_sites

GEOMETRIES = {
    "centred": {"kernel_size": 3, "submanifold": True},
    "even": {"kernel_size": 2, "submanifold": True},
    "dilated": {"kernel_size": 3, "dilation": 2, "submanifold": True},
    "point": {"kernel_size": 1, "submanifold": True},
    "wide": {"kernel_size": 5, "submanifold": True},
    "halved": {"kernel_size": 2, "stride": 2},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "padded": {"kernel_size": 3, "stride": 1, "padding": 2},
    "apart": {"kernel_size": 2, "stride": 3, "padding": 1, "dilation": 2},
}


def by_definition(geometry, inputs, outputs, transposed=False):
    """The rows that outputs read, one by one."""
    known = {tuple(row): i for i, row in enumerate(inputs.indices.tolist())}
    reached = {tuple(row): i for i, row in enumerate(outputs.indices.tolist())}
    found = torch.full((len(outputs), geometry.volume), -1, dtype=torch.int32)
    taps = list(itertools.product(*map(range, geometry.kernel_size)))
    moves = [[k * d - p for k, d, p in zip(tap, geometry.dilation, geometry.padding, strict=True)] for tap in taps]
    if transposed:
        for (b, *site), row in known.items():
            for k, move in enumerate(moves):
                at = (b, *(i * s + m for i, s, m in zip(site, geometry.stride, move, strict=True)))
                if at in reached:
                    found[reached[at], k] = row
        return found
    for (b, *site), row in reached.items():
        for k, move in enumerate(moves):
            at = (b, *(o * s + m for o, s, m in zip(site, geometry.stride, move, strict=True)))
            found[row, k] = known.get(at, -1)
    return found


def sites_of(coordinates):
    return sorted(map(tuple, coordinates.indices.tolist()))


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_neighbors_are_those_of_the_definition(dimensions, name, backend, monkeypatch):
    if backend == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", backend)
    if name == "wide" and dimensions == 4:
        pytest.skip("625 taps of the definition take long")
    sites = random_sites(dimensions, seed=dimensions)
    geometry = ConvGeometry.of(dimensions, **GEOMETRIES[name])
    found = KernelMap.of(geometry, sites)
    assert torch.equal(found.neighbors, by_definition(geometry, sites, found.outputs))
    assert found.symmetric == (name in ("centred", "dilated", "point", "wide"))
    back = found.inverse
    assert torch.equal(back.inverse.neighbors, found.neighbors)
    inputs, outputs, starts = found.pairs
    assert starts[-1] == (found.neighbors >= 0).sum()
    for k in range(geometry.volume):
        some = slice(starts[k], starts[k + 1])
        assert torch.equal(found.neighbors[outputs[some].long(), k], inputs[some])
        assert torch.equal(back.neighbors[inputs[some].long(), k], outputs[some])


@pytest.mark.parametrize("name", ["halved", "strided", "padded", "apart"])
def test_outputs_are_all_that_read_an_input(name):
    sites = random_sites(2, density=0.1)
    geometry = ConvGeometry.of(2, **GEOMETRIES[name])
    found = KernelMap.of(geometry, sites).outputs
    ones = torch.zeros(2, 1, *sites.spatial_shape)
    ones[sites.indices[:, 0].long(), 0, sites.indices[:, 1].long(), sites.indices[:, 2].long()] = 1
    dense = torch.nn.functional.conv2d(
        ones, torch.ones(1, 1, *geometry.kernel_size), None, geometry.stride, geometry.padding, geometry.dilation
    )
    assert found.spatial_shape == tuple(dense.shape[2:])
    assert sites_of(found) == sorted(map(tuple, dense[:, 0].nonzero().tolist()))


@pytest.mark.parametrize("name", ["halved", "strided", "padded", "apart"])
def test_transposed_maps_are_those_of_the_definition(name):
    sites = random_sites(3, density=0.1)
    geometry = ConvGeometry.of(3, **GEOMETRIES[name])
    found = KernelMap.of(geometry, sites, transposed=True)
    assert torch.equal(found.neighbors, by_definition(geometry, sites, found.outputs, transposed=True))
    assert (found.neighbors >= 0).any(1).all(), "a site that reads nothing"
    larger = tuple(n + s - 1 for n, s in zip(found.outputs.spatial_shape, geometry.stride, strict=True))
    if geometry.out_shape(larger) == sites.spatial_shape:
        assert KernelMap.of(geometry, sites, transposed=True, out_shape=larger).outputs.spatial_shape == larger
    with pytest.raises(ValueError, match=r"out_shape is \(99, 99, 99\)"):
        KernelMap.of(geometry, sites, transposed=True, out_shape=(99, 99, 99))


def test_any_sites_may_be_the_outputs():
    sites, targets = random_sites(3, 1), random_sites(3, 2, density=0.5)
    geometry = ConvGeometry.of(3, 3, 1, 1)
    found = KernelMap.of(geometry, sites, targets)
    assert torch.equal(found.neighbors, by_definition(geometry, sites, targets))
    assert KernelMap.of(geometry, sites, targets).neighbors is found.neighbors
    assert (found.neighbors < 0).all(1).any()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_neighbors_for_any_geometry(data):
    dimensions = data.draw(st.integers(1, 3))

    def numbers(least, most):
        return data.draw(st.tuples(*[st.integers(least, most)] * dimensions))

    kernel, shape = numbers(1, 4), numbers(1, 9)
    submanifold = data.draw(st.booleans())
    stride = (1,) * dimensions if submanifold else numbers(1, 3)
    geometry = ConvGeometry.of(dimensions, kernel, stride, numbers(0, 3), numbers(1, 3), submanifold)
    sites = random_sites(
        dimensions, data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])), 3, shape=shape
    )
    reach = [n + 2 * p - d * (k - 1) for n, k, p, d in zip(
        shape, geometry.kernel_size, geometry.padding, geometry.dilation, strict=True)]  # fmt: skip
    if not submanifold and min(reach) < 1:
        with pytest.raises(ValueError, match="does not fit"):
            KernelMap.of(geometry, sites)
        return
    found = KernelMap.of(geometry, sites)
    assert torch.equal(found.neighbors, by_definition(geometry, sites, found.outputs))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("name", ["centred", "strided"])
def test_backends_agree_where_lines_are_full_or_empty(ordered, name, monkeypatch):
    pytest.importorskip("numba")
    shape = (40, 3, 700)
    full = torch.zeros(2, *shape, dtype=torch.bool)
    full[0, ::7] = True
    full[1, 5, 1] = True
    indices = full.nonzero()
    if not ordered:
        indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
    found = []
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("KERNELGRAFT_BACKEND", backend)
        found.append(KernelMap.of(ConvGeometry.of(3, **GEOMETRIES[name]), Coordinates(indices, shape, 2)).neighbors)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": (3, 3)}, r"kernel_size is \(3, 3\), expected one whole number or 3"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"kernel_size": 17}, "4913 taps, at most 4096"),
        ({"kernel_size": 3, "stride": (1, 2)}, "stride is"),
        ({"kernel_size": 3, "padding": -1}, "padding is -1"),
        ({"kernel_size": 3, "dilation": 0}, "dilation is 0"),
        ({"kernel_size": 3, "stride": 2, "submanifold": True}, "stride is 2, but outputs of a submanifold"),
    ],
)
def test_geometry_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ConvGeometry.of(3, **options)


def test_what_does_not_belong_together_is_refused():
    sites = random_sites(3)
    with pytest.raises(ValueError, match="2 dimensions, coordinates 3"):
        KernelMap.of(ConvGeometry.of(2, 3), sites)
    with pytest.raises(ValueError, match="batch_size 1, inputs 2"):
        KernelMap.of(ConvGeometry.of(3, 3), sites, random_sites(3, batch=1))
    with pytest.raises(ValueError, match="does not fit"):
        KernelMap.of(ConvGeometry.of(3, 12), sites)
    keys = torch.arange(3)
    with pytest.raises(ValueError, match=r"in_keys is torch\.int32"):
        sparse_neighbors(keys.int(), None, keys, None, [0], 1, 1)
    with pytest.raises(ValueError, match="0 lines of 1 taps"):
        sparse_neighbors(keys, None, keys, None, [], 1, 1)
