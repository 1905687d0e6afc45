"""Which rows of the input each output of a sparse convolution reads, and everything that is derived from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .coordinates import Coordinates, Keys
from .geometry import ConvGeometry
from .maps.ops import sparse_neighbors


@dataclass(frozen=True, eq=False)
class KernelMap:
    """Immutable; made by :meth:`build`, kept with the coordinates and shared by all layers of the same geometry.

    Attributes:
        geometry: of the convolution.
        inputs, outputs: their sites.
        neighbors: int32 ``(N_out, K)``, the input row that each output reads by each tap, -1 where there is none.
    """

    geometry: ConvGeometry
    inputs: Coordinates
    outputs: Coordinates
    neighbors: Tensor

    @classmethod
    def build(cls, geometry: ConvGeometry, inputs: Coordinates, outputs: Coordinates | None = None) -> KernelMap:
        """The map of a convolution.

        Args:
            outputs: sites to compute; by default all that read an input.

        Raises:
            ValueError: dimensions, grids or devices do not belong together.
        """
        if geometry.dimensions != inputs.dimensions:
            raise ValueError(f"the convolution has {geometry.dimensions} dimensions, coordinates {inputs.dimensions}")
        given = outputs is not None
        outputs = geometry.out_coordinates(inputs) if outputs is None else outputs
        if outputs.dimensions != inputs.dimensions or outputs.device != inputs.device:
            raise ValueError(f"outputs are {outputs}, inputs {inputs}: dimensions and devices differ")
        return cls(geometry, inputs, outputs, _neighbors(geometry, inputs, outputs, given))

    @functools.cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tap by tap, input and output rows int32 ``(P,)``, and int64 ``(K + 1,)`` where each tap begins."""
        columns = self.neighbors.T
        tap, output = (columns >= 0).nonzero(as_tuple=True)
        counts = torch.bincount(tap, minlength=len(columns))
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return columns[tap, output], output.to(torch.int32), starts

    @functools.cached_property
    def transposed(self) -> Tensor:
        """int32 ``(N_in, K)``: the output row that reads each input by each tap, -1 where none does.

        No two outputs read one input by the same tap.
        """
        if self.geometry.mirrored and self.outputs is self.inputs:
            return self.neighbors.flip(1)
        found = self.neighbors.new_full((len(self.inputs), self.geometry.volume), -1)
        inputs, outputs, starts = self.pairs
        tap = torch.repeat_interleave(starts.diff())
        found[inputs.long(), tap] = outputs
        return found


def _neighbors(geometry: ConvGeometry, inputs: Coordinates, outputs: Coordinates, given: bool) -> Tensor:
    taps = geometry.taps()
    # As far as an output of the grid reads beyond it.
    shapes = zip(zip(*taps, strict=True), geometry.stride, outputs.spatial_shape, inputs.spatial_shape, strict=True)
    margin = tuple(
        max(0, -min(axis), (out_size - 1) * step + max(axis) - (in_size - 1))
        for axis, step, out_size, in_size in shapes
    )
    in_keys = inputs.keys(margin)
    mirrored = geometry.mirrored and outputs is inputs
    out_keys = in_keys if mirrored else _in_grid_of(in_keys, margin, geometry, outputs)
    steps, size = in_keys.steps[1:], geometry.kernel_size[-1]
    lines = [sum(step * at for step, at in zip(steps, tap, strict=True)) for tap in taps[::size]]
    return sparse_neighbors(
        in_keys.sorted,
        in_keys.order,
        out_keys.sorted,
        out_keys.order,
        lines,
        size,
        geometry.dilation[-1] * steps[-1],
        mirrored,
    )


def _in_grid_of(in_keys: Keys, margin: tuple[int, ...], geometry: ConvGeometry, outputs: Coordinates) -> Keys:
    """Where the tap at 0 of each output reads, as keys of the inputs' grid."""
    scaled = [step * stride for step, stride in zip(in_keys.steps[1:], geometry.stride, strict=True)]
    steps = torch.tensor((in_keys.steps[0], *scaled), device=outputs.device)
    offset = sum(step * more for step, more in zip(in_keys.steps[1:], margin, strict=True))
    order = outputs.keys((0,) * outputs.dimensions).order
    rows = outputs.indices if order is None else outputs.indices[order]
    # Strides are positive: the order of the outputs is that of what they read.
    return Keys((rows.long() * steps).sum(1) + offset, order, tuple(steps.tolist()))
