"""Modules with the names of another library, made of a facade: what ``import spconv.pytorch`` then finds."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from . import spconv, torchsparse

FACADES = ("spconv", "torchsparse", "torchsparse2")


def facade_modules(facade: str) -> dict[str, ModuleType]:
    """Modules by name, the packages first. ``"torchsparse"`` is version 1.4, ``"torchsparse2"`` version 2.x.

    Raises:
        ValueError: there is no such facade.
    """
    if facade == "spconv":
        return _spconv_modules()
    if facade in ("torchsparse", "torchsparse2"):
        return _torchsparse_modules("1.4" if facade == "torchsparse" else "2")
    raise ValueError(f"facade is {facade!r}, expected one of {', '.join(FACADES)}")


def _module(name: str, doc: str, **contents: Any) -> ModuleType:
    made = ModuleType(name, doc)
    made.__path__ = []  # a package, so that modules below it can be imported
    vars(made).update(contents)
    return made


def _linked(modules: list[ModuleType]) -> dict[str, ModuleType]:
    """Every module an attribute of the one above it."""
    found = {module.__name__: module for module in modules}
    for name, module in found.items():
        above, _, last = name.rpartition(".")
        if above:
            setattr(found[above], last, module)
    return found


def _spconv_modules() -> dict[str, ModuleType]:
    doc = "spconv's interface on kernelgraft's kernels"
    public = {
        name: value for name, value in vars(spconv).items()
        if isinstance(value, type) and value.__module__ == spconv.__name__ and not name.startswith("_")
    }  # fmt: skip
    functions = {"sparse_add": spconv.sparse_add}
    return _linked(
        [
            _module("spconv", doc, __version__=spconv.__version__, ConvAlgo=spconv.ConvAlgo),
            _module("spconv.core", doc, ConvAlgo=spconv.ConvAlgo),
            _module("spconv.pytorch", doc, **public, is_spconv_module=spconv.is_spconv_module),
            _module("spconv.pytorch.functional", doc, **functions, sparse_add_hash_based=spconv.sparse_add),
            *(_module(f"spconv.pytorch.{part}", doc, **public, is_spconv_module=spconv.is_spconv_module)
              for part in ("core", "conv", "modules", "pool", "tables")),
        ]
    )  # fmt: skip


def _torchsparse_modules(level: str) -> dict[str, ModuleType]:
    ts, doc = torchsparse, f"torchsparse {level} on kernelgraft's kernels"
    first = level == "1.4"
    tensors = {"SparseTensor": ts.SparseTensor if first else ts.SparseTensor2, "PointTensor": ts.PointTensor}
    layers = {
        "Conv3d": ts.Conv3d if first else ts.Conv3d2,
        **{
            name: getattr(ts, name)
            for name in ("BatchNorm", "SyncBatchNorm", "GroupNorm", "LayerNorm", "ReLU", "LeakyReLU", "SiLU",
                         "GlobalAvgPool", "GlobalMaxPool")
        },
    }  # fmt: skip
    functions = {
        name: getattr(ts, name)
        for name in ("sphash", "sphashquery", "spcount", "spvoxelize", "spdevoxelize", "calc_ti_weights")
    }
    collate = functools.partial(ts.sparse_collate, level=level)
    batches = {"sparse_collate": collate, "sparse_collate_fn": functools.partial(_collate_samples, collate=collate)}
    return _linked(
        [
            _module("torchsparse", doc, **tensors, cat=ts.cat, __version__="1.4.0" if first else "2.1.0"),
            _module("torchsparse.tensor", doc, **tensors),
            _module("torchsparse.nn", doc, **layers),
            _module("torchsparse.nn.functional", doc, **functions),
            _module("torchsparse.nn.utils", doc, fapply=ts.fapply, get_kernel_offsets=ts.get_kernel_offsets),
            _module("torchsparse.nn.modules", doc, **layers),
            _module("torchsparse.utils", doc),
            _module("torchsparse.utils.collate", doc, **batches),
            _module("torchsparse.utils.quantize", doc, sparse_quantize=ts.sparse_quantize),
        ]
    )


def _collate_samples(inputs: list[Any], collate: Any) -> Any:
    """Samples of one structure as one: tensors of torchsparse are collated, arrays stacked, the rest listed."""
    import numpy as np
    import torch

    first = inputs[0]
    if isinstance(first, dict):
        return {name: _collate_samples([each[name] for each in inputs], collate) for name in first}
    if isinstance(first, torchsparse.SparseTensor):
        return collate(inputs)
    if isinstance(first, np.ndarray):
        return torch.stack([torch.tensor(each) for each in inputs])
    if isinstance(first, torch.Tensor):
        return torch.stack(inputs)
    return inputs
