"""``spconv.pytorch`` as model code sees it: tensors, layers and their weights, in the layout of spconv 2.

Arguments that choose among spconv's own algorithms are taken and have no effect. Rows of outputs may be in another
order than spconv's, which has none that it promises.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernelgraft_core.sparse.compat.indexed import IndexedConvolution
from kernelgraft_core.sparse.conv.ops import sparse_conv
from kernelgraft_core.sparse.coordinates import Coordinates
from kernelgraft_core.sparse.geometry import ConvGeometry
from kernelgraft_core.sparse.kernel_map import KernelMap
from kernelgraft_core.sparse.nn.pooling import GlobalPool, average_pool
from kernelgraft_core.sparse.pool.ops import sparse_max_pool
from kernelgraft_core.sparse.tensor import SparseTensor

__version__ = "2.3.8"
Sizes = int | Sequence[int]


class ConvAlgo(Enum):
    """Of spconv; without effect here."""

    Native = 0
    MaskImplicitGemm = 1
    MaskSplitImplicitGemm = 2


class SparseConvTensor:
    """Features ``(N, C)`` at ``indices`` int32 ``(N, 1 + D)``, rows ``[b, z, y, x]`` or as many axes as there are.

    ``indice_dict`` holds the maps that layers were told to keep, by ``indice_key``, and is shared by all tensors that
    are made of this one.
    """

    def __init__(
        self,
        features: Tensor,
        indices: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
        grid: Tensor | None = None,
        voxel_num: Tensor | None = None,
        indice_dict: dict[str, KernelMap] | None = None,
        benchmark: bool = False,
        **_: Any,
    ) -> None:
        shape = [int(size) for size in spatial_shape]
        self._set(features, Coordinates(indices, shape, int(batch_size)), {} if indice_dict is None else indice_dict)
        self.grid, self.voxel_num, self.benchmark = grid, voxel_num, benchmark

    @classmethod
    def _of(cls, features: Tensor, coordinates: Coordinates, indice_dict: dict[str, KernelMap]) -> SparseConvTensor:
        made = cls.__new__(cls)
        made._set(features, coordinates, indice_dict)
        made.grid, made.voxel_num, made.benchmark = None, None, False
        return made

    def _set(self, features: Tensor, coordinates: Coordinates, indice_dict: dict[str, KernelMap]) -> None:
        self._tensor = SparseTensor(features, coordinates)
        self.indice_dict = indice_dict

    def __repr__(self) -> str:
        return f"SparseConvTensor[shape={tuple(self.features.shape)}]"

    @property
    def features(self) -> Tensor:
        return self._tensor.feats

    @features.setter
    def features(self, value: Tensor) -> None:
        raise ValueError("features cannot be set: use x = x.replace_feature(features)")

    @property
    def coordinates(self) -> Coordinates:
        """Those that kernel maps are kept with."""
        return self._tensor.coordinates

    @property
    def indices(self) -> Tensor:
        return self._tensor.coords

    @indices.setter
    def indices(self, value: Tensor) -> None:
        known = self.coordinates
        self._set(self.features, Coordinates(value, known.spatial_shape, known.batch_size), {})

    @property
    def spatial_shape(self) -> list[int]:
        return list(self._tensor.spatial_shape)

    @property
    def batch_size(self) -> int:
        return self._tensor.batch_size

    @property
    def spatial_size(self) -> int:
        return math.prod(self.spatial_shape)

    @property
    def is_quantized(self) -> bool:
        return False

    def replace_feature(self, feature: Tensor) -> SparseConvTensor:
        """Other features at the same sites."""
        made = SparseConvTensor._of(feature, self.coordinates, self.indice_dict)
        made.grid, made.voxel_num, made.benchmark = self.grid, self.voxel_num, self.benchmark
        return made

    def shadow_copy(self) -> SparseConvTensor:
        return self.replace_feature(self.features)

    def find_indice_pair(self, key: str | None) -> KernelMap | None:
        return None if key is None else self.indice_dict.get(key)

    def dense(self, channels_first: bool = True) -> Tensor:
        """``(B, C, *spatial_shape)``, or with channels last."""
        dense = self._tensor.to_dense()
        return dense if channels_first else dense.movedim(1, -1)

    @classmethod
    def from_dense(cls, x: Tensor) -> SparseConvTensor:
        """Of ``(B, *spatial_shape, C)``."""
        made = SparseTensor.from_dense(x.movedim(-1, 1))
        return cls._of(made.feats, made.coordinates, {})

    def select_by_index(self, valid_indices: Tensor) -> SparseConvTensor:
        """Only those rows, in that order."""
        known = self.coordinates
        sites = Coordinates(known.indices[valid_indices], known.spatial_shape, known.batch_size, known.stride)
        return SparseConvTensor._of(self.features[valid_indices], sites, {})

    def minus(self) -> SparseConvTensor:
        return self.replace_feature(-self.features)

    def __add__(self, other: SparseConvTensor | Tensor) -> SparseConvTensor:
        added = other.features if isinstance(other, SparseConvTensor) else other
        return self.replace_feature(self.features + added)


class SparseModule(nn.Module):
    """A module that takes a :class:`SparseConvTensor`; others are given features by :class:`SparseSequential`."""


class SparseSequential(SparseModule):
    """``nn.Sequential`` of sparse modules and of modules on features."""

    def __init__(self, *args: Any, **kwargs: nn.Module) -> None:
        super().__init__()
        layers: list[tuple[str, nn.Module]]
        if len(args) == 1 and isinstance(args[0], OrderedDict):
            layers = list(args[0].items())
        else:
            layers = [(str(i), layer) for i, layer in enumerate(args)]
        for name, layer in [*layers, *kwargs.items()]:
            self.add_module(name, layer)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self._modules.values())[index]  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self._modules)

    def add(self, module: nn.Module, name: str | None = None) -> None:
        self.add_module(str(len(self)) if name is None else name, module)

    def forward(self, x: Any) -> Any:
        for layer in self._modules.values():
            assert layer is not None
            if isinstance(layer, SparseModule) or not isinstance(x, SparseConvTensor):
                x = layer(x)
            elif len(x.features):
                x = x.replace_feature(layer(x.features))
        return x


class ToDense(SparseModule):
    def forward(self, x: SparseConvTensor) -> Tensor:
        return x.dense()


class RemoveGrid(SparseModule):
    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        x.grid = None
        return x


class Identity(SparseModule):
    def forward(self, x: Any) -> Any:
        return x


class SparseReLU(SparseModule, nn.ReLU):
    def forward(self, x: Any) -> Any:
        return x.replace_feature(super().forward(x.features))


class SparseBatchNorm(SparseModule, nn.BatchNorm1d):
    def forward(self, x: Any) -> Any:
        return x.replace_feature(super().forward(x.features)) if len(x.features) else x


class SparseConvolution(IndexedConvolution, SparseModule):
    """The base of the convolutions: ``weight (C_out, *kernel_size, C_in)`` and ``bias (C_out,)``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes = 3,
        stride: Sizes = 1,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        indice_key: str | None = None,
        output_padding: Sizes = 0,
        **_: Any,
    ) -> None:
        super().__init__()
        self.describe(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, indice_key, output_padding
        )
        self.weight = nn.Parameter(torch.empty(out_channels, *self.kernel_size, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        if x.features.shape[1] != self.in_channels:
            raise ValueError(f"the input has {x.features.shape[1]} channels, expected {self.in_channels}")
        known = self._map(x)
        weight = self.weight.movedim(0, -1).reshape(self.geometry.volume, 1, self.in_channels, self.out_channels)
        features = sparse_conv(x.features, weight, self.bias, known.neighbors, known.symmetric)
        made = SparseConvTensor._of(features, known.outputs, x.indice_dict)
        made.benchmark = x.benchmark
        return made

    def _map(self, x: SparseConvTensor) -> KernelMap:
        if self.inverse:
            return self.undone(x.find_indice_pair(self.indice_key))
        shape = self.out_shape(x.coordinates)
        known = KernelMap.of(self.geometry, x.coordinates, transposed=self.transposed, out_shape=shape)
        if self.indice_key is not None:
            # A submanifold layer may share its key with others, a layer that changes sites is found by its inverse.
            x.indice_dict[self.indice_key] = known
        return known

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}"


class _Pool(SparseModule):
    ndim: ClassVar[int]
    mean: ClassVar[bool] = False

    def __init__(
        self,
        kernel_size: Sizes = 3,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        indice_key: str | None = None,
        subm: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        stride = (1 if subm else kernel_size) if stride is None else stride
        self.geometry = ConvGeometry.of(self.ndim, kernel_size, stride, 0 if subm else padding, dilation, subm)
        self.indice_key = indice_key

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        known = KernelMap.of(self.geometry, x.coordinates)
        if self.indice_key is not None:
            x.indice_dict[self.indice_key] = known
        if self.mean:
            features = average_pool(x.features, known.neighbors)
        else:
            features = sparse_max_pool(x.features, known.neighbors)
        return SparseConvTensor._of(features, known.outputs, x.indice_dict)


class SparseGlobalMaxPool(SparseModule):
    def forward(self, x: SparseConvTensor) -> Tensor:
        found: Tensor = GlobalPool("max")(x._tensor)
        return found


class SparseGlobalAvgPool(SparseModule):
    def forward(self, x: SparseConvTensor) -> Tensor:
        found: Tensor = GlobalPool("mean")(x._tensor)
        return found


class SubMConvolution(SparseConvolution):
    """Outputs where the inputs are."""

    subm = True


class TransposedConvolution(SparseConvolution):
    """Outputs at every site that an input reaches."""

    transposed = True


class InverseConvolution(SparseConvolution):
    """Back to the sites before the layer with the same ``indice_key``."""

    inverse = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        indice_key: str | None = None,
        bias: bool = True,
        **_: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, indice_key=indice_key)


class AveragePool(_Pool):
    """The mean over the sites that are there."""

    mean = True


def sparse_add(*tensors: SparseConvTensor) -> SparseConvTensor:
    """The sum of tensors whose sites may differ."""
    total = tensors[0]._tensor
    for tensor in tensors[1:]:
        total = total + tensor._tensor
    return SparseConvTensor._of(total.feats, total.coordinates, tensors[0].indice_dict)


def _named(name: str, base: type, dimensions: int) -> type:
    made = type(name, (base,), {"ndim": dimensions, "__doc__": base.__doc__, "__module__": __name__})
    return made


def is_spconv_module(module: object) -> bool:
    """Whether it takes a :class:`SparseConvTensor`."""
    return isinstance(module, SparseModule)


# The classes are alike for every number of dimensions; model code asks for them by these names.
LAYERS: dict[str, type] = {
    f"{name}{n}d": _named(f"{name}{n}d", base, n)
    for name, base in (
        ("SparseConv", SparseConvolution),
        ("SubMConv", SubMConvolution),
        ("SparseConvTranspose", TransposedConvolution),
        ("SparseInverseConv", InverseConvolution),
        ("SparseMaxPool", _Pool),
        ("SparseAvgPool", AveragePool),
    )
    for n in (1, 2, 3, 4)
}
globals().update(LAYERS)
