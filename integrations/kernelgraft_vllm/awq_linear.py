"""A linear layer of an AutoAWQ checkpoint inside vLLM: loaded in the checkpoint's layout, run in the kernels'.

vLLM's loaders slice fused and tensor-parallel layers by the dimensions that a parameter names, so the parameters keep
AutoAWQ's layout until every shard is in place. Only then is the layer repacked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

import kernelgraft_core.quant.w4a16  # noqa: F401 - defines the op
from kernelgraft_core.quant.formats.autoawq import unpack_gemm

from .loaders import checked, on_each

_PER_WORD = 8
_STORED = ("qweight", "qzeros", "scales")
_linear = torch.ops.kernelgraft.w4a16_linear.default


class Repacked(Protocol):
    """A layer after loading: the three tensors of :class:`~kernelgraft_core.quant.w4a16.W4A16Weight`."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor


@register_weight_loader_v2_supported_method  # by class name: hands loading to the parameter classes used below
class KernelgraftAWQLinearMethod(LinearMethodBase):
    """Parameters, repacking and forward of one linear layer.

    Args:
        group_size: as in :class:`~kernelgraft_vllm.awq.KernelgraftAWQConfig`.
        prefix: name of the layer, for messages.
    """

    def __init__(self, group_size: int, prefix: str) -> None:
        self.group_size = group_size
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
        """Add empty ``qweight``, ``qzeros`` and ``scales`` in AutoAWQ's layout, for this rank's shard.

        Scales are float16 as in the file, whatever the model's dtype: rounding them to bfloat16 would cost accuracy.

        Raises:
            ValueError: this rank's K does not hold whole groups, or a column shard does not hold whole words.
        """
        k, n = input_size_per_partition, sum(output_partition_sizes)
        # A group that spans all of K is shared by the ranks of a row-parallel layer; any other belongs to one rank.
        shared = self.group_size in (-1, input_size)
        groups, rest = (1, k % _PER_WORD) if shared else divmod(k, self.group_size)
        if rest:
            whole = f"{_PER_WORD} weights" if shared else f"a group of {self.group_size}"
            raise ValueError(f"{self.prefix}: K = {k}{on_each(input_size // k)} is not a multiple of {whole}")
        odd = [width for width in output_partition_sizes if width % _PER_WORD]
        if odd:
            raise ValueError(
                f"{self.prefix}: N = {odd[0]}{on_each(output_size // n)} is not a multiple of the {_PER_WORD} columns "
                "in a word"
            )

        loader = extra_weight_attrs["weight_loader"]
        packed = {"output_dim": 1, "packed_dim": 1, "packed_factor": _PER_WORD}
        qweight = PackedvLLMParameter(
            data=torch.empty(k, n // _PER_WORD, dtype=torch.int32),
            weight_loader=self._checked(loader, "qweight", input_size),
            input_dim=0,
            **packed,
        )
        groups_in_file = 1 if shared else input_size // self.group_size
        by_group: dict[str, Any] = {} if shared else {"input_dim": 0}
        qzeros = (PackedColumnParameter if shared else PackedvLLMParameter)(
            data=torch.empty(groups, n // _PER_WORD, dtype=torch.int32),
            weight_loader=self._checked(loader, "qzeros", groups_in_file),
            **packed,
            **by_group,
        )
        scales = (ChannelQuantScaleParameter if shared else GroupQuantScaleParameter)(
            data=torch.empty(groups, n, dtype=torch.float16),
            weight_loader=self._checked(loader, "scales", groups_in_file),
            output_dim=1,
            **by_group,
        )
        for name, parameter in zip(_STORED, (qweight, qzeros, scales), strict=True):
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Replace the loaded parameters by ``qweight``, ``scales`` and ``zeros`` in the kernels' layout.

        Raises:
            ValueError: a scale is NaN or infinite.
        """
        weight = unpack_gemm(*(layer.get_parameter(name).data for name in _STORED))
        if not weight.scales.isfinite().all():
            raise ValueError(f"{self.prefix}: scales in the checkpoint are not all finite")
        for name in _STORED:
            delattr(layer, name)
        # Plain parameters: torch.compile does not trace vLLM's subclasses.
        layer.qweight = Parameter(weight.qweight, requires_grad=False)
        layer.scales = Parameter(weight.scales, requires_grad=False)
        layer.zeros = Parameter(weight.zeros, requires_grad=False)

    def apply(self, layer: Repacked, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # The op itself, not its public function: the weight is what this class made, and to check it again for every
        # token costs a quarter of what Python does around the kernel.
        out: Tensor = _linear(x, layer.qweight, layer.scales, layer.zeros, bias)
        return out

    def _checked(self, loader: Callable[..., Any], name: str, rows: int) -> Callable[..., Any]:
        def fits(tensor: Tensor) -> bool:
            right_kind = tensor.is_floating_point() if name == "scales" else tensor.dtype == torch.int32
            return right_kind and tensor.dim() == 2 and tensor.shape[0] == rows

        return checked(
            loader,
            f"{self.prefix}.{name}",
            fits,
            f"{'torch.float16' if name == 'scales' else 'torch.int32'} with {rows} rows in AutoAWQ's GEMM layout with "
            f"group size {self.group_size}",
        )
