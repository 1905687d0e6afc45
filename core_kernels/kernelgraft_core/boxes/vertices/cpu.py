"""The order of the vertices of overlaps on a CPU, compiled by numba: polygons are split over the threads."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kernelgraft_core.boxes.overlap.cpu import DTYPES
from kernelgraft_core.runtime.threads import Launch, Phase

from .reference import LARGEST

GRAIN = 256  # polygons worth a thread


def sort_overlap_vertices(vertices: Tensor, mask: Tensor) -> Tensor:
    from .cpu_kernels import sort_kernel

    out = torch.empty((*mask.shape[:-1], LARGEST + 1), dtype=torch.int32)
    vertices, mask = vertices.contiguous(), mask.contiguous()
    polygons = out.numel() // (LARGEST + 1)
    if polygons:
        Launch(Phase(sort_kernel(DTYPES[vertices.dtype]).address, polygons, GRAIN))(
            vertices.data_ptr(), mask.data_ptr(), mask.shape[-1], out.data_ptr()
        )
    return out


def supports_sort_overlap_vertices(*_: object) -> str | None:
    return None if importlib.util.find_spec("numba") else "numba is not installed"
