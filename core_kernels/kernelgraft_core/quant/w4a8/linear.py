"""The linear layer of QoQ checkpoints."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from kernelgraft_core.quant.packed_linear import PackedLinear
from kernelgraft_core.quant.weights import AnyWeight

from .weight import W4A8Weight


class W4A8Linear(PackedLinear):
    """A :class:`~kernelgraft_core.quant.packed_linear.PackedLinear` with 8-bit activations.

    Attributes:
        cpu_weight: what a layer on a CPU keeps: ``"int4"``, the weight alone, as the kernels read it, or ``"int8"``,
            which adds a byte per element, made at the first call, and takes a little less time from about 16 tokens
            on. Read when a layer is prepared, or first used on another device.
    """

    cpu_weight: ClassVar[Literal["int4", "int8"]] = "int4"
    row_scale: Tensor
    channel_zero: Tensor
    _held_for = ""  # type of the device that the weight is arranged for

    @property
    def weight(self) -> W4A8Weight:
        """The weight in the kernels' layout."""
        if self.keeps_layout and not self.prepared:
            weight = self._unpack(self._stored_tensors())
            assert isinstance(weight, W4A8Weight)
            return weight
        self.prepare()
        if self.words.device.type != self._held_for:
            self._hold(self._held())
        return self._held()

    def _held(self) -> W4A8Weight:
        if self.layout.group_size == -1:
            return W4A8Weight(self.words, self.row_scale, zero=self.channel_zero)
        return W4A8Weight(self.words, self.row_scale, self.group_scales, self.group_zeros)

    def _hold(self, weight: AnyWeight) -> None:
        assert isinstance(weight, W4A8Weight)
        self._held_for = weight.device.type
        keeps_four = self._held_for == "cpu" and self.cpu_weight == "int4"
        weight = weight.arranged() if keeps_four else weight.plain()
        names = ("words", "row_scale", "group_scales", "group_zeros", "channel_zero")
        for name, tensor in zip(names, weight.tensors, strict=True):
            if tensor is not None:
                self.register_buffer(name, tensor, persistent=False)
