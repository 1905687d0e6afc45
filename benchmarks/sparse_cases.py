"""Sparse convolution on real scans beside what people run on a CPU today; importing this registers the cases.

The peer is the plain torch recipe: for every tap gather rows, multiply, add them where they belong. spconv is measured
as well where it is installed; it calls its CPU kernels a help for debugging.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.sparse import ConvGeometry, Coordinates, KernelMap, sparse_conv
from kernelgraft_core.sparse.conv import cpu, reference

from .cases import Case, Prepared, Shape, Variant, register, require_backend
from .clouds import CLOUDS, load_cloud

CHANNELS = (16, 32, 64, 128)
SUBMANIFOLD = ConvGeometry.of(3, 3, submanifold=True)
STRIDED = ConvGeometry.of(3, 3, 2, 1)


def _spconv() -> Any:
    try:
        import spconv.pytorch as spconv
        from spconv.core import ConvAlgo
        from spconv.pytorch import ops
    except ImportError:
        return None
    assert spconv
    return ops, ConvAlgo.Native


# -- kernel maps ------------------------------------------------------------------------------------------------------


def _prepare_map(cloud: str, shape: Shape) -> Prepared:
    """From unsorted coordinates to pairs of rows, tap by tap; the result compared is how many pairs there are."""
    indices, grid, _ = load_cloud(cloud)
    indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]

    def ours() -> Tensor:
        pairs = cpu.make_pairs(KernelMap.of(SUBMANIFOLD, Coordinates(indices, grid, 1)).neighbors)
        return pairs.starts[-1:]

    def searched() -> Tensor:
        steps = torch.tensor([(grid[1] + 2) * (grid[2] + 2), grid[2] + 2, 1])
        keys, order = ((indices[:, 1:].long() + 1) * steps).sum(1).sort()
        total = 0
        for tap in itertools.product((-1, 0, 1), repeat=3):
            wanted = keys + int((torch.tensor(tap) * steps).sum())
            at = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
            outputs = (keys[at] == wanted).nonzero().squeeze(1)
            pairs = order[at[outputs]], order[outputs]
            total += len(pairs[0])
        return torch.tensor([total])

    variants = {
        "kernelgraft": Variant(ours, 0.0, "cpu", "int32"),
        "torch sort + searchsorted": Variant(searched, 0.0, "torch", "int64"),
    }
    if (known := _spconv()) is not None:
        ops, native = known
        ones, zeros = [1] * 3, [0] * 3

        def theirs() -> Tensor:
            counts = ops.get_indice_pairs(indices, 1, list(grid), native, [3] * 3, ones, zeros, ones, zeros, True)[2]
            return 2 * counts.sum() + len(indices)  # half of the taps, without the middle one

        variants["spconv"] = Variant(lambda: theirs().view(1), 1e-3, "spconv", "int32")
    return Prepared(searched().double(), variants)


# -- convolutions -----------------------------------------------------------------------------------------------------


def gather_multiply_add(x: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, pairs: Any) -> Tensor:
    """The recipe in plain torch; differentiable. ``pairs``: input and output rows of every tap."""
    out = x.new_zeros((len(neighbors), weight.shape[3]))
    for kernel, (inputs, outputs) in zip(weight, pairs, strict=True):
        out = out.index_add(0, outputs, x.index_select(0, inputs) @ kernel[0])
    return out if bias is None else out + bias


def tap_pairs(neighbors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What :func:`gather_multiply_add` takes."""
    found = []
    for column in neighbors.T:
        outputs = (column >= 0).nonzero().squeeze(1)
        found.append((column[outputs].long(), outputs))
    return found


def _inputs(geometry: ConvGeometry, cloud: str, shape: Shape) -> tuple[KernelMap, list[Tensor], Tensor]:
    """The map, features and weight, and a gradient of the output."""
    indices, grid, _ = load_cloud(cloud)
    known = KernelMap.of(geometry, Coordinates(indices, grid, 1))
    generator, c = torch.Generator().manual_seed(0), shape["c"]
    x = torch.randn(len(indices), c, generator=generator)
    weight = torch.randn(27, 1, c, c, generator=generator) / (27 * c) ** 0.5
    require_backend("sparse_conv", "cpu", "cpu", x, weight, None, known.neighbors, known.symmetric, "none", "auto")
    return known, [x, weight], torch.randn(len(known.outputs), c, generator=generator)


def _prepare_forward(geometry: ConvGeometry, cloud: str, shape: Shape) -> Prepared:
    known, (x, weight), _ = _inputs(geometry, cloud, shape)
    pairs = tap_pairs(known.neighbors)
    variants = {
        "kernelgraft": _float32(lambda: sparse_conv(x, weight, None, known.neighbors, known.symmetric), "cpu"),
        "torch gather, multiply, add": _float32(
            lambda: gather_multiply_add(x, weight, None, known.neighbors, pairs), "torch"
        ),
    }
    if geometry.submanifold and (peer := _spconv()) is not None:
        ops, native = peer
        ones, zeros = [1] * 3, [0] * 3
        _, found, counts = ops.get_indice_pairs(
            known.inputs.indices, 1, list(known.inputs.spatial_shape), native, [3] * 3, ones, zeros, ones, zeros, True
        )
        filters = weight[:, 0].view(3, 3, 3, *weight.shape[2:]).permute(4, 0, 1, 2, 3).contiguous()
        variants["spconv"] = _float32(
            lambda: ops.indice_conv(x, filters, found, counts, len(x), False, True, native), "spconv"
        )
    exact = reference.sparse_conv(x.double(), weight.double(), None, known.neighbors, False)
    return Prepared(exact, variants)


def _prepare_training(geometry: ConvGeometry, cloud: str, shape: Shape) -> Prepared:
    """Forward and both gradients; the gradients are what is compared."""
    known, leaves, grad = _inputs(geometry, cloud, shape)
    pairs = tap_pairs(known.neighbors)
    for leaf in leaves:
        leaf.requires_grad_()

    def train(run: Callable[..., Tensor]) -> Tensor:
        found = torch.autograd.grad(run(*leaves), leaves, grad)
        return torch.cat([each.flatten() for each in found])

    variants = {
        "kernelgraft": _float32(
            lambda: train(lambda x, w: sparse_conv(x, w, None, known.neighbors, known.symmetric)), "cpu"
        ),
        "torch gather, multiply, add": _float32(
            lambda: train(lambda x, w: gather_multiply_add(x, w, None, known.neighbors, pairs)), "torch"
        ),
    }
    x, weight = (leaf.detach().double() for leaf in leaves)
    exact = (
        reference.sparse_conv_dgrad(grad.double(), weight, known.neighbors, len(x), False),
        _exact_wgrad(x, grad.double(), pairs),
    )
    return Prepared(torch.cat([each.flatten() for each in exact]), variants)


def _prepare_threads(cloud: str, shape: Shape) -> Prepared:
    """One submanifold layer on one thread and on two, in turns."""
    known, (x, weight), _ = _inputs(SUBMANIFOLD, cloud, shape)

    def run() -> Tensor:
        return sparse_conv(x, weight, None, known.neighbors, True)

    variants = {
        name: Variant(run, 1e-5, "cpu", "float32", context=functools.partial(_on_threads, threads))
        for threads, name in ((1, "one thread"), (2, "two threads"))
    }
    return Prepared(reference.sparse_conv(x.double(), weight.double(), None, known.neighbors), variants)


def _prepare_bfloat16(cloud: str, shape: Shape) -> Prepared:
    """One submanifold layer in bfloat16, beside float32 and beside the recipe in bfloat16."""
    known, (x, weight), _ = _inputs(SUBMANIFOLD, cloud, shape)
    half = x.bfloat16(), weight.bfloat16()
    pairs = tap_pairs(known.neighbors)

    def run(*operands: Tensor) -> Tensor:
        return sparse_conv(*operands, None, known.neighbors, True)

    def recipe() -> Tensor:
        return gather_multiply_add(*half, None, known.neighbors, pairs)

    variants = {
        "kernelgraft bfloat16": Variant(functools.partial(run, *half), 2e-2, "cpu", "bfloat16"),
        "kernelgraft float32": _float32(functools.partial(run, x, weight), "cpu"),
        "torch bfloat16": Variant(recipe, 5e-2, "torch", "bfloat16"),
    }
    return Prepared(reference.sparse_conv(x.double(), weight.double(), None, known.neighbors), variants)


@contextlib.contextmanager
def _on_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


GPU_DATAFLOWS = ("implicit_gemm", *(f"implicit_gemm:{s}" for s in (1, 2, 3, 4)), "fetch_on_demand", "gather_scatter")


def _prepare_gpu(shape: Shape) -> Prepared:
    """A submanifold layer in float16: every dataflow on a map that is there, and the first guess with its map."""
    indices, grid, _ = load_cloud("semantickitti")
    sites, c = indices.cuda(), shape["c"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(sites), c, generator=generator).cuda().half()
    weight = (torch.randn(27, 1, c, c, generator=generator) / (27 * c) ** 0.5).cuda().half()
    known = KernelMap.of(SUBMANIFOLD, Coordinates(sites, grid, 1))
    require_backend("sparse_conv", "triton", "cuda", x, weight, None, known.neighbors, True, "none", "auto")
    pairs = tap_pairs(known.neighbors)

    def with_map() -> Tensor:
        made = KernelMap.of(SUBMANIFOLD, Coordinates(sites, grid, 1))
        return sparse_conv(x, weight, None, made.neighbors, True)

    runs: dict[str, Callable[[], Tensor]] = {
        f"kernelgraft {name}": functools.partial(sparse_conv, x, weight, None, known.neighbors, True, "none", name)
        for name in GPU_DATAFLOWS
    }
    runs["kernelgraft, map included"] = with_map
    runs["torch gather, multiply, add"] = lambda: gather_multiply_add(x, weight, None, known.neighbors, pairs)
    variants = {name: Variant(run, 2e-2, "triton", "float16") for name, run in runs.items()}
    return Prepared(reference.sparse_conv(x.double(), weight.double(), None, known.neighbors), variants)


def _exact_wgrad(x: Tensor, grad: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([x[inputs].T @ grad[outputs] for inputs, outputs in pairs])


def _float32(run: Callable[[], Tensor], backend: str) -> Variant:
    return Variant(run, 1e-5, backend, "float32")


def _flops(geometry: ConvGeometry, cloud: str, passes: int, shape: Shape) -> float:
    indices, grid, _ = load_cloud(cloud)
    pairs = int((KernelMap.of(geometry, Coordinates(indices, grid, 1)).neighbors >= 0).sum())
    return 2.0 * passes * pairs * shape["c"] ** 2


_SHAPES = tuple({"c": c} for c in CHANNELS)
for _cloud in CLOUDS:
    register(
        Case(
            f"sparse_map_{_cloud}", "sparse_neighbors", "cpu", "torch sort + searchsorted", ({"taps": 27},),
            functools.partial(_prepare_map, _cloud),
        )
    )  # fmt: skip
    for _name, _geometry, _prepare, _passes in (
        ("sparse_conv", SUBMANIFOLD, _prepare_forward, 1),
        ("sparse_conv_strided", STRIDED, _prepare_forward, 1),
        ("sparse_conv_training", SUBMANIFOLD, _prepare_training, 3),
    ):
        register(
            Case(
                f"{_name}_{_cloud}", "sparse_conv", "cpu", "torch gather, multiply, add", _SHAPES,
                functools.partial(_prepare, _geometry, _cloud), functools.partial(_flops, _geometry, _cloud, _passes),
            )
        )  # fmt: skip
    register(
        Case(
            f"sparse_conv_threads_{_cloud}", "sparse_conv", "cpu", "one thread", _SHAPES,
            functools.partial(_prepare_threads, _cloud), functools.partial(_flops, SUBMANIFOLD, _cloud, 1),
        )
    )  # fmt: skip
    register(
        Case(
            f"sparse_conv_bfloat16_{_cloud}", "sparse_conv", "cpu", "kernelgraft float32", _SHAPES,
            functools.partial(_prepare_bfloat16, _cloud), functools.partial(_flops, SUBMANIFOLD, _cloud, 1),
        )
    )  # fmt: skip
register(
    Case(
        "sparse_conv", "sparse_conv", "cuda", "torch gather, multiply, add", tuple({"c": c} for c in (64, 128, 256)),
        _prepare_gpu, functools.partial(_flops, SUBMANIFOLD, "semantickitti", 1),
    )
)  # fmt: skip
