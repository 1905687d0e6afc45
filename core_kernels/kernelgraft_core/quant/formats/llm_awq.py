"""llm-awq's layout since TinyChat 2, which AutoAWQ calls GEMV_FAST: exact packing in both directions.

Per linear layer ``qweight`` int16 ``(N / 4, K)``, ``scales`` and ``scaled_zeros`` float16 ``(P, N)``, where P is K / g
padded with zeros (:func:`~kernelgraft_core.quant.formats.autoawq.padded_groups`) and ``scaled_zeros`` is ``-(s * z)``:
``W = q * s + scaled_zeros``.

Four rows share a row of words, in stretches of 64: word ``64 b + 16 r + 8 c + 2 j + h`` of row ``R`` holds, in nibble
``i``, the weight of row ``4 R + r`` and column ``64 b + 32 c + 8 i + 2 j + h`` (``r``, ``i``, ``j`` in 0..3, ``c`` and
``h`` in 0..1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernelgraft_core.quant.w4a16.weight import W4A16Weight

from .autoawq import AwqLayout, padded_groups
from .layout import FLOATS, Part, StoredTensor
from .nibbles import pack_nibbles, unpack_nibbles

HALVES = FLOATS[:2]


def pack_interleaved(q: Tensor) -> Tensor:
    """Integers ``(N, K)`` in 0..15, N a multiple of 4 and K of 64, to words int16 ``(N / 4, K)``."""
    n, k = q.shape
    split = q.reshape(n // 4, 4, k // 64, 2, 4, 4, 2)  # R, r, b, c, i, j, h
    return pack_nibbles(split.permute(0, 2, 1, 3, 5, 6, 4).reshape(n // 4, k * 4), torch.int16)


def unpack_interleaved(words: Tensor) -> Tensor:
    """The inverse of :func:`pack_interleaved`, uint8."""
    n, k = words.shape[0] * 4, words.shape[1]
    split = unpack_nibbles(words).reshape(n // 4, k // 64, 4, 2, 4, 2, 4)  # R, b, r, c, j, h, i
    return split.permute(0, 2, 1, 3, 6, 4, 5).reshape(n, k)


def integer_zeros(scales: Tensor, scaled_zeros: Tensor, *, name: str = "scaled_zeros", sign: int = -1) -> Tensor:
    """The zero points ``z`` in 0..15 with ``scaled_zeros = sign * s * z``, uint8; any shape.

    Args:
        name: of the scaled zero points, for the message.

    Raises:
        ValueError: a value is more off than rounding the scale and the product to their dtype explains.
    """
    s, product = scales.float(), sign * scaled_zeros.float()
    zeros = torch.where(s == 0, 0.0, (product / s).round())
    explained = (product - s * zeros).abs() <= torch.finfo(scaled_zeros.dtype).eps * product.abs()
    wrong = ~explained | (zeros < 0) | (zeros > 15)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{name}{list(at)} = {scaled_zeros[at].item()} is not {'minus ' if sign < 0 else ''}the scale, "
            f"{s[at].item()}, times an integer in 0..15"
        )
    return zeros.to(torch.uint8)


@dataclass(frozen=True)
class LlmAwq(AwqLayout):
    """llm-awq version 2, AutoAWQ GEMV_FAST.

    Attributes:
        offsets: what the part ``scaled_zeros`` is called; GPTQModel writes ``qzeros`` into its GEMV_FAST checkpoints.
    """

    label = "llm-awq"
    version = "gemv_fast"

    offsets: str = "scaled_zeros"

    def features(self, packed: StoredTensor) -> tuple[int, int]:
        return packed.shape[0] * 4, packed.shape[1]

    def parts(self, n: int, k: int) -> dict[str, Part]:
        if n % 8 or k % 64:
            raise ValueError(f"N = {n} and K = {k}, but {self.label} layers have multiples of 8 and 64")
        self.groups(k)
        padded = padded_groups(k, self.group_size)
        return {
            "qweight": Part((torch.int16,), (n // 4, k)),
            "scales": Part(HALVES, (padded, n)),
            self.offsets: Part(HALVES, (padded, n)),
        }

    def _read(self, tensors: Mapping[str, Tensor]) -> W4A16Weight:
        q = unpack_interleaved(tensors["qweight"])
        groups = self.groups(q.shape[1])
        scales = tensors["scales"][:groups]
        zeros = integer_zeros(scales, tensors[self.offsets][:groups])
        return W4A16Weight.from_integers(q, scales.T, zeros.T)

    def _write(self, weight: W4A16Weight) -> dict[str, Tensor]:
        scales, zeros = weight.scales.T, weight.zeros.T
        padding = (0, 0, 0, padded_groups(weight.in_features, self.group_size) - scales.shape[0])
        return {
            "qweight": pack_interleaved(weight.integers()),
            "scales": pad(scales, padding),
            self.offsets: pad(-(scales.float() * zeros).to(torch.float16), padding),
        }
