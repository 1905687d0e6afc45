"""The order of vertices: the area of the polygon they make is that of the overlap."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.boxes import sort_overlap_vertices
from kernelgraft_core.boxes.vertices.ops import SORT


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def candidates(places):
    """``{index: (x, y)}`` of the valid ones among 24."""
    vertices, mask = torch.full((1, 1, 24, 2), 7.0), torch.zeros(1, 1, 24, dtype=torch.bool)
    for index, place in places.items():
        vertices[0, 0, index], mask[0, 0, index] = torch.tensor(place), True
    return vertices, mask


def test_by_angle_then_the_first_then_padding(backend):
    vertices, mask = candidates({3: (0.0, -1.0), 9: (1.0, 0.5), 1: (-1.0, 0.5), 8: (0.0, 1.0)})
    found = sort_overlap_vertices(vertices, mask)
    assert found.dtype == torch.int32
    assert found[0, 0].tolist() == [9, 8, 1, 3, 9, 10, 10, 10, 10]


def test_the_first_of_places_that_are_the_same(backend):
    corners = [(1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)]
    vertices, mask = candidates(dict(enumerate(corners + corners)))
    assert sort_overlap_vertices(vertices, mask)[0, 0].tolist() == [0, 1, 2, 3, 0, 8, 8, 8, 8]
    vertices[0, 0, 4:8] += 5e-9
    vertices[0, 0, 4:8] = vertices[0, 0, [5, 6, 7, 4]]
    assert sort_overlap_vertices(vertices.double(), mask)[0, 0].tolist() == [0, 1, 2, 3, 0, 8, 8, 8, 8]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few(count, backend):
    vertices, mask = candidates({index: (math.cos(index), math.sin(index)) for index in range(count)})
    mask[0, 0, 8] = False
    assert sort_overlap_vertices(vertices, mask)[0, 0].tolist() == [8] * 9
    assert sort_overlap_vertices(vertices * math.nan, mask)[0, 0].tolist() == [8] * 9


def test_those_that_matter_least_are_left_out(backend):
    corners = [(1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)]
    places = dict(enumerate(corners))
    places |= {4 + i: (x * (1 + 1e-7), y) for i, (x, y) in enumerate(corners)}
    places |= {8 + i: (x, y * (1 + 2e-7)) for i, (x, y) in enumerate(corners)}
    vertices, mask = candidates(places)
    found = sort_overlap_vertices(vertices, mask)[0, 0].long()
    assert found[8] == found[0]
    assert len(set(found.tolist())) == 8
    x, y = vertices[0, 0, found].double().T
    assert ((x[:-1] * y[1:] - y[:-1] * x[1:]).sum() / 2).item() == pytest.approx(4, abs=1e-5)


def test_all_are_valid(backend):
    angles = torch.arange(24) * 2 * math.pi / 24 + 0.01
    vertices = torch.stack((angles.cos(), angles.sin()), 1).view(1, 1, 24, 2)
    found = sort_overlap_vertices(vertices, torch.ones(1, 1, 24, dtype=torch.bool))[0, 0]
    assert found[8] == found[0]
    assert (found[:8].diff() > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
def test_backends_agree_on_anything(seed, share, broken):
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(seed)
    vertices = torch.randint(-4, 5, (2, 6, 24, 2), generator=generator) + 0.25
    vertices[:, :, :8] += torch.rand(2, 6, 8, 2, generator=generator)
    if broken:
        vertices[torch.rand(2, 6, 24, 2, generator=generator) < 0.05] = math.nan
    mask = torch.rand(2, 6, 24, generator=generator) < share
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for backend in ("cpu", "reference"):
            patch.setenv("KERNELGRAFT_BACKEND", backend)
            found.append(sort_overlap_vertices(vertices, mask))
    assert torch.equal(*found)
    assert ((found[0] >= 0) & (found[0] < 24)).all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_few_or_none(shape, dtype, backend):
    vertices = torch.randn(*shape, 2, 24).to(dtype).mT
    assert sort_overlap_vertices(vertices, torch.rand(*shape, 24) < 0.3).shape == (*shape, 9)


def test_it_is_a_sound_op():
    torch.library.opcheck(SORT._overload, (torch.randn(2, 3, 24, 2), torch.rand(2, 3, 24) < 0.3))


@pytest.mark.parametrize(
    ("vertices", "mask", "message"),
    [
        (torch.zeros(1, 2, 23, 2), torch.zeros(1, 2, 23).bool(), r"vertices is torch\.float32 \(1, 2, 23, 2\)"),
        (torch.zeros(1, 2, 24, 2), torch.zeros(1, 2, 24), r"mask is torch\.float32"),
        (torch.zeros(1, 2, 24, 2), torch.zeros(1, 3, 24).bool(), r"mask is torch\.bool \(1, 3, 24\)"),
    ],
)
def test_what_is_wrong_is_named(vertices, mask, message):
    with pytest.raises(ValueError, match=message):
        sort_overlap_vertices(vertices, mask)
