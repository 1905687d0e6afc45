"""What a quantization holds in memory does not grow with the number of blocks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).with_name("peak_memory.py")
FEW, MANY = 2, 24


def peak(float_llama, directory, blocks):
    """Bytes at most, and bytes of a block in float32."""
    config = LlamaConfig(
        vocab_size=99, hidden_size=512, intermediate_size=1408, num_hidden_layers=blocks, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).half()
    model.save_pretrained(directory / "source", max_shard_size="50MB")
    AutoTokenizer.from_pretrained(float_llama).save_pretrained(directory / "source")
    command = [sys.executable, str(SCRIPT), str(directory / "source"), str(directory / "out")]
    # One arena: what threads of the host free goes back to the system instead of staying with each of them.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    return int(done.stdout.split()[-1]) << 10, size


@pytest.mark.slow
def test_one_block_at_a_time_is_in_memory(float_llama, tmp_path):
    torch.manual_seed(0)
    found = {}
    for blocks in (FEW, MANY):
        directory = tmp_path / str(blocks)
        directory.mkdir()
        found[blocks], block = peak(float_llama, directory, blocks)
    growth = found[MANY] - found[FEW]
    # A quarter of the source's 16-bit files, were they all mapped at once; a ninth of the model in float32.
    assert growth < 2.5 * block, f"{growth >> 20} MiB more for {MANY - FEW} blocks of {block >> 20} MiB"
