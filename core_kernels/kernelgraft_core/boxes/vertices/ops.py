"""Public op that puts the vertices of the overlap of two rectangles in order, for areas that are differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelgraft_core.boxes.overlap.ops import FLOATS
from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

CANDIDATES = 24  # four corners of each box, and where four edges meet four edges


def sort_overlap_vertices(vertices: Tensor, mask: Tensor) -> Tensor:
    """Which of the candidates are the outline of what two rectangles share, counter-clockwise.

    Args:
        vertices: ``(B, N, 24, 2)`` float16, bfloat16, float32 or float64, relative to a point inside of the overlap:
            the corners of both boxes, then the crossings of their edges.
        mask: bool ``(B, N, 24)``: which of them belong to the overlap.

    Returns:
        int32 ``(B, N, 9)``: the vertices by their angles from x towards y, each place once, the lowest index where
        several are within 1e-8; then the first again; then a crossing that does not belong to the overlap, as often as
        there is room. The latter alone where fewer than three vertices are valid. Where rounding makes more than eight
        of them, those that matter least are left out. No gradient.

    Raises:
        ValueError: a shape, dtype or device is wrong.
        NoBackendError: no backend can run the call.
    """
    if vertices.dtype not in FLOATS or vertices.dim() != 4 or vertices.shape[2:] != (CANDIDATES, 2):
        raise ValueError(f"vertices is {vertices.dtype} {tuple(vertices.shape)}, expected floating point (B, N, 24, 2)")
    if mask.dtype != torch.bool or mask.shape != vertices.shape[:3] or mask.device != vertices.device:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}, expected torch.bool "
            f"{tuple(vertices.shape[:3])} on {vertices.device}"
        )
    wide = torch.promote_types(vertices.dtype, torch.float32)
    out: Tensor = SORT(vertices.detach().to(wide), mask)
    return out


SORT = Op(
    "sort_overlap_vertices(Tensor vertices, Tensor mask) -> Tensor",
    fake=lambda vertices, mask: vertices.new_empty((*vertices.shape[:2], reference.LARGEST + 1), dtype=torch.int32),
)
SORT.register(Implementation("reference", reference.sort_overlap_vertices, ("cpu", "cuda")))
_run, _supports = (
    deferred("kernelgraft_core.boxes.vertices.cpu", name)
    for name in ("sort_overlap_vertices", "supports_sort_overlap_vertices")
)
SORT.register(Implementation("cpu", _run, ("cpu",), 10, _supports))
