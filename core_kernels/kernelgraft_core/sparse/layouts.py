"""Weights of sparse convolutions as other libraries keep them, and whole checkpoints from one to another.

They differ in where channels are, in which axis of the kernel counts fastest, and in names:

================ ====================================== =====================================================
layout           a weight                               taps
================ ====================================== =====================================================
kernelgraft      ``weight (K, G, Cin / G, Cout / G)``   ``z`` fastest, as of coordinates ``(x, y, z)``
kernelgraft_zyx  the same                               ``x`` fastest, as of coordinates ``(z, y, x)``
mmcv, spconv1    ``weight (kz, ky, kx, Cin, Cout)``     an axis each
spconv2          ``weight (Cout, kz, ky, kx, Cin)``     an axis each
torchsparse      ``kernel (K, Cin, Cout)``              ``x`` fastest where K is odd, ``z`` where it is even
minkowski        ``kernel (K, Cin, Cout)``              ``x`` fastest, bias ``(1, Cout)``
================ ====================================== =====================================================

torchsparse and MinkowskiEngine drop the first axis of a kernel of one tap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .nn.conv import SparseConvolution

LAYOUTS = ("kernelgraft", "kernelgraft_zyx", "mmcv", "spconv1", "spconv2", "torchsparse", "minkowski")
_FLAT = {"torchsparse", "minkowski"}
_OURS = {"kernelgraft", "kernelgraft_zyx"}


def convert_weight(weight: Tensor, source: str, target: str, kernel_size: Sequence[int], groups: int = 1) -> Tensor:
    """A weight of layout ``source`` in layout ``target``, contiguous.

    Args:
        kernel_size: along ``(x, y, z)``, or as many axes as there are.
        groups: of channels; only this library's own layouts have more than one.

    Raises:
        ValueError: a layout is unknown, the shape is not what the layout has, or ``target`` has no groups.
    """
    for name in (source, target):
        if name not in LAYOUTS:
            raise ValueError(f"layout is {name!r}, expected one of {', '.join(LAYOUTS)}")
        if groups != 1 and name not in _OURS:
            raise ValueError(f"groups is {groups}, but {name} has weights of one group")
    size = tuple(kernel_size)
    return _write(_read(weight, source, size, groups), target, size).contiguous()


def convert_checkpoint(
    state: Mapping[str, Any],
    source: str,
    target: str,
    kernel_sizes: nn.Module | Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """A state dict of layout ``source`` in layout ``target``; all but the weights of sparse convolutions stay.

    Args:
        state: names and tensors.
        kernel_sizes: of every sparse convolution along ``(x, y, z)``, by the name of the layer, or a model of this
            library's layers that has them. Without it every tensor that looks like such a weight is one: five axes
            (which dense 3-D convolutions have too), or the name ``kernel``, whose taps then have to be a cube.

    Returns:
        A new dict in the same order, with ``weight`` and ``kernel`` renamed.

    Raises:
        ValueError: a layout is unknown, a layer is missing, or the shape of a kernel has to be told.
    """
    for name in (source, target):
        if name not in LAYOUTS:
            raise ValueError(f"layout is {name!r}, expected one of {', '.join(LAYOUTS)}")
    sizes = _sizes(state, source, kernel_sizes)
    old, new = (f".{_name(layout)}" for layout in (source, target))
    if missing := [name for name in sizes if f"{name}{old}".lstrip(".") not in state]:
        raise ValueError(f"the state dict has no {missing[0]}{old}; it has {', '.join(list(state)[:5])}, ...")
    found: dict[str, Any] = {}
    for key, value in state.items():
        layer, _, name = ("." + key).rpartition(".")
        layer = layer.lstrip(".")
        if layer in sizes and f".{name}" == old:
            groups = value.shape[1] if source in _OURS else 1
            found[f"{layer}{new}".lstrip(".")] = convert_weight(value, source, target, sizes[layer], groups)
        elif layer in sizes and name == "bias":
            found[key] = value.reshape(1, -1) if target == "minkowski" else value.reshape(-1)
        else:
            found[key] = value
    return found


def _name(layout: str) -> str:
    return "kernel" if layout in _FLAT else "weight"


def _sizes(
    state: Mapping[str, Any], source: str, told: nn.Module | Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[int, ...]]:
    if isinstance(told, nn.Module):
        layers = told.named_modules()
        return {name: each.geometry.kernel_size for name, each in layers if isinstance(each, SparseConvolution)}
    if told is not None:
        return {name: tuple(size) for name, size in told.items()}
    if source in _OURS:
        raise ValueError("weights of this library do not tell the shape of their kernel: pass kernel_sizes")
    found: dict[str, tuple[int, ...]] = {}
    for key, value in state.items():
        layer, _, name = key.rpartition(".")
        if name != _name(source) or not isinstance(value, Tensor):
            continue
        if source in _FLAT and value.dim() in (2, 3):
            taps = 1 if value.dim() == 2 else len(value)
            side = round(taps ** (1 / 3))
            if side**3 != taps:
                raise ValueError(f"{key} has {taps} taps, which are no cube: pass kernel_sizes")
            found[layer] = (side,) * 3
        elif source not in _FLAT and value.dim() == 5:
            axes = value.shape[1:4] if source == "spconv2" else value.shape[:3]
            found[layer] = tuple(reversed(axes))
    return found


def _read(weight: Tensor, layout: str, size: tuple[int, ...], groups: int) -> Tensor:
    """As ``(kx, ky, kz, G, Cin / G, Cout / G)``."""
    back, n = tuple(reversed(size)), len(size)
    expected: tuple[int | None, ...]
    if layout in _OURS:
        expected = math.prod(size), groups, None, None
    elif layout == "spconv2":
        expected = None, *back, None
    elif layout in _FLAT:
        expected = (None, None) if math.prod(size) == 1 and weight.dim() == 2 else (math.prod(size), None, None)
    else:
        expected = *back, None, None
    if len(expected) != weight.dim() or any(e not in (None, s) for e, s in zip(expected, weight.shape, strict=True)):
        shown = ", ".join("C" if each is None else str(each) for each in expected)
        raise ValueError(f"a weight of layout {layout} is {tuple(weight.shape)}, expected ({shown})")
    channels = weight.shape[-2:]
    if layout == "kernelgraft":
        return weight.reshape(*size, *weight.shape[1:])
    if layout == "kernelgraft_zyx":
        return _mirrored(weight.reshape(*back, *weight.shape[1:]), n)
    if layout == "spconv2":
        return _mirrored(weight.movedim(0, -1), n).unsqueeze(n)
    if layout in _FLAT:
        axes = size if _last_axis_fastest(layout, size) else back
        whole = weight.reshape(*axes, *channels)
        return (whole if _last_axis_fastest(layout, size) else _mirrored(whole, n)).unsqueeze(n)
    return _mirrored(weight, n).unsqueeze(n)


def _write(weight: Tensor, layout: str, size: tuple[int, ...]) -> Tensor:
    n, taps = len(size), math.prod(size)
    if layout == "kernelgraft":
        return weight.reshape(taps, *weight.shape[n:])
    if layout == "kernelgraft_zyx":
        return _mirrored(weight, n).reshape(taps, *weight.shape[n:])
    whole = weight.squeeze(n)
    if layout == "spconv2":
        return _mirrored(whole, n).movedim(-1, 0)
    if layout in _FLAT:
        ordered = whole if _last_axis_fastest(layout, size) else _mirrored(whole, n)
        return ordered.reshape(*((taps,) if taps > 1 else ()), *whole.shape[n:])
    return _mirrored(whole, n)


def _mirrored(weight: Tensor, dimensions: int) -> Tensor:
    """Axes of the kernel in the opposite order."""
    return weight.permute(*reversed(range(dimensions)), *range(dimensions, weight.dim()))


def _last_axis_fastest(layout: str, size: tuple[int, ...]) -> bool:
    return layout == "torchsparse" and math.prod(size) % 2 == 0
