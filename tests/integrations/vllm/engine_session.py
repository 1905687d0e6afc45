"""vLLM engines, one after the other in this process, and what each was seen to do, as JSON.

``python engine_session.py RUNS RESULTS``. RUNS is a list of ``{"engine": arguments of LLM, "requests": [{"prompts":
lists of tokens, "adapter": directory or null, "new_tokens": how many to generate}]}``; the tests run it as a process of
its own.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NEW_TOKENS = 8


class _CountOps(TorchDispatchMode):
    """Counts the calls of our ops by name and shape of the packed weight, below everything vLLM does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kernelgraft":
            weight = args[3][0] if "experts" in str(func) else args[1]
            self.calls[f"{func.overloadpacket.__name__} {'x'.join(map(str, weight.shape))}"] += 1
        return func(*args, **(kwargs or {}))


def _run(engine: dict[str, Any], requests: list[dict[str, Any]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    unnamed = EngineArgs(model=engine["model"], enforce_eager=True).create_model_config().quantization
    preempted = _watch_preemptions()
    small = {"enforce_eager": True, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 4}
    llm = LLM(**small | engine)
    cache = llm.llm_engine.vllm_config.cache_config
    seen: dict[str, Any] = {
        "method_unless_named": unnamed,
        "method": llm.llm_engine.model_config.quantization,
        "layers": llm.apply_model(_methods)[0],
        "attention": llm.apply_model(_attention)[0],
        "cached_tokens": cache.num_gpu_blocks * cache.block_size,
        "requests": [],
    }
    for number, request in enumerate(requests, 1):
        adapter = request.get("adapter")
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        lora = LoRARequest(f"adapter-{number}", number, adapter) if adapter else None
        limit = request.get("new_tokens", NEW_TOKENS)
        greedy = SamplingParams(temperature=0, max_tokens=limit, logprobs=5, ignore_eos=True)
        preempted.clear()
        with _CountOps() as counted:
            outputs = llm.generate(prompts, greedy, lora_request=lora, use_tqdm=False)
        completions = [output.outputs[0] for output in outputs]
        seen["requests"].append(
            {
                "tokens": [list(completion.token_ids) for completion in completions],
                "text": [completion.text for completion in completions],
                "logprobs": [
                    [{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs]
                    for completion in completions
                ],
                "cached": [output.num_cached_tokens for output in outputs],
                "calls": dict(counted.calls),
                "preempted": [
                    [tokens for name, tokens in preempted if name.partition("-")[0] == output.request_id]
                    for output in outputs
                ],
            }
        )
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    # vLLM looks for its Triton kernels in every loaded module, which fails at llvmlite's, loaded by our first product.
    # The first engine has replaced them for this process.
    type(current_platform).register_triton_kernel_overrides = staticmethod(lambda: None)
    return seen


def _watch_preemptions() -> list[tuple[str, int]]:
    """Of each request that gives up its place in the cache from now on, the name, and how many tokens it had."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen: list[tuple[str, int]] = []
    original = getattr(Scheduler._preempt_request, "original", Scheduler._preempt_request)

    def preempt(self, request, *args, **kwargs):
        seen.append((request.request_id, request.num_tokens))
        return original(self, request, *args, **kwargs)

    preempt.original = original
    Scheduler._preempt_request = preempt
    return seen


def _attention(model: torch.nn.Module) -> dict[str, str]:
    return {name: type(module.impl).__name__ for name, module in model.named_modules() if hasattr(module, "impl")}


def _methods(model: torch.nn.Module) -> dict[str, str]:
    return {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    }


def main(runs: str, results: str) -> None:
    seen = [_run(**run) for run in json.loads(Path(runs).read_text())]
    Path(results).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
