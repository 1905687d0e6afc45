"""The AWQ scale search: which input channels to enlarge before rounding, judged by a module's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelgraft_core.quant.rounding import Scheme, fake_quantize, split_groups

ACTIVATION, ACTIVATION_OVER_WEIGHT = "activation", "activation/weight"

# Error of the inspected module's output when its linear layers have these weights.
Objective = Callable[[Sequence[Tensor]], float]


@dataclass(frozen=True)
class ScaleChoice:
    """The result of one search.

    Attributes:
        scales: ``(K,)`` float32, geometric centre 1.
        form: ``"identity"``, ``"activation"`` or ``"activation/weight"``.
        exponent: the grid point ``r``.
        error: mean squared error of the module's output at the choice; ``plain_error`` without scales.
        curve: ``(form, exponent, error)`` of every candidate.
    """

    scales: Tensor
    form: str
    exponent: float
    error: float
    plain_error: float
    curve: tuple[tuple[str, float, float], ...]

    @classmethod
    def identity(cls, like: Tensor) -> ScaleChoice:
        """No scales, where none were searched."""
        return cls(torch.ones_like(like), "identity", 0.0, 0.0, 0.0, ())


def search_scales(
    weights: Sequence[Tensor],
    mean_abs: Tensor,
    objective: Objective,
    *,
    scheme: Scheme,
    points: int = 20,
) -> ScaleChoice:
    """Search ``s = a^r`` and ``s = a^r / b^(1 - r)`` on a grid of ``points`` values of ``r`` in [0, 1).

    ``a`` is the mean magnitude of the activations per channel (section 3.2 of the paper) and ``b`` the mean magnitude
    of the weights relative to their group's largest (the form that AutoAWQ calls duo scaling).

    Args:
        weights: ``(N_i, K)`` each, the layers that read these activations.
        mean_abs: ``(K,)``.
        objective: called with what the weights become, one ``(N_i, K)`` tensor each.

    Returns:
        The best candidate; plain rounding wins ties.
    """
    plain_error = objective([fake_quantize(w, scheme) for w in weights])
    relative = _relative_magnitude(weights, scheme.group_size)
    tried: dict[tuple[str, int], tuple[float, Tensor]] = {("identity", 0): (plain_error, torch.ones_like(mean_abs))}

    def attempt(form: str, point: int) -> None:
        if (form, point) not in tried and 0 <= point < points:
            r = point / points
            scales = _centred(mean_abs.pow(r) if form == ACTIVATION else mean_abs.pow(r) / (relative.pow(1 - r) + 1e-4))
            tried[form, point] = objective([fake_quantize(w * scales, scheme) / scales for w in weights]), scales

    # Every other point of both forms, then the neighbours of the best: the curves are smooth, and this halves the work.
    for form in (ACTIVATION, ACTIVATION_OVER_WEIGHT):
        for point in range(0 if form == ACTIVATION_OVER_WEIGHT else 2, points, 2):  # activation^0 is the identity
            attempt(form, point)
    form, point = min(tried, key=lambda key: tried[key][0])
    if form != "identity":
        attempt(form, point - 1)
        attempt(form, point + 1)
    form, point = min(tried, key=lambda key: tried[key][0])
    error, scales = tried[form, point]
    curve = tuple((f, p / max(points, 1), e) for (f, p), (e, _) in sorted(tried.items(), key=lambda item: item[0]))
    return ScaleChoice(scales, form, point / max(points, 1), error, plain_error, curve)


def _centred(scales: Tensor) -> Tensor:
    scales = scales.clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


def _relative_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    groups = split_groups(torch.cat([w.float() for w in weights]).abs(), group_size)
    return (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)
