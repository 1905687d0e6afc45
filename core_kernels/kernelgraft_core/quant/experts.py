"""Mixtures of experts taken apart: every projection a linear layer, so that each can be calibrated and quantized.

Hosts keep the experts of one layer as two tensors, ``gate_up_proj`` ``(E, 2I, H)`` and ``down_proj`` ``(E, H, I)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.runtime.errors import UnsupportedModelError

# How a fused module may say that its tensors are laid out, and what is read here.
_LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


class Expert(nn.Module):
    """A gated MLP, ``down(act(gate(x)) * up(x))``, on tokens ``(T, H)``."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class UnfusedExperts(nn.ModuleList):
    """The experts of one layer as modules, called like the fused ones that they replace.

    Args:
        fused: a module with parameters ``gate_up_proj`` ``(E, 2I, H)``, gates first, and ``down_proj`` ``(E, H, I)``,
            and an activation ``act_fn``. The new layers are views of its tensors.

    Attributes:
        calibrate_all: run every expert on every token, so that hooks on its layers see them all. The output is that of
            the routed experts either way.

    Raises:
        UnsupportedModelError: the module's tensors are laid out differently; the message says how.
    """

    calibrate_all: bool

    def __init__(self, fused: nn.Module) -> None:
        gate_up, down, act_fn = _parts(fused)
        inner = gate_up.shape[1] // 2
        super().__init__(
            Expert(
                _linear_view(gate_up, index, slice(0, inner)),
                _linear_view(gate_up, index, slice(inner, None)),
                _linear_view(down, index, slice(None)),
                act_fn,
            )
            for index in range(len(gate_up))
        )
        self.calibrate_all = False
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states: ``(T, H)``.
            top_k_index: ``(T, k)`` int64; an index that is no expert's (hosts use E) stands for none.
            top_k_weights: ``(T, k)``.
        """
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, place = torch.where(top_k_index == index)
            if self.calibrate_all:
                routed = expert(hidden_states)[token]
            elif len(token):
                routed = expert(hidden_states[token])
            else:
                continue
            weighted = routed * top_k_weights[token, place, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


def find_fused_experts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the fused experts in ``module``.

    Raises:
        UnsupportedModelError: those of a module are laid out differently.
    """
    for name, child in module.named_modules():
        if isinstance(getattr(child, "gate_up_proj", None), nn.Parameter):
            try:
                _parts(child)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{name}: {error}") from None
            yield name, child


def unfuse_experts(module: nn.Module) -> None:
    """Replace all fused experts in ``module`` by :class:`UnfusedExperts`, in place."""
    for name, fused in list(find_fused_experts(module)):
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, UnfusedExperts(fused))


def count_experts(experts: Any) -> int:
    """How many experts a fused or unfused module holds."""
    return len(experts if isinstance(experts, nn.ModuleList) else experts.gate_up_proj)


@contextmanager
def calibrate_every_expert(module: nn.Module) -> Iterator[None]:
    """While open, all :class:`UnfusedExperts` in ``module`` run every expert on every token."""
    before = [(m, m.calibrate_all) for m in module.modules() if isinstance(m, UnfusedExperts)]
    try:
        for experts, _ in before:
            experts.calibrate_all = True
        yield
    finally:
        for experts, value in before:
            experts.calibrate_all = value


def _linear_view(stacked: nn.Parameter, index: int, rows: slice) -> nn.Linear:
    weight = stacked.data[index, rows]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")  # no storage of its own
    layer.weight = nn.Parameter(weight, requires_grad=stacked.requires_grad)
    return layer


def _parts(fused: nn.Module) -> tuple[nn.Parameter, nn.Parameter, Callable[[Tensor], Tensor]]:
    """``gate_up_proj``, ``down_proj`` and ``act_fn`` of a module that is laid out as :class:`UnfusedExperts` reads it.

    Raises:
        UnsupportedModelError: it is not.
    """
    name = type(fused).__name__
    for flag, wanted in _LAYOUT.items():
        if getattr(fused, flag, wanted) != wanted:
            raise UnsupportedModelError(f"experts of {name} are stored with {flag}={not wanted}, which is not known")
    gate_up, down = getattr(fused, "gate_up_proj", None), getattr(fused, "down_proj", None)
    act_fn = getattr(fused, "act_fn", None)
    if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter) or not callable(act_fn):
        raise UnsupportedModelError(f"{name} has no parameters gate_up_proj and down_proj and an act_fn")
    fits = gate_up.dim() == 3 and down.shape == (len(gate_up), gate_up.shape[2], gate_up.shape[1] // 2)
    if not fits or gate_up.shape[1] % 2:
        raise UnsupportedModelError(
            f"gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)} of {name} are not "
            "(E, 2I, H) and (E, H, I)"
        )
    return gate_up, down, act_fn
