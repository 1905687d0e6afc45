"""Public op of products of pairs: what sparse convolution and relational graph convolution have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pair_gemm(
    x: Tensor,
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    starts: Tensor,
    rows: int,
    scale: Tensor | None = None,
) -> Tensor:
    """``y[outputs[p]] += scale[p] * x[inputs[p]] @ weight[k]`` for all pairs ``starts[k] <= p < starts[k + 1]``.

    The primitive under graph convolution in TorchSparse++ (arXiv 2311.12862). Sums are in float32 at least, and do not
    depend on the number of threads.

    Args:
        x: ``(N_in, C_in)`` float16, bfloat16, float32 or float64.
        weight: ``(K, C_in, C_out)``, or ``(K, G, C_in / G, C_out / G)`` for ``G`` blocks of channels; dtype of ``x``.
        inputs, outputs: int64 ``(P,)`` rows of x and of the result, relation by relation.
        starts: int64 ``(K + 1,)``, ascending from 0 to P.
        rows: N_out.
        scale: ``(P,)`` factors of the products; not differentiated.

    Returns:
        ``(N_out, C_out)``, dtype of ``x``. Differentiable in ``x`` and ``weight``.

    Raises:
        ValueError: a shape, dtype or device is wrong, or ``scale`` wants a gradient; on a CPU, and outside of compiled
            code, also a row that is not there: asking a GPU would mean to wait for it.
        NoBackendError: no backend can run the call.
    """
    if weight.dim() == 3:
        weight = weight.unsqueeze(1)
    _check(x, weight, inputs, outputs, starts, rows, scale)
    out: Tensor = PAIR_GEMM(x, weight, inputs, outputs, starts, scale, rows)
    return out


def _check(
    x: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor, starts: Tensor, rows: int, scale: Tensor | None
) -> None:
    if weight.dim() != 4:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected (K, C_in, C_out) or (K, G, C_in / G, C_out / G)")
    channels = weight.shape[1] * weight.shape[2]
    if x.dtype not in FLOATS or x.dim() != 2 or x.shape[1] != channels:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floating point (N, {channels}), as weight has")
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"weight is {weight.dtype}, x {x.dtype}")
    count = inputs.shape[0] if inputs.dim() else 0
    for name, tensor, shape in (("inputs", inputs, (count,)), ("outputs", outputs, (count,)),
                                ("starts", starts, (len(weight) + 1,))):  # fmt: skip
        if tensor.dtype != torch.int64 or tensor.shape != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected torch.int64 {shape}")
    if scale is not None and (scale.shape != (count,) or not scale.is_floating_point() or scale.requires_grad):
        raise ValueError(
            f"scale is {scale.dtype} {tuple(scale.shape)}, requires_grad = {scale.requires_grad}; expected floating "
            f"point ({count},) without a gradient"
        )
    for name, other in (("weight", weight), ("inputs", inputs), ("outputs", outputs), ("starts", starts)):
        if other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, x on {x.device}")
    if rows < 0:
        raise ValueError(f"rows is {rows}, expected at least 0")
    if x.device.type == "cpu" and count and not torch.compiler.is_compiling():  # elsewhere asking would wait
        for name, tensor, limit in (("inputs", inputs, len(x)), ("outputs", outputs, rows)):
            low, high = tensor.aminmax()
            if low < 0 or high >= limit:
                raise ValueError(f"{name} goes from {int(low)} to {int(high)}, expected 0 to {limit - 1}")
        if starts[0] != 0 or starts[-1] != count or (starts[1:] < starts[:-1]).any():
            raise ValueError(f"starts is {starts.tolist()}, expected to ascend from 0 to {count}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, inputs, outputs, starts, scale = ctx.saved_tensors
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    grad_x = grad_weight = None
    if needs_x:  # the same products with inputs and outputs exchanged
        grad_x = PAIR_GEMM(grad, weight.transpose(2, 3), outputs, inputs, starts, scale, x.shape[0])
    if needs_weight:
        grad_weight = WGRAD(x, grad, inputs, outputs, starts, scale, weight.shape[1])
    return grad_x, grad_weight, None, None, None, None, None


PAIR_GEMM = Op(
    "pair_gemm(Tensor x, Tensor weight, Tensor inputs, Tensor outputs, Tensor starts, Tensor? scale, SymInt rows)"
    " -> Tensor",
    fake=lambda x, weight, inputs, outputs, starts, scale, rows: x.new_empty((rows, weight.shape[1] * weight.shape[3])),
    gradient=(_gradients, _save),
    autocast=("x", "weight"),
)
WGRAD = Op(
    "pair_gemm_wgrad(Tensor x, Tensor grad, Tensor inputs, Tensor outputs, Tensor starts, Tensor? scale, int groups)"
    " -> Tensor",
    fake=lambda x, grad, inputs, outputs, starts, scale, groups: x.new_empty(
        (starts.shape[0] - 1, groups, x.shape[1] // groups, grad.shape[1] // groups)
    ),
)
for _op in (PAIR_GEMM, WGRAD):
    _op.register(Implementation("reference", getattr(reference, _op.name), ("cpu", "cuda")))
    for _backend, _device in (("cpu", "cpu"), ("triton", "cuda")):
        _run, _supports = (
            deferred(f"kernelgraft_core.sparse.pair_gemm.{_backend}", name)
            for name in (_op.name, f"supports_{_op.name}")
        )
        _op.register(Implementation(_backend, _run, (_device,), 10, _supports))
