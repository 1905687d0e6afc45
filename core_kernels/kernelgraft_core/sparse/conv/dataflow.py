"""Dataflows: in which order the products of a sparse convolution are made, and where they are added up.

The three of TorchSparse++ (arXiv 2311.12862). All give the same sums; which is fastest depends on the map, the channels
and the machine, and is what :mod:`kernelgraft_core.sparse.tuner` measures.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

KINDS = ("auto", "implicit_gemm", "fetch_on_demand", "fetch_on_demand_atomic", "gather_scatter")
MOST_SPLITS = 4


@dataclass(frozen=True)
class Dataflow:
    """One of them.

    Attributes:
        kind: ``"implicit_gemm"``: tiles of outputs, tap by tap, of what each reads, without anything in between;
            ``"fetch_on_demand"``: tap by tap, pairs of rows, added to outputs in memory; ``"fetch_on_demand_atomic"``:
            the same for all taps at once, by atomic additions, whose order and so the last digit changes from run to
            run; ``"gather_scatter"``: tap by tap, rows gathered, one library product, and scattered; ``"auto"``: what
            the backend takes to be best.
        splits: of implicit GEMM on a GPU: 0 leaves outputs in their order; s in 1..4 sorts them by which taps they
            have, in each of s parts of the taps, so that fewer taps of a tile are empty.
    """

    kind: str = "auto"
    splits: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"dataflow is {self.kind!r}, expected one of {', '.join(KINDS)}")
        if not 0 <= self.splits <= MOST_SPLITS or (self.splits and self.kind != "implicit_gemm"):
            raise ValueError(
                f"dataflow {self.kind!r} has splits = {self.splits}, expected 0..{MOST_SPLITS} for 'implicit_gemm' and "
                "0 for others"
            )

    def __str__(self) -> str:
        return f"{self.kind}:{self.splits}" if self.splits else self.kind

    @classmethod
    @functools.lru_cache(maxsize=256)
    def parse(cls, text: str) -> Dataflow:
        """Of what ``str`` gives, such as ``"implicit_gemm:3"``.

        Raises:
            ValueError: it is something else.
        """
        kind, _, splits = text.partition(":")
        if splits and not splits.isdecimal():
            raise ValueError(f"dataflow is {text!r}, expected a name, or 'implicit_gemm:' and a number of splits")
        return cls(kind, int(splits or 0))


AUTO = Dataflow()


@dataclass(frozen=True)
class ConvConfig:
    """A dataflow for each direction: outputs, gradient of the input, gradient of the weight."""

    forward: Dataflow = AUTO
    dgrad: Dataflow = AUTO
    wgrad: Dataflow = AUTO

    def __str__(self) -> str:
        return ",".join(str(getattr(self, field.name)) for field in fields(self))

    @classmethod
    @functools.lru_cache(maxsize=256)
    def parse(cls, text: str) -> ConvConfig:
        """Of what ``str`` gives, such as ``"implicit_gemm:2,auto,gather_scatter"``; of one name for all three.

        Raises:
            ValueError: it is something else.
        """
        parts = [Dataflow.parse(part) for part in text.split(",")]
        if len(parts) not in (1, 3):
            raise ValueError(f"dataflow is {text!r}, expected one, or three for forward, dgrad and wgrad")
        return cls(*(parts * 3 if len(parts) == 1 else parts))
