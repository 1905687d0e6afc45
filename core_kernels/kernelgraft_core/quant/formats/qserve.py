"""QServe's checkpoints (W4A8, arXiv 2405.04532): exact packing in both directions.

Per linear layer ``qweight`` int8 ``(N, K / 2)`` and ``s1_scales`` float16 ``(N,)``; in groups of 128 ``s2_scales`` and
``s2_zeros`` int8 ``(K / 128, N)``, per channel ``s1_szeros`` float16 ``(N,)``:

* groups: ``W = (q * s2_scales + s2_zeros) * s1_scales``, the inner sum modulo 256 an int8. ``s2_zeros`` is minus what
  :class:`~kernelgraft_core.quant.w4a8.W4A8Weight` calls ``group_zero``.
* per channel: ``W = q * s1_scales - s1_szeros``, and the latter is the scale times an integer zero point.

``qweight`` is tiled: of every 32 rows and 32 columns, byte ``64 l + 16 c + 8 a + 4 m + r`` holds in nibble ``h`` the
weight of row ``16 h + 8 m + l`` and column ``16 a + 4 c + r`` (``l`` in 0..7, ``c`` and ``r`` in 0..3, the others in
0..1). Columns of ``s2_scales`` and ``s2_zeros`` are rows of the layer, of every 32 in the order of :data:`S2_ORDERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernelgraft_core.quant.w4a8 import W4A8Weight

from .layout import Part, StoredTensor
from .llm_awq import integer_zeros
from .nibbles import pack_nibbles, unpack_nibbles
from .w4a8 import W4A8Layout, check_finite

TILE = 32
GROUP = 128
LARGEST_STEP, LARGEST_PRODUCT = 127, 255  # what QServe's kernel multiplies four at a time, as bytes

S2_ORDERS = {
    "qserve": [8 * m + lane for lane in range(8) for m in range(4)],
    "deepcompressor": [16 * h + 8 * m + lane for h in range(2) for lane in range(8) for m in range(2)],
}
"""The rows that stand one after another in ``s2_*``. QServe's kernel reads the first, which its converter writes; that
of later DeepCompressor versions writes the second."""


def pack_tiles(q: Tensor) -> Tensor:
    """Integers ``(N, K)`` in 0..15, N and K multiples of 32, to bytes int8 ``(N, K / 2)``."""
    n, k = q.shape
    split = q.reshape(n // TILE, 2, 2, 8, k // TILE, 2, 4, 4)  # rows: tile, h, m, l; columns: tile, a, c, r
    return pack_nibbles(split.permute(0, 4, 3, 6, 5, 2, 7, 1), torch.int8).reshape(n, k // 2)


def unpack_tiles(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_tiles`, uint8."""
    n, k = packed.shape[0], 2 * packed.shape[1]
    split = unpack_nibbles(packed).reshape(n // TILE, k // TILE, 8, 4, 2, 2, 4, 2)  # tiles, l, c, a, m, r, h
    return split.permute(0, 7, 5, 2, 1, 4, 3, 6).reshape(n, k)


@dataclass(frozen=True)
class QServe(W4A8Layout):
    """QServe in groups of 128 or per channel.

    Attributes:
        s2_order: a key of :data:`S2_ORDERS`. Nothing in a file tells which it is.
    """

    label = "QServe"
    scale: ClassVar[str] = "s1_scales"

    s2_order: str = "qserve"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size not in (GROUP, -1):
            raise ValueError(f"group_size = {self.group_size}, but {self.label} has {GROUP}, and -1 for whole rows")
        if self.s2_order not in S2_ORDERS:
            raise ValueError(f"s2_order = {self.s2_order!r}, expected {' or '.join(S2_ORDERS)}")

    def features(self, packed: StoredTensor) -> tuple[int, int]:
        return packed.shape[0], 2 * packed.shape[1]

    def parts(self, n: int, k: int) -> dict[str, Part]:
        if n % TILE or k % TILE:
            raise ValueError(f"N = {n} and K = {k}, but {self.label} layers have multiples of {TILE}")
        groups = self.groups(k)
        of_rows = Part((torch.float16,), (n,))
        parts = {"qweight": Part((torch.int8,), (n, k // 2)), "s1_scales": of_rows}
        if self.group_size == -1:
            return parts | {"s1_szeros": of_rows}
        of_groups = Part((torch.int8,), (groups, n))
        return parts | {"s2_scales": of_groups, "s2_zeros": of_groups}

    def config(self, skipped: Sequence[str] | None) -> dict[str, Any]:
        """Empty: nothing in QServe's directories says what they are."""
        return {}

    def _read(self, tensors: Mapping[str, Tensor]) -> W4A8Weight:
        q, scale = unpack_tiles(tensors["qweight"]), tensors["s1_scales"]
        check_finite("s1_scales", scale)
        if self.group_size == -1:
            zero = integer_zeros(scale, tensors["s1_szeros"], name="s1_szeros", sign=1)
            return W4A8Weight.from_integers(q, scale, zero=zero)
        step = self._by_rows(tensors["s2_scales"]).int()
        if step.numel() and step.min() < 1:
            raise ValueError(f"s2_scales go down to {int(step.min())}, expected 1..{LARGEST_STEP}")
        offset = -self._by_rows(tensors["s2_zeros"]).int() & 255
        return W4A8Weight.from_integers(q, scale, group_scale=step, group_zero=offset)

    def _write(self, weight: W4A8Weight) -> dict[str, Tensor]:
        q = weight.integers()
        tensors = {"qweight": pack_tiles(q), "s1_scales": weight.scale}
        if weight.group_scale is None or weight.group_zero is None:
            assert weight.zero is not None
            zeros = (weight.scale.float() * weight.zero).half()
            check_finite("s1_szeros, the scale times the zero point,", zeros)
            return tensors | {"s1_szeros": zeros}
        step = weight.group_scale.int()
        product = q.unflatten(1, (step.shape[1], -1)).amax(-1) * step
        if step.numel() and (step.max() > LARGEST_STEP or product.max() > LARGEST_PRODUCT):
            raise ValueError(
                f"group_scale goes up to {int(step.max())} and times q to {int(product.max())}; {self.label}'s kernels "
                f"multiply up to {LARGEST_STEP} and {LARGEST_PRODUCT}"
            )
        return tensors | {
            "s2_scales": self._by_positions(step).to(torch.int8),
            "s2_zeros": self._by_positions(-weight.group_zero.int()).to(torch.int8),
        }

    def _by_positions(self, values: Tensor) -> Tensor:
        """``(N, G)`` in the order of rows to ``(G, N)`` in the order of the file."""
        ordered = values.unflatten(0, (-1, TILE))[:, S2_ORDERS[self.s2_order]]
        found: Tensor = ordered.flatten(0, 1).T.contiguous()
        return found

    def _by_rows(self, stored: Tensor) -> Tensor:
        """The inverse of :meth:`_by_positions`."""
        order = S2_ORDERS[self.s2_order]
        tiles: Tensor = stored.T.unflatten(0, (-1, TILE))
        return tiles[:, sorted(range(TILE), key=order.__getitem__)].flatten(0, 1)
