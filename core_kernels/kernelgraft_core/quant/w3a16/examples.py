"""Arguments for every op of the family, for reports, measurements and tests that go over all ops."""

from __future__ import annotations

from kernelgraft_core.quant.packed.examples import LinearExamples

from .weight import W3A16Weight

TUNED = ("w3a16_linear",)
"""Ops that measure themselves inside ``PLANS.tuning()``; the first dimension of their first argument is tokens."""

_EXAMPLES = LinearExamples("w3a16", W3A16Weight)
example_args, peer = _EXAMPLES.example_args, _EXAMPLES.peer
