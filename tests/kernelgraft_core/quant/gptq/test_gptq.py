"""GPTQ against exhaustive search and round-to-nearest, and over the blocks of a random Llama."""

import itertools

import pytest
import torch

from kernelgraft_core.quant.gptq import GptqConfig, GptqMethod, gptq_round, round_columns
from kernelgraft_core.quant.rounding import Grid, Scheme, fake_quantize, nearest_grid, split_groups
from kernelgraft_core.quant.runner import quantize_model
from kernelgraft_core.runtime.errors import NonFiniteError

transformers = pytest.importorskip("transformers")

SCHEMES = [Scheme(4, 16), Scheme(3, 16), Scheme(4, 16, True), Scheme(3, -1), Scheme(4, 8)]


def hessian_of(k, *, tokens=200, dtype=torch.float64):
    """Second moments of inputs that a third as many hidden causes explain for the most part, of different sizes."""
    causes = torch.randn(tokens, max(1, k // 3), dtype=dtype) @ torch.randn(max(1, k // 3), k, dtype=dtype)
    x = (causes + 0.3 * torch.randn(tokens, k, dtype=dtype)) * (0.3 + torch.rand(k, dtype=dtype))
    return x.T @ x


def loss(weight, values, hessian):
    change = values - weight
    return float(((change @ hessian) * change).sum())


def values_of(integers, grid):
    groups = integers.view(*grid.scales.shape, -1)
    return ((groups - grid.zeros.unsqueeze(-1)) * grid.scales.unsqueeze(-1)).view_as(integers)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("order", ["activation", "natural"])
def test_it_beats_rounding_to_nearest_on_the_same_grid(scheme, order):
    weight, hessian = torch.randn(24, 48, dtype=torch.float64), hessian_of(48)
    integers, grid = gptq_round(weight, hessian, scheme, order=order)
    assert integers.min() >= 0
    assert integers.max() <= scheme.levels
    assert torch.equal(integers, integers.round())
    assert loss(weight, values_of(integers, grid), hessian) < 0.6 * loss(weight, fake_quantize(weight, scheme), hessian)


def test_it_comes_close_to_the_best_of_all_roundings():
    scheme = Scheme(3, -1)
    ratios = []
    for _ in range(10):
        weight, hessian = torch.randn(1, 5, dtype=torch.float64), hessian_of(5)
        grid = nearest_grid(split_groups(weight, -1), scheme)
        every = torch.tensor(list(itertools.product(range(8), repeat=5)), dtype=torch.float64)
        change = (every - grid.zeros) * grid.scales - weight
        best = float(((change @ hessian) * change).sum(-1).min())
        integers, _ = gptq_round(weight, hessian, grid)
        ratios.append((loss(weight, values_of(integers, grid), hessian), best,
                       loss(weight, grid.reproduce(split_groups(weight, -1)).view_as(weight), hessian)))  # fmt: skip
    found, best, nearest = (sum(column) for column in zip(*ratios, strict=True))
    assert best <= found < best + 0.5 * (nearest - best)


def test_inputs_that_do_not_correlate_leave_nothing_to_make_up_for():
    weight, scheme = torch.randn(8, 32, dtype=torch.float64), Scheme(4, 16)
    integers, grid = gptq_round(weight, torch.diag(torch.rand(32, dtype=torch.float64) + 0.1), scheme)
    assert torch.equal(integers, grid.round(split_groups(weight, 16)).view_as(weight))


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_the_block_size_changes_the_time_and_not_the_result(order):
    weight, hessian = torch.randn(8, 64, dtype=torch.float64), hessian_of(64)
    found = [gptq_round(weight, hessian, Scheme(4, 16), block=block, order=order)[0] for block in (1, 7, 64, 500)]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_columns_that_never_see_anything_are_rounded_as_they_are():
    weight, hessian = torch.randn(8, 32, dtype=torch.float64), hessian_of(32)
    dead = [3, 17]
    hessian[dead], hessian[:, dead] = 0, 0
    integers, grid = gptq_round(weight, hessian, Scheme(4, 16))
    nearest = grid.round(split_groups(weight, 16)).view_as(weight)
    assert torch.equal(integers[:, dead], nearest[:, dead])
    assert not torch.equal(integers, nearest)
    assert torch.equal(gptq_round(weight, torch.zeros_like(hessian), Scheme(4, 16))[0], nearest)


def test_a_hessian_of_few_tokens_is_damped_until_it_can_be_factored(caplog):
    weight = torch.randn(8, 32, dtype=torch.float64)
    hessian = hessian_of(32, tokens=3)
    integers, grid = gptq_round(weight, hessian, Scheme(4, 16), damping=0.0)
    assert loss(weight, values_of(integers, grid), hessian) < loss(
        weight, fake_quantize(weight, Scheme(4, 16)), hessian
    )
    with pytest.raises(NonFiniteError, match="the Hessian of 32 columns is not positive definite"):
        gptq_round(weight, hessian - 10 * torch.diag(hessian.diagonal().max().expand(32)), Scheme(4, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.eye(8)}, r"the Hessian \(8, 8\); expected \(N, K\), \(K, K\)"),
        ({"group_size": 5}, "group size 5 does not divide K = 16"),
        ({"block": 0}, "block of 0 columns"),
        ({"damping": -1.0}, r"damping -1.0 is not between 0 and 1"),
        ({"order": "random"}, "order 'random'; there are activation, natural"),
        ({"weight": torch.full((2, 16), torch.nan)}, "the weight is not finite in 32 of 32"),
        ({"hessian": torch.full((16, 16), torch.inf)}, "the Hessian is not finite in 256 of 256"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"weight": torch.randn(2, 16), "hessian": torch.eye(16), "group_size": 8} | change
    with pytest.raises((ValueError, NonFiniteError), match=message):
        round_columns(arguments.pop("weight"), arguments.pop("hessian"), lambda c, g: (c, c), **arguments)


def test_grids_that_are_not_the_weights_are_refused():
    grid = Grid.spanning(-torch.ones(3, 2), torch.ones(3, 2), Scheme(4, 8))
    with pytest.raises(ValueError, match=r"weight is \(2, 16\), but the grid's scales are \(3, 2\)"):
        gptq_round(torch.randn(2, 16), torch.eye(16), grid)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32), Scheme(4, 32, True)], ids=str)
def test_a_model_computes_what_its_packed_weights_stand_for(scheme):
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.125,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    norms = [p for name, p in model.named_parameters() if "layernorm" in name]
    for norm in norms:
        norm.data[[3, 40]] = 12
    before = [norm.clone() for norm in norms]
    batches = [torch.randint(0, 100, (1, 24)) for _ in range(6)]
    results = list(quantize_model(model, batches, GptqMethod(GptqConfig(scheme)), scheme_group_size=32))
    weights = {name: weight for result in results for name, weight in result.outcome.weights.items()}
    assert len(weights) == 14
    for name, weight in weights.items():
        stored = weight.integers().view(*weight.scales.shape, -1).float() - weight.zeros.float().unsqueeze(-1)
        layer = model.get_submodule(name).weight
        assert weight.bits == scheme.bits
        assert torch.equal((stored * weight.scales.float().unsqueeze(-1)).view_as(layer), layer)
    reports = [report for result in results for report in result.outcome.reports]
    assert all(report.error_after < report.error_before for report in reports)
    assert all(torch.equal(a, b) for a, b in zip(norms, before, strict=True))
