"""device_map with packed layers: on one device, with blocks left on disk, and what generation streams."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from kernelgraft_core.quant.packed_linear import PackedLinear

pytest.importorskip("accelerate")

IDS = torch.arange(3, 27).unsqueeze(0)
BLOCK_ON_DISK = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"], ids=str)
def test_a_model_on_one_device_is_the_same(plugin, quantized, device_map):
    model = load(quantized.directory, device_map=device_map)
    assert all(layer.prepared for layer in model.modules() if isinstance(layer, PackedLinear))
    assert torch.equal(logits(model), logits(load(quantized.directory)))


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_block_may_stay_on_disk(plugin, quantized, tmp_path, offload_buffers):
    model = load(
        quantized.directory, device_map=BLOCK_ON_DISK, offload_folder=tmp_path, offload_buffers=offload_buffers
    )
    wanted = logits(load(quantized.directory))
    for _ in range(2):
        assert torch.equal(logits(model), wanted)
    devices = {buffer.device.type for buffer in model.model.layers[1].mlp.buffers()}
    assert devices == ({"meta"} if offload_buffers else {"cpu"})


def test_generated_text_is_streamed(plugin, quantized):
    model, tokenizer = load(quantized.directory), AutoTokenizer.from_pretrained(quantized.directory)
    prompt = tokenizer("w5 w17 w30 w2", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**prompt, **options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    whole = model.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :]
    assert "".join(pieces).split() == tokenizer.decode(whole).split()
    assert len(pieces) > 4
