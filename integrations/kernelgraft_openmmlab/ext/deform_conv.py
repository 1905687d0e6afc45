"""Deformable convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernelgraft_core.vision.deform_conv import Window, deform_conv2d, deform_conv2d_backward

__all__ = (
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
)


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **how: Any
) -> None:
    output.copy_(deform_conv2d(input, offset, weight, window=_window(how)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **how: Any,
) -> None:
    wanted = (True, True, False, False)
    by_input, by_offset, _, _ = deform_conv2d_backward(grad_output, input, offset, weight, None, _window(how), wanted)
    _write((grad_input, by_input), (grad_offset, by_offset))


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float,
    **how: Any,
) -> None:
    wanted = (False, False, True, False)
    *_, by_weight, _ = deform_conv2d_backward(grad_output, input, offset, grad_weight, None, _window(how), wanted)
    assert by_weight is not None
    grad_weight.add_(by_weight, alpha=scale)  # as the compiled op does: mmcv passes zeros


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    with_bias: bool,
    **how: Any,
) -> None:
    output.copy_(deform_conv2d(input, offset, weight, bias if with_bias else None, mask, _modulated_window(how)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **how: Any,
) -> None:
    found = deform_conv2d_backward(grad_output, input, offset, weight, mask, _modulated_window(how))
    _write(*zip((grad_input, grad_offset, grad_weight, grad_mask), found, strict=True))
    if with_bias:
        grad_bias.copy_(grad_output.sum((0, 2, 3)))


def _window(how: dict[str, Any]) -> Window:
    return Window(
        (how["dH"], how["dW"]),
        (how["padH"], how["padW"]),
        (how["dilationH"], how["dilationW"]),
        how["group"],
        how["deformable_group"],
    )


def _modulated_window(how: dict[str, Any]) -> Window:
    return Window(
        (how["stride_h"], how["stride_w"]),
        (how["pad_h"], how["pad_w"]),
        (how["dilation_h"], how["dilation_w"]),
        how["group"],
        how["deformable_group"],
    )


def _write(*pairs: tuple[Tensor, Tensor | None]) -> None:
    for target, found in pairs:
        assert found is not None
        target.copy_(found)
