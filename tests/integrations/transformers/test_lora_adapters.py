"""LoRA adapters of PEFT on packed layers: only they are trained, and they come back from a file."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import kernelgraft
from kernelgraft_core.quant.formats.autoawq import Gemm
from kernelgraft_core.quant.formats.native import Native
from kernelgraft_core.quant.packed_linear import PackedLinear

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 27).unsqueeze(0)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module", params=[Gemm(4, 32), Native(3, 32)], ids=["awq", "3-bits"])
def checkpoint(request, pack, float_llama):
    return pack(float_llama, request.param)[0]


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def trained(model, steps=3):
    """The losses of some steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_lowers_the_loss_and_touches_adapters_alone(plugin, checkpoint):
    base = load(checkpoint)
    plain = logits(base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA))
    assert torch.equal(logits(model), plain)
    losses = trained(model.train())
    assert losses[0] > losses[1] > losses[2]
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(with_gradient) == 8
    assert all(".lora_" in name for name in with_gradient)
    assert not torch.equal(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_adapter_comes_back_from_its_file(plugin, checkpoint, tmp_path):
    model = peft.get_peft_model(load(checkpoint), peft.LoraConfig(**LORA))
    trained(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(checkpoint), tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.add_adapter("second", peft.LoraConfig(**LORA))  # beside the first, on the same layers
    again.set_adapter("second")
    assert torch.equal(logits(again), logits(load(checkpoint)))


def test_all_linear_means_the_packed_layers_too(plugin, checkpoint):
    base = load(checkpoint)
    names = [name for name, layer in base.named_modules() if isinstance(layer, PackedLinear)]
    model = peft.get_peft_model(
        base, peft.LoraConfig(**{**LORA, "target_modules": [n.rpartition(".")[2] for n in names]})
    )
    wrapped = [layer for layer in model.modules() if isinstance(getattr(layer, "base_layer", None), PackedLinear)]
    assert len(wrapped) == len(names) == 14


def test_unloading_puts_the_dispatcher_back_and_float_layers_keep_theirs(float_llama):
    from peft.tuners.lora import model as dispatching

    before = dispatching.dispatch_awq
    with kernelgraft.load_plugin("awq", host="transformers"):
        assert dispatching.dispatch_awq is not before
        model = peft.get_peft_model(load(float_llama), peft.LoraConfig(**LORA))
        assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is peft.tuners.lora.Linear
    assert dispatching.dispatch_awq is before
