"""Public ops of sparse convolution: checked here once, run by the best backend at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference
from .dataflow import ConvConfig

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = ("none", "relu")


def sparse_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbors: Tensor,
    symmetric: bool = False,
    activation: str = "none",
    dataflow: str = "auto",
) -> Tensor:
    """Sparse convolution: ``y[o] = bias + sum_k x[neighbors[o, k]] @ weight[k]``, channel groups side by side.

    The dataflows of TorchSparse++ (arXiv 2311.12862); products are summed in float32 at least. The result does not
    depend on the number of threads.

    Args:
        x: ``(N_in, C_in)`` float16, bfloat16, float32 or float64.
        weight: ``(K, G, C_in / G, C_out / G)`` of the dtype of ``x``; ``G`` groups of channels.
        bias: ``(C_out,)`` of the same dtype.
        neighbors: int32 ``(N_out, K)`` input rows, -1 for none; see
            :class:`~kernelgraft_core.sparse.kernel_map.KernelMap`.
        symmetric: ``neighbors[o, k] == i`` exactly where ``neighbors[i, K - 1 - k] == o``, which spares gradients a
            transposed map.
        activation: ``"none"``, or ``"relu"`` of the outputs.
        dataflow: one for all directions or three, as :class:`~.dataflow.ConvConfig` reads them. A backend that does not
            have it leaves the call to the next.

    Returns:
        ``(N_out, C_out)``, contiguous, dtype of ``x``. Differentiable in ``x``, ``weight`` and ``bias``. Under
        ``torch.autocast`` these are converted to its dtype first.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
        NoBackendError: no backend can run the call; the message gives each one's reason.
    """
    _check_map(neighbors, weight.shape[0] if weight.dim() else 0)
    _check_features("x", x, weight, 2)
    channels = weight.shape[1] * weight.shape[3]
    if bias is not None and (bias.shape != (channels,) or bias.device != x.device):
        raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}, expected ({channels},) on {x.device}")
    if symmetric and len(neighbors) != len(x):
        raise ValueError(f"a symmetric map has as many outputs as inputs, not {len(neighbors)} and {len(x)}")
    if neighbors.device != x.device:
        raise ValueError(f"neighbors is on {neighbors.device}, x on {x.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {ACTIVATIONS}")
    if dataflow != "auto":
        dataflow = str(ConvConfig.parse(dataflow))
    out: Tensor = CONV(x, weight, bias, neighbors, symmetric, activation, dataflow)
    return out


def sparse_conv_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, neighbors: Tensor, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and the weight of :func:`sparse_conv`, for callers with an autograd function of their own.

    Args:
        x, weight, neighbors, symmetric: as given to :func:`sparse_conv`.
        grad: ``(N_out, C_out)``, of the output.

    Returns:
        ``(N_in, C_in)``, and of the shape of ``weight``.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
        NoBackendError: no backend can run the call.
    """
    _check_map(neighbors, weight.shape[0] if weight.dim() else 0)
    _check_features("x", x, weight, 2)
    _check_features("grad", grad, weight, 3)
    if len(grad) != len(neighbors):
        raise ValueError(f"grad has {len(grad)} rows, neighbors {len(neighbors)}")
    grad_x = DGRAD(grad, weight, neighbors, x.shape[0], symmetric, "auto")
    return grad_x, WGRAD(x, grad, neighbors, weight.shape[1], "auto")


def _check_map(neighbors: Tensor, taps: int) -> None:
    if neighbors.dtype != torch.int32 or neighbors.dim() != 2 or neighbors.shape[1] != taps:
        raise ValueError(
            f"neighbors is {neighbors.dtype} {tuple(neighbors.shape)}, expected torch.int32 (N_out, {taps}), as the "
            "weight has taps"
        )


def _check_features(name: str, x: Tensor, weight: Tensor, axis: int) -> None:
    if weight.dim() != 4:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected (K, G, C_in / G, C_out / G)")
    channels = weight.shape[1] * weight.shape[axis]
    if x.dim() != 2 or x.shape[1] != channels:
        raise ValueError(f"{name} is {tuple(x.shape)}, expected (N, {channels}) for a weight {tuple(weight.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, {name} on {x.device}")
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"weight is {weight.dtype}, {name} {x.dtype}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, neighbors, symmetric, activation, dataflow = inputs
    ctx.save_for_backward(x, weight, neighbors, output if activation == "relu" else None)
    ctx.symmetric, ctx.bias_dtype = symmetric, None if bias is None else bias.dtype
    ctx.config = ConvConfig.parse(dataflow)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, neighbors, positive = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    if positive is not None:
        grad = torch.where(positive > 0, grad, 0)
    grad_x = grad_weight = grad_bias = None
    if needs_x:
        grad_x = DGRAD(grad, weight, neighbors, x.shape[0], ctx.symmetric, str(ctx.config.dgrad))
    if needs_weight:
        grad_weight = WGRAD(x, grad, neighbors, weight.shape[1], str(ctx.config.wgrad))
    if needs_bias:
        grad_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None, None, None, None


CONV = Op(
    "sparse_conv(Tensor x, Tensor weight, Tensor? bias, Tensor neighbors, bool symmetric, str activation, str dataflow)"
    " -> Tensor",
    fake=lambda x, weight, bias, neighbors, *_: x.new_empty((neighbors.shape[0], weight.shape[1] * weight.shape[3])),
    gradient=(_gradients, _save),
    autocast=("x", "weight", "bias"),
)
DGRAD = Op(
    "sparse_conv_dgrad(Tensor grad, Tensor weight, Tensor neighbors, SymInt rows, bool symmetric, str dataflow)"
    " -> Tensor",
    fake=lambda grad, weight, neighbors, rows, *_: grad.new_empty((rows, weight.shape[1] * weight.shape[2])),
)
WGRAD = Op(
    "sparse_conv_wgrad(Tensor x, Tensor grad, Tensor neighbors, int groups, str dataflow) -> Tensor",
    fake=lambda x, grad, neighbors, groups, _: x.new_empty(
        (neighbors.shape[1], groups, x.shape[1] // groups, grad.shape[1] // groups)
    ),
)
for _op in (CONV, DGRAD, WGRAD):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    for _backend, _module, _devices, _priority in (
        ("torch", "gather", ("cpu", "cuda"), 5),
        ("cpu", "cpu", ("cpu",), 10),
        ("triton", "triton", ("cuda",), 10),
    ):
        _run, _supports = (
            deferred(f"kernelgraft_core.sparse.conv.{_module}", name) for name in (_op.name, f"supports_{_op.name}")
        )
        _op.register(Implementation(_backend, _run, _devices, _priority, _supports))
