"""Blocks that compute as they will be served: activations in 8 bits, keys and values in 4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernelgraft_core.quant.architectures import Architecture, linear_layer
from kernelgraft_core.quant.kv4 import dequantize_kv, quantize_kv
from kernelgraft_core.quant.w4a8.reference import quantize_activation
from kernelgraft_core.runtime.errors import UnsupportedModelError


@contextmanager
def as_served(
    architecture: Architecture, blocks: Iterable[nn.Module], *, activations: bool = True, cache: bool = True
) -> Iterator[None]:
    """While open, what the layers and the attention of blocks read is quantized and dequantized, in float arithmetic.

    Args:
        architecture: of the blocks; their experts are taken apart (:meth:`Architecture.prepare`).
        activations: the input of every quantized layer to int8, a scale per token.
        cache: keys and values to 4 bits, a scale and a lower end per token and head. They are met where
            ``torch.nn.functional.scaled_dot_product_attention`` gets them, behind rotary embeddings.

    Raises:
        UnsupportedModelError: on leaving, that blocks ran with ``cache`` and never called that function.
    """
    attention = _QuantizedCache()
    with ExitStack() as stack:
        for block in blocks:
            if activations:
                for group in architecture.scale_groups(block):
                    for name in group.targets:
                        stack.callback(linear_layer(block, name).register_forward_pre_hook(_quantize_input).remove)
            if cache:
                stack.callback(block.register_forward_pre_hook(attention.enter_block).remove)
                stack.callback(block.register_forward_hook(attention.leave_block, always_call=True).remove)
        if cache:
            stack.enter_context(attention)
        yield
    if attention.blocks and not attention.calls:
        raise UnsupportedModelError(
            f"the attention of {architecture.name} blocks did not call scaled_dot_product_attention, where keys and "
            "values are quantized; load the model with attn_implementation='sdpa', or set cache_bits=None"
        )


class _QuantizedCache(TorchFunctionMode):
    """Quantizes keys and values of attention inside blocks.

    Attributes:
        blocks, calls: how often a block, and attention in one, was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.calls = self._depth = 0

    def enter_block(self, *_: Any) -> None:
        self.blocks += 1
        self._depth += 1

    def leave_block(self, *_: Any) -> None:
        self._depth -= 1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention and self._depth:
            self.calls += 1
            named |= dict(zip(("query", "key", "value"), args, strict=False))
            key, value = (_through_cache(named.pop(name)) for name in ("key", "value"))
            return func(named.pop("query"), key, value, *args[3:], **named)
        return func(*args, **named)


def _through_cache(x: Tensor) -> Tensor:
    return dequantize_kv(*quantize_kv(x), x.dtype)


def _quantize_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x: Tensor = args[0]
    q, scale, _sums = quantize_activation(x)
    return q.to(x.dtype) * scale.to(x.dtype).unsqueeze(-1), *args[1:]
