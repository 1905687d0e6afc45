"""The ``pack-quantized`` format of compressed-tensors with 4-bit integers (W4A16): exact packing in both directions.

Per linear layer ``weight_packed`` int32 ``(N, K / 8)``, ``weight_scale`` ``(N, K / g)``, ``weight_shape`` int64
``(2,)`` holding N and K and, unless symmetric, ``weight_zero_point`` int32 ``(N / 8 rounded up, K / g)``, which packs
along N. Words are packed in natural order. Integers and zero points are signed, -8..7, and stored with 8 added, which
is what :class:`~kernelgraft_core.quant.w4a16.W4A16Weight` calls ``q`` and ``zeros``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelgraft_core.quant.w4a16.weight import W4A16Weight

from .layout import FLOATS, Layout, Part, StoredTensor
from .nibbles import pack_nibbles, unpack_nibbles


class PackQuantized(Layout):
    """compressed-tensors W4A16, symmetric or not."""

    label = "compressed-tensors pack-quantized"
    may_be_symmetric = True
    packed = "weight_packed"
    scale = "weight_scale"

    def features(self, packed: StoredTensor) -> tuple[int, int]:
        return packed.shape[0], packed.shape[1] * 8

    def parts(self, n: int, k: int) -> dict[str, Part]:
        if k % 8:
            raise ValueError(f"K = {k}, but layers of {self.label} are read and written in multiples of 8")
        groups = self.groups(k)
        parts = {
            "weight_packed": Part((torch.int32,), (n, k // 8)),
            "weight_scale": Part(FLOATS, (n, groups)),
            "weight_shape": Part((torch.int64, torch.int32), (2,)),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = Part((torch.int32,), (-(-n // 8), groups))
        return parts

    def config(self, skipped: Sequence[str] | None) -> dict[str, Any]:
        grouped = self.group_size != -1
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size if grouped else None,
            "dynamic": False,
            "actorder": None,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"] if skipped is None else list(skipped),
            "kv_cache_scheme": None,
        }

    def _read(self, tensors: Mapping[str, Tensor]) -> W4A16Weight:
        q, scales = unpack_nibbles(tensors["weight_packed"]), tensors["weight_scale"]
        shape = tuple(tensors["weight_shape"].tolist())
        if shape != q.shape:
            raise ValueError(f"weight_shape holds {shape}, but weight_packed has {tuple(q.shape)} integers")
        if self.symmetric:
            zeros = torch.full(scales.shape, self.zero, dtype=torch.uint8, device=q.device)
        else:
            zeros = unpack_nibbles(tensors["weight_zero_point"].T)[:, : q.shape[0]].T
        return W4A16Weight.from_integers(q, scales, zeros)

    def _write(self, weight: W4A16Weight) -> dict[str, Tensor]:
        n, k = weight.out_features, weight.in_features
        tensors = {
            "weight_packed": pack_nibbles(weight.integers(), torch.int32),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor([n, k]),
        }
        if not self.symmetric:
            tensors["weight_zero_point"] = pack_nibbles(pad(weight.zeros.T, (0, -n % 8)), torch.int32).T
        return tensors
