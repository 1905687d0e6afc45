"""Products of pairs: every backend equals one dense product for each relation, forward and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.runtime.testing import assert_close, poison_empty
from kernelgraft_core.sparse.pair_gemm.merging import merge
from kernelgraft_core.sparse.pair_gemm.ops import PAIR_GEMM, pair_gemm
from kernelgraft_core.sparse.relational import RelationalConv, relational_edges

RATIO = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


def a_graph(pairs, relations, sources, targets, seed=0, skewed=False):
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(relations, (pairs,), generator=generator)
    if skewed:
        kinds = torch.where(torch.rand(pairs, generator=generator) < 0.9, 1 % relations, kinds)
    counts = torch.bincount(kinds, minlength=relations)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return (
        torch.randint(max(1, sources), (pairs,), generator=generator),
        torch.randint(max(1, targets), (pairs,), generator=generator),
        starts,
    )


def adjacency(inputs, outputs, starts, scale, sources, targets):
    """One dense matrix ``(targets, sources)`` for each relation."""
    scale = torch.ones(len(inputs)) if scale is None else scale
    found = torch.zeros(len(starts) - 1, targets, sources, dtype=torch.float64)
    for k, (first, last) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        pairs = outputs[first:last], inputs[first:last]
        found[k].index_put_(pairs, scale[first:last].double(), accumulate=True)
    return found


@pytest.mark.parametrize("dtype", RATIO, ids=["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("pairs", "relations", "sources", "targets", "skewed"),
    [(1, 1, 1, 1, False), (400, 7, 30, 50, False), (3000, 40, 64, 20, True), (90, 200, 300, 700, False)],
    ids=str,
)
def test_is_a_dense_product_for_each_relation(pairs, relations, sources, targets, skewed, scaled, dtype, backend):
    if dtype == torch.float64 and backend == "cpu":
        pytest.skip("the reference's")
    inputs, outputs, starts = a_graph(pairs, relations, sources, targets, skewed=skewed)
    scale = torch.rand(pairs) if scaled else None
    x, weight = torch.randn(sources, 12).to(dtype), torch.randn(relations, 3, 4, 5).to(dtype)
    grad = torch.randn(targets, 15).to(dtype)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with poison_empty():
        out = pair_gemm(*leaves, inputs, outputs, starts, targets, scale)
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    assert [each.dtype for each in found] == [dtype] * 3
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dense = torch.einsum(
        "kts,sgi,kgio->tgo", adjacency(inputs, outputs, starts, scale, sources, targets), exact[0].unflatten(1, (3, 4)),
        exact[1],
    ).flatten(1)  # fmt: skip
    for name, wanted, value in zip(
        ("y", "x", "weight"), [dense.detach(), *torch.autograd.grad(dense, exact, grad.double())], found, strict=True
    ):
        assert_close(name, wanted, value, RATIO[dtype])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (4, 3, 0, 5), (4, 3, 4, 0)], ids=str)
def test_nothing_to_multiply(shape, backend):
    pairs, relations, cin, cout = shape
    inputs, outputs, starts = a_graph(pairs, relations, 6, 5)
    x, weight = torch.randn(6, cin, requires_grad=True), torch.randn(relations, cin, cout, requires_grad=True)
    out = pair_gemm(x, weight, inputs, outputs, starts, 5)
    assert torch.equal(out, torch.zeros(5, cout))
    out.sum().backward()
    assert x.grad.eq(0).all()
    assert weight.grad.eq(0).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_merging_keeps_every_pair_once(data):
    sources, targets, relations = (data.draw(st.integers(1, 6)) for _ in range(3))
    pairs, tile = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 8))
    inputs, outputs, starts = a_graph(pairs, relations, sources, targets, data.draw(st.integers(0, 99)))
    scale = torch.rand(pairs) if data.draw(st.booleans()) else None
    merged = merge(inputs, outputs, starts, scale, (sources, targets), tile)
    sums = torch.eye(sources)[merged.inputs] if merged.sums is None else merged.sums.to_dense()[merged.inputs]
    found = torch.zeros(relations, targets, sources, dtype=torch.float64)
    found[merged.relations, merged.outputs] = sums.double()
    assert len(set(zip(merged.relations.tolist(), merged.outputs.tolist(), strict=True))) == len(merged.outputs)
    wanted = adjacency(inputs, outputs, starts, scale, sources, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    tiles = merged.outputs // tile * relations + merged.relations
    assert (tiles[1:] >= tiles[:-1]).all()


def test_threads_do_not_change_the_result(monkeypatch):
    pytest.importorskip("numba")
    inputs, outputs, starts = a_graph(4000, 9, 900, 800)
    x, weight, before, found = torch.randn(900, 20), torch.randn(9, 20, 20), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(pair_gemm(x, weight, inputs, outputs, starts, 800))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_it_is_a_sound_op():
    inputs, outputs, starts = a_graph(40, 3, 9, 8)
    x, weight = torch.randn(9, 4, requires_grad=True), torch.randn(3, 1, 4, 5, requires_grad=True)
    torch.library.opcheck(PAIR_GEMM._overload, (x, weight, inputs, outputs, starts, torch.rand(40), 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3)}, r"x is torch\.float32 \(4, 3\), expected floating point \(N, 2\)"),
        ({"weight": torch.zeros(2, 2)}, r"weight is \(2, 2\)"),
        ({"weight": torch.zeros(2, 2, 3).double()}, r"weight is torch\.float64, x torch\.float32"),
        ({"inputs": torch.zeros(3)}, r"inputs is torch\.float32 \(3,\), expected torch\.int64"),
        ({"outputs": torch.zeros(2, dtype=torch.int64)}, r"outputs is torch\.int64 \(2,\), expected"),
        ({"inputs": torch.tensor([0, 4, 1])}, "inputs goes from 0 to 4, expected 0 to 3"),
        ({"outputs": torch.tensor([0, -1, 1])}, "outputs goes from -1 to 1, expected 0 to 4"),
        ({"starts": torch.tensor([0, 2])}, r"starts is torch\.int64 \(2,\), expected torch\.int64 \(3,\)"),
        ({"starts": torch.tensor([0, 2, 4])}, r"starts is \[0, 2, 4\], expected to ascend from 0 to 3"),
        ({"rows": -1}, "rows is -1"),
        ({"scale": torch.ones(2)}, r"scale is torch\.float32 \(2,\)"),
        ({"scale": torch.ones(3, requires_grad=True)}, "requires_grad = True"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change, message):
    right = {
        "x": torch.zeros(4, 2), "weight": torch.zeros(2, 2, 3), "inputs": torch.tensor([0, 1, 3]),
        "outputs": torch.tensor([0, 4, 1]), "starts": torch.tensor([0, 2, 3]), "rows": 5, "scale": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pair_gemm(**right | change)


@pytest.mark.parametrize("options", [{}, {"bases": 3}, {"blocks": 2}, {"aggregation": "sum", "root_weight": False}])
def test_relational_convolution_is_its_definition(options):
    torch.manual_seed(0)
    edges, types = torch.randint(20, (2, 150)), torch.randint(6, (150,))
    layer = RelationalConv(8, 4, 7, **options)
    x = torch.randn(20, 8)
    weight = layer.weight
    if layer.comp is not None:
        weight = torch.einsum("rb,bio->rio", layer.comp, layer.weight)
    wanted = torch.zeros(20, 4) if layer.root is None else x @ layer.root
    for i in range(20):
        for r in range(7):
            near = edges[0, (edges[1] == i) & (types == r)]
            if len(near):
                reduced = x[near].sum(0) if layer.aggregation == "sum" else x[near].mean(0)
                block = torch.block_diag(*weight[r]) if weight.dim() == 4 else weight[r]
                wanted[i] += reduced @ block
    torch.testing.assert_close(layer(x, edges, types), wanted + layer.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("edges", "types", "message"),
    [
        (torch.zeros(3, 2).long(), torch.zeros(2).long(), r"edge_index is torch\.int64 \(3, 2\)"),
        (torch.zeros(2, 2).long(), torch.zeros(3).long(), r"edge_type is torch\.int64 \(3,\)"),
        (torch.zeros(2, 2).long(), torch.tensor([0, 7]), "edge_type goes from 0 to 7, expected 0 to 6"),
    ],
)
def test_edges_that_are_wrong_are_named(edges, types, message):
    with pytest.raises(ValueError, match=message):
        relational_edges(edges, types, 7, 4)


@pytest.mark.parametrize("changed", ["scale", "outputs", "starts"])
def test_tensors_that_come_and_go_are_told_apart(changed, backend):
    inputs, _, _ = a_graph(20, 2, 6, 6)
    x, weight = torch.randn(6, 4), torch.randn(2, 4, 5)
    for value in range(1, 6):
        made = {"outputs": torch.arange(20) % 6, "starts": torch.tensor([0, 9, 20]), "scale": torch.ones(20)}
        made[changed] = {"scale": torch.full((20,), float(value)), "outputs": torch.arange(20) % value,
                         "starts": torch.tensor([0, 2 * value, 20])}[changed]  # fmt: skip
        found = pair_gemm(x, weight, inputs, rows=6, **made)
        dense = adjacency(inputs, made["outputs"], made["starts"], made["scale"], 6, 6)
        wanted = torch.einsum("kts,si,kio->to", dense, x.double(), weight.double())
        assert_close("y", wanted, found, 1e-6)


def test_edges_that_come_and_go_are_told_apart():
    layer, x = RelationalConv(4, 4, 3), torch.randn(20, 4)
    edges = torch.stack((torch.arange(20), torch.arange(20)))
    with torch.no_grad():
        for kind in range(3):
            found = layer(x, edges, torch.full((20,), kind))
            torch.testing.assert_close(found, x @ (layer.weight[kind] + layer.root) + layer.bias)


def test_relational_convolution_trains_within_autocast():
    layer, x = RelationalConv(8, 4, 3), torch.randn(20, 8, requires_grad=True)
    edges, kinds = torch.randint(20, (2, 50)), torch.randint(3, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, edges, kinds).float().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"bases": 0}, {"blocks": 0}, {"bases": 2, "blocks": 2}, {"blocks": 3}])
def test_sizes_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=r"bases|blocks"):
        RelationalConv(8, 4, 3, **options)
