"""Scales move between a module and the layers behind it without a change of what comes out."""

import pytest
import torch
from torch import nn

from kernelgraft_core.quant.architectures import Source, fold

K = 24


class OffsetNorm(nn.Module):
    """Multiplies by ``1 + weight`` like Gemma's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(K))

    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt() * (1 + self.weight)


class Rows(nn.Module):
    """Some output channels of a fused linear layer."""

    def __init__(self, spans, bias):
        super().__init__()
        self.fused, self.index = nn.Linear(20, 3 * K, bias=bias), torch.cat([torch.arange(*span) for span in spans])

    def forward(self, x):
        return self.fused(x)[..., self.index]


ONE_SPAN, SPANS = ((2 * K, 3 * K),), ((8, 16), (32, 40), (56, 64))
SOURCES = [
    pytest.param(lambda: nn.LayerNorm(K), Source("source"), id="norm-with-bias"),
    pytest.param(lambda: nn.RMSNorm(K), Source("source"), id="norm-without-bias"),
    pytest.param(OffsetNorm, Source("source", offset=1.0), id="norm-with-offset"),
    pytest.param(lambda: nn.Linear(20, K), Source("source"), id="linear-with-bias"),
    pytest.param(lambda: nn.Linear(20, K, bias=False), Source("source"), id="linear-without-bias"),
    pytest.param(lambda: Rows(ONE_SPAN, True), Source("source.fused", rows=ONE_SPAN), id="rows"),
    pytest.param(lambda: Rows(SPANS, True), Source("source.fused", rows=SPANS), id="rows-in-spans"),
    pytest.param(lambda: Rows(SPANS, False), Source("source.fused", rows=SPANS), id="rows-without-bias"),
]


class Router(nn.Module):
    """A weight that is no linear layer's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, K))

    def forward(self, x):
        return x @ self.weight.T


def block_of(make, dtype):
    block = nn.Module()
    block.source, block.target, block.router = make(), nn.Linear(K, 12), Router()
    block.to(dtype)
    for parameter in block.parameters():
        parameter.data.normal_()
    return block


@pytest.mark.parametrize(("make", "source"), SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_scales_leave_products_unchanged(make, source, dtype):
    block = block_of(make, dtype)
    x = torch.randn(9, K if source.module == "source" and block.source.weight.dim() == 1 else 20, dtype=dtype)
    scales = torch.logspace(-2, 2, K, dtype=dtype)
    inner = block.source(x)
    before, routed = block.target(inner), block.router(inner)

    block.target.weight.data *= scales
    fold(block, source, ("router",), scales)

    # 1 + weight of a norm is stored without the one, which costs what the division by a large scale leaves of it
    tolerance = {torch.float32: 2e-5 if source.offset == 0 else 2e-4, torch.float64: 1e-12}[dtype]
    after = block.source(x)
    torch.testing.assert_close(after * scales, inner, rtol=tolerance, atol=tolerance)
    for out, wanted in ((block.target(after), before), (block.router(after), routed)):
        torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())
    assert {p.dtype for p in block.parameters()} == {dtype}


@pytest.mark.parametrize("bias", [True, False])
def test_other_rows_of_a_fused_layer_stay(bias):
    block = block_of(lambda: Rows(SPANS, bias), torch.float64)
    before = {name: p.clone() for name, p in block.source.named_parameters()}
    fold(block, Source("source.fused", rows=SPANS), (), torch.full((K,), 2.0, dtype=torch.float64))
    others = [row for row in range(3 * K) if row not in block.source.index.tolist()]
    for name, parameter in block.source.named_parameters():
        assert torch.equal(parameter[others], before[name][others])
        assert torch.equal(parameter[block.source.index], before[name][block.source.index] / 2)


def test_half_precision_is_rounded_once():
    block = block_of(OffsetNorm, torch.bfloat16)
    block.source.weight.data = torch.linspace(-0.5, 0.5, K).bfloat16()
    weight, router = block.source.weight.float(), block.router.weight.float()
    scales = torch.logspace(-1, 1, K)
    fold(block, Source("source", offset=1.0), ("router",), scales)
    assert torch.equal(block.source.weight, ((1 + weight) / scales - 1).bfloat16())
    assert torch.equal(block.router.weight, (router * scales).bfloat16())


def test_a_frozen_and_a_trainable_source_are_changed_alike():
    block = block_of(lambda: nn.Linear(20, K), torch.float64)
    block.source.weight.requires_grad_(False)
    before = block.source.weight.clone()
    fold(block, Source("source"), (), torch.full((K,), 4.0, dtype=torch.float64))
    assert torch.equal(block.source.weight, before / 4)
    assert block.source.weight.grad_fn is None
    assert block.source.bias.grad_fn is None
    assert block.source.bias.requires_grad


@pytest.mark.parametrize("scales", [torch.ones(K - 1), torch.ones(K, 1), torch.ones(())])
@pytest.mark.parametrize("source", [Source("source"), Source("router", rows=((0, 5),))])
def test_scales_that_do_not_fit_change_nothing(source, scales):
    block = block_of(lambda: nn.LayerNorm(K), torch.float32)
    before = {name: p.clone() for name, p in block.named_parameters()}
    with pytest.raises(ValueError, match="channels, but the scales are of shape"):
        fold(block, source, ("router",), scales)
    with pytest.raises(ValueError, match="router has 24 channels"):
        fold(block, Source("target"), ("router",), torch.ones(12))
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
