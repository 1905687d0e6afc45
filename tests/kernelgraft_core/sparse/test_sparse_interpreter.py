"""The Triton kernels of the sparse engine in the interpreter, on CPU tensors, against the reference in float64."""

import os

import pytest
import torch

from kernelgraft_core.runtime.testing import assert_close, poison_empty
from kernelgraft_core.sparse.conv import reference
from kernelgraft_core.sparse.geometry import ConvGeometry
from kernelgraft_core.sparse.kernel_map import KernelMap
from kernelgraft_core.sparse.maps import reference as maps_reference

from .clouds import random_sites

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_interpreter.py"),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernelgraft_core.sparse.conv import triton
    from kernelgraft_core.sparse.maps import triton as maps_triton
else:
    triton = maps_triton = None

DATAFLOWS = [
    "auto",
    "implicit_gemm",
    "implicit_gemm:1",
    "implicit_gemm:3",
    "fetch_on_demand",
    "fetch_on_demand_atomic",
]
RATIO = {torch.float32: 2e-6, torch.float16: 1e-3}


def a_map(size=3, seed=0, **options):
    geometry = ConvGeometry.of(3, size, **options)
    return KernelMap.of(geometry, random_sites(3, seed, density=0.15))


def operands(known, cin, cout, groups, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (len(known.inputs), cin),
        (known.geometry.volume, groups, cin // groups, cout // groups),
        (cout,),
        (len(known.outputs), cout),
    )
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("dtype", RATIO, ids=["fp32", "fp16"])
def test_every_dataflow_is_the_reference(dataflow, dtype):
    known = a_map(submanifold=True)
    x, weight, bias, grad = operands(known, 24, 20, 1, dtype)
    wide = [each.double() for each in (x, weight, bias, grad)]
    direction = dataflow
    with poison_empty():
        found = triton.sparse_conv(x, weight, bias, known.neighbors, True, "relu", dataflow)
        dgrad = triton.sparse_conv_dgrad(grad, weight, known.neighbors, len(x), True, direction)
    wanted = reference.sparse_conv(*wide[:3], known.neighbors, activation="relu")
    assert_close("y", wanted, found, RATIO[dtype])
    wanted = reference.sparse_conv_dgrad(wide[3], wide[1], known.neighbors, len(x))
    assert_close("x", wanted, dgrad, RATIO[dtype])


@pytest.mark.parametrize("dataflow", ["implicit_gemm:2", "fetch_on_demand"])
@pytest.mark.parametrize(
    ("cin", "cout", "groups"), [(1, 1, 1), (16, 64, 1), (40, 33, 1), (8, 8, 8), (6, 4, 2)], ids=str
)
def test_any_channels(dataflow, cin, cout, groups):
    known = a_map(2, stride=2)
    x, weight, bias, grad = operands(known, cin, cout, groups, torch.float32)
    wide = [each.double() for each in (x, weight, bias, grad)]
    with poison_empty():
        found = triton.sparse_conv(x, weight, None, known.neighbors, False, "none", dataflow)
        dgrad = triton.sparse_conv_dgrad(grad, weight, known.neighbors, len(x), False, dataflow)
        wgrad = triton.sparse_conv_wgrad(x, grad, known.neighbors, groups, "auto")
    assert_close("y", reference.sparse_conv(*wide[:2], None, known.neighbors), found, 2e-6)
    assert_close("x", reference.sparse_conv_dgrad(wide[3], wide[1], known.neighbors, len(x)), dgrad, 2e-6)
    assert_close("weight", reference.sparse_conv_wgrad(wide[0], wide[3], known.neighbors, groups), wgrad, 2e-6)


def test_no_rows():
    x, weight = torch.randn(5, 8), torch.randn(27, 1, 8, 4)
    none, empty = torch.full((3, 27), -1, dtype=torch.int32), torch.empty(0, 27, dtype=torch.int32)
    with poison_empty():
        assert triton.sparse_conv(x, weight, None, none, False, "none", "auto").equal(torch.zeros(3, 4))
        assert triton.sparse_conv(x, weight, None, empty, False, "none", "auto").shape == (0, 4)
        assert triton.sparse_conv(x[:0], weight, None, none, False, "none", "auto").equal(torch.zeros(3, 4))
        assert triton.sparse_conv_wgrad(x, torch.randn(3, 4), none, 1, "auto").equal(torch.zeros_like(weight))


@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (3, 2), (2, 1), ((1, 3, 5), 1)], ids=str)
@pytest.mark.parametrize("shuffled", [False, True])
def test_maps_are_those_of_the_reference(size, dilation, shuffled, monkeypatch):
    sites = random_sites(3, shuffled=shuffled)
    geometry = ConvGeometry.of(3, size, dilation=dilation, submanifold=True)
    seen = []
    from kernelgraft_core.sparse import kernel_map

    monkeypatch.setattr(kernel_map, "sparse_neighbors", lambda *args: seen.append(args) or args[0])
    kernel_map._neighbors(geometry, sites, sites)
    with poison_empty():
        found = maps_triton.sparse_neighbors(*seen[0])
    wanted = maps_reference.sparse_neighbors(*seen[0])
    assert torch.equal(found, wanted)
    transposed = maps_triton.sparse_transpose(found, len(sites))
    assert torch.equal(transposed, maps_reference.sparse_transpose(wanted, len(sites)))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_pairs_are_those_of_the_reference(groups, scaled):
    from kernelgraft_core.sparse.pair_gemm import reference as pair_reference
    from kernelgraft_core.sparse.pair_gemm import triton as pair_triton

    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([40, 0, 3, 90])
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    inputs, outputs = (torch.randint(size, (133,), generator=generator) for size in (30, 25))
    scale = torch.rand(133, generator=generator) if scaled else None
    x, weight = torch.randn(30, 20, generator=generator), torch.randn(4, groups, 20 // groups, 6, generator=generator)
    grad = torch.randn(25, 6 * groups, generator=generator)
    pairs = inputs, outputs, starts, scale
    wide = x.double(), weight.double()
    with poison_empty():
        found = pair_triton.pair_gemm(x, weight, *pairs, 25)
        wgrad = pair_triton.pair_gemm_wgrad(x, grad, *pairs, groups)
    assert_close("y", pair_reference.pair_gemm(*wide, *pairs, 25), found, 2e-6)
    assert_close("weight", pair_reference.pair_gemm_wgrad(wide[0], grad.double(), *pairs, groups), wgrad, 2e-6)
