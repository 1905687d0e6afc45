"""Which rows of the input each output of a sparse convolution reads, and everything that is derived from it."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from .coordinates import Coordinates, Keys
from .geometry import ConvGeometry
from .grids import starts_of
from .maps.exchanged import exchanged
from .maps.ops import sparse_keys, sparse_neighbors, sparse_transpose


@dataclass(frozen=True, eq=False)
class KernelMap:
    """Immutable; made by :meth:`of`, kept with the coordinates of its inputs and shared by all layers of its geometry.

    Attributes:
        geometry: of the convolution.
        inputs, outputs: their sites.
        neighbors: int32 ``(N_out, K)``, the input row that each output reads by each tap, -1 where there is none.
        transposed: whether it is that of a transposed convolution: input ``i`` is read by output
            ``i * stride - padding + k * dilation``.
    """

    geometry: ConvGeometry
    inputs: Coordinates
    outputs: Coordinates
    neighbors: Tensor
    transposed: bool = False

    @classmethod
    def of(
        cls,
        geometry: ConvGeometry,
        inputs: Coordinates,
        outputs: Coordinates | None = None,
        transposed: bool = False,
        out_shape: tuple[int, ...] | None = None,
    ) -> KernelMap:
        """The map of a convolution; the one that was made before, where there is one.

        Args:
            outputs: sites to compute; by default all that read an input.
            out_shape: of the grid of outputs of a transposed convolution, whose size is not settled by that of the
                input; by default the least.

        Raises:
            ValueError: dimensions, grids or devices do not belong together.
        """
        if geometry.dimensions != inputs.dimensions:
            raise ValueError(f"the convolution has {geometry.dimensions} dimensions, coordinates {inputs.dimensions}")
        if outputs is not None and (outputs.dimensions != inputs.dimensions or outputs.device != inputs.device):
            raise ValueError(f"outputs are {outputs}, inputs {inputs}: dimensions and devices differ")
        if outputs is not None and outputs.batch_size != inputs.batch_size:
            raise ValueError(f"outputs have batch_size {outputs.batch_size}, inputs {inputs.batch_size}")
        if outputs is None and not geometry.submanifold:
            return cls._with_outputs(geometry, inputs, transposed, out_shape)
        outputs = inputs if outputs is None else outputs
        # With the outputs, and without holding the inputs: nothing here refers to itself, so that memory is given back
        # as soon as a network is done with it.
        key = geometry, transposed, id(inputs)
        source, neighbors = outputs.found.get(key, (None, None))
        if source is None or source() is not inputs:
            neighbors = _neighbors_of(geometry, inputs, outputs, transposed)
            gone = [each for each, value in outputs.found.items() if isinstance(value, tuple) and value[0]() is None]
            for each in gone:  # inputs that came and went, one for every frame perhaps
                del outputs.found[each]
            outputs.found[key] = weakref.ref(inputs), neighbors
        return cls(geometry, inputs, outputs, neighbors, transposed)

    @classmethod
    def _with_outputs(
        cls, geometry: ConvGeometry, inputs: Coordinates, transposed: bool, out_shape: tuple[int, ...] | None
    ) -> KernelMap:
        key = geometry, transposed, out_shape
        made: Coordinates | None = inputs.found.get(key, lambda: None)()
        if made is None:
            if transposed:
                made = geometry.transposed_coordinates(inputs, out_shape)
            else:
                made = geometry.out_coordinates(inputs)
            neighbors = _neighbors_of(geometry, inputs, made, transposed)
            made.made_by = MadeBy(geometry, inputs, neighbors, transposed)
            inputs.found[key] = weakref.ref(made)
        assert made.made_by is not None
        return made.made_by.map_to(made)

    @property
    def symmetric(self) -> bool:
        """Whether an input that an output reads by tap ``k`` is an output that reads it by tap ``K - 1 - k``."""
        return self.geometry.mirrored and self.outputs is self.inputs

    @property
    def inverse(self) -> KernelMap:
        """With inputs and outputs exchanged: for the layer that undoes the change of sites of this one's."""
        neighbors = exchanged(self.neighbors, len(self.inputs))
        return KernelMap(self.geometry, self.outputs, self.inputs, neighbors, not self.transposed)

    @functools.cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tap by tap, input and output rows int32 ``(P,)``, and int64 ``(K + 1,)`` where each tap begins."""
        columns = self.neighbors.T
        tap, output = (columns >= 0).nonzero(as_tuple=True)
        counts = torch.bincount(tap, minlength=len(columns))
        starts = starts_of(counts)
        return columns[tap, output], output.to(torch.int32), starts


@dataclass(frozen=True, eq=False)
class MadeBy:
    """What coordinates are the outputs of: a :class:`KernelMap` that does not hold them."""

    geometry: ConvGeometry
    inputs: Coordinates
    neighbors: Tensor
    transposed: bool

    def map_to(self, outputs: Coordinates) -> KernelMap:
        """The map to those coordinates."""
        return KernelMap(self.geometry, self.inputs, outputs, self.neighbors, self.transposed)


def _neighbors_of(geometry: ConvGeometry, inputs: Coordinates, outputs: Coordinates, transposed: bool) -> Tensor:
    if transposed:
        return sparse_transpose(_neighbors(geometry, outputs, inputs), len(outputs))
    return _neighbors(geometry, inputs, outputs)


def _neighbors(geometry: ConvGeometry, inputs: Coordinates, outputs: Coordinates) -> Tensor:
    taps = geometry.taps()
    # As far as an output of the grid reads beyond it.
    shapes = zip(zip(*taps, strict=True), geometry.stride, outputs.spatial_shape, inputs.spatial_shape, strict=True)
    margin = tuple(
        max(0, -min(axis), (out_size - 1) * step + max(axis) - (in_size - 1))
        for axis, step, out_size, in_size in shapes
    )
    in_keys = inputs.keys(margin)
    same = geometry.submanifold and outputs is inputs
    out_keys = in_keys if same else _in_grid_of(in_keys, geometry, outputs)
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
    )


def _in_grid_of(in_keys: Keys, geometry: ConvGeometry, outputs: Coordinates) -> Keys:
    """Where the tap at 0 of each output reads, as keys of the inputs' grid."""
    scaled = [step * stride for step, stride in zip(in_keys.steps[1:], geometry.stride, strict=True)]
    steps = in_keys.steps[0], *scaled
    order = outputs.any_keys().order
    # Strides are positive: the order of the outputs is that of what they read.
    return Keys(sparse_keys(outputs.indices, order, steps, in_keys.offset), order, steps, in_keys.margin)
