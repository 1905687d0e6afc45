"""The shape of a convolution: which sites an output reads, and at which sites there are outputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .coordinates import Coordinates, per_axis

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
        if not submanifold:
            return cls(kernel, steps, per_axis("padding", padding, dimensions, least=0), apart)
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
        return self.submanifold and all(k % 2 for k in self.kernel_size)

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

    def out_coordinates(self, inputs: Coordinates) -> Coordinates:
        """The sites of all outputs that read an input; those of the inputs for a submanifold convolution."""
        if self.submanifold:
            return inputs
        shape = self.out_shape(inputs.spatial_shape)
        indices, strides = inputs.indices, torch.tensor(self.stride, dtype=torch.int32, device=inputs.device)
        limits = torch.tensor(shape, dtype=torch.int32, device=inputs.device)
        weights = [1]
        for size in reversed(shape):
            weights.insert(0, weights[0] * size)
        found = []
        for tap in self.taps():
            moved = indices[:, 1:] - torch.tensor(tap, dtype=torch.int32, device=inputs.device)
            site = torch.div(moved, strides, rounding_mode="floor")
            inside = ((site * strides == moved) & (site >= 0) & (site < limits)).all(1)
            rows = torch.cat((indices[:, :1], site), 1)[inside].long()
            found.append((rows * torch.tensor(weights, device=inputs.device)).sum(1))
        keys = torch.cat(found).unique()
        return Coordinates.known(_unpack(keys, weights), shape, inputs.batch_size, _product(inputs.stride, self.stride))


def _unpack(keys: Tensor, weights: list[int]) -> Tensor:
    columns = []
    for weight in weights:
        columns.append(torch.div(keys, weight, rounding_mode="floor"))
        keys = keys - columns[-1] * weight
    return torch.stack(columns, 1).to(torch.int32)


def _product(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x * y for x, y in zip(a, b, strict=True))
