"""What quantizing one block of a decoder yields, whatever the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from .architectures import Architecture
    from .sequential import BlockInputs
    from .weights import AnyWeight


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer.

    Attributes:
        error_before, error_after: squared error of the output over the calibration tokens relative to the output's own
            square, with the original weight rounded to nearest, and now.
        form, exponent: the scales that were chosen (:class:`~kernelgraft_core.quant.awq.scales.ScaleChoice`);
            ``"identity"`` for methods without scales.
    """

    name: str
    error_before: float
    error_after: float
    form: str = "identity"
    exponent: float = 0.0


@dataclass(frozen=True)
class SearchReport:
    """The scale search of one group of layers.

    Attributes:
        source: the module that took the inverse scales.
        targets: the layers that were scaled.
        inspect: the module whose output judged.
        plain_error, error: mean squared error of its output without scales and with the chosen ones.
        curve: ``(form, exponent, error)`` of every candidate.
    """

    source: str
    targets: tuple[str, ...]
    inspect: str
    plain_error: float
    error: float
    curve: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class BlockOutcome:
    """Packed weights of one block by full layer name, and how they came about."""

    weights: Mapping[str, AnyWeight]
    reports: tuple[LayerReport, ...]
    searches: tuple[SearchReport, ...] = ()


# What a tensor outside the blocks becomes: floating point in, the same dtype and shape out.
TensorChange = Callable[[Tensor], Tensor]


class Method(Protocol):
    """A way to quantize. Only :meth:`quantize_block` has to be defined by those who derive from this."""

    def around(self, architecture: Architecture, model: Any) -> Mapping[str, TensorChange]:
        """What becomes of tensors outside the blocks, by name; nothing is changed yet.

        An output head that shares the embeddings' tensor gets one of its own when either changes.

        Raises:
            UnsupportedModelError: the model is one that the method cannot do.
        """
        return {}

    def as_served(self, architecture: Architecture, block: nn.Module) -> AbstractContextManager[None]:
        """While open, a quantized block computes what it will when it is served; the next block is calibrated on that.

        For methods that round more than weights.
        """
        return nullcontext()

    def quantize_block(
        self, architecture: Architecture, block: nn.Module, path: str, inputs: BlockInputs
    ) -> BlockOutcome:
        """Quantize the layers of ``block`` in place: afterwards they hold exactly what the packed weights stand for.

        Args:
            path: name of the block in the model, for the names of layers.
            inputs: what the block is called with during calibration.
        """
        ...
