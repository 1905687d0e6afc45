"""Quantize a large model on a small machine: memory, time, and the same bytes after being killed again and again.

python -m benchmarks.quantize_large --out benchmarks/results/quantize-large-<machine>-<date>.json

Makes a random Llama of the shape of Llama-2-7B (hidden 4096, inner 11008, bfloat16 shards on disk; --layers for fewer
blocks), quantizes it with AWQ in a process of its own, then once more in a process that is killed with SIGKILL at
random moments and started again. Reports the largest resident set of any of these processes beside the size of one
block, and whether both checkpoints are the same byte for byte. The weights are random: nothing is said about quality.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kernelgraft_core.runtime.timing import environment

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
VOCABULARY = 32000

WORKER = """
import json, sys
from pathlib import Path
from kernelgraft_transformers.quantize import load_source, quantize_checkpoint
from kernelgraft_transformers.texts import Calibration

source, out, text, samples, length, settings = sys.argv[1:]
quantize_checkpoint(
    load_source(source), Path(out), Path(text).read_text(), group_size=128, overwrite=True, offload=True,
    calibration=Calibration(int(samples), int(length)), settings=json.loads(settings),
    on_block=lambda r: print(f"block {r.index + 1} of {r.count}", flush=True),
)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where models go: 4 bytes a parameter are needed")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--scale-points", type=int, default=20)
    parser.add_argument("--clip-steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments of death")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    source, text = given.work / "source", given.work / "text.txt"
    make_model(source, given.layers)
    text.write_text(" ".join(f"w{i * 7919 % VOCABULARY}" for i in range(4 * given.length)))
    settings = {"scale_points": given.scale_points, "clip_steps": given.clip_steps}

    def command(out: Path) -> list[str]:
        arguments = [source, out, text, given.samples, given.length, json.dumps(settings)]
        return [sys.executable, "-c", WORKER, *map(str, arguments)]

    whole, broken = given.work / "whole", given.work / "broken"
    started = time.perf_counter()
    code, peak = watch(command(whole), None)
    seconds = time.perf_counter() - started
    if code:
        sys.exit(f"quantizing failed with exit code {code}")
    draw = random.Random(given.seed)
    kills = 0
    shutil.rmtree(broken, ignore_errors=True)
    shutil.rmtree(given.work / ".broken.quantizing", ignore_errors=True)
    while True:
        # Long enough to get somewhere on average, spread over everything that a run does.
        limit = draw.uniform(0, 2.2 * seconds / given.kills) if kills < given.kills else None
        code, held = watch(command(broken), limit)
        peak = max(peak, held)
        if code == 0:
            break
        if limit is None:
            sys.exit(f"resuming failed with exit code {code}")
        kills += 1
        print(f"killed {kills} times", flush=True)
    block = block_bytes()
    same = digest(whole) == digest(broken)
    result: dict[str, Any] = {
        "schema": 1,
        "benchmark": "quantize_large",
        "env": environment(),
        "model": SHAPE | {"layers": given.layers, "weights": "random, bfloat16"},
        "settings": settings | {"samples": given.samples, "length": given.length, "group_size": 128},
        "seconds": round(seconds, 1),
        "seconds_per_block": round(seconds / given.layers, 1),
        "block_bytes_float32": block,
        "peak_rss_bytes": peak,
        "beyond_one_block_bytes": peak - block,
        "kills": kills,
        "same_bytes": same,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "env"}, indent=1))
    if given.out:
        fresh = given.out.with_suffix(".partial")
        fresh.write_text(json.dumps(result, indent=1))
        os.replace(fresh, given.out)
    if not same:
        sys.exit("the two checkpoints differ")


def watch(command: list[str], limit: float | None) -> tuple[int, int]:
    """Run a command, killed after ``limit`` seconds: its exit code and the largest resident set in bytes."""
    process = subprocess.Popen(command)
    started, peak = time.perf_counter(), 0
    while process.poll() is None:
        peak = max(peak, _high_water(process.pid))
        if limit is not None and time.perf_counter() - started > limit:
            process.kill()
        time.sleep(0.05)
    return process.wait(), peak


def _high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(found[0]) * 1024 if found else 0


def block_bytes() -> int:
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    return 4 * (4 * hidden * hidden + 3 * hidden * inner + 2 * hidden)


def digest(directory: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.name != "kernelgraft.json":  # it holds the time that was taken
            found.update(file.name.encode())
            with open(file, "rb") as handle:
                found.update(hashlib.file_digest(handle, "sha256").digest())
    return found.hexdigest()


def make_model(directory: Path, layers: int) -> None:
    """A random Llama with a shard for every block, made one block at a time; nothing is done when it is there."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    if (directory / "model.safetensors.index.json").is_file():
        found = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
        if found != layers:
            sys.exit(f"{directory} holds a model of {found} layers; take another --work")
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        **SHAPE, num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.save_pretrained(directory)
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]

    def random_weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    def random_norm() -> torch.Tensor:
        norm = torch.rand(hidden, generator=generator).add_(0.5)
        norm[:: hidden // 8] *= 10  # a few channels are large, as they are in real models
        return norm.bfloat16()

    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for index in range(layers):
        prefix = f"model.layers.{index}."
        attention = {f"{prefix}self_attn.{name}_proj.weight": random_weight(hidden, hidden) for name in "qkvo"}
        mlp = {f"{prefix}mlp.{name}_proj.weight": random_weight(inner, hidden) for name in ("gate", "up")}
        mlp[f"{prefix}mlp.down_proj.weight"] = random_weight(hidden, inner)
        norms = {f"{prefix}{name}_layernorm.weight": random_norm() for name in ("input", "post_attention")}
        save(index + 1, attention | mlp | norms)
    around = {"model.embed_tokens.weight": random_weight(VOCABULARY, hidden)}
    around |= {"lm_head.weight": random_weight(VOCABULARY, hidden), "model.norm.weight": random_norm()}
    save(layers + 1, around)
    index_file = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))


if __name__ == "__main__":
    main()
