"""Sparse convolution: every backend equals dense convolution in float64, forward and every gradient."""

import os
import subprocess
import sys

import pytest
import torch

from kernelgraft_core.runtime.testing import assert_close, poison_empty
from kernelgraft_core.sparse.conv import gather, ops, reference
from kernelgraft_core.sparse.conv.ops import sparse_conv
from kernelgraft_core.sparse.geometry import ConvGeometry
from kernelgraft_core.sparse.kernel_map import KernelMap
from kernelgraft_core.sparse.tensor import SparseTensor

from .clouds import CONVS, TRANSPOSED, dense_weight, random_sites

RATIO = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
CHANNELS = [
    (1, 1, 1),
    (3, 5, 1),
    (16, 16, 1),
    (16, 33, 1),
    (64, 96, 1),
    (70, 130, 1),
    (6, 4, 2),
    (8, 8, 8),
    (64, 32, 2),
]


@pytest.fixture(params=["cpu", "torch", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    if request.param == "torch":  # which has no kernel maps of its own
        monkeypatch.setattr(sys.modules[__name__], "sparse_conv", gathering)
    else:
        monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def gathering(*args, **options):
    """The op by the dataflow that the backend torch has."""
    return ops.sparse_conv(*args[:6], **options | {"dataflow": "gather_scatter"})


def parts(geometry, cin, cout, groups, rows, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, cin), (geometry.volume, groups, cin // groups, cout // groups), (cout,)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def both(found, leaves, grad):
    """The result and the gradients of all leaves."""
    return [found.detach(), *torch.autograd.grad(found, leaves, grad)]


def at(dense, sites):
    return dense.movedim(1, -1)[tuple(sites.indices.long().T)]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 2, "stride": 1, "padding": 2, "dilation": 2},
        {"kernel_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 2])
def test_is_dense_convolution(dimensions, options, groups, backend):
    geometry = ConvGeometry.of(dimensions, **options)
    sites = random_sites(dimensions, dimensions)
    known = KernelMap.of(geometry, sites)
    x, weight, bias = leaves = parts(geometry, 6, 4, groups, len(sites))
    grad = torch.randn(len(known.outputs), 4, dtype=torch.float64)
    if backend == "cpu":
        leaves = x, weight, bias = [leaf.detach().float().requires_grad_() for leaf in leaves]
    found = both(sparse_conv(x, weight, bias, known.neighbors), leaves, grad.to(x.dtype))
    exact = x, weight, bias = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dense = CONVS[dimensions](
        SparseTensor(x, sites).to_dense(),
        dense_weight(weight, geometry.kernel_size),
        bias,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        groups,
    )
    assert dense.shape[2:] == known.outputs.spatial_shape
    for name, wanted, value in zip(
        ("y", "x", "weight", "bias"), both(at(dense, known.outputs), exact, grad), found, strict=True
    ):
        assert_close(name, wanted, value.double(), RATIO[leaves[0].dtype])


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [3, (1, 5, 3)])
def test_submanifold_is_dense_convolution_at_its_sites(size, dilation, backend):
    geometry = ConvGeometry.of(3, size, dilation=dilation, submanifold=True)
    sites = random_sites(3)
    known = KernelMap.of(geometry, sites)
    assert known.symmetric
    x, weight, bias = leaves = parts(geometry, 5, 7, 1, len(sites), dtype=torch.float32)
    grad = torch.randn(len(sites), 7, dtype=torch.float64)
    found = both(sparse_conv(x, weight, bias, known.neighbors, True), leaves, grad.float())
    exact = x, weight, bias = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dense = torch.nn.functional.conv3d(
        SparseTensor(x, sites).to_dense(),
        dense_weight(weight, geometry.kernel_size),
        bias,
        padding=geometry.padding,
        dilation=dilation,
    )
    for name, wanted, value in zip(
        ("y", "x", "weight", "bias"), both(at(dense, sites), exact, grad), found, strict=True
    ):
        assert_close(name, wanted, value.double(), RATIO[torch.float32])


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("options", [{"kernel_size": 2, "stride": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}])
def test_transposed_convolution_is_the_dense_one(dimensions, options, backend):
    geometry = ConvGeometry.of(dimensions, **options)
    sites = random_sites(dimensions, density=0.1)
    known = KernelMap.of(geometry, sites, transposed=True)
    x, weight, bias = leaves = parts(geometry, 3, 4, 1, len(sites), dtype=torch.float32)
    grad = torch.randn(len(known.outputs), 4, dtype=torch.float64)
    found = both(sparse_conv(x, weight, bias, known.neighbors), leaves, grad.float())
    exact = x, weight, bias = [leaf.detach().double().requires_grad_() for leaf in leaves]
    kernel = weight[:, 0].permute(1, 2, 0).reshape(3, 4, *geometry.kernel_size)
    dense = TRANSPOSED[dimensions](SparseTensor(x, sites).to_dense(), kernel, bias, geometry.stride, geometry.padding)
    for name, wanted, value in zip(
        ("y", "x", "weight", "bias"), both(at(dense, known.outputs), exact, grad), found, strict=True
    ):
        assert_close(name, wanted, value.double(), RATIO[torch.float32])


@pytest.mark.parametrize("dtype", RATIO, ids=str)
@pytest.mark.parametrize(("cin", "cout", "groups"), CHANNELS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["submanifold", "strided"])
def test_every_block_of_channels_equals_the_reference(cin, cout, groups, dtype, symmetric, monkeypatch):
    """More rows than a tile, some with no neighbour; memory that is not written is NaN."""
    if dtype != torch.float64:
        pytest.importorskip("numba")
    options = {"submanifold": True} if symmetric else {"stride": 2, "padding": 1}
    geometry = ConvGeometry.of(3, 3, **options)
    sites = random_sites(3, density=0.25, shape=(14, 13, 9))
    known = KernelMap.of(geometry, sites)
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in parts(geometry, cin, cout, groups, len(sites))]
    grad = torch.randn(len(known.outputs), cout, dtype=torch.float64).to(dtype)
    with poison_empty():
        found = both(sparse_conv(*leaves, known.neighbors, symmetric), leaves, grad)
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = both(sparse_conv(*exact, known.neighbors, symmetric), exact, grad.double())
    for name, right, value in zip(("y", "x", "weight", "bias"), wanted, found, strict=True):
        assert value.dtype == dtype
        assert value.is_contiguous()
        assert_close(name, right, value.double(), RATIO[dtype])


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("submanifold", [True, False])
def test_few_rows(rows, submanifold, backend):
    sites = random_sites(3, density=0.0)
    if rows:
        sites = type(sites)(torch.tensor([[1, 2, 3, 4]]), sites.spatial_shape, 2)
    geometry = ConvGeometry.of(3, 3, padding=0 if submanifold else 1, submanifold=submanifold)
    known = KernelMap.of(geometry, sites)
    x, weight, bias = leaves = parts(geometry, 4, 3, 1, rows, dtype=torch.float32)
    out = sparse_conv(x, weight, bias, known.neighbors, submanifold)
    assert out.shape == (len(known.outputs), 3)
    out.sum().backward()
    assert torch.isfinite(torch.cat([leaf.grad.flatten() for leaf in leaves])).all()
    if rows and submanifold:
        torch.testing.assert_close(out, x @ weight[13, 0] + bias)


def test_a_row_that_is_not_finite_spoils_those_that_read_it_and_no_other(backend):
    geometry = ConvGeometry.of(3, 3, submanifold=True)
    sites = random_sites(3)
    known = KernelMap.of(geometry, sites)
    x, weight, bias = (leaf.detach() for leaf in parts(geometry, 4, 20, 1, len(sites), dtype=torch.float32))
    clean = sparse_conv(x, weight, bias, known.neighbors, True)
    x[5] = float("nan")
    out = sparse_conv(x, weight, bias, known.neighbors, True)
    reads = (known.neighbors == 5).any(1)
    assert out[reads].isnan().all()
    assert torch.equal(out[~reads], clean[~reads])


def test_strides_do_not_matter(backend):
    geometry = ConvGeometry.of(3, 3, submanifold=True)
    sites = random_sites(3)
    known = KernelMap.of(geometry, sites)
    x, weight, bias = (leaf.detach() for leaf in parts(geometry, 8, 6, 2, len(sites), dtype=torch.float32))
    wanted = sparse_conv(x, weight, bias, known.neighbors, True)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, weight)]
    neighbors = known.neighbors.T.contiguous().T
    assert not neighbors.is_contiguous()
    assert torch.equal(sparse_conv(*strided, bias.repeat(2)[::2].contiguous() * 0 + bias, neighbors, True), wanted)


def test_threads_change_no_bit():
    pytest.importorskip("numba")
    geometry = ConvGeometry.of(3, 3, submanifold=True)
    sites = random_sites(3, density=0.3, shape=(60, 60, 6))
    known = KernelMap.of(geometry, sites)
    leaves = parts(geometry, 20, 20, 1, len(sites), dtype=torch.float32)
    grad, before, found = torch.randn(len(sites), 20), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(both(sparse_conv(*leaves, known.neighbors, True), leaves, grad))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_autocast_converts_features_and_weight(backend):
    geometry = ConvGeometry.of(3, 3, submanifold=True)
    sites = random_sites(3)
    known = KernelMap.of(geometry, sites)
    leaves = parts(geometry, 8, 8, 1, len(sites), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_conv(*leaves, known.neighbors, True)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}


def test_compiles_to_one_op():
    geometry = ConvGeometry.of(3, 3, 2, 1)
    sites = random_sites(3)
    known = KernelMap.of(geometry, sites)
    leaves = parts(geometry, 8, 8, 1, len(sites), dtype=torch.float32)
    compiled = torch.compile(lambda *a: sparse_conv(*a, known.neighbors).relu(), fullgraph=True, backend="aot_eager")
    found, wanted = compiled(*leaves), sparse_conv(*leaves, known.neighbors).relu()
    assert torch.equal(found, wanted)
    grad = torch.randn_like(found)
    for a, b in zip(both(found, leaves, grad), both(wanted, leaves, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3)}, r"x is \(4, 3\), expected \(N, 4\) for a weight \(8, 1, 4, 2\)"),
        ({"x": torch.zeros(4, 4, dtype=torch.int32)}, r"x is torch\.int32"),
        ({"weight": torch.zeros(8, 4, 2)}, r"weight is \(8, 4, 2\), expected \(K, G"),
        ({"weight": torch.zeros(8, 1, 4, 2, dtype=torch.float64)}, r"weight is torch\.float64, x torch\.float32"),
        ({"bias": torch.zeros(3)}, r"bias is \(3,\).*expected \(2,\)"),
        ({"neighbors": torch.zeros(2, 8)}, r"neighbors is torch\.float32 \(2, 8\)"),
        ({"neighbors": torch.zeros(2, 9, dtype=torch.int32)}, r"\(2, 9\), expected torch\.int32 \(N_out, 8\)"),
        ({"symmetric": True}, "as many outputs as inputs, not 2 and 4"),
        ({"x": torch.zeros(4, 4, device="meta")}, "on cpu, x on meta"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    right = {
        "x": torch.zeros(4, 4),
        "weight": torch.zeros(8, 1, 4, 2),
        "bias": torch.zeros(2),
        "neighbors": torch.full((2, 8), -1, dtype=torch.int32),
        "symmetric": False,
    }
    with pytest.raises(ValueError, match=message):
        sparse_conv(**right | change)


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_other_instruction_sets_compute_the_same(isa, tmp_path):
    pytest.importorskip("numba")
    script = """
import torch
from kernelgraft_core.runtime import cpu_vectors
from kernelgraft_core.sparse.conv import cpu, reference
isa = cpu_vectors.BY_NAME["{isa}"]
cpu_vectors.instruction_set = lambda: isa
torch.manual_seed(0)
neighbors = torch.randint(-40, 90, (90, 27)).clamp(min=-1).int()
for cin, cout in ((5, 3), (16, 40), (33, 17)):
    x, weight, bias = torch.randn(90, cin), torch.randn(27, 1, cin, cout), torch.randn(cout)
    out = cpu.sparse_conv(x, weight, bias, neighbors, False, "none", "auto")
    exact = reference.sparse_conv(x.double(), weight.double(), bias.double(), neighbors, False)
    assert (out - exact).norm() / exact.norm() < 1e-6, (cin, cout)
    found = cpu.sparse_conv_wgrad(x, out, neighbors, 1, "auto")
    exact = reference.sparse_conv_wgrad(x.double(), out.double(), neighbors, 1)
    assert (found - exact).norm() / exact.norm() < 1e-6, (cin, cout)
assert cpu.float_set().isa.name == isa.name
"""
    done = subprocess.run(
        [sys.executable, "-c", script.replace("{isa}", isa)],
        env=os.environ | {"KERNELGRAFT_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dataflow", ["auto", "implicit_gemm", "gather_scatter", "fetch_on_demand"])
def test_an_activation_is_what_follows_a_convolution(dtype, dataflow, backend):
    if backend != "reference" and dataflow not in (
        "auto",
        {"cpu": "implicit_gemm", "torch": "gather_scatter"}[backend],
    ):
        pytest.skip("another backend's")
    known = KernelMap.of(ConvGeometry.of(3, 3, 2, 1), random_sites(3))
    leaves = parts(known.geometry, 6, 9, 1, len(known.inputs), dtype=dtype)
    grad = torch.randn(len(known.outputs), 9).to(dtype)
    found = both(sparse_conv(*leaves, known.neighbors, False, "relu", dataflow), leaves, grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = both(reference.sparse_conv(*exact, known.neighbors).relu(), exact, grad.double())
    for name, right, value in zip(("y", "x", "weight", "bias"), wanted, found, strict=True):
        # Where an output is about 0, half types may take the other side.
        assert_close(name, right, value, RATIO[dtype] if dtype == torch.float32 else 0.05)


def test_each_direction_takes_its_own_dataflow():
    pytest.importorskip("numba")
    known = KernelMap.of(ConvGeometry.of(3, 3, submanifold=True), random_sites(3))
    x, weight, bias = parts(known.geometry, 4, 4, 1, len(known.inputs), dtype=torch.float32)
    config = "gather_scatter,auto,implicit_gemm"
    forward = ops.CONV.explain("cpu", x, weight, bias, known.neighbors, True, "none", config)
    assert forward == {"cpu": "dataflow is gather_scatter", "torch": "runs", "reference": "ready"}
    taken, before = [], (ops.DGRAD, ops.WGRAD)
    with pytest.MonkeyPatch.context() as patch:
        for op in before:
            patch.setattr(ops, "DGRAD" if op is before[0] else "WGRAD", lambda *a, op=op: taken.append(a[-1]) or op(*a))
        sparse_conv(x, weight, bias, known.neighbors, True, dataflow=config).sum().backward()
    assert taken == ["auto", "implicit_gemm"]


def test_a_row_that_is_not_there_is_named():
    pytest.importorskip("numba")
    far = torch.tensor([[0], [100_000_000]], dtype=torch.int32)
    x, weight = torch.ones(2, 4, requires_grad=True), torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match="row 100000000 of x, which has 2"):
        sparse_conv(x, weight, None, far)
    near = torch.tensor([[0], [1]], dtype=torch.int32)
    sparse_conv(x, weight, None, near)
    with pytest.raises(ValueError, match="row 1 of x, which has 1"):
        sparse_conv(x[:1], weight, None, near)


def test_gradients_within_autocast(backend):
    known = KernelMap.of(ConvGeometry.of(3, 3, submanifold=True), random_sites(3))
    leaves = parts(known.geometry, 4, 4, 1, len(known.inputs), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_conv(*leaves, known.neighbors, True)
        found = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in found)


def test_one_map_serves_inputs_of_other_lengths(backend):
    neighbors = torch.tensor([[0, -1], [2, 1]], dtype=torch.int32)
    weight = torch.randn(2, 1, 3, 2)
    for rows in (3, 5, 3):
        x = torch.randn(rows, 3, requires_grad=True)
        sparse_conv(x, weight, None, neighbors).sum().backward()
        assert x.grad.shape == (rows, 3)


def test_an_infinite_gradient_stops_at_an_activation(backend):
    x, weight = -torch.ones(1, 2, requires_grad=True), torch.ones(1, 1, 2, 2)
    out = sparse_conv(x, weight, None, torch.zeros(1, 1, dtype=torch.int32), False, "relu")
    (grad,) = torch.autograd.grad(out, x, torch.full((1, 2), torch.inf))
    assert grad.eq(0).all()


def test_taps_that_are_filled_up_compute_the_same():
    known = KernelMap.of(ConvGeometry.of(3, 3, 2, 1), random_sites(3))
    leaves = [leaf.detach() for leaf in parts(known.geometry, 6, 4, 2, len(known.inputs))]
    split = gather._split(known.neighbors, 0.5)
    assert any(len(batch) > 1 for batch in split.batches)
    found = gather._products(leaves[0], leaves[1], split, len(known.outputs), backwards=False)
    assert_close("y", reference.sparse_conv(leaves[0], leaves[1], None, known.neighbors), found, 1e-13)
    found = gather._products(found, leaves[1].transpose(2, 3), split, len(known.inputs), backwards=True)
    assert found.shape == leaves[0].shape
