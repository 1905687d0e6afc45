"""A linear layer that loads and saves any checkpoint layout and computes on the packed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .formats.layout import Layout
from .w3a16.weight import W3A16Weight
from .w4a16.weight import W4A16Weight
from .weights import AnyWeight, linear


class PackedLinear(nn.Module):
    """``x @ W.T + bias`` with a weight of 3 or 4 bits.

    Right after construction the buffers have the names, shapes and dtypes of the checkpoint's layout, so that any
    loader fills them. :meth:`prepare` turns them into the kernels' layout; ``state_dict`` keeps giving, and
    ``load_state_dict`` taking, the checkpoint's layout, bit for bit. Scales stay float16 when the module is cast.

    Args:
        in_features, out_features: K and N.
        layout: how the checkpoint stores the layer.
        bias: whether the layer has one, of type ``dtype``.

    Attributes:
        keeps_layout: stay in the checkpoint's layout and unpack in every forward pass, for hosts that put the buffers
            in and take them out by name around it, as offloading does.

    Raises:
        ValueError: the layout cannot hold N x K; the message gives the number that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layout: Layout,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        parts = layout.parts(out_features, in_features)
        self.in_features, self.out_features, self.layout = in_features, out_features, layout
        self.group_size = in_features // layout.groups(in_features)
        self.stored, self.keeps_layout = tuple(parts), False
        for name, part in parts.items():
            self.register_buffer(name, torch.empty(part.shape, dtype=part.dtypes[0], device=device))
        self.words: Tensor
        self.high_words: Tensor
        self.group_scales: Tensor
        self.group_zeros: Tensor
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self._register_state_dict_hook(_to_checkpoint_layout)  # type: ignore[no-untyped-call]
        self._register_load_state_dict_pre_hook(self._from_checkpoint_layout)  # type: ignore[no-untyped-call]

    @property
    def prepared(self) -> bool:
        """Whether the layer has left the checkpoint's layout."""
        return "words" in self._buffers

    @property
    def weight(self) -> AnyWeight:
        """The weight in the kernels' layout."""
        if self.keeps_layout and not self.prepared:
            return self._unpack(self._stored_tensors())
        self.prepare()
        if self.layout.bits == 4:
            return W4A16Weight(self.words, self.group_scales, self.group_zeros)
        return W3A16Weight(self.words, self.high_words, self.group_scales, self.group_zeros)

    def prepare(self) -> None:
        """Leave the checkpoint's layout for the kernels'; nothing happens the second time.

        Raises:
            ValueError: a loader has put in tensors that are not of this layer's sizes.
        """
        if not self.prepared:
            weight = self._unpack(self._stored_tensors())
            for name in self.stored:
                delattr(self, name)
            self._hold(weight)

    def _stored_tensors(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in self.stored}

    def _unpack(self, tensors: dict[str, Tensor]) -> AnyWeight:
        weight = self.layout.read(tensors)
        found = (weight.in_features, weight.out_features, weight.group_size)
        if found != (self.in_features, self.out_features, self.group_size):
            raise ValueError(
                f"the weight is {found[0]} x {found[1]} with group size {found[2]}; this layer has {self.extra_repr()}"
            )
        return weight

    def _hold(self, weight: AnyWeight) -> None:
        # Buffers, so that whatever moves, counts or offloads a module sees them; the state dict has its own layout.
        *planes, scales, zeros = weight.tensors
        for name, tensor in zip(("words", "high_words"), planes, strict=False):
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("group_scales", scales, persistent=False)
        self.register_buffer("group_zeros", zeros, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        return linear(x, self.weight, bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.layout.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: buffer for name, buffer in self._buffers.items() if name != "bias" and buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype != before.dtype and before.device.type != "meta":
                self._buffers[name] = before.to(moved.device)  # moved, but not cast
        return self

    def _from_checkpoint_layout(
        self, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *_: Any
    ) -> None:
        """``load_state_dict`` into a prepared layer, whose buffers have other names: it takes the tensors itself."""
        if not self.prepared:
            return
        if absent := [prefix + name for name in self.stored if prefix + name not in state]:
            missing += absent
            return
        taken = {name: state.pop(prefix + name).to(self.words.device) for name in self.stored}
        try:
            self._hold(self._unpack(taken))
        except ValueError as error:
            raise ValueError(f"{prefix}{self.layout.packed}: {error}") from None


def _to_checkpoint_layout(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(module, PackedLinear)
    if module.prepared:
        for name, tensor in module.layout.write(module.weight).items():
            state[prefix + name] = tensor
