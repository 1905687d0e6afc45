"""The sparse engine on a GPU: every dataflow against the reference, maps, layers, and what training needs of them."""

import pytest
import torch

from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_core.sparse import ConvGeometry, Coordinates, KernelMap, SparseTensor, sparse_conv
from kernelgraft_core.sparse.conv import reference
from kernelgraft_core.sparse.models import MinkUNet
from kernelgraft_core.sparse.pair_gemm.ops import pair_gemm

RATIO = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=["fp16", "bf16", "fp32"])
DATAFLOWS = [
    "auto", "implicit_gemm", "implicit_gemm:1", "implicit_gemm:2", "implicit_gemm:3", "implicit_gemm:4",
    "fetch_on_demand", "fetch_on_demand_atomic", "gather_scatter",
]  # fmt: skip
GEOMETRIES = {
    "submanifold": ConvGeometry.of(3, 3, submanifold=True),
    "strided": ConvGeometry.of(3, 3, 2, 1),
    "halving": ConvGeometry.of(3, 2, 2),
    "large": ConvGeometry.of(3, 5, dilation=2, submanifold=True),
}


def a_map(geometry, device, sites=4000):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(40, (sites, 4), generator=generator)
    indices[:, 0] %= 2
    indices = indices.unique(dim=0)
    return KernelMap.of(geometry, Coordinates(indices[torch.randperm(len(indices))].to(device), (40, 40, 40), 2))


def check(known, cin, cout, groups, dtype, dataflow):
    device = known.neighbors.device
    shapes = (len(known.inputs), cin), (known.geometry.volume, groups, cin // groups, cout // groups), (cout,)
    leaves = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]
    grad = torch.randn(len(known.outputs), cout).to(device, dtype)

    def run():
        out = sparse_conv(*leaves, known.neighbors, known.symmetric, "none", dataflow)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    found = run()
    x, weight, bias = (leaf.detach().double() for leaf in leaves)
    wanted = (
        reference.sparse_conv(x, weight, bias, known.neighbors),
        reference.sparse_conv_dgrad(grad.double(), weight, known.neighbors, len(x)),
        reference.sparse_conv_wgrad(x, grad.double(), known.neighbors, groups),
        grad.double().sum(0),
    )
    for name, right, value in zip(("y", "x", "weight", "bias"), wanted, found, strict=True):
        assert_close(name, right, value, RATIO[dtype] * (3 if dataflow == "gather_scatter" else 1))
    if "atomic" not in dataflow:
        assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))


@DTYPES
@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_dataflow_equals_the_reference(geometry, dataflow, dtype, device):
    check(a_map(GEOMETRIES[geometry], device), 64, 96, 1, dtype, dataflow)


@DTYPES
@pytest.mark.parametrize(
    ("cin", "cout", "groups"),
    [(1, 1, 1), (4, 16, 1), (16, 16, 1), (33, 70, 1), (256, 256, 1), (32, 32, 32), (64, 32, 2)],
    ids=str,
)
def test_any_channels(cin, cout, groups, dtype, device):
    check(a_map(GEOMETRIES["submanifold"], device), cin, cout, groups, dtype, "auto")


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_maps_are_those_of_a_cpu(geometry, device):
    known = a_map(GEOMETRIES[geometry], device)
    at_home = Coordinates(known.inputs.indices.cpu(), known.inputs.spatial_shape, 2)
    wanted = KernelMap.of(GEOMETRIES[geometry], at_home)
    assert torch.equal(known.outputs.indices.cpu(), wanted.outputs.indices)
    assert torch.equal(known.neighbors.cpu(), wanted.neighbors)
    assert torch.equal(known.inverse.neighbors.cpu(), wanted.inverse.neighbors)


def test_no_rows(device):
    none = torch.full((3, 27), -1, dtype=torch.int32, device=device)
    x, weight = torch.randn(5, 8, device=device), torch.randn(27, 1, 8, 4, device=device)
    assert sparse_conv(x, weight, None, none).eq(0).all()
    assert sparse_conv(x, weight, None, none[:0]).shape == (0, 4)
    assert sparse_conv(x[:0], weight, None, none).eq(0).all()


@DTYPES
def test_pairs_equal_the_reference(dtype, device, monkeypatch):
    counts = torch.randint(0, 60, (40,))
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(device)
    inputs, outputs = (torch.randint(size, (int(starts[-1]),), device=device) for size in (300, 200))
    x, weight = (torch.randn(shape).to(device, dtype) for shape in ((300, 48), (40, 1, 48, 64)))
    scale = torch.rand(len(inputs), device=device)
    found = pair_gemm(x, weight, inputs, outputs, starts, 200, scale)
    assert torch.equal(found, pair_gemm(x, weight, inputs, outputs, starts, 200, scale))
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    wanted = pair_gemm(x.double(), weight.double(), inputs, outputs, starts, 200, scale)
    assert_close("y", wanted, found, 3 * RATIO[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_network_trains_under_autocast(dtype, device):
    torch.manual_seed(0)
    known = a_map(GEOMETRIES["submanifold"], device)
    model = MinkUNet(4, 5, 0.5).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    feats, losses = torch.randn(len(known.inputs), 4, device=device), []
    labels = (feats[:, 0] > 0).long()
    for _ in range(8):
        with torch.autocast("cuda", dtype):
            logits = model(SparseTensor(feats, known.inputs))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dataflow", ["implicit_gemm", "implicit_gemm:3", "fetch_on_demand"])
def test_a_cuda_graph_replays_it(dataflow, device):
    known = a_map(GEOMETRIES["submanifold"], device)
    x = torch.randn(len(known.inputs), 64, device=device, dtype=torch.float16)
    weight = torch.randn(27, 1, 64, 64, device=device, dtype=torch.float16)
    arguments = weight, None, known.neighbors, True, "relu", dataflow
    sparse_conv(x, *arguments)  # compiles, packs the map
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_conv(x, *arguments)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, sparse_conv(x, *arguments))
