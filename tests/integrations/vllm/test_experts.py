"""Quantized experts in vLLM: loaded through its expert loader, sliced by rank, computed as their formula says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe import FusedMoEConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from kernelgraft_vllm import experts as experts_module
from kernelgraft_vllm.awq import KernelgraftAWQConfig
from kernelgraft_vllm.experts import KernelgraftExpertsMethod
from kernelgraft_vllm.native import KernelgraftNativeConfig
from kernelgraft_vllm.routed_experts import routed_experts

EXPERTS, CHOSEN, HIDDEN, INNER, NAME = 4, 2, 256, 128, "model.layers.3.mlp.experts"
SIZES = {"gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}  # K, N
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-3}
ACTS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
LAYOUTS = [
    *(pytest.param("awq", 4, group, False, id=f"awq-g{group}") for group in (32, INNER, -1)),
    *(
        pytest.param("native", bits, group, symmetric, id=f"native-{bits}bit-g{group}{'-symmetric' * symmetric}")
        for bits, group, symmetric in ((4, 32, False), (3, 32, False), (3, INNER, True), (3, -1, False))
    ),
]


@pytest.fixture(scope="module")
def stored_experts(awq_layer, native_layer):
    """``stored_experts(layout, bits, group, symmetric)``: per expert, the projections by name."""

    def make(layout, bits, group, symmetric):
        def one(k, n, seed):
            return awq_layer(k, n, group, seed) if layout == "awq" else native_layer(k, n, bits, group, symmetric, seed)

        return [
            {name: one(k, n, 10 * e + seed) for seed, (name, (k, n)) in enumerate(SIZES.items())}
            for e in range(EXPERTS)
        ]

    return make


def config_of(layout, bits, group, symmetric):
    return KernelgraftAWQConfig(group) if layout == "awq" else KernelgraftNativeConfig(bits, group, symmetric)


def new_layer(config, rank=0, ranks=1, **changes):
    """vLLM's layer, built as rank ``rank``; nothing is communicated."""
    parallel = changes.pop("parallel", {})
    parallel = replace(FusedMoEParallelConfig.make_no_parallel(), tp_size=ranks, tp_rank=rank, **parallel)
    options = {name: changes.pop(name) for name in ("apply_router_weight_on_input",) if name in changes}
    moe = FusedMoEConfig(
        **{
            "num_experts": EXPERTS,
            "experts_per_token": CHOSEN,
            "hidden_dim": HIDDEN,
            "intermediate_size": INNER,
            "num_local_experts": EXPERTS,
            "num_logical_experts": EXPERTS,
            "activation": MoEActivation.SILU,
            "device": "cpu",
            "routing_method": RoutingMethodType.Renormalize,
            "moe_parallel_config": parallel,
            "in_dtype": torch.float32,
        }
        | changes
    )
    mapping = ExpertMapManager(
        max_num_batched_tokens=16,
        top_k=CHOSEN,
        global_num_experts=EXPERTS,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        placement_strategy="linear",
        enable_eplb=False,
    )
    return RoutedExperts(NAME, torch.float32, moe, config, mapping, **options)


def load(layer, experts, but=()):
    weights = [
        (f"{e}.{name}.{part}", tensor)
        for e, projections in enumerate(experts)
        for name, stored in projections.items()
        for part, tensor in stored.tensors.items()
    ]
    return set(layer.load_weights([(name, tensor) for name, tensor in weights if name not in but]))


def formula(x, weights, ids, experts, act):
    """In float64, token by token."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for weight, e in zip(weights[token].double(), ids[token].tolist(), strict=True):
            gate, up, down = (experts[e][name].weight for name in SIZES)
            out[token] += weight * (down @ (act(gate @ row) * (up @ row)))
    return out


def routing(tokens):
    logits = torch.randn(tokens, EXPERTS)
    weights, ids = logits.softmax(-1).topk(CHOSEN)
    return weights, ids.int()


def assert_near(found, expected, dtype=torch.float32):
    error = (found.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize(("layout", "bits", "group", "symmetric"), LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_add_up_to_the_formula(stored_experts, layout, bits, group, symmetric, ranks):
    experts = stored_experts(layout, bits, group, symmetric)
    x, (weights, ids) = torch.randn(7, HIDDEN), routing(7)
    total = 0.0
    for rank in range(ranks):
        layer = new_layer(config_of(layout, bits, group, symmetric), rank, ranks)
        assert isinstance(layer.quant_method, KernelgraftExpertsMethod)
        loaded = load(layer, experts)
        assert loaded == set(dict(layer.named_parameters()))
        layer.quant_method.process_weights_after_loading(layer)
        total = total + layer.forward_modular(x, weights, ids).double()
    assert_near(total, formula(x, weights, ids, experts, ACTS["silu"]))


@pytest.fixture(scope="module")
def packed(stored_experts):
    """``packed(bits)``: experts, and their tensors as the op takes them."""

    def make(bits):
        experts = stored_experts("native", bits, 32, False)
        names = ("qweight", "qhigh", "scales", "zeros") if bits == 3 else ("qweight", "scales", "zeros")

        def stacked(*projections):
            return [
                torch.stack([torch.cat([e[p].tensors[name] for p in projections]) for e in experts]) for name in names
            ]

        return experts, stacked("gate_proj", "up_proj"), stacked("down_proj")

    return make


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_op_is_the_formula(packed, bits, activation, dtype):
    experts, gate_up, down = packed(bits)
    x, (weights, ids) = torch.randn(9, HIDDEN).to(dtype), routing(9)
    out = routed_experts(x, weights, ids, gate_up, down, activation)
    assert out.dtype == dtype
    assert_near(out, formula(x, weights, ids, experts, ACTS[activation]), dtype)


def test_op_takes_no_tokens_and_experts_without_or_with_all_of_them(packed):
    experts, gate_up, down = packed(4)
    empty = routed_experts(torch.empty(0, HIDDEN), *routing(0), gate_up, down, "silu")
    assert empty.shape == (0, HIDDEN)
    x, weights = torch.randn(5, HIDDEN), torch.rand(5, 1)
    ids = torch.full((5, 1), EXPERTS - 1)
    assert_near(routed_experts(x, weights, ids, gate_up, down, "silu"), formula(x, weights, ids, experts, ACTS["silu"]))
    wide = torch.randn(5, 2 * HIDDEN)[:, ::2]
    assert_near(
        routed_experts(wide, weights, ids, gate_up, down, "silu"), formula(wide, weights, ids, experts, ACTS["silu"])
    )


def test_op_is_opaque_to_the_compiler(packed):
    _, gate_up, down = packed(3)
    arguments = (torch.randn(5, HIDDEN), *routing(5), gate_up, down, "silu")
    torch.library.opcheck(routed_experts, arguments)
    compiled = torch.compile(lambda x, *rest: routed_experts(x + 1, *rest) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), routed_experts(arguments[0] + 1, *arguments[1:]) * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"parallel": {"use_ep": True, "ep_size": 2}}, r"expert and data parallelism .* 2 x 1", id="ep"),
        pytest.param({"parallel": {"dp_size": 2}}, r"expert and data parallelism .* 1 x 2 ranks", id="dp"),
        pytest.param({"activation": MoEActivation.SWIGLUOAI}, r"activation 'swigluoai' .* only silu, gelu", id="act"),
        pytest.param({"has_bias": True}, r"experts with a bias", id="bias"),
        pytest.param({"swiglu_limit": 7.0}, r"a limit, alpha or beta in the activation", id="limit"),
        pytest.param({"is_lora_enabled": True}, r"LoRA on a model with quantized experts", id="lora"),
        pytest.param({"apply_router_weight_on_input": True}, r"a routing weight on the input", id="input-weight"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, message):
    with pytest.raises(NotImplementedError, match=rf"{NAME}: .*{message}.*; serve with --quantization awq"):
        new_layer(KernelgraftAWQConfig(32), **changes)
    with pytest.raises(NotImplementedError, match=message) as refusal:
        new_layer(KernelgraftNativeConfig(3, 32, False), **changes)
    assert "--quantization awq" not in str(refusal.value)


def test_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(experts_module, "current_platform", SimpleNamespace(is_cpu=lambda: False, device_type="cuda"))
    with pytest.raises(NotImplementedError, match=r"on cuda need a host synchronization per layer; not written"):
        new_layer(KernelgraftNativeConfig(3, 32, False))


def test_ranks_that_cut_a_group_are_refused():
    with pytest.raises(ValueError, match=rf"{NAME}: w2 on each of 4 tensor-parallel ranks: K = 32 .* 64"):
        new_layer(KernelgraftAWQConfig(64), ranks=4)


def test_a_tensor_that_misfits_is_refused_by_expert(stored_experts):
    experts = stored_experts("awq", 4, 32, False)
    layer = new_layer(KernelgraftAWQConfig(64))
    with pytest.raises(ValueError, match=rf"{NAME}: qzeros for w1 of expert 0 .*\(8, 16\), expected int32 \(4, 16\)"):
        load(layer, experts)


def test_an_expert_that_is_missing_is_named(stored_experts):
    layer = new_layer(KernelgraftAWQConfig(32))
    load(layer, stored_experts("awq", 4, 32, False), but=("2.up_proj.scales", "3.down_proj.qweight"))
    with pytest.raises(ValueError, match=rf"{NAME}: .* has no scales for w3 of expert 2 \(2 tensors are missing\)"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_refused(stored_experts, value):
    experts = stored_experts("native", 3, 32, False)
    experts[2]["down_proj"].tensors["scales"][5, 1] = value
    layer = new_layer(KernelgraftNativeConfig(3, 32, False))
    load(layer, experts)
    with pytest.raises(ValueError, match=rf"{NAME}: scales in the checkpoint are not all finite"):
        layer.quant_method.process_weights_after_loading(layer)


def test_vllms_dummy_weights_are_not_missing():
    layer = new_layer(KernelgraftAWQConfig(32))
    for parameter in layer.parameters():
        parameter.data.zero_()
    layer.quant_method.process_weights_after_loading(layer)
    out = layer.forward_modular(torch.randn(3, HIDDEN), *routing(3))
    assert torch.equal(out, torch.zeros(3, HIDDEN))
