"""Move scales from the input of linear layers into the module that feeds them, without changing the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .adapter import Source


@torch.no_grad()
def fold(block: nn.Module, source: Source, followers: Iterable[str], scales: Tensor) -> None:
    """Divide what ``source`` produces by ``scales`` ``(K,)`` and make up for it in the ``followers``, in place.

    The caller multiplies the input channels of the group's targets. Weights of any float dtype; the arithmetic is in
    the wider dtype of weight and scales.

    Raises:
        ValueError: there are not as many scales as channels; nothing is changed then.
    """
    weights = [weight_of(block.get_submodule(name)) for name in followers]
    for name, weight in zip(followers, weights, strict=True):
        _check_width(name, weight.shape[-1], scales)
    fold_into_source(block.get_submodule(source.module), scales, offset=source.offset, rows=source.rows)
    for weight in weights:
        weight.mul_(scales)


@torch.no_grad()
def fold_into_source(
    source: nn.Module, scales: Tensor, *, offset: float = 0.0, rows: tuple[tuple[int, int], ...] | None = None
) -> None:
    """Divide the output channels of a norm or linear layer by ``scales`` ``(K,)``, weight and bias, in place.

    Args:
        offset: the layer works with ``weight + offset``, and that is what is divided.
        rows: the channels, where the scales are not for all of them (:class:`Source`).

    Raises:
        ValueError: there are not as many scales as channels; nothing is changed then.
    """
    weight = weight_of(source)
    spans = ((0, weight.shape[0]),) if rows is None else rows
    _check_width(type(source).__name__, sum(stop - start for start, stop in spans), scales)
    bias = getattr(source, "bias", None)
    wide = torch.promote_types(weight.dtype, scales.dtype)
    divisors = scales.split([stop - start for start, stop in spans])
    for (start, stop), divisor in zip(spans, divisors, strict=True):
        part = weight[start:stop]
        part.copy_((part.to(wide) + offset) / (divisor.unsqueeze(-1) if weight.dim() == 2 else divisor) - offset)
        if bias is not None:
            bias.data[start:stop] /= divisor


def weight_of(module: nn.Module) -> Tensor:
    """A module's weight, without its gradient."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data


def _check_width(name: str, channels: int, scales: Tensor) -> None:
    if scales.shape != (channels,):
        raise ValueError(f"{name} has {channels} channels, but the scales are of shape {tuple(scales.shape)}")
