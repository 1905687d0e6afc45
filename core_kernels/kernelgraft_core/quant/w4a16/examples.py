"""Arguments for every op of the family, for reports, measurements and tests that go over all ops."""

from __future__ import annotations

from kernelgraft_core.quant.packed.examples import LinearExamples

from .weight import W4A16Weight

TUNED = ("w4a16_linear",)
"""Ops that measure themselves inside ``PLANS.tuning()``; the first dimension of their first argument is tokens."""

_EXAMPLES = LinearExamples("w4a16", W4A16Weight)
example_args, peer = _EXAMPLES.example_args, _EXAMPLES.peer
