"""The three ops of a packed weight - linear layer, its gradient, dequantized weight - checked and registered alike.

A family of ops, such as W4A16, makes one :class:`LinearOps`; its public functions give the arguments names.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernelgraft_core.runtime.op import Implementation, Op, deferred

from .weight import PackedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _without_triton(*_: Any) -> str:
    return "Triton is not installed"


class LinearOps:
    """Defines ``<family>_linear``, ``<family>_linear_dgrad`` and ``dequantize_<family>`` and registers their backends.

    A weight is a tuple: its planes, scales float16 ``(N, K / g)`` and zeros uint8 ``(N, K / g)``. Methods check their
    arguments; they raise ValueError with the name and the value of what is wrong.

    Args:
        family: e.g. ``"w4a16"``.
        kind: the type of the weight.
        reference: the module with the backend "reference"; beside it are ``cpu`` and ``triton``, imported at first use
            (importing the ops must not start numba or Triton), each with ``supports_<op>`` for every op.
    """

    def __init__(self, family: str, kind: type[PackedWeight], reference: ModuleType) -> None:
        self.planes, self.unit = tuple(kind.planes.items()), kind.unit()
        per_word = self.planes[0][1]
        tensors = ", ".join(f"Tensor {name}" for name in (*kind.planes, "scales", "zeros"))
        self.linear_op = Op(
            f"{family}_linear(Tensor x, {tensors}, Tensor? bias) -> Tensor",
            fake=lambda x, *rest: x.new_empty((*x.shape[:-1], rest[0].shape[0])),
            gradient=(self._gradient, self._save_weight),
            autocast=("x", "bias"),
        )
        self.dgrad_op = Op(
            f"{family}_linear_dgrad(Tensor grad, {tensors}) -> Tensor",
            fake=lambda grad, *weight: grad.new_empty((*grad.shape[:-1], weight[0].shape[1] * per_word)),
        )
        self.dequantize_op = Op(
            f"dequantize_{family}({tensors}, ScalarType dtype) -> Tensor",
            fake=lambda first, *rest: first.new_empty((first.shape[0], first.shape[1] * per_word), dtype=rest[-1]),
        )
        package = reference.__name__.rpartition(".")[0]
        for op in (self.linear_op, self.dgrad_op, self.dequantize_op):
            op.register(Implementation("reference", getattr(reference, op.name), ("cpu", "cuda")))
            for backend, device, present in (("cpu", "cpu", True), ("triton", "cuda", _HAS_TRITON)):
                module = f"{package}.{backend}"
                supports = deferred(module, f"supports_{op.name}") if present else _without_triton
                op.register(Implementation(backend, deferred(module, op.name), (device,), 10, supports))

    def linear(self, x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        """``x @ W.T + bias``: ``(..., K)`` to ``(..., N)``."""
        rows, k = self._check_weight(weight)
        _check_activation("x", x, weight[0], k)
        alike = bias is None or bias.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
        if bias is not None and (bias.shape != (rows,) or not alike or bias.device != x.device):
            raise ValueError(
                f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, expected {x.dtype} ({rows},) on {x.device}"
            )
        out: Tensor = self.linear_op(x, *weight, bias)
        return out

    def dgrad(self, grad: Tensor, weight: tuple[Tensor, ...]) -> Tensor:
        """``grad @ W``: ``(..., N)`` to ``(..., K)``."""
        rows, _ = self._check_weight(weight)
        _check_activation("grad", grad, weight[0], rows)
        out: Tensor = self.dgrad_op(grad, *weight)
        return out

    def dequantize(self, weight: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """``W`` ``(N, K)``."""
        self._check_weight(weight)
        if dtype not in FLOATS:
            raise ValueError(f"dtype is {dtype}, expected one of {FLOATS}")
        out: Tensor = self.dequantize_op(*weight, dtype)
        return out

    def _check_weight(self, weight: tuple[Tensor, ...]) -> tuple[int, int]:
        """N and K."""
        *packed, scales, zeros = weight
        first = packed[0]
        for (name, per_word), plane in zip(self.planes, packed, strict=True):
            if plane.dtype != torch.int32 or plane.dim() != 2:
                raise ValueError(
                    f"{name} is {plane.dtype} {tuple(plane.shape)}, expected torch.int32 (N, K / {per_word})"
                )
        if scales.dtype != torch.float16 or zeros.dtype != torch.uint8:
            raise ValueError(
                f"scales are {scales.dtype} and zeros {zeros.dtype}, expected torch.float16 and torch.uint8"
            )
        rows, k = first.shape[0], first.shape[1] * self.planes[0][1]
        for (name, per_word), plane in zip(self.planes[1:], packed[1:], strict=True):
            if plane.shape[0] != rows or plane.shape[1] * per_word != k:
                wanted = f"({rows}, {k} / {per_word}) beside {self.planes[0][0]} {tuple(first.shape)}"
                raise ValueError(f"{name} is {tuple(plane.shape)}, expected {wanted}")
            _check_device(name, plane, first)
        for name, tensor in (("scales", scales), ("zeros", zeros)):
            if tensor.dim() != 2 or tensor.shape[0] != rows or tensor.shape != scales.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected ({rows}, K / group size)")
            _check_device(name, tensor, first)
        groups = scales.shape[1]
        if k == 0 or groups == 0 or k % groups or (k // groups) % self.unit:
            raise ValueError(f"K = {k} does not split into {groups} groups of a multiple of {self.unit}")
        return rows, k

    @staticmethod
    def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:-1])

    def _gradient(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The weight is frozen (LoRA on a quantized base needs the input's gradient only); the bias sums over tokens.
        wants_x, *_, wants_bias = ctx.needs_input_grad
        grad_x = self.dgrad_op(grad.contiguous(), *ctx.saved_tensors) if wants_x else None
        grad_bias = grad.unsqueeze(0).flatten(0, -2).sum(0) if wants_bias else None
        return grad_x, *(None for _ in ctx.saved_tensors), grad_bias


def _check_activation(name: str, x: Tensor, qweight: Tensor, features: int) -> None:
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"{name} is {tuple(x.shape)}, expected (..., {features})")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} is {x.dtype}, expected one of {FLOATS}")
    _check_device(name, x, qweight)


def _check_device(name: str, tensor: Tensor, qweight: Tensor) -> None:
    if tensor.device != qweight.device:
        raise ValueError(f"{name} is on {tensor.device}, qweight on {qweight.device}")
