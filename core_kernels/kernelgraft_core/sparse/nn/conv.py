"""Sparse convolution layers: they take a :class:`SparseTensor` and give one; maps are shared by layers of one shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kernelgraft_core.sparse.conv.ops import sparse_conv
from kernelgraft_core.sparse.coordinates import Coordinates
from kernelgraft_core.sparse.geometry import ConvGeometry
from kernelgraft_core.sparse.kernel_map import KernelMap
from kernelgraft_core.sparse.tensor import SparseTensor

Sizes = int | Sequence[int]


def begin_uniform(layer: nn.Module, summands: int) -> None:
    """Parameters of a layer uniform, within the inverse root of how many numbers an output is a sum of."""
    bound = 1 / math.sqrt(max(1, summands))
    for parameter in layer.parameters(recurse=False):
        nn.init.uniform_(parameter, -bound, bound)


class SparseConvolution(nn.Module):
    """A weight ``(K, G, C_in / G, C_out / G)``, taps numbered with the last axis fastest, and ``bias (C_out,)``.

    Both begin as those of torch's dense convolutions do. The base of all layers below.

    Attributes:
        dataflow: how the layer computes, as :func:`~kernelgraft_core.sparse.conv.ops.sparse_conv` takes it; what
            :func:`kernelgraft_core.sparse.tune` sets.
        activation: ``"none"``, or ``"relu"`` after the bias.
    """

    dimensions: ClassVar[int]
    dataflow = "auto"
    activation = "none"

    def __init__(
        self, in_channels: int, out_channels: int, geometry: ConvGeometry, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups is {groups}, which does not divide {in_channels} and {out_channels} channels")
        self.in_channels, self.out_channels, self.groups, self.geometry = in_channels, out_channels, groups, geometry
        shape = geometry.volume, groups, in_channels // groups, out_channels // groups
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform, within the inverse root of how many numbers an output is a sum of."""
        begin_uniform(self, self.geometry.volume * self.in_channels // self.groups)

    def forward(self, x: SparseTensor) -> SparseTensor:
        if x.channels != self.in_channels:
            raise ValueError(f"x has {x.channels} channels, expected {self.in_channels}: {x}")
        if self.pointwise:
            feats = nn.functional.linear(x.feats, self.weight[0, 0].T, self.bias)
            return x.replace(feats.relu() if self.activation == "relu" else feats)
        known = self.map_of(x.coordinates)
        return SparseTensor(self._multiply(x.feats, known), known.outputs)

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product at every site, without a kernel map."""
        return self.geometry.volume == 1 and self.geometry.submanifold and self.groups == 1

    def map_of(self, coordinates: Coordinates) -> KernelMap:
        """Which inputs each output reads."""
        return KernelMap.of(self.geometry, coordinates)

    def _multiply(self, feats: Tensor, known: KernelMap) -> Tensor:
        return sparse_conv(
            feats, self.weight, self.bias, known.neighbors, known.symmetric, self.activation, self.dataflow
        )

    def extra_repr(self) -> str:
        g = self.geometry
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={g.kernel_size}"]
        if g.stride != (1,) * g.dimensions:
            parts.append(f"stride={g.stride}")
        if not g.submanifold and any(g.padding):
            parts.append(f"padding={g.padding}")
        if g.dilation != (1,) * g.dimensions:
            parts.append(f"dilation={g.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        parts += [f"{name}={value!r}" for name, value in (("activation", self.activation), ("dataflow", self.dataflow))
                  if value not in ("none", "auto")]  # fmt: skip
        return ", ".join(parts)


class _SparseConv(SparseConvolution):
    """Outputs at every site that reads an input, as ``torch.nn.Conv3d`` and its kin number them.

    Args:
        in_channels, out_channels: C_in and C_out.
        kernel_size, stride, padding, dilation: one number, or one for each axis.
        groups: of channels.
        bias: whether there is one.

    Raises:
        ValueError: a number is out of range; the message names it.
    """

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
    ) -> None:
        geometry = ConvGeometry.of(self.dimensions, kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, geometry, groups, bias)


class _SubMConv(SparseConvolution):
    """Outputs at the sites of the inputs (submanifold convolution, arXiv 1711.10275); arguments as for ``Conv3d``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        geometry = ConvGeometry.of(self.dimensions, kernel_size, dilation=dilation, submanifold=True)
        super().__init__(in_channels, out_channels, geometry, groups, bias)


class _GenerativeConv(_SparseConv):
    """Transposed convolution with outputs at every site that reads an input: more sites come out than go in.

    Arguments as for ``Conv3d``. The grid of outputs is the least that the convolution of the same numbers takes to that
    of the inputs.
    """

    def map_of(self, coordinates: Coordinates) -> KernelMap:
        return KernelMap.of(self.geometry, coordinates, transposed=True)


class _InverseConv(SparseConvolution):
    """Back to the sites before the layer that made those of the input: the decoder of a U-Net.

    It reads the map of that layer in the other direction. Raises ValueError where the input's sites are no layer's
    outputs, or that layer had another kernel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sizes, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, ConvGeometry.of(self.dimensions, kernel_size), groups, bias)

    @property
    def pointwise(self) -> bool:
        return False  # its outputs are at other sites

    def map_of(self, coordinates: Coordinates) -> KernelMap:
        if coordinates.made_by is None:
            raise ValueError(f"the sites of {coordinates} were not made by a convolution: there is nothing to invert")
        known = coordinates.made_by.map_to(coordinates)
        if known.geometry.kernel_size != self.geometry.kernel_size:
            raise ValueError(
                f"the sites of {coordinates} were made with kernel_size {known.geometry.kernel_size}, this layer has "
                f"{self.geometry.kernel_size}"
            )
        return known.inverse


class Conv1d(_SparseConv):
    __doc__ = _SparseConv.__doc__
    dimensions = 1


class Conv2d(_SparseConv):
    __doc__ = _SparseConv.__doc__
    dimensions = 2


class Conv3d(_SparseConv):
    __doc__ = _SparseConv.__doc__
    dimensions = 3


class Conv4d(_SparseConv):
    __doc__ = _SparseConv.__doc__
    dimensions = 4


class SubMConv1d(_SubMConv):
    __doc__ = _SubMConv.__doc__
    dimensions = 1


class SubMConv2d(_SubMConv):
    __doc__ = _SubMConv.__doc__
    dimensions = 2


class SubMConv3d(_SubMConv):
    __doc__ = _SubMConv.__doc__
    dimensions = 3


class SubMConv4d(_SubMConv):
    __doc__ = _SubMConv.__doc__
    dimensions = 4


class GenerativeConv1d(_GenerativeConv):
    __doc__ = _GenerativeConv.__doc__
    dimensions = 1


class GenerativeConv2d(_GenerativeConv):
    __doc__ = _GenerativeConv.__doc__
    dimensions = 2


class GenerativeConv3d(_GenerativeConv):
    __doc__ = _GenerativeConv.__doc__
    dimensions = 3


class GenerativeConv4d(_GenerativeConv):
    __doc__ = _GenerativeConv.__doc__
    dimensions = 4


class InverseConv1d(_InverseConv):
    __doc__ = _InverseConv.__doc__
    dimensions = 1


class InverseConv2d(_InverseConv):
    __doc__ = _InverseConv.__doc__
    dimensions = 2


class InverseConv3d(_InverseConv):
    __doc__ = _InverseConv.__doc__
    dimensions = 3


class InverseConv4d(_InverseConv):
    __doc__ = _InverseConv.__doc__
    dimensions = 4
