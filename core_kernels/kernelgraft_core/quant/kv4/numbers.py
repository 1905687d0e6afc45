"""Keys and values in 4 bits: a scale and a lower end per token and head, found when they are stored.

``x ~ q * scale + low`` with ``q`` in 0..15: KV4 of QServe (arXiv 2405.04532), with the lower end in place of a
fractional zero point, which is the same information and exact for rows whose values are all equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 15
LARGEST = 65504.0  # of float16


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the last axis of ``x`` ``(..., D)``.

    Values beyond float16 are cut off at its ends. A row that holds NaN or infinity gets NaN for a scale.

    Returns:
        ``q`` uint8 ``(..., D)`` in 0..15, ``scale`` and ``low`` float16 ``(...)``.
    """
    finite = x.isfinite().all(-1)
    values = x.float().nan_to_num(0.0).clamp(-LARGEST, LARGEST)
    low = values.amin(-1).half()
    scale = ((values.amax(-1) - low.float()) / LEVELS).clamp(min=0).half()
    step = torch.where(scale > 0, scale, torch.ones_like(scale)).float().unsqueeze(-1)
    q = ((values - low.float().unsqueeze(-1)) / step).round().clamp(0, LEVELS)
    q = torch.where((scale > 0).unsqueeze(-1), q, torch.zeros_like(q)).to(torch.uint8)
    return q, torch.where(finite, scale, torch.full_like(scale, torch.nan)), low


def dequantize_kv(q: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`quantize_kv` stands for, ``(..., D)``."""
    return q.to(dtype) * scale.to(dtype).unsqueeze(-1) + low.to(dtype).unsqueeze(-1)
