"""Overlaps on a CPU, compiled by numba: pairs that are apart, nearly all, cost two comparisons."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernelgraft_core.runtime.threads import Launch, Phase

PAIRS = 1 << 14  # worth a thread
DTYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


def box_iou(a: Tensor, b: Tensor, mode: int, aligned: bool, offset: float) -> Tensor:
    from kernelgraft_core.boxes.cpu_kernels import box_kernel

    wide = torch.promote_types(a.dtype, torch.float32)
    first, second = (each.to(wide).T.contiguous() for each in (a, b))
    number = torch.tensor(offset, dtype=wide)
    return _run(box_kernel, first, second, mode, aligned, wide, number.data_ptr()).to(a.dtype)


def outline_overlap(a: Tensor, b: Tensor, mode: int, aligned: bool, dtype: torch.dtype) -> Tensor:
    from kernelgraft_core.boxes.cpu_kernels import overlap_kernel

    wide = torch.promote_types(dtype, torch.float32)
    return _run(overlap_kernel, a.contiguous(), b.contiguous(), mode, aligned, wide).to(dtype)


def _run(kernel: Any, a: Tensor, b: Tensor, mode: int, aligned: bool, dtype: torch.dtype, *more: int) -> Tensor:
    rows, columns = a.shape[1], b.shape[1]
    out = torch.empty((rows,) if aligned else (rows, columns), dtype=dtype)
    if out.numel():
        grain = max(1, PAIRS // (1 if aligned else columns))
        _launch(kernel(DTYPES[dtype]).address, rows, grain)(
            a.data_ptr(), rows, b.data_ptr(), columns, mode, aligned, out.data_ptr(), *more
        )
    return out


@functools.lru_cache(maxsize=256)
def _launch(address: int, rows: int, grain: int) -> Launch:
    return Launch(Phase(address, rows, grain))


def supports_box_iou(*_: object) -> str | None:
    return None if importlib.util.find_spec("numba") else "numba is not installed"


supports_outline_overlap = supports_box_iou
