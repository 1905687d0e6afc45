"""What the sparse layers of spconv and of mmcv have in common: maps that are found again by an ``indice_key``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from kernelgraft_core.sparse.coordinates import Coordinates
from kernelgraft_core.sparse.geometry import ConvGeometry
from kernelgraft_core.sparse.kernel_map import KernelMap
from kernelgraft_core.sparse.nn.conv import begin_uniform

Sizes = int | Sequence[int]


class IndexedConvolution(nn.Module):
    """Without weight and forward, which differ. Numbers are lists of one for each axis, as models read them."""

    ndim: ClassVar[int]
    subm: ClassVar[bool] = False
    transposed: ClassVar[bool] = False
    inverse: ClassVar[bool] = False

    def describe(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        groups: int,
        indice_key: str | None,
        output_padding: Sizes,
    ) -> None:
        """Take the arguments of a layer.

        Raises:
            ValueError: there is more than one group, or a number is out of range; the message names it.
        """
        if groups != 1:
            raise ValueError(f"groups is {groups}: weights of spconv and mmcv have one group")
        self.in_channels, self.out_channels, self.indice_key = in_channels, out_channels, indice_key
        stride, padding = (1, 0) if self.subm or self.inverse else (stride, padding)
        self.geometry = self.make_geometry(kernel_size, stride, padding, dilation)
        extra = (output_padding,) * self.ndim if isinstance(output_padding, int) else tuple(output_padding)
        self.kernel_size, self.output_padding = list(self.geometry.kernel_size), extra
        self.stride, self.padding, self.dilation = (
            list(each) for each in (self.geometry.stride, self.geometry.padding, self.geometry.dilation)
        )

    def make_geometry(self, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> ConvGeometry:
        return ConvGeometry.of(self.ndim, kernel_size, stride, padding, dilation, self.subm)

    def reset_parameters(self) -> None:
        begin_uniform(self, self.geometry.volume * self.in_channels)

    def undone(self, found: KernelMap | None) -> KernelMap:
        """The map of an inverse layer, of what was found under its key.

        Raises:
            ValueError: nothing was, or it belongs to another kernel.
        """
        if found is None:
            raise ValueError(f"no layer before has indice_key = {self.indice_key!r}: there is nothing to invert")
        if found.geometry.kernel_size != self.geometry.kernel_size:
            raise ValueError(
                f"indice_key = {self.indice_key!r} belongs to kernel_size {found.geometry.kernel_size}, this layer "
                f"has {self.geometry.kernel_size}"
            )
        return found.inverse

    def out_shape(self, sites: Coordinates) -> tuple[int, ...] | None:
        """Of a transposed layer that asks for more than the least grid; else None."""
        if not (self.transposed and any(self.output_padding)):
            return None
        least = self.geometry.transposed_shape(sites.spatial_shape)
        return tuple(a + b for a, b in zip(least, self.output_padding, strict=True))
