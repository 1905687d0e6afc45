"""Every model type that the adapters name, as its real class at tiny size: scales alone leave logits unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")


from kernelgraft_core.quant.architectures import ARCHITECTURES, Architecture, ScaleGroup, fold
from kernelgraft_core.quant.experts import UnfusedExperts
from kernelgraft_core.quant.sequential import capture_block_calls, watch_inputs
from kernelgraft_core.runtime import testing
from kernelgraft_core.runtime.errors import UnsupportedModelError

from .architecture_cases import (
    CASES,
    MIXTURES,
    TOKENS,
    Case,
    deviation,
    llava,
    logits,
    text_only,
    tiny,
    use_float64_throughout,
)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@torch.no_grad()
def scale(
    model: nn.Module, architecture: Architecture, spoil: Callable[[ScaleGroup], ScaleGroup] = lambda group: group
) -> int:
    """Random scales for all groups of all blocks, each group ``spoil``ed before; the number of groups scaled."""
    generator, scaled = testing.rng(2), 0
    for block in architecture.block_list(model):
        architecture.prepare(block)
        for group in architecture.scale_groups(block):
            if group.source is None:
                continue
            group = spoil(group)
            width = block.get_submodule(group.targets[0]).in_features
            scales = torch.randn(width, dtype=torch.float64, generator=generator).mul(0.7).exp()
            for name in group.targets:
                block.get_submodule(name).weight.data *= scales
            fold(block, group.source, group.followers, scales)
            scaled += 1
    return scaled


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    use_float64_throughout(monkeypatch)


def test_scales_alone_leave_the_logits_unchanged(case):
    model, architecture = tiny(case)
    before = logits(model, case)
    assert before.std() > 1e-2
    assert scale(model, architecture) == case.scaled
    torch.testing.assert_close(logits(model, case), before, rtol=1e-9, atol=1e-9 * float(before.abs().max()))


def test_every_case_is_a_type_that_an_adapter_names_and_no_type_is_left_out():
    types = {model_type for architecture in ARCHITECTURES for model_type in architecture.model_types}
    assert {name.split("-")[0] for name in CASES} == types


def test_every_linear_layer_of_a_block_is_quantized_once_or_follows(case):
    model, architecture = tiny(case)
    for block in architecture.block_list(model):
        architecture.prepare(block)
        groups = architecture.scale_groups(block)
        targets = [name for group in groups for name in group.targets]
        followers = {name for group in groups for name in group.followers}
        linear = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert len(targets) == len(set(targets))
        assert set(targets) == linear - followers
        assert followers <= {"mlp.gate", "mlp.shared_expert_gate"}
        # No weight of any size stays outside: what is left are norms and followers.
        left = {n.rpartition(".")[0] for n, p in block.named_parameters() if p.dim() > 1} - set(targets)
        assert left == followers


def test_the_check_passes_before_and_after_experts_are_taken_apart_and_on_the_meta_device(case):
    model, architecture = tiny(case)
    architecture.check(model)
    model.to("meta")
    for block in architecture.block_list(model):
        architecture.prepare(block)
    architecture.check(model)


def test_targets_of_a_group_read_the_same_activations_and_the_inspected_module_is_called(case):
    model, architecture = tiny(case)
    seen: dict[str, list[Tensor]] = {}
    called: set[str] = set()
    for block in architecture.block_list(model):
        architecture.prepare(block)
        groups = architecture.scale_groups(block)
        readers = {name: block.get_submodule(name) for group in groups for name in (*group.targets, *group.followers)}
        inspected = {group.inspect: block.get_submodule(group.inspect) for group in groups}
        seen.clear()
        called.clear()
        hooks = [
            module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in inspected.items()
        ]
        with architecture.calibrating(block), watch_inputs(readers, lambda n, x: seen.setdefault(n, []).append(x)):
            logits(model, case)
        for hook in hooks:
            hook.remove()
        for group in groups:
            first, *others = (torch.cat(seen[name]).flatten(0, -2) for name in (*group.targets, *group.followers))
            assert all(torch.equal(first, other) for other in others)
        assert called == set(inspected)


def test_modules_that_treat_tokens_by_themselves_are_declared_so(case):
    model, architecture = tiny(case)
    block = architecture.block_list(model)[-1]
    architecture.prepare(block)
    x = torch.randn(1, 6, 64, dtype=torch.float64, generator=testing.rng(7))
    for group in architecture.scale_groups(block):
        if group.per_token:
            module = block.get_submodule(group.inspect)
            width = block.get_submodule(group.targets[0]).in_features
            whole, part = (module(rows)[0, -1] for rows in (x[..., :width], x[:, -1:, :width]))
            torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
        else:
            assert group.inspect in ("self_attn", "attention")


def test_blocks_run_one_by_one_give_what_the_model_gives(case):
    """What the quantizer relies on: blocks take and return a tensor, and their calls can be recorded in advance."""
    model, architecture = tiny(case)
    blocks, batches = list(architecture.block_list(model)), [case.inputs(model)]
    wanted: list[Tensor] = []
    hook = blocks[-1].register_forward_hook(lambda _module, _args, out: wanted.append(out))
    logits(model, case)
    hook.remove()
    assert isinstance(wanted[0], Tensor)
    with torch.no_grad():
        calls = capture_block_calls(model, blocks, batches)
        hidden = calls.first
        for index, block in enumerate(blocks[:-1]):
            hidden = list(calls.entering(index + 1, calls.inputs(index, hidden).outputs(block)))
        (out,) = calls.inputs(len(blocks) - 1, hidden).outputs(blocks[-1])
    torch.testing.assert_close(out, wanted[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.inputs is not text_only])
def test_images_change_the_logits(name):
    """Otherwise the cases with images would test nothing but text."""
    model, _ = tiny(CASES[name])
    inputs = CASES[name].inputs(model)
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        after = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}, use_cache=False).logits
    assert deviation(after, before) > 1e-3


@pytest.mark.parametrize("name", MIXTURES)
def test_a_router_that_does_not_follow_changes_the_logits(name):
    model, architecture = tiny(CASES[name])
    before = logits(model, CASES[name])
    scale(model, architecture, lambda group: replace(group, followers=()))
    assert deviation(logits(model, CASES[name]), before) > 1e-3


def test_the_gate_of_the_shared_expert_has_to_follow_too():
    model, architecture = tiny(CASES["qwen2_moe"])
    before = logits(model, CASES["qwen2_moe"])
    scale(model, architecture, lambda group: replace(group, followers=group.followers[:1]))
    assert deviation(logits(model, CASES["qwen2_moe"]), before) > 1e-3


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_norms_that_add_one_need_their_offset(name):
    model, architecture = tiny(CASES[name])
    before = logits(model, CASES[name])
    scale(model, architecture, lambda group: replace(group, source=replace(group.source, offset=0.0)))
    assert deviation(logits(model, CASES[name]), before) > 1e-3


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_taken_apart_compute_what_the_fused_ones_do(name):
    model, architecture = tiny(CASES[name])
    before = logits(model, CASES[name])
    for block in architecture.block_list(model):
        architecture.prepare(block)
        with architecture.calibrating(block):
            torch.testing.assert_close(logits(model, CASES[name]), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits(model, CASES[name]), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_sees_every_token_while_calibrating(name):
    model, architecture = tiny(CASES[name])
    block = architecture.block_list(model)[1]
    architecture.prepare(block)
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and ".experts." in n}
    counts = dict.fromkeys(layers, 0)

    def count(layer: str, x: Tensor) -> None:
        counts[layer] += len(x)

    with watch_inputs(layers, count):
        logits(model, CASES[name])
        routed = dict(counts)
        with architecture.calibrating(block):
            logits(model, CASES[name])
    tokens = 2 * TOKENS
    assert sum(routed.values()) == 3 * tokens * 2  # three projections, two experts a token
    assert min(routed.values()) < tokens
    assert all(counts[layer] - routed[layer] == tokens for layer in layers)


def test_layers_without_experts_stay_dense():
    model, architecture = tiny(CASES["qwen2_moe"])
    kinds = []
    for block in architecture.block_list(model):
        architecture.prepare(block)
        kinds.append(any(isinstance(module, UnfusedExperts) for module in block.modules()))
    assert kinds == [False, True, True]


def test_a_tower_of_another_type_is_refused():
    model, architecture = tiny(llava("phi3", 0))
    with pytest.raises(UnsupportedModelError, match=r"tower of this LLaVA model is of type 'phi3'; known: llama"):
        architecture.check(model)


def test_experts_in_another_layout_are_refused_by_name():
    model, architecture = tiny(CASES["mixtral"])
    architecture.block_list(model)[1].mlp.experts.is_transposed = True
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1: mlp\.experts: .*is_transposed=True"):
        architecture.check(model)


def test_a_layer_that_the_adapter_does_not_know_is_refused_by_name():
    model, architecture = tiny(CASES["llama"])
    architecture.block_list(model)[2].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2: the Llama adapter does not know .*mlp\.extra"):
        architecture.check(model)
