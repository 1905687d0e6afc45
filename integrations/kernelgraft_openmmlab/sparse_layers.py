"""Sparse convolution layers of mmcv's names and weights, on our kernels, for mmcv's or spconv's sparse tensors.

A container of either library hands a tensor to a layer only when that is a subclass of its own ``SparseModule``, so the
classes are made for the one that is active.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernelgraft_core.runtime.notices import warn_once
from kernelgraft_core.runtime.patching import Patches
from kernelgraft_core.sparse import ConvGeometry, KernelMap, sparse_conv
from kernelgraft_core.sparse.compat.indexed import IndexedConvolution, Sizes
from kernelgraft_core.sparse.conv.dataflow import ConvConfig

from .sites import indices_of, map_of, sites_of


class SparseConvolutionMixin(IndexedConvolution):
    """A sparse convolution with ``weight (*kernel, C_in, C_out)`` and ``bias (C_out,)``, as mmcv saves them.

    It also loads weights of spconv 2, ``(C_out, *kernel, C_in)``.

    Args:
        in_channels, out_channels: C_in and C_out.
        kernel_size, stride, padding, dilation: one number, or one for each axis ``(z, y, x)``.
        groups: 1.
        bias: whether there is one.
        indice_key: a name for the map: submanifold layers of one name share it, an inverse layer undoes the layer of
            its name.
        output_padding: of a transposed convolution, how much larger its grid is than the least.
        dataflow: as :func:`kernelgraft_core.sparse.sparse_conv` takes it.

    Raises:
        ValueError: a number is out of range; the message names it.
    """

    like_mmcv: ClassVar[bool] = True  # or like spconv 2
    # What nn.Module writes into checkpoints. mmdet3d takes 2 for the layout of spconv 2, which these are not in.
    _version = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        indice_key: str | None = None,
        output_padding: Sizes = 0,
        dataflow: str = "auto",
        **_: Any,
    ) -> None:
        super().__init__()
        self.describe(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, indice_key, output_padding
        )
        ConvConfig.parse(dataflow)
        self.groups, self.dataflow = groups, dataflow
        # Products at every site. mmcv takes every kernel of one tap for that, whatever its stride.
        self.conv1x1 = self.geometry.volume == 1 and (self.geometry.submanifold or self.like_mmcv)
        self.weight = nn.Parameter(torch.empty(*self.kernel_size, in_channels, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def make_geometry(self, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> ConvGeometry:
        made = super().make_geometry(kernel_size, stride, padding, dilation)
        if not self.subm:
            return made
        # Centred at half of the kernel, which for even ones is the later tap; mmcv does so whatever the dilation.
        apart = (1,) * self.ndim if self.like_mmcv else made.dilation
        half = tuple(size // 2 * step for size, step in zip(made.kernel_size, apart, strict=True))
        return dataclasses.replace(made, padding=half)

    def forward(self, x: Any) -> Any:
        """A tensor of the class of ``x``, with the layer's sites."""
        features: Tensor = x.features
        if features.shape[1] != self.in_channels:
            raise ValueError(f"the input has {features.shape[1]} channels, expected {self.in_channels}")
        weight = self.weight.reshape(-1, 1, self.in_channels, self.out_channels)
        if self.conv1x1 and not self.inverse:
            made = nn.functional.linear(features, weight[0, 0].T, self.bias)
            return _tensor(x, made, x.indices, x.spatial_shape)
        known = self._map(x)
        made = sparse_conv(features, weight, self.bias, known.neighbors, known.symmetric, dataflow=self.dataflow)
        same = known.outputs is known.inputs
        return _tensor(x, made, x.indices if same else indices_of(known.outputs), known.outputs.spatial_shape)

    def _map(self, x: Any) -> KernelMap:
        key = ("kernelgraft", self.indice_key)
        found: KernelMap | None = x.indice_dict.get(key)
        if self.inverse:
            return self.undone(found)
        sites = sites_of(x.indices, x.spatial_shape, x.batch_size)
        if found is not None and self.subm and found.inputs is sites and found.geometry != self.geometry:
            # mmcv takes the map of the first layer of that name for both, and weights may have been trained so.
            warn_once(
                f"indice_key = {self.indice_key!r} belongs to kernel_size {found.geometry.kernel_size} and to "
                f"{self.geometry.kernel_size}: mmcv would use the first layer's map for both, kernelgraft gives each "
                "its own; for weights trained on mmcv's, leave such layers to the plugin mmcv"
            )
        known = map_of(self.geometry, sites, self.transposed, self.out_shape(sites))
        if self.indice_key is not None:
            x.indice_dict.setdefault(key, known)  # the first layer of a name is the one that an inverse layer undoes
        return known

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        # Past what mmdet3d hangs into spconv's class, which turns weights over.
        if (weight := state_dict.get(key := f"{prefix}weight")) is not None:
            turned = _in_layout_of_mmcv(weight, self.weight.shape, (local_metadata or {}).get("version"))
            state_dict = OrderedDict(state_dict, **{key: turned})
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *lists)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )


def _in_layout_of_mmcv(weight: Tensor, shape: torch.Size, version: int | None) -> Tensor:
    """A weight of either layout as ``shape``, ``(*kernel, C_in, C_out)``; one of another shape as it is.

    Where the shape leaves both open (as many channels in and out as the kernel is wide), version 2 tells spconv 2.
    """
    turned = torch.Size((shape[-1], *shape[:-1]))
    if weight.shape == turned and (weight.shape != shape or version == 2):
        return weight.movedim(0, -1)
    return weight


def _tensor(x: Any, features: Tensor, indices: Tensor, spatial_shape: Sequence[int]) -> Any:
    made = type(x)(features, indices, list(spatial_shape), x.batch_size)
    made.indice_dict, made.grid = x.indice_dict, x.grid
    if hasattr(x, "benchmark"):  # of spconv's
        made.benchmark = x.benchmark
    return made


_KINDS: dict[str, dict[str, bool]] = {
    "SubMConv": {"subm": True},
    "SparseConv": {},
    "SparseConvTranspose": {"transposed": True},
    "SparseInverseConv": {"inverse": True},
}
NAMES = {
    "SparseConv": (2, 3, 4),
    "SubMConv": (2, 3, 4),
    "SparseConvTranspose": (2, 3),
    "SparseInverseConv": (2, 3),
}


@functools.cache
def layers_for(sparse_module: type) -> dict[str, type]:
    """The layers by the names that mmcv registers, as subclasses of a library's ``SparseModule``."""
    made = {}
    for kind, dimensions in NAMES.items():
        for n in dimensions:
            name = f"{kind}{n}d"
            attributes = {
                "ndim": n,
                "like_mmcv": not sparse_module.__module__.startswith("spconv"),
                "__module__": __name__,
                "__doc__": SparseConvolutionMixin.__doc__,
                **_KINDS[kind],
            }
            base = _Inverse if kind == "SparseInverseConv" else SparseConvolutionMixin
            made[name] = type(name, (base, sparse_module), attributes)
    return made


class _Inverse(SparseConvolutionMixin):
    """Takes the arguments of mmcv's: no stride, no padding."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        indice_key: str | None = None,
        bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, indice_key=indice_key, **kwargs)


def active_sparse_module() -> type:
    """The class that mmdet3d's containers look for: spconv's where it has found that, else mmcv's.

    Raises:
        ModuleNotFoundError: mmcv has no ops; load the plugin ``mmcv`` first.
    """
    # mmdet3d, which takes seconds to import, is asked only where it may say spconv.
    if importlib.util.find_spec("mmdet3d") is not None and _has_spconv():
        from mmdet3d.models.layers.spconv import IS_SPCONV2_AVAILABLE

        if IS_SPCONV2_AVAILABLE:
            from spconv.pytorch import SparseModule as Spconv

            return Spconv  # type: ignore[no-any-return]
    from mmcv.ops import SparseModule

    return SparseModule  # type: ignore[no-any-return]


def _has_spconv() -> bool:
    return "spconv" in sys.modules or importlib.util.find_spec("spconv") is not None


def __getattr__(name: str) -> type:
    """The layers by name, which pickles of models look up here."""
    layers = {} if name.startswith("_") else layers_for(active_sparse_module())
    if name not in layers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return layers[name]


def override_sparse_layers(patches: Patches) -> dict[str, type]:
    """Put our layers under mmcv's names into the root registry, where SparseEncoder and its kin look them up."""
    from mmengine.registry import MODELS

    layers = layers_for(active_sparse_module())
    for name, layer in layers.items():
        patches.item(MODELS._module_dict, name, layer)
    return layers
