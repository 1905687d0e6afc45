"""The shape of a convolution: which sites an output reads, and at which sites there are outputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .coordinates import LARGEST_SIZE, Coordinates, per_axis
from .grids import grid_sites, grid_steps

LARGEST_VOLUME = 4096


@dataclass(frozen=True)
class ConvGeometry:
    """A convolution without its weight.

    Output ``o`` reads input ``o * stride - padding + k * dilation`` for every tap ``k``, the same as in
    ``torch.nn.functional.conv3d`` (cross-correlation). Taps are numbered with the last axis fastest.

    Attributes:
        kernel_size, stride, padding, dilation: per axis.
        submanifold: outputs are where inputs are; stride is 1 then, and padding such that the kernel is centred: below
            an output are ``(kernel_size - 1) // 2`` taps.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    submanifold: bool = False

    @classmethod
    def of(
        cls,
        dimensions: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        submanifold: bool = False,
    ) -> ConvGeometry:
        """Numbers for every axis from one number or one for each.

        Raises:
            ValueError: a number is out of range, the kernel has more than 4096 taps, or a submanifold convolution has a
                stride; the message names the argument.
        """
        kernel = per_axis("kernel_size", kernel_size, dimensions)
        steps = per_axis("stride", stride, dimensions)
        apart = per_axis("dilation", dilation, dimensions)
        if math.prod(kernel) > LARGEST_VOLUME:
            raise ValueError(
                f"kernel_size {kernel} has {math.prod(kernel)} taps, at most {LARGEST_VOLUME} are supported"
            )
        around = per_axis("padding", padding, dimensions, least=0)
        # One tap that reads its own site has its outputs where the inputs are, in their order.
        if not submanifold and not (math.prod(kernel) == 1 and set(steps) == {1} and set(around) == {0}):
            return cls(kernel, steps, around, apart)
        if any(step != 1 for step in steps):
            raise ValueError(f"stride is {stride}, but outputs of a submanifold convolution are where its inputs are")
        centred = tuple(d * ((k - 1) // 2) for k, d in zip(kernel, apart, strict=True))
        return cls(kernel, steps, centred, apart, True)

    @property
    def dimensions(self) -> int:
        return len(self.kernel_size)

    @property
    def volume(self) -> int:
        """How many taps there are."""
        return math.prod(self.kernel_size)

    @property
    def mirrored(self) -> bool:
        """Whether an input that an output reads by tap ``k`` is an output that reads it by tap ``volume - 1 - k``."""
        axes = zip(self.kernel_size, self.padding, self.dilation, strict=True)
        return self.submanifold and all(2 * p == d * (k - 1) for k, p, d in axes)

    def taps(self) -> list[tuple[int, ...]]:
        """Where each tap reads, relative to ``o * stride``."""
        axes = [
            [k * d - p for k in range(size)]
            for size, d, p in zip(self.kernel_size, self.dilation, self.padding, strict=True)
        ]
        return list(itertools.product(*axes))

    def out_shape(self, spatial_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the grid of outputs.

        Raises:
            ValueError: the kernel is larger than the padded grid.
        """
        if self.submanifold:
            return spatial_shape
        sizes = zip(spatial_shape, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        shape = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        if any(n < 1 for n in shape):
            raise ValueError(f"kernel_size {self.kernel_size} with padding {self.padding} does not fit {spatial_shape}")
        return shape

    def transposed_shape(self, spatial_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The least grid whose shape this convolution takes to ``spatial_shape``.

        Raises:
            ValueError: there is none; padding is too large.
        """
        sizes = zip(spatial_shape, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        shape = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in sizes)
        if max(shape) > LARGEST_SIZE:
            raise ValueError(f"a transposed convolution of {spatial_shape} reaches {shape}, at most {LARGEST_SIZE}")
        if any(n < 1 for n in shape):
            raise ValueError(f"padding {self.padding} leaves nothing of a transposed convolution of {spatial_shape}")
        return shape

    def out_coordinates(self, inputs: Coordinates) -> Coordinates:
        """The sites of all outputs that read an input; those of the inputs for a submanifold convolution."""
        if self.submanifold:
            return inputs
        shape = self.out_shape(inputs.spatial_shape)
        stride = tuple(a * b for a, b in zip(inputs.stride, self.stride, strict=True))
        axes = []
        for axis, site in enumerate(inputs.indices[:, 1:].long().unbind(1)):
            size, step, around, apart = (
                self.kernel_size[axis],
                self.stride[axis],
                self.padding[axis],
                self.dilation[axis],
            )
            if apart == 1:  # outputs in a row, the last of which reads the site by its first tap that there is
                last = torch.div(site + around, step, rounding_mode="floor")
                found = last.unsqueeze(1) - torch.arange(-(-size // step), device=site.device)
                reads = found * step + size > (site + around).unsqueeze(1)
            else:
                moved = (site + around).unsqueeze(1) - apart * torch.arange(size, device=site.device)
                found = torch.div(moved, step, rounding_mode="floor")
                reads = found * step == moved
            axes.append((found, reads))
        return _sites(inputs, axes, shape, stride)

    def transposed_coordinates(self, inputs: Coordinates, out_shape: tuple[int, ...] | None = None) -> Coordinates:
        """The sites of all outputs of the transposed convolution that read an input.

        Raises:
            ValueError: this convolution does not take ``out_shape`` to the shape of the inputs' grid.
        """
        shape = self.transposed_shape(inputs.spatial_shape) if out_shape is None else out_shape
        if out_shape is not None and self.out_shape(out_shape) != inputs.spatial_shape:
            raise ValueError(f"out_shape is {out_shape}, which the convolution takes to {self.out_shape(out_shape)}, "
                             f"not to {inputs.spatial_shape}")  # fmt: skip
        stride = tuple(max(1, a // b) for a, b in zip(inputs.stride, self.stride, strict=True))
        axes = []
        for axis, site in enumerate(inputs.indices[:, 1:].long().unbind(1)):
            taps = torch.arange(self.kernel_size[axis], device=site.device) * self.dilation[axis] - self.padding[axis]
            found = (site * self.stride[axis]).unsqueeze(1) + taps
            axes.append((found, torch.ones_like(found, dtype=torch.bool)))
        return _sites(inputs, axes, shape, stride)


def _sites(
    inputs: Coordinates, axes: list[tuple[Tensor, Tensor]], shape: tuple[int, ...], stride: tuple[int, ...]
) -> Coordinates:
    """The sites that inputs reach in a grid of ``shape``, each once, in order.

    ``axes``: for each axis where every input reaches, int64 ``(N, R)``, and which of these count.
    """
    steps = grid_steps(shape, inputs.batch_size)
    # One number for each combination of what is reached along the axes, and whether it is in the grid.
    keys = inputs.indices[:, :1].long() * steps[0]
    counts = torch.ones_like(keys, dtype=torch.bool)
    for (found, reads), size, step in zip(axes, shape, steps[1:], strict=True):
        inside = reads & (found >= 0) & (found < size)
        keys = (keys.unsqueeze(2) + (found * step).unsqueeze(1)).flatten(1)
        counts = (counts.unsqueeze(2) & inside.unsqueeze(1)).flatten(1)
    return Coordinates.known(grid_sites(keys[counts].unique(), steps), shape, inputs.batch_size, stride)
