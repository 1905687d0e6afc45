"""The Sparse Autotuner of TorchSparse++ (arXiv 2311.12862): which dataflow each layer of a network computes with.

Layers that share a kernel map are a group and are decided together: what a dataflow needs to know of the map, an order
of its rows say, is made once for all of them, and its cost is counted once. Forward, gradient of the input and gradient
of the weight may differ. What a dataflow would waste is known from the map alone; who wastes far more than the best is
not measured.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernelgraft_core.runtime.device import arch_key
from kernelgraft_core.runtime.plans import PLANS

from .conv.dataflow import MOST_SPLITS, ConvConfig, Dataflow
from .conv.macs import overhead
from .conv.ops import CONV, DGRAD, WGRAD
from .maps.exchanged import exchanged
from .nn.conv import SparseConvolution
from .watching import RunLayer, watch

SCHEMA = 1
MODES = ("inference", "training")
BINDS = ("free", "forward_dgrad", "dgrad_wgrad")
DIRECTIONS = ("forward", "dgrad", "wgrad")
WASTEFUL = 2.0  # times the products of the best dataflow: more are not measured


@dataclass(frozen=True)
class TunedGroup:
    """What was found for the layers that share a map.

    Attributes:
        layers: their names in the model.
        dataflow: a :class:`ConvConfig` as text.
        us: microseconds of all layers of the group over all samples, by direction and dataflow.
        overhead: products made over products that count, by dataflow, on the first sample.
    """

    layers: tuple[str, ...]
    dataflow: str
    us: dict[str, dict[str, float]]
    overhead: dict[str, float]


@dataclass(frozen=True)
class TuneResult:
    """Dataflows for the layers of a model; a JSON file that ships with it.

    Attributes:
        mode: ``"inference"`` or ``"training"``; bind: see :func:`tune`.
        arch: the processor it was measured on, see :func:`~kernelgraft_core.runtime.device.arch_key`.
        dtype: of the features, e.g. ``"float16"``.
    """

    mode: str
    bind: str
    arch: str
    dtype: str
    groups: tuple[TunedGroup, ...]

    def apply(self, model: nn.Module) -> None:
        """Set ``dataflow`` of every layer that was tuned.

        Raises:
            ValueError: the model lacks one of them, or it is no sparse convolution, or it was tuned on a CPU and the
                model is on a GPU or the other way round; no layer is changed then.
        """
        known = dict(model.named_modules())
        device = next((parameter.device.type for parameter in model.parameters()), None)
        if device is not None and (device == "cpu") != self.arch.startswith("cpu"):
            raise ValueError(f"it was tuned on {self.arch}, the model is on {device}: tune it there")
        layers = [(name, group.dataflow) for group in self.groups for name in group.layers]
        for name, _ in layers:
            if not isinstance(known.get(name), SparseConvolution):
                raise ValueError(f"the model has no sparse convolution {name!r}: it was tuned for another one")
        for name, dataflow in layers:
            known[name].dataflow = dataflow

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON file, whole or not at all."""
        target = Path(path)
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            try:
                file.write(text)
                file.close()
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TuneResult:
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            ValueError: it is no such file; the message says where.
        """
        try:
            found = json.loads(Path(path).read_text())
            if found.pop("schema") != SCHEMA:
                raise ValueError("another version wrote it")
            groups = tuple(TunedGroup(**group | {"layers": tuple(group["layers"])}) for group in found.pop("groups"))
            for group in groups:
                ConvConfig.parse(group.dataflow)
            return cls(**found, groups=groups)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no result of tune: {error}") from error

    def summary(self) -> str:
        """A line for each group: its layers, and what they compute with."""
        lines = []
        for group in self.groups:
            rest = f" and {len(group.layers) - 1} more" if len(group.layers) > 1 else ""
            lines.append(f"{group.layers[0]}{rest}: {group.dataflow}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Cost:
    """Microseconds of all layers of a group, and of what they need to know of the map first."""

    run: float
    prepare: float


def tune(
    model: nn.Module,
    samples: Sequence[Any],
    mode: str = "inference",
    bind: str = "free",
    *,
    deterministic: bool = True,
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> TuneResult:
    """Measure the dataflows of every sparse convolution of a model on this device.

    Each layer is measured on its own, with random features on the maps of the samples, so that a model of many layers
    takes seconds. The model runs once on every sample, without gradients and in evaluation mode; it stays as it is.

    Args:
        model: with :class:`.nn.conv.SparseConvolution` layers, on the device to tune for.
        samples: what the model is called with: one argument, or a tuple or dict of several. A few are enough; they
            should be as large as those to come.
        mode: ``"inference"`` tunes the forward, ``"training"`` both gradients as well.
        bind: ``"free"``; ``"forward_dgrad"``: the same dataflow for these two, for they share orders of a submanifold
            map; ``"dgrad_wgrad"``: of the same kind for these two.
        deterministic: leave out dataflows whose last digit changes from run to run.
        repeats: runs of each, of which the fastest counts.
        progress: called with how many of how many groups are done.

    Returns:
        Dataflows by group. The model is not changed: ``result.apply(model)`` does that. Tiles that a GPU takes are
        remembered in the plan store.

    Raises:
        ValueError: mode or bind is unknown, there are no samples, or the model runs no sparse convolution on them.
    """
    for name, value, known in (("mode", mode, MODES), ("bind", bind, BINDS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {known}")
    if not len(samples):
        raise ValueError("there are no samples to tune on")
    layers = [watch(model, sample) for sample in samples]
    if not layers[0]:
        raise ValueError("the model ran no sparse convolution with a kernel of more than one tap")
    device, dtype = layers[0][0].known.neighbors.device, layers[0][0].dtype
    directions = DIRECTIONS if mode == "training" else DIRECTIONS[:1]
    groups, found = _groups(layers[0]), []
    tiles = PLANS.tuning() if device.type == "cuda" else contextlib.nullcontext()
    with tiles, torch.no_grad():
        for i, names in enumerate(groups):
            members = [[layer for layer in each if layer.name in names] for each in layers]
            found.append(_tune_group(names, members, directions, bind, deterministic, repeats))
            if progress is not None:
                progress(i + 1, len(groups))
    return TuneResult(mode, bind, arch_key(device), str(dtype).removeprefix("torch."), tuple(found))


def _groups(layers: list[RunLayer]) -> list[tuple[str, ...]]:
    """Names of layers whose maps are the same, or each other's inverse."""
    parents: dict[int, int] = {}

    def root(key: int) -> int:
        while parents.setdefault(key, key) != key:
            key = parents[key]
        return key

    for layer in layers:
        known = layer.known
        if not known.symmetric:
            parents[root(id(exchanged(known.neighbors, len(known.inputs))))] = root(id(known.neighbors))
    found: dict[int, list[str]] = {}
    for layer in layers:
        names = found.setdefault(root(id(layer.known.neighbors)), [])
        if layer.name not in names:
            names.append(layer.name)
    return [tuple(names) for names in found.values()]


def _tune_group(
    names: tuple[str, ...],
    members: list[list[RunLayer]],
    directions: tuple[str, ...],
    bind: str,
    deterministic: bool,
    repeats: int,
) -> TunedGroup:
    first = members[0][0]
    device = first.known.neighbors.device.type
    wasted = {
        str(dataflow): overhead(first.known.neighbors, dataflow) for dataflow in _candidates(device, deterministic)
    }
    costs: dict[str, dict[Dataflow, _Cost]] = {}
    for direction in directions:
        costs[direction] = {}
        for dataflow in _candidates(device, deterministic, direction, wasted):
            runs = [_measure(layer, direction, dataflow, repeats) for each in members for layer in each]
            # The map is prepared once for all layers of a sample.
            prepared = [_measure_preparing(each[0], direction, dataflow) for each in members if each]
            costs[direction][dataflow] = _Cost(sum(runs), sum(prepared))
    best = min(
        itertools.product(*costs.values()),
        key=lambda chosen: _total(dict(zip(costs, chosen, strict=True)), costs, first.known.symmetric, bind, device),
    )
    config = ConvConfig(**dict(zip(costs, best, strict=True)))
    us = {name: {str(d): round(cost.run + cost.prepare, 1) for d, cost in each.items()} for name, each in costs.items()}
    return TunedGroup(names, str(config), us, {name: round(value, 3) for name, value in wasted.items()})


def _candidates(
    device: str, deterministic: bool, direction: str = "forward", wasted: dict[str, float] | None = None
) -> Iterator[Dataflow]:
    if device == "cpu" or direction == "wgrad":
        yield from (Dataflow("implicit_gemm"), Dataflow("gather_scatter"))
        return
    best = min(wasted.values()) if wasted else 0.0
    for splits in range(MOST_SPLITS + 1):
        dataflow = Dataflow("implicit_gemm", splits)
        if wasted is None or wasted[str(dataflow)] <= WASTEFUL * best:
            yield dataflow
    yield from (Dataflow("fetch_on_demand"), Dataflow("gather_scatter"))
    if not deterministic:
        yield Dataflow("fetch_on_demand_atomic")


def _total(
    chosen: dict[str, Dataflow],
    costs: dict[str, dict[Dataflow, _Cost]],
    symmetric: bool,
    bind: str,
    device: str = "cuda",
) -> float:
    """Microseconds of a choice; what several directions need to know of the map is counted once."""
    forward, dgrad, wgrad = (chosen.get(direction) for direction in DIRECTIONS)
    if bind == "forward_dgrad" and dgrad is not None and forward != dgrad:
        return float("inf")
    if bind == "dgrad_wgrad" and dgrad is not None and wgrad is not None and dgrad.kind != wgrad.kind:
        return float("inf")
    total, prepared = 0.0, set()
    for direction, dataflow in chosen.items():
        cost = costs[direction][dataflow]
        total += cost.run
        need = _need(direction, dataflow, symmetric, device)
        if need not in prepared:
            total += cost.prepare
            prepared.add(need)
    return total


def _need(direction: str, dataflow: Dataflow, symmetric: bool, device: str) -> tuple[bool, str]:
    """What has to be known of a map: that of the other direction or not, and how it is arranged."""
    if dataflow.kind == "gather_scatter":
        return False, "taps"
    other = direction == "dgrad" and not symmetric
    # On a CPU all directions read pairs by tile; on a GPU the gradient of a weight reads pairs by tap.
    pairs = device == "cpu" or direction == "wgrad" or dataflow.kind.startswith("fetch_on_demand")
    return other, "pairs" if pairs else str(dataflow)


def _measure(layer: RunLayer, direction: str, dataflow: Dataflow, repeats: int) -> float:
    run = _call(layer, direction, dataflow, layer.known.neighbors)
    run()
    return min(_clocked(run, layer.known.neighbors.device) for _ in range(repeats))


def _measure_preparing(layer: RunLayer, direction: str, dataflow: Dataflow) -> float:
    """What the first call with a map takes longer than the second."""
    neighbors = layer.known.neighbors.clone()  # nothing is known of it
    run = _call(layer, direction, dataflow, neighbors)
    times = [_clocked(run, neighbors.device) for _ in range(3)]
    return max(0.0, times[0] - min(times[1:]))


def _call(layer: RunLayer, direction: str, dataflow: Dataflow, neighbors: Tensor) -> Callable[[], Tensor]:
    weight = layer.weight.detach().to(layer.dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(layer.dtype)
    _, groups, cin, cout = weight.shape
    inputs, symmetric = len(layer.known.inputs), layer.known.symmetric
    x, grad = (
        torch.randn(rows, channels * groups, device=neighbors.device).to(layer.dtype)
        for rows, channels in ((inputs, cin), (len(neighbors), cout))
    )
    if direction == "forward":
        config = str(ConvConfig(forward=dataflow))
        return lambda: CONV(x, weight, bias, neighbors, symmetric, layer.activation, config)
    if direction == "dgrad":
        return lambda: DGRAD(grad, weight, neighbors, inputs, symmetric, str(dataflow))
    return lambda: WGRAD(x, grad, neighbors, groups, str(dataflow))


def _clocked(run: Callable[[], object], device: torch.device) -> float:
    """Microseconds until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e6
