"""A linear layer that loads and saves AutoAWQ GEMM checkpoints and computes with :func:`w4a16_linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.quant.formats.autoawq import pack_gemm, unpack_gemm

from .ops import w4a16_linear
from .weight import W4A16Weight

_CHECKPOINT_NAMES = ("qweight", "qzeros", "scales")


class AwqLinear(nn.Module):
    """``x @ W.T + bias`` with an AWQ weight.

    Right after construction the buffers have the names, shapes and dtypes of an AutoAWQ GEMM checkpoint, so that any
    loader fills them. :meth:`prepare` turns them into the kernels' layout; ``state_dict`` keeps giving, and
    ``load_state_dict`` taking, the checkpoint's layout, bit for bit. Scales stay float16 when the module is cast.

    Args:
        in_features, out_features: K and N; N a multiple of 8.
        group_size: weights per scale along K; -1 is the whole row.
        bias: whether the layer has one, of type ``dtype``.

    Raises:
        ValueError: the group size does not divide K, or N is not a multiple of 8.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        size = in_features if group_size == -1 else group_size
        if size <= 0 or size % 8 or in_features % size or out_features % 8:
            raise ValueError(
                f"an AWQ layer of {in_features} x {out_features} cannot have group size {group_size}: "
                "it must divide the inputs, and 8 the outputs"
            )
        self.in_features, self.out_features, self.group_size = in_features, out_features, size
        groups = in_features // size
        self.qweight: Tensor
        self.qzeros: Tensor
        self.scales: Tensor
        self.words: Tensor
        self.group_scales: Tensor
        self.group_zeros: Tensor
        for name, shape, kind in (
            ("qweight", (in_features, out_features // 8), torch.int32),
            ("qzeros", (groups, out_features // 8), torch.int32),
            ("scales", (groups, out_features), torch.float16),
        ):
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self._register_state_dict_hook(_to_checkpoint_layout)  # type: ignore[no-untyped-call]
        self._register_load_state_dict_pre_hook(self._from_checkpoint_layout)  # type: ignore[no-untyped-call]

    @property
    def prepared(self) -> bool:
        """Whether the layer has left the checkpoint's layout."""
        return "words" in self._buffers

    @property
    def weight(self) -> W4A16Weight:
        """The weight in the kernels' layout."""
        self.prepare()
        return W4A16Weight(self.words, self.group_scales, self.group_zeros)

    def prepare(self) -> None:
        """Leave the checkpoint's layout for the kernels'; nothing happens the second time.

        Raises:
            ValueError: a loader has put in tensors that are not of this layer's sizes.
        """
        if not self.prepared:
            weight = self._unpack(self.qweight, self.qzeros, self.scales)
            for name in _CHECKPOINT_NAMES:
                delattr(self, name)
            self._hold(weight)

    def _unpack(self, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> W4A16Weight:
        weight = unpack_gemm(qweight, qzeros, scales)
        found = (weight.in_features, weight.out_features, weight.group_size)
        if found != (self.in_features, self.out_features, self.group_size):
            raise ValueError(
                f"the weight is {found[0]} x {found[1]} with group size {found[2]}; this layer has {self.extra_repr()}"
            )
        return weight

    def _hold(self, weight: W4A16Weight) -> None:
        # Buffers, so that whatever moves, counts or offloads a module sees them; the state dict has its own layout.
        for name, tensor in (("words", weight.qweight), ("group_scales", weight.scales), ("group_zeros", weight.zeros)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.prepare()
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        return w4a16_linear(x, self.words, self.group_scales, self.group_zeros, bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, "
            f"bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AwqLinear:
        name = "group_scales" if self.prepared else "scales"
        exact = self.get_buffer(name)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.get_buffer(name)
        if moved.dtype != torch.float16 and exact.device.type != "meta":
            self._buffers[name] = exact.to(moved.device)  # moved, but not cast
        return self

    def _from_checkpoint_layout(
        self, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *_: Any
    ) -> None:
        """``load_state_dict`` into a prepared layer, whose buffers have other names: it takes the tensors itself."""
        if not self.prepared:
            return
        if absent := [prefix + name for name in _CHECKPOINT_NAMES if prefix + name not in state]:
            missing += absent
            return
        taken = [state.pop(prefix + name).to(self.words.device) for name in _CHECKPOINT_NAMES]
        try:
            self._hold(self._unpack(*taken))
        except ValueError as error:
            raise ValueError(f"{prefix}qweight: {error}") from None


def _to_checkpoint_layout(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(module, AwqLinear)
    if module.prepared:
        for name, tensor in zip(_CHECKPOINT_NAMES, pack_gemm(module.weight), strict=True):
            state[prefix + name] = tensor
