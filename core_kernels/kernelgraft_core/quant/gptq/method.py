"""GPTQ on one decoder block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.architectures import Architecture, linear_layer
from kernelgraft_core.quant.outcome import BlockOutcome, LayerReport
from kernelgraft_core.quant.ranks import all_sum
from kernelgraft_core.quant.rounding import Grid, Scheme, nearest_grid, split_groups
from kernelgraft_core.quant.sequential import BlockInputs, watch_inputs
from kernelgraft_core.quant.weights import QuantizedWeight, pack_weight
from kernelgraft_core.runtime.errors import NonFiniteError

from .solver import Order, gptq_round


@dataclass(frozen=True)
class GptqConfig:
    """How to quantize.

    Attributes:
        scheme: bits, group size, symmetric or not.
        block, damping, order: as for :func:`~kernelgraft_core.quant.gptq.solver.round_columns`.
    """

    scheme: Scheme = field(default_factory=Scheme)
    block: int = 128
    damping: float = 0.01
    order: Order = "activation"


class GptqMethod:
    """The method for :mod:`kernelgraft_core.quant.runner`; see :class:`~kernelgraft_core.quant.outcome.Method`.

    Layers that read the same activations share a Hessian. Groups are taken in the order of execution, and each sees
    what the ones before it, already quantized, produce.
    """

    def __init__(self, config: GptqConfig) -> None:
        self.config = config

    def quantize_block(
        self, architecture: Architecture, block: nn.Module, path: str, inputs: BlockInputs
    ) -> BlockOutcome:
        weights: dict[str, QuantizedWeight] = {}
        reports: list[LayerReport] = []
        for group in architecture.scale_groups(block):
            layers = {name: linear_layer(block, name) for name in group.targets}
            first = group.targets[0]
            hessian = torch.zeros(
                layers[first].in_features, layers[first].in_features, device=layers[first].weight.device
            )
            with architecture.calibrating(block), watch_inputs({first: layers[first]}, _adder(hessian)):
                inputs.run(block)
            all_sum(hessian)
            if not torch.isfinite(hessian).all():
                raise NonFiniteError(f"activations of {path}.{first} are not finite")
            for name, layer in layers.items():
                weight, report = self._round(layer, hessian, f"{path}.{name}")
                weights[report.name] = weight
                reports.append(report)
        return BlockOutcome(weights, tuple(reports))

    def _round(self, layer: nn.Linear, hessian: Tensor, name: str) -> tuple[QuantizedWeight, LayerReport]:
        scheme, original = self.config.scheme, layer.weight.data
        groups = split_groups(original, scheme.group_size)
        grid = nearest_grid(groups, scheme)
        integers, grid = gptq_round(
            original, hessian, grid, block=self.config.block, damping=self.config.damping, order=self.config.order
        )
        values = _values(integers, grid)
        report = LayerReport(
            name,
            _relative_error(grid.reproduce(groups).view_as(original), original, hessian),
            _relative_error(values, original, hessian),
        )
        layer.weight.data = values
        return pack_weight(integers, grid.scales, grid.zeros, scheme.bits), report


def _adder(hessian: Tensor) -> Callable[[str, Tensor], None]:
    def add(_: str, x: Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1]).float()
        hessian.addmm_(tokens.T, tokens)

    return add


def _values(integers: Tensor, grid: Grid) -> Tensor:
    """What integers ``(N, K)`` stand for."""
    groups = integers.view(*grid.scales.shape, -1)
    return ((groups - grid.zeros.unsqueeze(-1)) * grid.scales.unsqueeze(-1)).view_as(integers)


def _relative_error(weight: Tensor, original: Tensor, hessian: Tensor) -> float:
    """Squared error of the output relative to its own square."""
    change = weight - original
    return float(((change @ hessian) * change).sum() / ((original @ hessian) * original).sum().clamp(min=1e-30))
