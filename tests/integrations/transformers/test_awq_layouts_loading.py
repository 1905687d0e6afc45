"""AutoAWQ's GEMV and GEMV_FAST and llm-awq through from_pretrained: the numbers of the same layers in GEMM."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kernelgraft_core.quant.formats.autoawq import Gemm, Gemv
from kernelgraft_core.quant.formats.llm_awq import LlmAwq
from kernelgraft_core.quant.packed_linear import PackedLinear
from kernelgraft_core.runtime.errors import CheckpointError

UP = "model.layers.1.mlp.up_proj"
IDS = torch.arange(3, 27).unsqueeze(0)
LAYOUTS = {
    "gemv-32": Gemv(4, 32),
    "gemv-64": Gemv(4, 64),
    "gemv-row": Gemv(4, -1),
    "gemv-fast-32": LlmAwq(4, 32),
    "gemv-fast-row": LlmAwq(4, -1),
    "gptqmodel-gemv-fast": LlmAwq(4, 64, offsets="qzeros"),
}


def load(directory, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def fast(pack, float_llama):
    """A checkpoint as AutoAWQ writes GEMV_FAST."""
    return pack(float_llama, LlmAwq(4, 32))[0]


@pytest.fixture(scope="module")
def gemm(pack, float_llama):
    """The same numbers in GEMM."""
    return pack(float_llama, Gemm(4, 32))[0]


def same_tensors(directory, other):
    saved, original = (load_file(path / "model.safetensors") for path in (directory, other))
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        assert saved[name].dtype is tensor.dtype
        assert torch.equal(saved[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_logits_are_those_in_gemm_and_saving_changes_no_bit(plugin, pack, float_llama, layout, tmp_path):
    packed, _ = pack(float_llama, layout)
    model = load(packed)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert len(layers) == 14
    assert all(layer.prepared and layer.layout == layout for layer in layers)
    wanted = logits(load(pack(float_llama, Gemm(4, layout.group_size))[0]))
    assert torch.equal(logits(model), wanted)

    load(packed, torch.float16).save_pretrained(tmp_path)
    same_tensors(tmp_path, packed)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in layout.config(None)} == layout.config(None)
    assert torch.equal(logits(load(tmp_path)), wanted)


@pytest.mark.parametrize("kind", [Gemm, Gemv, LlmAwq], ids=["first", "tinychat", "tinychat-2"])
@pytest.mark.parametrize("said", [{"version": "llm-awq"}, {"version": "gemm", "backend": "llm-awq"}], ids=str)
def test_the_layouts_of_llm_awq_are_told_apart_by_their_tensors(
    plugin, pack, float_llama, edited, gemm, kind, said, tmp_path
):
    packed = pack(float_llama, kind(4, 32))[0]
    model = load(edited(packed, lambda config: config.update(said)))
    assert type(model.get_submodule(UP).layout) is kind
    assert torch.equal(logits(model), logits(load(gemm)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def as_pickle(file):
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


@pytest.mark.parametrize("offsets", ["scaled_zeros", "qzeros"])
def test_pickled_files_are_told_apart_by_their_tensors_too(plugin, pack, float_llama, edited, gemm, offsets):
    packed = pack(float_llama, LlmAwq(4, 32, offsets=offsets))[0]
    model = load(edited(packed, file=as_pickle))
    assert model.get_submodule(UP).layout.offsets == offsets
    assert torch.equal(logits(model), logits(load(gemm)))


def test_a_truncated_pickle_is_refused_by_name(plugin, fast, edited):
    directory = edited(fast, file=as_pickle)
    file = directory / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a whole file of tensors"):
        load(directory)


def test_scales_in_bfloat16_give_the_same_zero_points(plugin, fast, edited):
    """Rounded to bfloat16, scaled zero points are multiples of their scales only to the precision of bfloat16."""

    def round_all(tensors):
        for name, tensor in tensors.items():
            if name.endswith((".scales", ".scaled_zeros")):
                tensors[name] = tensor.bfloat16()

    found, wanted = load(edited(fast, tensors=round_all)), load(fast)
    for name, layer in wanted.named_modules():
        if isinstance(layer, PackedLinear):
            rounded = found.get_submodule(name)
            assert torch.equal(rounded.words, layer.words)
            assert torch.equal(rounded.group_zeros, layer.group_zeros)
            assert torch.equal(rounded.group_scales, layer.group_scales.bfloat16().half())


def test_a_block_may_stay_on_disk(plugin, fast, gemm, tmp_path):
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = load(fast, device_map=places, offload_folder=tmp_path, offload_buffers=True)
    assert {buffer.device.type for buffer in model.get_submodule(UP).buffers()} == {"meta"}
    assert torch.equal(logits(model), logits(load(gemm)))


def replace(part, change):
    def edit(tensors):
        tensors[f"{UP}.{part}"] = change(tensors[f"{UP}.{part}"]).contiguous()

    return edit


BAD = [
    pytest.param({"zero_point": False}, None, "zero_point = False, expected True", id="symmetric"),
    pytest.param({"bits": 8}, None, "bits = 8, but llm-awq has 4", id="8-bits"),
    pytest.param({"group_size": 16}, None, "group size 16, but the layout has 32, 64 and", id="group-16"),
    pytest.param({"group_size": 64}, None, r"scales is float16 \(32, \d+\), but .* group size 64", id="group-64"),
    pytest.param({"version": "gemv"}, None, "qweight is int16", id="gemv"),
    pytest.param({"version": "gemm"}, None, r"down_proj: K = 16 is no multiple of group size 32", id="gemm"),
    pytest.param(None, replace("scaled_zeros", lambda t: t + 0.01), rf"{UP}: scaled_zeros\[0, 0\] = ", id="no-integer"),
    pytest.param(None, replace("scaled_zeros", torch.Tensor.float), rf"{UP}: scaled_zeros is float32", id="float32"),
    pytest.param(None, replace("scales", lambda t: t[:8]), rf"{UP}: scales is float16 \(8, 128\)", id="unpadded"),
    pytest.param(None, lambda t: t.pop(f"{UP}.scaled_zeros"), rf"{UP}: scaled_zeros is missing", id="missing"),
]


@pytest.mark.parametrize(("config", "tensors", "message"), BAD)
def test_what_does_not_fit_is_refused_by_name(plugin, fast, edited, config, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        load(edited(fast, config and (lambda settings: settings.update(config)), tensors))
