"""A linear layer of kernelgraft's own format inside vLLM: loaded and run in one layout, sliced along N and K."""

from __future__ import annotations

from collections.abc import Callable
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

from kernelgraft_core.quant.w3a16 import w3a16_linear
from kernelgraft_core.quant.w4a16 import w4a16_linear

from .loaders import checked, on_each

_PER_WORD = {4: {"qweight": 8}, 3: {"qweight": 16, "qhigh": 32}}


@register_weight_loader_v2_supported_method  # by class name: hands loading to the parameter classes used below
class KernelgraftNativeLinearMethod(LinearMethodBase):
    """Parameters and forward of one linear layer.

    Args:
        bits, group_size, symmetric: as in :class:`~kernelgraft_vllm.native.KernelgraftNativeConfig`.
        prefix: name of the layer, for messages.
    """

    def __init__(self, bits: int, group_size: int, symmetric: bool, prefix: str) -> None:
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.prefix = prefix

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
            ValueError: this rank's K does not hold whole groups or whole words.
        """
        k, n = input_size_per_partition, sum(output_partition_sizes)
        # A group that spans all of K is shared by the ranks of a row-parallel layer; any other belongs to one rank.
        shared = self.group_size in (-1, input_size)
        multiple = max(_PER_WORD[self.bits].values()) if shared else self.group_size
        if k % multiple:
            raise ValueError(f"{self.prefix}: K = {k}{on_each(input_size // k)} is not a multiple of {multiple}")

        loader = extra_weight_attrs["weight_loader"]
        for name, per_word in _PER_WORD[self.bits].items():
            packed = PackedvLLMParameter(
                data=torch.empty(n, k // per_word, dtype=torch.int32),
                weight_loader=self._checked(loader, name, torch.int32, input_size // per_word),
                output_dim=0,
                input_dim=1,
                packed_dim=1,
                packed_factor=per_word,
            )
            layer.register_parameter(name, packed)
        groups, groups_in_file = (1, 1) if shared else (k // self.group_size, input_size // self.group_size)
        by_group: dict[str, Any] = {} if shared else {"input_dim": 1}
        for name, dtype in (("scales", torch.float16), ("zeros", torch.uint8))[: 1 if self.symmetric else 2]:
            of_group = (ChannelQuantScaleParameter if shared else GroupQuantScaleParameter)(
                data=torch.empty(n, groups, dtype=dtype),
                weight_loader=self._checked(loader, name, dtype, groups_in_file),
                output_dim=0,
                **by_group,
            )
            layer.register_parameter(name, of_group)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Replace vLLM's parameters by plain ones, which torch.compile traces, and fill in symmetric zero points.

        Raises:
            ValueError: a scale is NaN or infinite, or a zero point has more than ``bits`` bits.
        """
        scales = layer.get_parameter("scales").data
        if not scales.isfinite().all():
            raise ValueError(f"{self.prefix}: scales in the checkpoint are not all finite")
        tensors = {name: layer.get_parameter(name).data for name in (*_PER_WORD[self.bits], "scales")}
        if self.symmetric:
            tensors["zeros"] = torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.uint8, device=scales.device)
        else:
            zeros = tensors["zeros"] = layer.get_parameter("zeros").data
            if zeros.numel() and zeros.max() >= 1 << self.bits:
                raise ValueError(f"{self.prefix}: zeros go up to {int(zeros.max())}, expected {self.bits} bits")
        for name, tensor in tensors.items():
            if hasattr(layer, name):
                delattr(layer, name)
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.bits == 4:
            return w4a16_linear(x, layer.qweight, layer.scales, layer.zeros, bias)
        return w3a16_linear(x, layer.qweight, layer.qhigh, layer.scales, layer.zeros, bias)

    def _checked(self, loader: Callable[..., Any], name: str, dtype: torch.dtype, columns: int) -> Callable[..., Any]:
        return checked(
            loader,
            f"{self.prefix}.{name}",
            lambda tensor: tensor.dtype == dtype and tensor.dim() == 2 and tensor.shape[1] == columns,
            f"{dtype} with {columns} columns for {self.bits} bits and group size {self.group_size}",
        )
