"""Public W4A8 ops: checked here once, run by the best backend at hand. They have no gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from . import reference
from .cpu_panels import ROWS, TOGETHER

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WEIGHT = "Tensor qweight, Tensor scale, Tensor? group_scale, Tensor? group_zero, Tensor? zero"

Quantized = tuple[Tensor, Tensor, Tensor]


def _fake_quantized(x: Tensor, features: int) -> Quantized:
    rows = x.shape[:-1]
    return (
        x.new_empty((*rows, features), dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


def register_backends(op: Op, module: Any) -> None:
    """The implementations of ``op`` in ``module``, the reference, and in ``cpu`` and ``triton`` beside it."""
    package = module.__name__.rpartition(".")[0]
    op.register(Implementation("reference", getattr(module, op.name), ("cpu", "cuda")))
    for backend, device in (("cpu", "cpu"), ("triton", "cuda")):
        supports, run = (deferred(f"{package}.{backend}", name) for name in (f"supports_{op.name}", op.name))
        op.register(Implementation(backend, run, (device,), 10, supports))


QUANTIZE = Op(
    "quantize_activation(Tensor x) -> (Tensor, Tensor, Tensor)", fake=lambda x: _fake_quantized(x, x.shape[-1])
)
NORM = Op(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, weight, eps: _fake_quantized(x, x.shape[-1]),
)
SILU = Op(
    "silu_mul_quantize(Tensor gate_up) -> (Tensor, Tensor, Tensor)",
    fake=lambda x: _fake_quantized(x, x.shape[-1] // 2),
)
MATMUL = Op(
    f"w4a8_matmul(Tensor q, Tensor x_scale, Tensor x_sums, {_WEIGHT}, Tensor? bias, ScalarType dtype) -> Tensor",
    fake=lambda q, *rest: q.new_empty((*q.shape[:-1], rest[3].shape[0]), dtype=rest[-1]),
)
LINEAR = Op(
    f"w4a8_linear(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor",
    fake=lambda x, qweight, scale, *rest: x.new_empty((*x.shape[:-1], scale.shape[0])),
    autocast=("x", "bias"),
)
for _op in (QUANTIZE, NORM, SILU, MATMUL, LINEAR):
    register_backends(_op, reference)


def quantize_activation(x: Tensor) -> Quantized:
    """Each token to int8 with a scale of its own: ``x ~ q * scale``.

    Args:
        x: ``(..., K)`` float16, bfloat16, float32 or float64, any strides.

    Returns:
        ``q`` int8 ``(..., K)`` in -127..127, ``round(x / scale)`` with ties to even; ``scale`` float32 ``(...)``,
        the largest magnitude over 127, 1 for a row of zeros and NaN for one that holds NaN or infinity; and the sum of
        the integers of each token, int32 ``(...)``, which is what a zero point multiplies.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    _check_float("x", x)
    out: Quantized = QUANTIZE(x)
    return out


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    """:func:`quantize_activation` of ``x / sqrt(mean(x^2) + eps) * weight``, without rounding in between.

    Args:
        x: ``(..., K)``; weight: ``(K,)``, both float; eps: at least 0.

    Raises:
        ValueError: a shape, dtype or ``eps`` is wrong.
    """
    _check_float("x", x)
    _check_float("weight", weight)
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"weight is {tuple(weight.shape)} on {weight.device}, expected {tuple(x.shape[-1:])} on {x.device}"
        )
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected at least 0")
    out: Quantized = NORM(x, weight, eps)
    return out


def silu_mul_quantize(gate_up: Tensor) -> Quantized:
    """:func:`quantize_activation` of ``silu(gate) * up``, for ``gate_up`` ``(..., 2 K)`` with the gate first.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    _check_float("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}, expected (..., 2 K)")
    out: Quantized = SILU(gate_up)
    return out


def w4a8_matmul(
    q: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None = None,
    group_zero: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """``x @ W.T + bias`` for activations that are quantized already (QServe, arXiv 2405.04532).

    The integers are summed exactly in 32 bits; scales and bias follow in float32.

    Args:
        q, x_scale, x_sums: as :func:`quantize_activation` returns them.
        qweight, scale, group_scale, group_zero, zero: of a :class:`~kernelgraft_core.quant.w4a8.W4A8Weight`.
        bias: ``(N,)``.
        dtype: of the result.

    Returns:
        ``(..., N)``, contiguous.

    Raises:
        ValueError: a shape, dtype or device is wrong; the message names the tensor and the value.
        NoBackendError: no backend can run the call; the message gives each one's reason.
    """
    sizes = check_weight(qweight, scale, group_scale, group_zero, zero)
    check_quantized(q, x_scale, x_sums, bias, dtype, sizes, qweight)
    out: Tensor = MATMUL(q, x_scale, x_sums, qweight, scale, group_scale, group_zero, zero, bias, dtype)
    return out


def w4a8_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None = None,
    group_zero: Tensor | None = None,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`quantize_activation` of ``x`` and :func:`w4a8_matmul` in one.

    Args:
        x: ``(..., K)`` float16, bfloat16, float32 or float64, any strides; the others as for :func:`w4a8_matmul`.

    Returns:
        ``(..., N)`` of the dtype of ``x``, contiguous. A token that holds NaN or infinity gives a row of NaN. Under
        ``torch.autocast``, ``x`` and ``bias`` are converted to its dtype first.

    Raises:
        ValueError, NoBackendError: as for :func:`w4a8_matmul`.
    """
    check_activation(x, bias, check_weight(qweight, scale, group_scale, group_zero, zero), qweight)
    out: Tensor = LINEAR(x, qweight, scale, group_scale, group_zero, zero, bias)
    return out


def check_weight(
    qweight: Tensor, scale: Tensor, group_scale: Tensor | None, group_zero: Tensor | None, zero: Tensor | None
) -> tuple[int, int]:
    """N and K of a weight whose shapes, dtypes and devices are right; values are not looked at."""
    check = _sizes if torch.compiler.is_compiling() else _known_sizes
    return check(_form(qweight), _form(scale), _form(group_scale), _form(group_zero), _form(zero))


def _form(tensor: Tensor | None) -> Any:
    """What can be wrong with a tensor without looking at its values."""
    return None if tensor is None else _Form(tensor.dtype, tensor.shape, tensor.device, tensor.is_contiguous())


class _Form(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device
    contiguous: bool

    def __str__(self) -> str:
        return f"{self.dtype} {tuple(self.shape)}"


def _sizes(
    qweight: _Form, scale: _Form, group_scale: _Form | None, group_zero: _Form | None, zero: _Form | None
) -> tuple[int, int]:
    if qweight.dtype != torch.uint8 or len(qweight.shape) not in (2, 4):
        raise ValueError(f"qweight is {qweight}, expected torch.uint8 (N, K / 2)")
    arranged = len(qweight.shape) == 4
    n, k = qweight.shape[0], qweight.shape[1] * (8 if arranged else 2)
    if arranged and len(scale.shape) == 1:
        n = scale.shape[0]
    if scale.dtype != torch.float16 or scale.shape != (n,):
        raise ValueError(f"scale is {scale}, expected torch.float16 ({n},)")
    rows = -(-n // TOGETHER) * TOGETHER
    if arranged and (qweight.shape != (rows // ROWS, k // 8, ROWS, 4) or not qweight.contiguous):
        raise ValueError(f"qweight is {tuple(qweight.shape)}, expected a contiguous arranged weight of {n} rows")
    parts = {"group_scale": group_scale, "group_zero": group_zero, "zero": zero}
    present = {name: form for name, form in parts.items() if form is not None}
    if sorted(present) not in (["group_scale", "group_zero"], ["zero"]):
        raise ValueError(f"got {sorted(present)}, expected group_scale and group_zero, or zero alone")
    of_groups = (rows // TOGETHER, "K / group size", TOGETHER) if arranged else (n, "K / group size")
    for name, form in present.items():
        shape = (n,) if name == "zero" else of_groups
        sizes = zip(shape, form.shape, strict=False)
        fits = len(form.shape) == len(shape) and all(isinstance(a, str) or a == b for a, b in sizes)
        if form.dtype != torch.uint8 or not fits or (arranged and not form.contiguous):
            wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
            raise ValueError(f"{name} is {form}, expected torch.uint8 {wanted}")
    for name, form in (present | {"scale": scale}).items():
        if form.device != qweight.device:
            raise ValueError(f"{name} is on {form.device}, qweight on {qweight.device}")
    if group_scale is not None and group_zero is not None:
        groups = group_scale.shape[1]
        step = 8 if arranged else 2
        if group_zero.shape != group_scale.shape or groups == 0 or k % groups or k // groups % step:
            raise ValueError(
                f"group_scale is {tuple(group_scale.shape)} and group_zero {tuple(group_zero.shape)}: "
                f"K = {k} does not split into such groups"
            )
    return n, k


# A model has few forms of weights and asks for each before every product, when caches hold other things than this code.
_known_sizes = functools.lru_cache(maxsize=1024)(_sizes)


def check_quantized(
    q: Tensor,
    x_scale: Tensor,
    x_sums: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    qweight: Tensor,
) -> None:
    """Refuse quantized activations, a bias or a result dtype that do not fit a weight of ``sizes`` N and K."""
    n, k = sizes
    if q.dtype != torch.int8 or q.dim() == 0 or q.shape[-1] != k:
        raise ValueError(f"q is {q.dtype} {tuple(q.shape)}, expected torch.int8 (..., {k})")
    _check_device("q", q, qweight)
    for name, tensor, kind in (("x_scale", x_scale, torch.float32), ("x_sums", x_sums, torch.int32)):
        if tensor.dtype != kind or tensor.shape != q.shape[:-1]:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {kind} {tuple(q.shape[:-1])}")
        _check_device(name, tensor, qweight)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, expected one of {FLOATS}")
    _check_bias(bias, n, qweight)


def check_activation(x: Tensor, bias: Tensor | None, sizes: tuple[int, int], qweight: Tensor) -> None:
    """Refuse activations or a bias that do not fit a weight of ``sizes`` N and K."""
    n, k = sizes
    _check_float("x", x)
    if x.shape[-1] != k:
        raise ValueError(f"x is {tuple(x.shape)}, expected (..., {k})")
    _check_device("x", x, qweight)
    _check_bias(bias, n, qweight)


def _check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS or x.dim() == 0:
        raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, expected (..., K) of one of {FLOATS}")


def _check_bias(bias: Tensor | None, n: int, qweight: Tensor) -> None:
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,) or bias.device != qweight.device):
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, expected ({n},) on {qweight.device}"
        )


def _check_device(name: str, tensor: Tensor, qweight: Tensor) -> None:
    if tensor.device != qweight.device:
        raise ValueError(f"{name} is on {tensor.device}, qweight on {qweight.device}")
