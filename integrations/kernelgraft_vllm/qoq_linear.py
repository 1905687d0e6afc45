"""A linear layer of a QoQ checkpoint inside vLLM: loaded as it is stored, sliced along N and K, run in integers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

import kernelgraft_core.quant.w4a8  # noqa: F401 - defines the op
from kernelgraft_core.quant.formats.layout import Part
from kernelgraft_core.quant.formats.qoq import Qoq

from .loaders import checked, on_each

_HELD = ("qweight", "scale", "group_scale", "group_zero", "zero")
"""What :class:`~kernelgraft_core.quant.w4a8.W4A8Weight` calls its tensors, of which a layer has some."""
_linear = torch.ops.kernelgraft.w4a8_linear.default


@register_weight_loader_v2_supported_method  # by class name: hands loading to the parameter classes used below
class KernelgraftQoQLinearMethod(LinearMethodBase):
    """Parameters, repacking and forward of one linear layer.

    Args:
        layout: how the checkpoint stores it.
        prefix: name of the layer, for messages.
    """

    def __init__(self, layout: Qoq, prefix: str) -> None:
        self.layout = layout
        self.prefix = prefix
        self._local = layout
        self._loads: Counter[str] = Counter()

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add the empty tensors of this rank's shard; scales are float16 as in the file, whatever the model's dtype.

        Raises:
            ValueError: this rank's K does not hold whole groups, or is odd.
        """
        k, n = input_size_per_partition, sum(output_partition_sizes)
        # A group that spans all of K is shared by the ranks of a row-parallel layer; any other belongs to one rank.
        shared = self.layout.group_size == input_size
        self._local = replace(self.layout, group_size=k) if shared else self.layout
        try:
            parts, in_file = self._local.parts(n, k), self.layout.parts(output_size, input_size)
        except ValueError as error:
            raise ValueError(f"{self.prefix}{on_each(input_size // k)}: {error}") from None
        for name, part in parts.items():
            parameter = _new_parameter(
                name,
                shared,
                data=torch.empty(part.shape, dtype=part.dtypes[0]),
                weight_loader=self._checked(extra_weight_attrs["weight_loader"], name, in_file[name]),
            )
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Replace the loaded parameters by plain ones that hold what the kernels take.

        Raises:
            ValueError: a tensor is missing from the checkpoint, a scale is NaN or infinite, or an integer out of range.
        """
        stored = {name: getattr(layer, name).data for name in _HELD if hasattr(layer, name)}
        loads = {name: self._loads[name] for name in stored}
        if not any(loads.values()):
            _make_neutral(stored)  # vLLM's dummy weights, with which it measures, go past the loaders
        elif len(set(loads.values())) > 1:
            counts = ", ".join(f"{count} x {name}" for name, count in loads.items())
            raise ValueError(f"{self.prefix}: the checkpoint does not hold all of its tensors, only {counts}")
        try:
            weight = self._local.read(stored).arranged()
        except ValueError as error:
            raise ValueError(f"{self.prefix}: {error}") from None
        for name, tensor in zip(_HELD, weight.tensors, strict=True):
            if name in stored:
                delattr(layer, name)
            # Plain parameters: torch.compile does not trace vLLM's subclasses.
            layer.register_parameter(name, None if tensor is None else Parameter(tensor, requires_grad=False))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # The op itself, not its public function: the weight is what this class made, and need not be checked again.
        out: Tensor = _linear(x, layer.qweight, layer.scale, layer.group_scale, layer.group_zero, layer.zero, bias)
        return out

    def _checked(self, loader: Callable[..., Any], name: str, part: Part) -> Callable[..., Any]:
        def fits(tensor: Tensor) -> bool:
            # How many rows there are depends on what is fused.
            fitting = tensor.dtype in part.dtypes and tensor.dim() == len(part.shape)
            return fitting and tuple(tensor.shape[1:]) == part.shape[1:]

        columns = f" with {part.shape[1]} columns" if len(part.shape) > 1 else " of one dimension"
        look = checked(
            loader,
            f"{self.prefix}.{name}",
            fits,
            f"{part.dtypes[0]}{columns} for group size {self.layout.group_size}",
        )

        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            loaded = look(*args, **kwargs)
            self._loads[name] += 1
            return loaded

        return load


def _new_parameter(name: str, shared: bool, **contents: Any) -> Parameter:
    """The parameter of that name, of the class that slices its tensor right."""
    if name == "qweight":
        packed: Parameter = PackedvLLMParameter(output_dim=0, input_dim=1, packed_dim=1, packed_factor=2, **contents)
        return packed
    if name in ("scale", "zero") or shared:
        of_rows: Parameter = ChannelQuantScaleParameter(output_dim=0, **contents)
        return of_rows
    of_groups: Parameter = GroupQuantScaleParameter(output_dim=0, input_dim=1, **contents)
    return of_groups


def _make_neutral(stored: dict[str, Tensor]) -> None:
    """Integers with which int8 does not overflow."""
    for name, tensor in stored.items():
        if name != "scale":
            tensor.fill_(1 if name == "group_scale" else 0)
