"""Our format of QoQ checkpoints, ``quant_method: "qoq"``: 4-bit weights for 8-bit activations, for any kernel.

Per linear layer ``qweight`` uint8 ``(N, K / 2)``, the low nibble of a byte an even column, rows and columns in order;
``scale`` float16 ``(N,)``; in groups ``group_scale`` and ``group_zero`` uint8 ``(N, K / g)``, per channel ``zero``
uint8 ``(N,)``. With ``zero: "pre"`` an int8 is ``(q - group_zero) * group_scale``, with ``"post"`` it is
``q * group_scale - group_zero``. No name ends in ``k_scale`` or ``v_scale``, which vLLM takes for the cache's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernelgraft_core.quant.w4a8 import W4A8Weight

from .layout import Part, StoredTensor
from .w4a8 import W4A8Layout, check_finite

FORMAT_VERSION = 1
ZERO_FORMS = ("pre", "post")


@dataclass(frozen=True)
class Qoq(W4A8Layout):
    """QoQ in groups or per channel.

    Attributes:
        zero_form: whether zero points are subtracted before (``"pre"``) or after (``"post"``) scaling to int8.
        kv_bits: what the key-value cache is meant to have, 4; None where the model was not made for that.
        kv_smooth: whether keys were smoothed for it.
    """

    label = "qoq"
    scale: ClassVar[str] = "scale"

    zero_form: str = "pre"
    kv_bits: int | None = None
    kv_smooth: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_form not in ZERO_FORMS:
            raise ValueError(f"zero = {self.zero_form!r}, expected {' or '.join(ZERO_FORMS)}")
        if self.kv_bits not in (None, 4) or not isinstance(self.kv_smooth, bool):
            raise ValueError(f"kv of {self.kv_bits!r} bits with smooth = {self.kv_smooth!r}, expected 4, true or false")

    def features(self, packed: StoredTensor) -> tuple[int, int]:
        return packed.shape[0], 2 * packed.shape[1]

    def parts(self, n: int, k: int) -> dict[str, Part]:
        groups = self.groups(k)
        if k % 2 or k // groups % 2:
            raise ValueError(f"K = {k} and groups of {k // groups}, which have to be even")
        parts = {"qweight": Part((torch.uint8,), (n, k // 2)), "scale": Part((torch.float16,), (n,))}
        if self.group_size == -1:
            return parts | {"zero": Part((torch.uint8,), (n,))}
        of_groups = Part((torch.uint8,), (n, groups))
        return parts | {"group_scale": of_groups, "group_zero": of_groups}

    def config(self, skipped: Sequence[str] | None) -> dict[str, Any]:
        return {
            "quant_method": "qoq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero": self.zero_form,
            "act_bits": 8,
            "kv": None if self.kv_bits is None else {"bits": self.kv_bits, "smooth": self.kv_smooth},
            "modules_to_not_convert": None if skipped is None else list(skipped),
            "format_version": FORMAT_VERSION,
        }

    def _read(self, tensors: Mapping[str, Tensor]) -> W4A8Weight:
        check_finite("scale", tensors["scale"])
        if self.group_size == -1:
            weight = W4A8Weight(tensors["qweight"], tensors["scale"], zero=tensors["zero"])
            if weight.zero is not None and weight.zero.numel() and weight.zero.max() > 15:
                raise ValueError(f"zero goes up to {int(weight.zero.max())}, expected 0..15")
        else:
            scale, zero = tensors["group_scale"], tensors["group_zero"]
            if scale.numel() and scale.min() < 1:
                raise ValueError("group_scale holds zeros, expected 1..255")
            if self.zero_form == "pre":
                product = zero.to(torch.int32) * scale
                if product.numel() and (product.max() > 255 or zero.max() > 15):
                    raise ValueError(
                        f"group_zero goes up to {int(zero.max())} and times group_scale to {int(product.max())}, "
                        "expected 15 and 255 at most"
                    )
                zero = product.to(torch.uint8)
            weight = W4A8Weight(tensors["qweight"], tensors["scale"], scale, zero)
        weight.check()
        return weight

    def _write(self, weight: W4A8Weight) -> dict[str, Tensor]:
        tensors = {"qweight": weight.qweight, "scale": weight.scale}
        if weight.group_scale is None or weight.group_zero is None:
            assert weight.zero is not None
            return tensors | {"zero": weight.zero}
        zero = weight.group_zero
        if self.zero_form == "pre":
            if (zero % weight.group_scale).any():
                raise ValueError("zero points are no multiples of their scales: the format has to be of zero = 'post'")
            zero = zero // weight.group_scale
        return tensors | {"group_scale": weight.group_scale, "group_zero": zero}
