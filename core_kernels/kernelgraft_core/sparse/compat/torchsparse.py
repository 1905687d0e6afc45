"""``torchsparse`` as model code sees it: tensors, layers and functions, at the levels of version 1.4 and of 2.x.

They differ in more than names: rows are ``[x, y, z, b]`` and in units of the input's grid in 1.4, ``[b, x, y, z]`` and
in units of their own grid in 2.x, and 2.x has ``padding`` before ``dilation``. What 2.x takes and ignores, dilation, is
computed here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.sparse.conv.ops import sparse_conv
from kernelgraft_core.sparse.coordinates import Coordinates, per_axis
from kernelgraft_core.sparse.geometry import ConvGeometry
from kernelgraft_core.sparse.kernel_map import KernelMap
from kernelgraft_core.sparse.layouts import convert_weight
from kernelgraft_core.sparse.nn.conv import begin_uniform

Sizes = int | Sequence[int]
Level = str
LEVELS = ("1.4", "2")
Stride = tuple[int, ...]


class Caches:
    """What tensors of one origin share: sites by stride, and the maps that lead from one to another.

    Attributes:
        cmaps: the coordinates that belong to a stride.
        kmaps: maps by stride of the input, kernel, stride and dilation, and sites by the coordinates that they are.
    """

    def __init__(self) -> None:
        self.cmaps: dict[Any, Any] = {}
        self.kmaps: dict[Any, Any] = {}
        self.hashmaps: dict[Any, Any] = {}


class SparseTensor:
    """Features at sites, of version 1.4: rows ``[x, y, z, b]`` in units of the input's grid."""

    level = "1.4"

    def __init__(self, feats: Tensor, coords: Tensor, stride: Sizes = 1, spatial_range: Any = None) -> None:
        self.feats, self.coords, self.stride = feats, coords, per_axis("stride", stride, 3)
        self.spatial_range = spatial_range
        self._caches = Caches()

    @property
    def F(self) -> Tensor:
        return self.feats

    @F.setter
    def F(self, feats: Tensor) -> None:
        self.feats = feats

    @property
    def C(self) -> Tensor:
        return self.coords

    @C.setter
    def C(self, coords: Tensor) -> None:
        self.coords = coords

    @property
    def s(self) -> Stride:
        return self.stride

    @s.setter
    def s(self, stride: Sizes) -> None:
        self.stride = per_axis("stride", stride, 3)

    @property
    def cmaps(self) -> dict[Any, Any]:
        return self._caches.cmaps

    @cmaps.setter
    def cmaps(self, value: dict[Any, Any]) -> None:
        self._caches.cmaps = value

    @property
    def kmaps(self) -> dict[Any, Any]:
        return self._caches.kmaps

    @kmaps.setter
    def kmaps(self, value: dict[Any, Any]) -> None:
        self._caches.kmaps = value

    def like(self, feats: Tensor) -> SparseTensor:
        """Other features at the same sites, with what is known of them."""
        made = type(self)(feats, self.coords, self.stride, self.spatial_range)
        made._caches = self._caches
        return made

    def sites(self) -> Coordinates:
        """The coordinates that kernel maps are kept with; made once for a tensor of coordinates."""
        key = "sites", self.stride
        known = self.kmaps.get(key)
        if known is None or known[0] is not self.coords:
            known = self.kmaps[key] = self.coords, self._make_sites()
        sites: Coordinates = known[1]
        return sites

    def _make_sites(self) -> Coordinates:
        steps = torch.tensor((*self.stride, 1), dtype=self.coords.dtype, device=self.coords.device)
        rows = torch.div(self.coords, steps, rounding_mode="floor")[:, [3, 0, 1, 2]]
        # Version 1.4 does not know how large a grid is: outputs may lie one kernel beyond the last input, and a flat
        # cloud is as high as the kernels of all halvings.
        least = rows[:, 1:].amax(0).add(1).tolist() if len(rows) else [1] * 3
        return Coordinates(rows, [size + 64 for size in least], stride=self.stride)

    def rows_of(self, sites: Coordinates) -> Tensor:
        """Sites as this version writes them."""
        steps = torch.tensor(sites.stride, dtype=torch.int32, device=sites.device)
        return torch.cat((sites.indices[:, 1:] * steps, sites.indices[:, :1]), 1)

    def to(self, device: Any, non_blocking: bool = True) -> SparseTensor:
        self.coords = self.coords.to(device, non_blocking=non_blocking)
        self.feats = self.feats.to(device, non_blocking=non_blocking)
        return self

    def cpu(self) -> SparseTensor:
        return self.to("cpu")

    def cuda(self) -> SparseTensor:
        return self.to("cuda")

    def half(self) -> SparseTensor:
        self.feats = self.feats.half()
        return self

    def detach(self) -> SparseTensor:
        self.feats = self.feats.detach()
        return self

    def __add__(self, other: SparseTensor) -> SparseTensor:
        return self.like(self.feats + other.feats)


class SparseTensor2(SparseTensor):
    """Features at sites, of version 2.x: rows ``[b, x, y, z]`` in units of their own grid."""

    level = "2"

    def __init__(self, feats: Tensor, coords: Tensor, stride: Sizes = 1, spatial_range: Any = None) -> None:
        super().__init__(feats, coords, stride, None if spatial_range is None else tuple(map(int, spatial_range)))

    def _make_sites(self) -> Coordinates:
        if self.spatial_range is None:
            return Coordinates(self.coords, stride=self.stride)
        batch, *shape = self.spatial_range
        return Coordinates(self.coords, shape, batch, self.stride)

    def rows_of(self, sites: Coordinates) -> Tensor:
        return sites.indices

    def dense(self) -> Tensor:
        """``(B, X, Y, Z, C)``."""
        from kernelgraft_core.sparse.tensor import SparseTensor as Own

        return Own(self.feats, self.sites()).to_dense().movedim(1, -1)


class PointTensor:
    """Features at points; ``idx_query`` and ``weights`` keep, by stride, which voxels a point lies among."""

    def __init__(
        self, feats: Tensor, coords: Tensor, idx_query: dict[Any, Any] | None = None,
        weights: dict[Any, Any] | None = None,
    ) -> None:  # fmt: skip
        self.F, self.C = feats, coords
        self.idx_query = {} if idx_query is None else idx_query
        self.weights = {} if weights is None else weights
        self.additional_features: dict[str, Any] = {"idx_query": {}, "counts": {}}

    def to(self, device: Any, non_blocking: bool = True) -> PointTensor:
        self.F = self.F.to(device, non_blocking=non_blocking)
        self.C = self.C.to(device, non_blocking=non_blocking)
        return self

    def cuda(self) -> PointTensor:
        return self.to("cuda")

    def detach(self) -> PointTensor:
        self.F, self.C = self.F.detach(), self.C.detach()
        return self

    def __add__(self, other: PointTensor) -> PointTensor:
        made = PointTensor(self.F + other.F, self.C, self.idx_query, self.weights)
        made.additional_features = self.additional_features
        return made


def cat(inputs: Sequence[SparseTensor]) -> SparseTensor:
    """Channels side by side, of tensors at the same sites."""
    first = inputs[0]
    for other in inputs[1:]:
        if other.coords is not first.coords and not torch.equal(other.coords, first.coords):
            raise ValueError("the tensors are not at the same sites in the same order")
    return first.like(torch.cat([each.feats for each in inputs], 1))


# -- layers -----------------------------------------------------------------------------------------------------------


class Conv3d(nn.Module):
    """A convolution of version 1.4: ``kernel (K, C_in, C_out)``, without the first axis where K is 1.

    Outputs of a stride are where the kernel, centred, reaches an input; with ``transposed`` it goes back to the sites
    before the layer of the same kernel and stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes = 3,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        bias: bool = False,
        transposed: bool = False,
        config: Any = None,
    ) -> None:
        super().__init__()
        self._build(in_channels, out_channels, kernel_size, stride, dilation, bias, transposed, None)

    def _build(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes,
        dilation: Sizes,
        bias: bool,
        transposed: bool,
        padding: Sizes | None,
    ) -> None:
        self.in_channels, self.out_channels, self.transposed = in_channels, out_channels, transposed
        self.kernel_size, self.stride = per_axis("kernel_size", kernel_size, 3), per_axis("stride", stride, 3)
        self.dilation = per_axis("dilation", dilation, 3)
        submanifold = all(step == 1 for step in self.stride)
        axes = list(zip(self.kernel_size, self.stride, self.dilation, strict=True))
        # Version 1.4 has one output for every cell of a stride where the kernel is as large, and else one wherever the
        # centred kernel reaches an input.
        self.centred = padding is None
        self.cells = all(step in (1, size) for size, step, _ in axes)
        if padding is None:
            padding = [0 if step == size else apart * ((size - 1) // 2) for size, step, apart in axes]
        self.geometry = ConvGeometry.of(3, self.kernel_size, self.stride, padding, self.dilation, submanifold)
        volume = self.geometry.volume
        shape = (volume, in_channels, out_channels) if volume > 1 else (in_channels, out_channels)
        self.kernel = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        begin_uniform(self, (self.out_channels if self.transposed else self.in_channels) * self.geometry.volume)

    def forward(self, x: Any) -> Any:
        if len(x.feats) != len(x.coords):
            raise ValueError(f"there are {len(x.feats)} rows of features and {len(x.coords)} of coordinates")
        if self.geometry.volume == 1 and self.geometry.submanifold:
            return x.like(nn.functional.linear(x.feats, self.kernel.view(*self.kernel.shape[-2:]).T, self.bias))
        key = self.kernel_size, self.stride, self.dilation
        if self.transposed and not self.geometry.submanifold:
            finer = tuple(a // b for a, b in zip(x.stride, self.stride, strict=True))
            found = x.kmaps.get((finer, *key))
            if found is None:
                raise ValueError(
                    f"no layer went from stride {finer} to {x.stride} with kernel_size {self.kernel_size}: there is "
                    "nothing to go back to"
                )
            known, coords, reach = found[0].inverse, x.cmaps[finer], found[1]
        else:
            known, reach = self._map(x), x.spatial_range
            if self.transposed:
                known = known.inverse
            coords = x.coords if self.geometry.submanifold else x.rows_of(known.outputs)
            x.kmaps[x.stride, *key] = known, reach
            x.cmaps.setdefault(x.stride, x.coords)
            if not self.geometry.submanifold and reach is not None:
                reach = known.outputs.batch_size, *known.outputs.spatial_shape
        weight = convert_weight(self.kernel, "torchsparse", "kernelgraft", self.kernel_size)
        feats = sparse_conv(x.feats, weight, self.bias, known.neighbors, known.symmetric)
        made = type(x)(feats, coords, known.outputs.stride, reach)
        made._caches = x._caches
        made.cmaps.setdefault(made.stride, coords)
        made.kmaps.setdefault(("sites", made.stride), (coords, known.outputs))
        return made

    def _map(self, x: SparseTensor) -> KernelMap:
        sites = x.sites()
        if self.geometry.submanifold or not self.centred or not len(sites):
            return KernelMap.of(self.geometry, sites)
        found = x.kmaps.get((x.stride, self.kernel_size, self.stride, self.dilation))
        if found is not None and found[0].inputs is sites:
            known: KernelMap = found[0]
            return known
        every = self.geometry.out_coordinates(sites)
        steps = torch.tensor((1, *self.stride), dtype=torch.int32, device=sites.device)
        if self.cells:
            rows = torch.div(sites.indices, steps, rounding_mode="floor").unique(dim=0)
        else:  # none below the first input
            rows = every.indices[(every.indices * steps >= sites.indices.amin(0))[:, 1:].all(1)]
        outputs = Coordinates.known(rows.contiguous(), every.spatial_shape, every.batch_size, every.stride)
        return KernelMap.of(self.geometry, sites, outputs)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


class Conv3d2(Conv3d):
    """A convolution of version 2.x: ``padding`` as in torch, before ``dilation``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes = 3,
        stride: Sizes = 1,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        bias: bool = False,
        transposed: bool = False,
        generative: bool = False,
        config: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        if generative:
            raise ValueError("generative convolutions are not part of this facade: use kernelgraft's GenerativeConv3d")
        self._build(in_channels, out_channels, kernel_size, stride, dilation, bias, transposed, padding)


def fapply(input: Any, fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
    """A function of features, applied to those of a sparse tensor."""
    return input.like(fn(input.feats, *args, **kwargs))


def _on_features(name: str, base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Any) -> Any:
        # Without rows there is nothing to do, but other processes wait for statistics.
        return x.like(base.forward(self, x.feats)) if len(x.feats) or base is nn.SyncBatchNorm else x

    return type(name, (base,), {"forward": forward, "__module__": __name__, "__doc__": f"torch's {base.__name__}."})


BatchNorm = _on_features("BatchNorm", nn.BatchNorm1d)
SyncBatchNorm = _on_features("SyncBatchNorm", nn.SyncBatchNorm)
LayerNorm = _on_features("LayerNorm", nn.LayerNorm)
ReLU = _on_features("ReLU", nn.ReLU)
LeakyReLU = _on_features("LeakyReLU", nn.LeakyReLU)
SiLU = _on_features("SiLU", nn.SiLU)


class GroupNorm(nn.GroupNorm):
    """Statistics over all sites of each grid."""

    def forward(self, x: Any) -> Any:
        from kernelgraft_core.sparse.nn import GroupNorm as Own
        from kernelgraft_core.sparse.tensor import SparseTensor as OwnTensor

        return x.like(Own.forward(self, OwnTensor(x.feats, x.sites())).feats)  # type: ignore[arg-type]


class _GlobalPool(nn.Module):
    reduce = "mean"

    def forward(self, x: Any) -> Tensor:
        from kernelgraft_core.sparse.nn import GlobalPool
        from kernelgraft_core.sparse.tensor import SparseTensor as Own

        found: Tensor = GlobalPool(self.reduce)(Own(x.feats, x.sites()))
        return found


class GlobalAvgPool(_GlobalPool):
    """The mean of each channel over every grid."""


class GlobalMaxPool(_GlobalPool):
    """The largest of each channel over every grid."""

    reduce = "max"


# -- functions on points and voxels -----------------------------------------------------------------------------------


def get_kernel_offsets(size: Sizes, stride: Sizes = 1, dilation: Sizes = 1, device: Any = "cpu") -> Tensor:
    """Where the taps of a kernel read, int32 ``(K, 3)``, in torchsparse's order."""
    sizes, strides, apart = (
        per_axis(name, value, 3) for name, value in (("size", size), ("stride", stride), ("dilation", dilation))
    )
    axes = [[(i - (k - 1) // 2) * s * d for i in range(k)] for k, s, d in zip(sizes, strides, apart, strict=True)]
    offsets = list(itertools.product(*axes))
    if math.prod(sizes) % 2:
        offsets = [(x, y, z) for z, y, x in itertools.product(*reversed(axes))]
    return torch.tensor(offsets, dtype=torch.int32, device=device)


def sphash(coords: Tensor, offsets: Tensor | None = None) -> Tensor:
    """A number for every row ``[x, y, z, b]``, int64 ``(N,)``; or of it moved by each offset, ``(K, N)``.

    Not a hash: 16 bits for each column, so that different rows have different numbers.

    Raises:
        ValueError: a number does not fit.
    """
    rows = coords.long() if offsets is None else coords.long().unsqueeze(0).repeat(len(offsets), 1, 1)
    if offsets is not None:
        rows[..., :3] += offsets.long().unsqueeze(1)
    if rows.numel() and (int(rows.min()) < -(1 << 15) or int(rows.max()) >= 1 << 15):
        raise ValueError(f"coordinates go from {int(rows.min())} to {int(rows.max())}, expected -32768 to 32767")
    x, y, z, b = (rows + (1 << 15)).unbind(-1)
    return (b << 48) - (1 << 63) + (x << 32) + (y << 16) + z


def sphashquery(queries: Tensor, references: Tensor) -> Tensor:
    """The place of each query among the references, int64, -1 where it is none of them."""
    if not len(references):
        return torch.full_like(queries, -1)
    ordered, order = references.flatten().sort()
    at = torch.searchsorted(ordered, queries.contiguous()).clamp_(max=len(ordered) - 1)
    return torch.where(ordered[at] == queries, order[at], -1)


def spcount(coords: Tensor, num: int) -> Tensor:
    """How many points have each of ``num`` voxels, int32."""
    there = coords[coords >= 0].long()
    return torch.bincount(there, minlength=int(num)).int()


def spvoxelize(feats: Tensor, coords: Tensor, counts: Tensor) -> Tensor:
    """Means of the points of each voxel, ``(len(counts), C)``; ``coords``: the voxel of each point, -1 for none."""
    there = coords >= 0
    total = feats.new_zeros((len(counts), feats.shape[1]), dtype=torch.promote_types(feats.dtype, torch.float32))
    total = total.index_add(0, coords[there].long(), feats[there].to(total.dtype))
    return (total / counts.clamp(min=1).unsqueeze(1)).to(feats.dtype)


def calc_ti_weights(coords: Tensor, idx_query: Tensor, scale: float = 1) -> Tensor:
    """Trilinear weights ``(8, N)`` of the voxels around each point, those that are there adding up to 1."""
    with torch.no_grad():
        position = coords[:, :3].float() / scale
        part = position - position.floor()
        weights = []
        for corner in itertools.product((0, 1), repeat=3):
            axes = [part[:, i] if high else 1 - part[:, i] for i, high in enumerate(corner)]
            weights.append(axes[0] * axes[1] * axes[2])
        found = torch.stack(weights)
        found = torch.where(idx_query == -1, 0, found)
        return found / (found.sum(0) + 1e-8)


def spdevoxelize(feats: Tensor, coords: Tensor, weights: Tensor) -> Tensor:
    """Features of points: sums of those of the voxels ``coords (N, 8)``, -1 for none, with ``weights (N, 8)``."""
    there = coords >= 0
    rows = feats[coords.clamp(min=0).long()]
    found = (rows * torch.where(there, weights, 0).to(feats.dtype).unsqueeze(2)).sum(1)
    return found


def sparse_collate(inputs: Sequence[Any], level: Level = "1.4") -> Any:
    """One tensor of all, the batch index appended (1.4) or put in front (2.x); coordinates are without one."""
    make: Callable[..., SparseTensor] = SparseTensor if level == "1.4" else SparseTensor2
    coords = []
    for i, each in enumerate(inputs):
        index = each.coords.new_full((len(each.coords), 1), i)
        coords.append(torch.cat((each.coords, index) if level == "1.4" else (index, each.coords), 1).int())
    return make(torch.cat([each.feats for each in inputs]), torch.cat(coords), inputs[0].stride)


def sparse_quantize(
    coords: Any, voxel_size: float | Sequence[float] = 1, *, return_index: bool = False, return_inverse: bool = False
) -> Any:
    """The different voxels of points, as numpy; with the first point of each, and the voxel of each point."""
    import numpy as np

    size = np.asarray(voxel_size, dtype=np.float64)
    cells = np.floor(np.asarray(coords) / size).astype(np.int32)
    found, index, inverse = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    outputs = [found] + [index] * return_index + [inverse.reshape(-1)] * return_inverse
    return outputs[0] if len(outputs) == 1 else outputs
