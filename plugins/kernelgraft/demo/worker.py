"""A process that serves one model: ``python -m kernelgraft.demo.worker --engine vllm --model DIR``.

Requests come as lines of JSON on stdin, answers go as lines of JSON to stdout, everything that hosts print to stderr. A
process of its own is what makes a model's memory measurable. The first line tells that the model is loaded; when stdin
ends, the last line tells the most memory that was in use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO

from kernelgraft.builtin import PLUGIN_OF_METHOD

FOUR_BITS = "int4_per_token_head"


class Engine(Protocol):
    """A host with a model in it. ``generate`` decodes greedily, at least and at most ``limits`` tokens."""

    def generate(self, prompt: list[int], limits: tuple[int, int]) -> list[int]: ...

    def modules(self) -> dict[str, Any]: ...


class TransformersEngine:
    """``AutoModelForCausalLM`` in the dtype of the checkpoint."""

    def __init__(self, model: str, quantization: str | None, cache: str | None, context: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import kernelgraft

        self._cache: Any = None
        if quantization:
            plugin = kernelgraft.load_plugin(PLUGIN_OF_METHOD[quantization], host="transformers")
            self._cache = plugin.QoQCache if cache == FOUR_BITS else None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(self._device).eval()

    def generate(self, prompt: list[int], limits: tuple[int, int]) -> list[int]:
        import torch

        ids = torch.tensor([prompt], device=self._device)
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=limits[0],
                max_new_tokens=limits[1],
                pad_token_id=self._model.generation_config.pad_token_id or 0,
                past_key_values=self._cache(self._model.config) if self._cache else None,
            )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    def modules(self) -> dict[str, Any]:
        from kernelgraft_core.quant.packed_linear import PackedLinear

        ours = sum(isinstance(module, PackedLinear) for module in self._model.modules())
        return {"weight_bytes": _weight_bytes(self._model), "grafted_layers": ours}


class VllmEngine:
    """vLLM's offline engine in this process, eager. kernelgraft is not imported: vLLM finds the plugin itself."""

    def __init__(self, model: str, quantization: str | None, cache: str | None, context: int) -> None:
        import torch
        from vllm import LLM

        # On a GPU vLLM takes most of the memory unless told otherwise, and two models are served side by side.
        share: dict[str, Any] = {"gpu_memory_utilization": 0.3} if torch.cuda.is_available() else {}
        if cache:
            share["kv_cache_dtype"] = cache
        self._engine = LLM(
            model=model,
            quantization=quantization,
            max_model_len=context,
            max_num_seqs=4,
            enforce_eager=True,
            disable_log_stats=True,
            **share,
        )

    def generate(self, prompt: list[int], limits: tuple[int, int]) -> list[int]:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, min_tokens=limits[0], max_tokens=limits[1])
        (output,) = self._engine.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def modules(self) -> dict[str, Any]:
        found: dict[str, Any] = self._engine.apply_model(_look_into_vllm)[0]
        cache = self._engine.llm_engine.vllm_config.cache_config
        return found | {"cached_tokens": cache.num_gpu_blocks * cache.block_size}


def _look_into_vllm(model: Any) -> dict[str, Any]:
    from kernelgraft_vllm.awq_linear import KernelgraftAWQLinearMethod
    from kernelgraft_vllm.qoq_linear import KernelgraftQoQLinearMethod

    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    ours = sum(isinstance(method, KernelgraftAWQLinearMethod | KernelgraftQoQLinearMethod) for method in methods)
    return {"weight_bytes": _weight_bytes(model) + _packed_away(model), "grafted_layers": ours}


def _packed_away(model: Any) -> int:
    """Bytes of weights that vLLM has given to oneDNN on a CPU, where nothing lists them: their parameters are empty."""
    layers = (module for module in model.modules() if hasattr(module, "input_size_per_partition"))
    empty = (layer for layer in layers if getattr(layer, "weight", None) is not None and not layer.weight.numel())
    return sum(
        layer.input_size_per_partition * layer.output_size_per_partition * layer.weight.element_size()
        for layer in empty
    )


def _weight_bytes(model: Any) -> int:
    """Parameters and buffers, tied ones once."""
    tensors: Iterable[Any] = (*model.parameters(), *model.buffers())
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())


ENGINES: dict[str, type[TransformersEngine] | type[VllmEngine]] = {
    "transformers": TransformersEngine,
    "vllm": VllmEngine,
}


def peak_bytes() -> int:
    """Most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent had when it started this process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--quantization", choices=("kernelgraft_awq", "qoq"), help="the method to name to vLLM")
    parser.add_argument("--cache", choices=(FOUR_BITS,), help="the type of the key-value cache, as vLLM calls it")
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    replies = _take_stdout()
    started = time.perf_counter()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    engine: Engine = ENGINES[options.engine](options.model, options.quantization, options.cache, options.context)
    _send(replies, load_seconds=time.perf_counter() - started, **engine.modules())
    for line in sys.stdin:
        request = json.loads(line)
        prompt = _encode(tokenizer, request["question"])
        started = time.perf_counter()
        tokens = engine.generate(prompt, (request["least"], request["most"]))
        seconds = time.perf_counter() - started
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        _send(replies, text=text, tokens=len(tokens), prompt_tokens=len(prompt), seconds=seconds)
    _send(replies, peak_bytes=peak_bytes(), peak_gpu_bytes=_peak_gpu_bytes())


def _encode(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a question, in the form of a chat where the model has one."""
    if not tokenizer.chat_template:
        plain: list[int] = tokenizer(question).input_ids
        return plain
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _peak_gpu_bytes() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _take_stdout() -> TextIO:
    """Keep stdout for answers; whatever else writes to it, libraries in C included, writes to stderr from now on."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return replies


def _send(replies: TextIO, **answer: Any) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
