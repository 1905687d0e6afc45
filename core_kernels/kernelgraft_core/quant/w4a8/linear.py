"""The linear layer of QoQ checkpoints."""

from __future__ import annotations

from torch import Tensor

from kernelgraft_core.quant.packed_linear import PackedLinear
from kernelgraft_core.quant.weights import AnyWeight

from .weight import W4A8Weight


class W4A8Linear(PackedLinear):
    """A :class:`~kernelgraft_core.quant.packed_linear.PackedLinear` with 8-bit activations."""

    row_scale: Tensor
    channel_zero: Tensor

    @property
    def weight(self) -> W4A8Weight:
        """The weight in the kernels' layout."""
        if self.keeps_layout and not self.prepared:
            weight = self._unpack(self._stored_tensors())
            assert isinstance(weight, W4A8Weight)
            return weight
        self.prepare()
        if self.layout.group_size == -1:
            return W4A8Weight(self.words, self.row_scale, zero=self.channel_zero)
        return W4A8Weight(self.words, self.row_scale, self.group_scales, self.group_zeros)

    def _hold(self, weight: AnyWeight) -> None:
        assert isinstance(weight, W4A8Weight)
        names = ("words", "row_scale", "group_scales", "group_zeros", "channel_zero")
        for name, tensor in zip(names, weight.tensors, strict=True):
            if tensor is not None:
                self.register_buffer(name, tensor, persistent=False)
