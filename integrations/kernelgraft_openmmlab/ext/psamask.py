"""Masks of point-wise spatial attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernelgraft_core.vision import psa_mask as core

__all__ = ("psamask_backward", "psamask_forward")

_DISTRIBUTE = 1  # psa_type; 0 collects


def psamask_forward(input: Tensor, output: Tensor, psa_type: int, h_mask: int, w_mask: int, **_: Any) -> None:
    output.copy_(core.psa_mask(input, (h_mask, w_mask), distribute=psa_type == _DISTRIBUTE))


def psamask_backward(
    grad_output: Tensor, grad_input: Tensor, psa_type: int, h_mask: int, w_mask: int, **_: Any
) -> None:
    grad_input.copy_(core.psa_mask_backward(grad_output, (h_mask, w_mask), distribute=psa_type == _DISTRIBUTE))
