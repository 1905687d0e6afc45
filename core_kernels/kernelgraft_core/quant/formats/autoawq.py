"""AutoAWQ's layouts GEMM, the de facto AWQ checkpoint, and GEMV: exact packing in both directions.

In both ``W = (q - z) * s``, and a layer's tensors are ``qweight``, ``qzeros`` and ``scales``.

* GEMM packs along N: ``qweight`` int32 ``(K, N / 8)``, ``qzeros`` int32 ``(K / g, N / 8)``, ``scales`` float16
  ``(K / g, N)``; nibble ``i`` of word ``c`` is column ``8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``. The order is the one of
  :mod:`kernelgraft_core.quant.int4`, only that here it runs along N and in
  :class:`~kernelgraft_core.quant.w4a16.W4A16Weight` along K. llm-awq's first checkpoints are the same.
* GEMV packs along K in natural order: ``qweight`` int32 ``(N, K / 8)``, ``qzeros`` int32 ``(N, P / 8)``, ``scales``
  float16 ``(N, P)``, where P is K / g padded with zeros (:func:`padded_groups`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelgraft_core.quant.int4 import pack_int4, unpack_int4
from kernelgraft_core.quant.w4a16.weight import W4A16Weight

from .layout import FLOATS, Layout, Part, StoredTensor
from .nibbles import pack_nibbles, unpack_nibbles


def unpack_gemm(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> W4A16Weight:
    """Read one linear layer.

    Args:
        qweight: int32 ``(K, N / 8)``.
        qzeros: int32 ``(K / g, N / 8)``.
        scales: ``(K / g, N)``, converted to float16.

    Raises:
        ValueError: dtypes or shapes are not those of one GEMM layer (GEMV checkpoints have other shapes).
    """
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        if tensor.dtype != torch.int32 or tensor.dim() != 2:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected two-dimensional torch.int32")
    k, n = qweight.shape[0], qweight.shape[1] * 8
    groups = qzeros.shape[0]
    if qzeros.shape != (groups, n // 8) or scales.shape != (groups, n) or groups == 0 or k % groups or k % 8:
        raise ValueError(
            f"qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)} and scales {tuple(scales.shape)} "
            "are not one AutoAWQ GEMM layer"
        )
    return W4A16Weight.from_integers(
        unpack_int4(qweight).T.contiguous(), scales.T.contiguous(), unpack_int4(qzeros).T.contiguous()
    )


def pack_gemm(weight: W4A16Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Write one linear layer: ``(qweight, qzeros, scales)`` as :func:`unpack_gemm` takes them, contiguous.

    Raises:
        ValueError: N is not a multiple of 8, which the layout cannot hold.
    """
    if weight.out_features % 8:
        raise ValueError(f"AutoAWQ GEMM packs 8 columns to a word; this layer has {weight.out_features}")
    return (
        pack_int4(weight.integers().T),
        pack_int4(weight.zeros.T),
        weight.scales.T.contiguous(),
    )


def padded_groups(k: int, group_size: int) -> int:
    """Columns that GEMV and llm-awq give the scales of a row: K / g, rounded up to the words that a warp reads at once.

    Raises:
        ValueError: these layouts have no such group size.
    """
    size = k if group_size == -1 else group_size
    words = {32: 4, 64: 2}.get(size, 1)
    if size % 8 or (size < 128 and words == 1):
        raise ValueError(f"group size {size}, but the layout has 32, 64 and multiples of 8 from 128 on")
    groups = k // size
    return -(-groups // (8 * words)) * 8 * words


class AwqLayout(Layout):
    """What AutoAWQ's and llm-awq's layouts share: the ``quantization_config``."""

    version: ClassVar[str]

    def config(self, skipped: Sequence[str] | None) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": True,
            "version": self.version,
            "modules_to_not_convert": None if skipped is None else list(skipped),
        }


class Gemm(AwqLayout):
    """AutoAWQ GEMM, and llm-awq's checkpoints before TinyChat."""

    label = "AutoAWQ GEMM"
    version = "gemm"

    def features(self, packed: StoredTensor) -> tuple[int, int]:
        return packed.shape[1] * 8, packed.shape[0]

    def parts(self, n: int, k: int) -> dict[str, Part]:
        if n % 8 or k % 8:
            raise ValueError(f"N = {n} and K = {k}, but {self.label} layers have multiples of 8")
        groups = self.groups(k)
        return {
            "qweight": Part((torch.int32,), (k, n // 8)),
            "qzeros": Part((torch.int32,), (groups, n // 8)),
            "scales": Part(FLOATS, (groups, n)),
        }

    def _read(self, tensors: Mapping[str, Tensor]) -> W4A16Weight:
        return unpack_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"])

    def _write(self, weight: W4A16Weight) -> dict[str, Tensor]:
        return dict(zip(("qweight", "qzeros", "scales"), pack_gemm(weight), strict=True))


class Gemv(AwqLayout):
    """AutoAWQ GEMV, and llm-awq's checkpoints of the first TinyChat."""

    label = "AutoAWQ GEMV"
    version = "gemv"

    def features(self, packed: StoredTensor) -> tuple[int, int]:
        return packed.shape[0], packed.shape[1] * 8

    def parts(self, n: int, k: int) -> dict[str, Part]:
        if n % 8 or k % 8:
            raise ValueError(f"N = {n} and K = {k}, but {self.label} layers have multiples of 8")
        self.groups(k)
        padded = padded_groups(k, self.group_size)
        return {
            "qweight": Part((torch.int32,), (n, k // 8)),
            "qzeros": Part((torch.int32,), (n, padded // 8)),
            "scales": Part(FLOATS, (n, padded)),
        }

    def _read(self, tensors: Mapping[str, Tensor]) -> W4A16Weight:
        q = unpack_nibbles(tensors["qweight"])
        groups = self.groups(q.shape[1])
        return W4A16Weight.from_integers(
            q, tensors["scales"][:, :groups], unpack_nibbles(tensors["qzeros"])[:, :groups]
        )

    def _write(self, weight: W4A16Weight) -> dict[str, Tensor]:
        padding = (0, padded_groups(weight.in_features, self.group_size) - weight.scales.shape[1])
        return {
            "qweight": pack_nibbles(weight.integers(), torch.int32),
            "qzeros": pack_nibbles(pad(weight.zeros, padding), torch.int32),
            "scales": pad(weight.scales, padding),
        }
