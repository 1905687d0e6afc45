"""Statistics of what the linear layers of a decoder block read, group by group, over the calibration batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from .architectures import Architecture, ScaleGroup, linear_layer
from .moments import InputStatistics, within
from .sequential import BlockInputs, watch_inputs

# Second moments that are held at once, in bytes: layers beyond that take another pass over the calibration data.
MOMENTS_LIMIT = 512 << 20


def watch_groups(
    architecture: Architecture,
    block: nn.Module,
    path: str,
    groups: Sequence[ScaleGroup],
    inputs: BlockInputs,
    *,
    second_moments: bool = True,
) -> dict[ScaleGroup, InputStatistics]:
    """Run a block once and gather what the layers of each group read.

    Raises:
        NonFiniteError: activations hold NaN or infinity; the message names the layer, which ``path`` begins.
    """
    layers = {group.targets[0]: linear_layer(block, group.targets[0]) for group in groups}
    statistics = {
        name: InputStatistics(layer.in_features, layer.weight.device, second_moments=second_moments)
        for name, layer in layers.items()
    }
    with architecture.calibrating(block), watch_inputs(layers, lambda name, x: statistics[name].add(x)):
        inputs.run(block)
    for name, seen in statistics.items():
        seen.gather()
        seen.check(f"{path}.{name}")
    return {group: statistics[group.targets[0]] for group in groups}


def moments_by_group(
    architecture: Architecture, block: nn.Module, path: str, groups: Sequence[ScaleGroup], inputs: BlockInputs
) -> Iterator[tuple[ScaleGroup, Tensor]]:
    """The second moments ``(K, K)`` of what each group reads, in as few passes as memory allows.

    What the caller does to the layers of a group is seen by the groups of later passes.

    Raises:
        NonFiniteError: as for :func:`watch_groups`.
    """
    sizes = [(group, 4 * linear_layer(block, group.targets[0]).in_features ** 2) for group in groups]
    for together in within(sizes, MOMENTS_LIMIT):
        statistics = watch_groups(architecture, block, path, together, inputs)
        for group in together:
            yield group, statistics.pop(group).take_moments()
