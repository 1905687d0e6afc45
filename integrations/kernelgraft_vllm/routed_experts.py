"""The experts of one layer as one op, opaque to compilers: which are computed depends on the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from kernelgraft_core.quant.w3a16 import W3A16Weight
from kernelgraft_core.quant.w4a16 import W4A16Weight
from kernelgraft_core.quant.weights import QuantizedWeight, linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
"""Of the gate, by the name that vLLM gives them."""


@torch.library.custom_op("kernelgraft::routed_experts", mutates_args=())
def routed_experts(
    x: Tensor,
    routing_weights: Tensor,
    expert_ids: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """``sum_j routing_weights[t, j] * down_e(act(gate_e(x[t])) * up_e(x[t]))`` with ``e = expert_ids[t, j]``, on CPU.

    Args:
        x: ``(T, H)`` float.
        routing_weights: ``(T, k)`` float.
        expert_ids: ``(T, k)`` integers, 0..E-1.
        gate_up: the tensors of :class:`~kernelgraft_core.quant.w4a16.W4A16Weight` or
            :class:`~kernelgraft_core.quant.w3a16.W3A16Weight` for E experts, with a first dimension E: H inputs and 2I
            outputs, gates first.
        down: the same for I inputs and H outputs.
        activation: a key of :data:`ACTIVATIONS`.

    Returns:
        ``(T, H)`` of the dtype of ``x``, summed in float32.
    """
    act, chosen = ACTIVATIONS[activation], expert_ids.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float32)
    by_expert = expert_ids.flatten().argsort(stable=True)
    counts = expert_ids.flatten().bincount(minlength=len(gate_up[0])).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        places = by_expert[start : start + count]
        start += count
        tokens = places // chosen
        gate, up = linear(x[tokens], _weight(gate_up, expert)).chunk(2, -1)
        computed = linear(act(gate) * up, _weight(down, expert))
        out.index_add_(0, tokens, computed.float() * routing_weights.flatten()[places].float().unsqueeze(-1))
    return out.to(x.dtype)


@routed_experts.register_fake
def _(
    x: Tensor,
    routing_weights: Tensor,
    expert_ids: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape)


def _weight(stacked: Sequence[Tensor], expert: int) -> QuantizedWeight:
    tensors = [tensor[expert] for tensor in stacked]
    return W4A16Weight(*tensors) if len(tensors) == 3 else W3A16Weight(*tensors)
