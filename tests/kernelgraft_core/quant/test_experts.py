"""Experts taken apart against the product over their fused tensors, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kernelgraft_core.quant.experts import (
    UnfusedExperts,
    calibrate_every_expert,
    count_experts,
    find_fused_experts,
    unfuse_experts,
)
from kernelgraft_core.runtime import testing
from kernelgraft_core.runtime.errors import UnsupportedModelError

E, H, INNER = 4, 6, 10


class Fused(nn.Module):
    """As hosts keep experts, computed token by token from the definition."""

    def __init__(self, experts=E, hidden=H, inner=INNER):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden, dtype=torch.float64))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner, dtype=torch.float64))
        self.act_fn = nn.SiLU()

    def forward(self, x, index, weights):
        rows = []
        for token in range(len(x)):
            out = torch.zeros_like(x[token])
            for place in range(index.shape[1]):
                expert = int(index[token, place])
                if expert < len(self.gate_up_proj):
                    gate, up = (self.gate_up_proj[expert] @ x[token]).chunk(2)
                    out = out + weights[token, place] * (self.down_proj[expert] @ (self.act_fn(gate) * up))
            rows.append(out)
        return torch.stack(rows) if rows else torch.zeros_like(x)


def tokens(count, k=2, experts=E, seed=0):
    """Activations, distinct experts per token out of E + 1 (the last is none), and weights."""
    generator = testing.rng(seed)
    x = torch.randn(count, H, dtype=torch.float64, generator=generator)
    index = torch.rand(count, experts + 1, generator=generator).argsort(-1)[:, :k]
    return x, index, torch.rand(count, k, dtype=torch.float64, generator=generator)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 2, 33])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("calibrate_all", [False, True])
def test_the_output_is_that_of_the_fused_experts(count, k, calibrate_all):
    fused = Fused()
    experts = UnfusedExperts(fused)
    experts.calibrate_all = calibrate_all
    x, index, weights = tokens(count, k)
    close(experts(x, index, weights), fused(x, index, weights))


@given(seed=st.integers(0, 1000), count=st.integers(0, 9), k=st.integers(1, 5), number=st.integers(1, 5))
def test_any_routing_gives_that_output(seed, count, k, number):
    fused = Fused(experts=number)
    x, index, weights = tokens(count, min(k, number), number, seed)
    close(UnfusedExperts(fused)(x, index, weights), fused(x, index, weights))


@pytest.mark.parametrize("chosen", [0, E - 1, E])
def test_all_tokens_may_go_to_one_expert_or_to_none(chosen):
    fused, (x, index, weights) = Fused(), tokens(7, 1)
    index = torch.full_like(index, chosen)
    out = UnfusedExperts(fused)(x, index, weights)
    close(out, fused(x, index, weights))
    assert bool(out.any()) == (chosen < E)


@pytest.mark.parametrize("calibrate_all", [False, True])
def test_gradients_are_those_of_the_fused_experts(calibrate_all):
    fused = Fused()
    experts = UnfusedExperts(fused)
    experts.calibrate_all = calibrate_all
    x, index, weights = tokens(9)
    results = []
    for module in (fused, experts):
        leaf, scale = x.clone().requires_grad_(), weights.clone().requires_grad_()
        module(leaf, index, scale).square().sum().backward()
        results.append((leaf.grad, scale.grad))
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)
    for number, expert in enumerate(experts):
        gate, up, down = (
            torch.zeros_like(p) if p.grad is None else p.grad  # no token went there
            for p in (expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight)
        )
        close(torch.cat([gate, up]), fused.gate_up_proj.grad[number])
        close(down, fused.down_proj.grad[number])


def test_the_layers_are_views_of_the_fused_tensors():
    fused = Fused()
    experts = UnfusedExperts(fused)
    storages = {p.untyped_storage().data_ptr() for p in fused.parameters()}
    assert {p.untyped_storage().data_ptr() for p in experts.parameters()} == storages
    assert [name for name, _ in experts.named_parameters()][:3] == [
        "0.gate_proj.weight",
        "0.up_proj.weight",
        "0.down_proj.weight",
    ]
    assert sum(p.numel() for p in experts.parameters()) == sum(p.numel() for p in fused.parameters())


class Doubled(nn.Module):
    """Stands for a quantized layer: no linear layer, and it refuses empty input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        assert len(x)
        return self.layer(x) * 2


@pytest.mark.parametrize("calibrate_all", [False, True])
def test_layers_may_be_replaced(calibrate_all):
    fused = Fused()
    experts = UnfusedExperts(fused)
    experts.calibrate_all = calibrate_all
    for expert in experts:
        expert.down_proj = Doubled(expert.down_proj)
    x, index, weights = tokens(3, 1)
    with torch.no_grad():
        close(experts(x, index, weights), 2 * fused(x, index, weights))


def test_weights_of_another_dtype_give_the_dtype_of_the_activations():
    experts = UnfusedExperts(Fused().bfloat16())
    x, index, weights = tokens(5)
    out = experts(x.bfloat16(), index, weights.float())
    assert out.dtype is torch.bfloat16


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_mode_and_trainability_are_kept(training, trainable):
    fused = Fused().train(training).requires_grad_(trainable)
    experts = UnfusedExperts(fused)
    assert {m.training for m in experts.modules() if m is not fused.act_fn} == {training}
    assert {p.requires_grad for p in experts.parameters()} == {trainable}


def layer_with_experts():
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.experts, block.mlp.gate = Fused(), nn.Linear(H, E)
    block.dense = nn.Linear(H, H)
    return block


def test_fused_experts_are_found_and_replaced_in_place():
    block = layer_with_experts()
    fused = block.mlp.experts
    assert [(name, module) for name, module in find_fused_experts(block)] == [("mlp.experts", fused)]
    assert count_experts(fused) == E
    unfuse_experts(block)
    assert isinstance(block.mlp.experts, UnfusedExperts)
    assert count_experts(block.mlp.experts) == E
    assert not list(find_fused_experts(block))
    before = block.mlp.experts
    unfuse_experts(block)
    assert block.mlp.experts is before


def test_experts_on_the_meta_device_are_taken_apart_too():
    experts = UnfusedExperts(Fused().to("meta"))
    assert {p.device.type for p in experts.parameters()} == {"meta"}
    assert {tuple(expert.up_proj.weight.shape) for expert in experts} == {(INNER, H)}


def test_every_expert_is_calibrated_while_open_and_no_longer_after_an_error():
    block = layer_with_experts()
    unfuse_experts(block)
    experts, (x, index, weights) = block.mlp.experts, tokens(11, 1)
    seen = [0] * E
    for number, expert in enumerate(experts):
        expert.down_proj.register_forward_pre_hook(
            lambda _, args, number=number: seen.__setitem__(number, seen[number] + len(args[0]))
        )
    routed = experts(x, index, weights)
    assert sum(seen) == int((index < E).sum())
    seen[:] = [0] * E
    with calibrate_every_expert(block):
        close(experts(x, index, weights), routed)
    assert seen == [11] * E
    with pytest.raises(RuntimeError, match="on the way"), calibrate_every_expert(block):
        raise RuntimeError("on the way")
    assert not experts.calibrate_all


def test_calibration_may_be_nested():
    block = layer_with_experts()
    unfuse_experts(block)
    with calibrate_every_expert(block):
        with calibrate_every_expert(block):
            pass
        assert block.mlp.experts.calibrate_all


@pytest.mark.parametrize(
    ("flag", "value"), [("has_gate", False), ("has_bias", True), ("is_transposed", True), ("is_concatenated", False)]
)
def test_layouts_that_a_host_declares_and_we_do_not_read_are_refused(flag, value):
    block = layer_with_experts()
    setattr(block.mlp.experts, flag, not value)
    list(find_fused_experts(block))
    setattr(block.mlp.experts, flag, value)
    with pytest.raises(UnsupportedModelError, match=f"mlp.experts: experts of Fused are stored with {flag}={value}"):
        unfuse_experts(block)
    assert isinstance(block.mlp.experts, Fused)


@pytest.mark.parametrize("shape", [(E, H, 2 * INNER), (E, 2 * INNER + 1, H), (E + 1, 2 * INNER, H), (2 * INNER, H)])
def test_shapes_that_do_not_fit_are_refused(shape):
    fused = Fused()
    fused.gate_up_proj = nn.Parameter(torch.zeros(shape))
    with pytest.raises(UnsupportedModelError, match=r"gate_up_proj .* of Fused are not \(E, 2I, H\) and \(E, H, I\)"):
        UnfusedExperts(fused)


def test_a_module_without_experts_is_refused():
    with pytest.raises(
        UnsupportedModelError, match="Linear has no parameters gate_up_proj and down_proj and an act_fn"
    ):
        UnfusedExperts(nn.Linear(2, 2))
