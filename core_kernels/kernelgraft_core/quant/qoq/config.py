"""The settings of QoQ."""

from __future__ import annotations

from dataclasses import dataclass, field

from kernelgraft_core.quant.awq.grids import GridSearch, Rounding
from kernelgraft_core.quant.rounding import Scheme

from .progressive import ZeroForm

Exponents = tuple[float, float]


@dataclass(frozen=True)
class QoqConfig:
    """How to quantize; every step can be left out. :func:`qoq_config` knows what suits a scheme.

    Attributes:
        scheme: 4 bits, asymmetric; group size -1 is the per-channel variant.
        rotate: turn the residual stream (:mod:`.rotation`).
        rotate_heads: turn the channels of every head between values and attention output.
        smooth_attention: the exponent of SmoothAttention (:mod:`.smoothing`); 0 leaves it out.
        smooth_output: the exponents of activation and weight for the inputs of the last layer of an MLP;
            ``smooth_values`` those for the attention output's. Zeros leave it out.
        reorder: sort the input channels of attention output and last layer of an MLP (:mod:`.reorder`).
        zero: zero points before (``"pre"``) or after scaling groups to int8 (``"post"``); groups only.
        weight_bits: 4; None transforms and rounds no weight.
        clip_steps, refine_sweeps, rounding, damping: how integers are found
            (:class:`~kernelgraft_core.quant.awq.grids.GridSearch`).
        activation_bits, cache_bits: 8 and 4: layers are calibrated on activations, keys and values that are rounded as
            they will be when the model is served (:mod:`.serving`). None leaves them as they are.

    Raises:
        ValueError: a setting is none of these.
    """

    scheme: Scheme = field(default_factory=Scheme)
    rotate: bool = True
    rotate_heads: bool = True
    smooth_attention: float = 0.5
    smooth_output: Exponents = (0.3, 0.7)
    smooth_values: Exponents = (0.0, 0.0)
    reorder: bool = True
    zero: ZeroForm = "post"
    weight_bits: int | None = 4
    clip_steps: int = 20
    refine_sweeps: int = 1
    rounding: Rounding = "gptq"
    damping: float = 0.01
    activation_bits: int | None = 8
    cache_bits: int | None = 4

    def __post_init__(self) -> None:
        if self.scheme.bits != 4 or self.scheme.symmetric:
            raise ValueError(f"QoQ has asymmetric weights of 4 bits, not {self.scheme}")
        if self.zero not in ("pre", "post"):
            raise ValueError(f"zero is {self.zero!r}, expected 'pre' or 'post'")
        for name, bits in (("weight_bits", 4), ("activation_bits", 8), ("cache_bits", 4)):
            if getattr(self, name) not in (bits, None):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {bits} or None")
        for name in ("smooth_output", "smooth_values"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected two exponents")
        _ = self.search

    @property
    def search(self) -> GridSearch:
        return GridSearch(self.clip_steps, self.refine_sweeps, self.rounding, self.damping)


def qoq_config(scheme: Scheme) -> QoqConfig:
    """The steps that suit groups, or whole rows."""
    if scheme.group_size == -1:
        return QoqConfig(scheme, smooth_output=(0.1, 0.9), reorder=False)
    return QoqConfig(scheme)
