"""Whole networks on sparse data beside the same on what people run without us; importing this registers the cases."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from kernelgraft_core.runtime.derived import Derived
from kernelgraft_core.sparse import Coordinates, RelationalConv, SparseTensor, nn
from kernelgraft_core.sparse.maps import reference as map_reference
from kernelgraft_core.sparse.models import MinkUNet

from .cases import Case, Prepared, Shape, UnavailableError, Variant, register
from .clouds import load_cloud
from .sparse_cases import gather_multiply_add, tap_pairs

SWAPPED = {
    "kernel_map": ("sparse_neighbors", "sparse_keys", "sparse_transpose"),
    "coordinates": ("sparse_keys",),
    "maps.exchanged": ("sparse_transpose",),
}
GRAPH = "graphs/fb15k237/train2id.txt"


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, maps come of torch's sort and searchsorted, and layers gather, multiply and add, tap by tap."""
    with contextlib.ExitStack() as stack:
        for module, names in SWAPPED.items():
            for name in names:
                plain = getattr(map_reference, name)
                stack.enter_context(mock.patch(f"kernelgraft_core.sparse.{module}.{name}", plain))
        stack.enter_context(mock.patch("kernelgraft_core.sparse.coordinates.sparse_sort", _sort))
        stack.enter_context(mock.patch("kernelgraft_core.sparse.nn.conv.sparse_conv", _recipe))
        yield


_pairs: Derived[list[tuple[Tensor, Tensor]]] = Derived()


def _recipe(x: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, *_: object) -> Tensor:
    """What people write: pairs of a map are kept, gradients are torch's own."""
    pairs = _pairs.of((neighbors,), lambda: tap_pairs(neighbors))
    if torch.is_grad_enabled():
        return gather_multiply_add(x, weight, bias, neighbors, pairs)
    out = x.new_zeros((len(neighbors), weight.shape[3]))
    for kernel, (inputs, outputs) in zip(weight, pairs, strict=True):
        out.index_add_(0, outputs, x.index_select(0, inputs) @ kernel[0])
    return out if bias is None else out.add_(bias)


def _sort(sites: Tensor, steps: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    keys, order = map_reference.sparse_sort(sites, list(steps))
    return keys, order if len(order) else None


def _prepare_minkunet(shape: Shape) -> Prepared:
    """From coordinates to logits, or to all gradients; the result compared is the logits, or the first gradient."""
    indices, grid, feats = load_cloud("semantickitti")
    torch.manual_seed(0)
    model = MinkUNet(4, 20, shape["percent"] / 100)
    model.train(bool(shape["training"]))

    def run(dtype: torch.dtype = torch.float32, model: torch.nn.Module = model) -> Tensor:
        x = SparseTensor(feats.to(dtype), Coordinates(indices, grid, 1))
        if not shape["training"]:
            with torch.inference_mode():
                out: Tensor = model(x)
                return out
        logits = model(x)
        found = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
        return found[0]

    def plain() -> Tensor:
        with plain_torch():
            return run()

    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.double()
    exact = run(torch.float64)
    model.float().load_state_dict(state)
    # Thirty layers deep, among them batch norms of few rows, rounding alone moves a gradient more than a kernel does.
    ratio = 2e-2 if shape["training"] else 1e-4
    variants = {
        "kernelgraft": Variant(run, ratio, "cpu", "float32"),
        "plain torch": Variant(plain, ratio, "torch", "float32"),
    }
    if not shape["training"]:
        fused = nn.fuse(copy.deepcopy(model))
        variants["kernelgraft, norms fused"] = Variant(lambda: run(model=fused), ratio, "cpu", "float32")
    return Prepared(exact, variants)


def _prepare_relational(shape: Shape) -> Prepared:
    path = Path(os.environ.get("KERNELGRAFT_TEST_DATA", "../shared/data")) / GRAPH
    if not path.is_file():
        raise UnavailableError(f"{path} is not there: set KERNELGRAFT_TEST_DATA")
    try:
        from torch_geometric.nn import FastRGCNConv, RGCNConv
    except ImportError as error:
        raise UnavailableError(f"the peers are PyG's: {error}") from error
    table = torch.from_numpy(np.loadtxt(path, skiprows=1, dtype=np.int64))
    edges, kinds = table[:, :2].T.contiguous(), table[:, 2].contiguous()
    nodes, relations, width = int(edges.max()) + 1, int(kinds.max()) + 1, shape["c"]
    torch.manual_seed(0)
    x = torch.randn(nodes, width)
    layer = RelationalConv(width, width, relations)
    peers = {name: kind(width, width, relations) for name, kind in (("PyG RGCNConv", RGCNConv),
                                                                     ("PyG FastRGCNConv", FastRGCNConv))}  # fmt: skip
    for each in peers.values():
        each.load_state_dict(layer.state_dict())

    def run(module: torch.nn.Module, *args: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = module(*args)
            return out

    exact = run(layer.double(), x.double(), edges, kinds)
    layer.float()
    variants = {"kernelgraft": Variant(lambda: run(layer, x, edges, kinds), 1e-5, "cpu", "float32")}
    for name, module in peers.items():
        variants[name] = Variant(lambda module=module: run(module, x, edges, kinds), 1e-5, "torch", "float32")  # type: ignore[misc]
    return Prepared(exact, variants)


register(
    Case(
        "sparse_minkunet", "sparse_conv", "cpu", "plain torch",
        tuple({"percent": 100, "training": training} for training in (0, 1)), _prepare_minkunet,
    )
)  # fmt: skip
register(Case("rgcn_fb15k237", "pair_gemm", "cpu", "PyG RGCNConv", ({"c": 64},), _prepare_relational))
