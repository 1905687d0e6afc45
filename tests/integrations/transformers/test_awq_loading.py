"""AWQ checkpoints through from_pretrained: the plugin's layers compute what was quantized, or say why they cannot."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import auto

import kernelgraft
from kernelgraft_core.quant.w4a16 import dequantize_w4a16
from kernelgraft_core.quant.w4a16.linear import AwqLinear
from kernelgraft_core.runtime.errors import CheckpointError
from kernelgraft_core.runtime.testing import assert_close
from kernelgraft_transformers.awq import AwqQuantizer

UP = "model.layers.1.mlp.up_proj"
PARTS = ("qweight", "qzeros", "scales")
IDS = torch.arange(3, 27).unsqueeze(0)


def load(directory, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [(torch.float32, 5e-4), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
    ids=["float32", "float16", "bfloat16"],
)
def test_the_logits_are_those_of_the_quantized_model(plugin, quantized, dtype, ratio):
    model = load(quantized.directory, dtype)
    assert model.dtype is dtype
    assert_close("logits", logits(quantized.model), logits(model), ratio)


def test_every_linear_layer_of_the_blocks_is_ours_and_ready(plugin, quantized):
    model = load(quantized.directory)
    ours = {name: layer for name, layer in model.named_modules() if isinstance(layer, AwqLinear)}
    assert ours.keys() == {layer["name"] for layer in quantized.record["layers"]}
    assert all(layer.prepared and layer.group_size == 32 for layer in ours.values())
    assert type(model.lm_head) is torch.nn.Linear
    assert model.hf_quantizer.is_serializable()
    assert model.hf_quantizer.is_trainable
    for name, layer in ours.items():
        weight = dequantize_w4a16(layer.words, layer.group_scales, layer.group_zeros, torch.float32)
        assert torch.equal(weight, quantized.model.get_submodule(name).weight)


def test_generation_gives_the_tokens_of_the_quantized_model(plugin, quantized):
    tokenizer = AutoTokenizer.from_pretrained(quantized.directory)
    prompt = tokenizer("w5 w17 w30 w2", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    found = load(quantized.directory).generate(**prompt, **options)
    assert torch.equal(found, quantized.model.generate(**prompt, **options))
    assert found.shape[1] > 4


def test_a_model_without_its_head_loads_too(plugin, quantized):
    # In the stored dtype: Transformers does not cast what it renames (here it takes "model." off) when quantized.
    model = AutoModel.from_pretrained(quantized.directory, dtype=torch.float16)
    with torch.no_grad():
        found, wanted = (m(input_ids=IDS).last_hidden_state for m in (model, quantized.model.model))
    assert_close("hidden", wanted, found, 4e-3)


@pytest.mark.parametrize("size", ["5GB", "30KB"], ids=["one-file", "shards"])
def test_what_was_loaded_is_saved_bit_for_bit(plugin, quantized, tmp_path, size):
    model = load(quantized.directory, torch.float16)
    before = logits(model)
    model.save_pretrained(tmp_path, max_shard_size=size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "30KB")
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    original = load_file(quantized.directory / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        assert saved[name].dtype is tensor.dtype
        assert torch.equal(saved[name], tensor), name
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in ("quant_method", "bits", "group_size", "zero_point", "version")} == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    }  # fmt: skip
    assert torch.equal(logits(load(tmp_path, torch.float16)), before)


def test_unloading_puts_the_hosts_own_quantizer_back():
    table = auto.AUTO_QUANTIZER_MAPPING
    before = dict(table)
    assert before["awq"] is not AwqQuantizer
    with kernelgraft.load_plugin("awq", host="transformers"):
        assert table["awq"] is AwqQuantizer
        assert table.keys() == before.keys() | {"kernelgraft_awq"}
    assert dict(table) == before
    assert list(table) == list(before)


def test_a_model_that_is_loaded_outlives_the_plugin(quantized):
    with kernelgraft.load_plugin("awq", host="transformers"):
        model = load(quantized.directory)
    assert_close("logits", logits(quantized.model), logits(model), 5e-4)


def adapted(model):
    """Low-rank factors beside a quantized layer, as LoRA puts them there: their gradients and the input's."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).mul_(0.1).requires_grad_() for shape in ((64, 4), (4, 128)))
    embeddings = torch.randn(1, 12, 64, generator=generator).requires_grad_()
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, args, out: out + args[0] @ a @ b)
    model(inputs_embeds=embeddings).logits.logsumexp(-1).square().sum().backward()
    hook.remove()
    return {"a": a.grad, "b": b.grad, "embeddings": embeddings.grad}


def test_gradients_flow_through_the_layers_to_adapters_and_inputs(plugin, quantized):
    model = load(quantized.directory).train()
    wanted = adapted(quantized.model)
    for name, grad in adapted(model).items():
        assert_close(name, wanted[name], grad, 1e-3)
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_the_kernels_can_be_forced_to_the_reference(plugin, quantized, monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    assert_close("logits", logits(quantized.model), logits(load(quantized.directory)), 1e-5)


def unquantized(quantized, *names):
    """Stores some layers in float16 instead of packed."""

    def edit(tensors):
        for name in names:
            for part in PARTS:
                del tensors[f"{name}.{part}"]
            tensors[f"{name}.weight"] = quantized.model.get_submodule(name).weight.half()

    return edit


@pytest.mark.parametrize("listed", [UP, "layers.1.mlp.up_proj", "up_proj"])
def test_modules_that_are_not_converted_stay_what_they_are(plugin, quantized, damaged, listed):
    names = [UP] if "1" in listed else [UP, UP.replace("1", "0")]
    directory = damaged(lambda config: config.update(modules_to_not_convert=[listed]), unquantized(quantized, *names))
    model = load(directory)
    kinds = {n: type(m) for n, m in model.named_modules() if n.endswith("_proj")}
    assert {n for n, kind in kinds.items() if kind is torch.nn.Linear} == set(names)
    assert set(kinds.values()) == {torch.nn.Linear, AwqLinear}
    assert_close("logits", logits(quantized.model), logits(model), 1e-3)


def test_part_of_a_name_excludes_nothing(plugin, quantized, damaged):
    model = load(damaged(lambda config: config.update(modules_to_not_convert=["up", "proj", "layers.1.mlp.up"])))
    assert isinstance(model.get_submodule(UP), AwqLinear)


@pytest.mark.parametrize("listed", ["up_proj", "model.layers.1", "mlp"])
def test_a_quantized_layer_that_is_listed_as_another_is_refused_not_filled_with_noise(plugin, damaged, listed):
    with pytest.raises(
        CheckpointError, match=r"layers\.\d\.(mlp|self_attn)\.\w+ is stored quantized, but modules_to_not"
    ):
        load(damaged(lambda config: config.update(modules_to_not_convert=[listed])))


def test_a_quantized_output_head_is_refused(plugin, damaged):
    def quantize_head(tensors):
        del tensors["lm_head.weight"]
        for part in PARTS:
            tensors[f"lm_head.{part}"] = tensors[f"{UP}.{part}"].clone()

    with pytest.raises(CheckpointError, match=r"lm_head is stored quantized, but .* output head, says that it is not"):
        load(damaged(tensors=quantize_head))


def test_excluding_everything_is_refused(plugin, quantized, damaged):
    layers = [layer["name"] for layer in quantized.record["layers"]]

    def exclude(tensors):
        for part in PARTS:
            tensors[f"other.{part}"] = tensors[f"{UP}.{part}"].clone()
        unquantized(quantized, *layers)(tensors)

    with pytest.raises(CheckpointError, match=r"no linear layer of LlamaForCausalLM is left.*skipped: .*'model'"):
        load(damaged(lambda config: config.update(modules_to_not_convert=["model"]), exclude))


BAD_CONFIGS = [
    pytest.param({"bits": 3}, "bits = 3, but AutoAWQ GEMM has 4", id="3-bits"),
    pytest.param({"version": "gemv"}, r"qzeros is int32 \(4, 8\), but .* in AutoAWQ GEMV", id="gemv"),
    pytest.param({"zero_point": False}, "zero_point = False, expected True", id="symmetric"),
    pytest.param({"group_size": 64}, r"qzeros is int32 \(4, 8\), but .* group size 64 .* \(2, 8\)", id="other-group"),
    pytest.param({"group_size": -1}, r"qzeros is int32 \(4, 8\), but .* group size -1 .* \(1, 8\)", id="whole-row"),
    pytest.param({"group_size": 48}, r"group size 48", id="group-does-not-divide"),
    pytest.param({"group_size": 0}, "group_size = 0", id="group-0"),
    pytest.param({"group_size": None}, "group_size = None", id="no-group"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS)
def test_a_config_that_the_layers_do_not_fit_is_refused_with_its_value(plugin, damaged, change, message):
    with pytest.raises(CheckpointError, match=message):
        load(damaged(lambda config: config.update(change)))


def replace(part, change):
    def edit(tensors):
        tensors[f"{UP}.{part}"] = change(tensors[f"{UP}.{part}"]).contiguous()

    return edit


def remove(*parts):
    def edit(tensors):
        for part in parts:
            del tensors[f"{UP}.{part}"]

    return edit


def set_first(value):
    return replace("scales", lambda t: t.index_fill(0, torch.tensor([0]), value))


BAD_TENSORS = [
    *(pytest.param(remove(part), rf"layers\.1\.mlp\.up_proj.*{part}", id=f"{part}-missing") for part in PARTS),
    pytest.param(remove(*PARTS), rf"{UP}: the checkpoint has no qweight, qzeros, scales", id="layer-missing"),
    pytest.param(replace("qweight", torch.Tensor.float), rf"{UP}: qweight is float32", id="float-words"),
    pytest.param(replace("qweight", torch.Tensor.long), rf"{UP}: qweight is int64", id="long-words"),
    pytest.param(replace("qweight", torch.Tensor.flatten), rf"{UP}: qweight is int32 \(1024,\)", id="flat-words"),
    pytest.param(
        replace("qweight", lambda t: t[:-8]), rf"{UP}: K = 56 is no multiple of group size 32", id="rows-missing"
    ),
    pytest.param(replace("qweight", torch.Tensor.t), rf"{UP}: K = 16 is no multiple of group size 32", id="gemv-shape"),
    pytest.param(replace("scales", lambda t: t[:, :-8]), rf"{UP}: scales is float16 \(2, 120\)", id="columns-missing"),
    pytest.param(replace("scales", torch.Tensor.int), rf"{UP}: scales is int32", id="integer-scales"),
    pytest.param(set_first(torch.nan), rf"{UP}: scales in the checkpoint are not all finite", id="nan-scale"),
    pytest.param(set_first(torch.inf), rf"{UP}: scales in the checkpoint are not all finite", id="infinite-scale"),
]


@pytest.mark.parametrize(("edit", "message"), BAD_TENSORS)
def test_tensors_that_are_not_one_layer_are_refused_by_name(plugin, damaged, edit, message):
    with pytest.raises(CheckpointError, match=message):
        load(damaged(tensors=edit))


def test_a_layer_of_another_models_size_is_refused(plugin, damaged):
    def swap(tensors):
        for part in PARTS:
            tensors[f"{UP}.{part}"] = tensors[f"model.layers.1.mlp.down_proj.{part}"].clone()

    # Transformers has refused such tensors itself since 5.23, with a table of them.
    ours = rf"{UP}: the weight is 128 x 64 with .*; this layer has in_features=64, out_features=128"
    with pytest.raises((CheckpointError, RuntimeError), match=rf"{ours}|ignore_mismatched_sizes"):
        load(damaged(tensors=swap))


@pytest.mark.parametrize("size", [0, 100, -1000])
def test_a_truncated_file_is_refused_by_name(plugin, damaged, size):
    def cut(file):
        file.write_bytes(file.read_bytes()[:size])

    with pytest.raises(CheckpointError, match=r"holds a file that is not whole: model\.safetensors"):
        load(damaged(file=cut))


def test_a_scale_that_float16_cannot_hold_is_refused(plugin, damaged):
    edit = replace("scales", lambda t: t.bfloat16().index_fill(0, torch.tensor([0]), 1e5))
    with pytest.raises(CheckpointError, match=rf"{UP}: scales in the checkpoint are not all finite in float16"):
        load(damaged(tensors=edit))


def test_a_divisor_behind_an_activation_function_is_refused_not_left_out(plugin, damaged):
    scales = {"model.layers.0.mlp.act_fn.scales": torch.ones(128).half()}
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.act_fn\.scales scales the output of an activation"):
        load(damaged(tensors=lambda tensors: tensors.update(scales)))


def test_scales_in_bfloat16_are_taken(plugin, quantized, damaged):
    model = load(damaged(tensors=replace("scales", torch.Tensor.bfloat16)))
    assert model.get_submodule(UP).group_scales.dtype is torch.float16
    assert_close("logits", logits(quantized.model), logits(model), 1e-2)


def test_a_float_model_is_not_touched_by_the_plugin(plugin, float_llama):
    model = load(float_llama)
    assert not any(isinstance(layer, AwqLinear) for layer in model.modules())


def test_layers_with_biases_keep_them(plugin, quantized, tmp_path):
    shutil.copytree(quantized.directory, tmp_path / "biased")
    config = json.loads((tmp_path / "biased" / "config.json").read_text()) | {"mlp_bias": True}
    (tmp_path / "biased" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "biased" / "model.safetensors"
    tensors = load_file(file)
    biases = {
        f"model.layers.{i}.mlp.{name}.bias": torch.randn(width).half()
        for i in range(2)
        for name, width in (("gate_proj", 128), ("up_proj", 128), ("down_proj", 64))
    }
    save_file(tensors | biases, file, metadata={"format": "pt"})
    model = load(tmp_path / "biased")
    for name, bias in biases.items():
        assert torch.equal(model.get_buffer(name), bias.float())
    x = torch.randn(1, 3, 64)
    up, down = model.get_submodule(UP), UP + ".bias"
    plain = x @ quantized.model.get_submodule(UP).weight.T
    assert_close("up_proj", plain + biases[down].float(), up(x), 1e-4)

    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj: the checkpoint has no bias"):
        load(tmp_path / "biased")
