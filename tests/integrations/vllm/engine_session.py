"""Run by test_engine.py in a process of its own: start vLLM once, look at everything, write what was seen as JSON.

``python engine_session.py AWQ_CHECKPOINT DEQUANTIZED_CHECKPOINT RESULT``
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PROMPTS = [[3, 5, 7, 11], [200, 13, 13, 90, 41, 2, 77]]
NEW_TOKENS = 8


class _CountLinears(TorchDispatchMode):
    """Counts the calls of our op by shape of the weight, ``KxN``, below everything vLLM does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.kernelgraft.w4a16_linear.default:
            words = args[1]
            self.calls[f"{words.shape[1] * 8}x{words.shape[0]}"] += 1
        return func(*args, **(kwargs or {}))


def main(checkpoint: str, dequantized: str, result: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    seen: dict[str, Any] = {}
    seen["method_unless_named"] = EngineArgs(model=checkpoint, enforce_eager=True).create_model_config().quantization

    llm = LLM(
        model=checkpoint,
        quantization="kernelgraft_awq",
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
    )
    seen["method_when_named"] = llm.llm_engine.model_config.quantization
    seen["methods"] = llm.apply_model(_methods)[0]

    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=5, ignore_eos=True)
    with _CountLinears() as counted:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy)
    seen["calls"] = dict(counted.calls)
    seen["text"] = outputs[0].outputs[0].text
    seen["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
    seen |= _compare(dequantized, [output.outputs[0] for output in outputs])
    Path(result).write_text(json.dumps(seen))


def _methods(model: torch.nn.Module) -> dict[str, str]:
    return {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    }


def _compare(dequantized: str, completions: list[Any]) -> dict[str, Any]:
    """Log-probabilities against the same weights as a float32 model of Transformers, token by token."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(dequantized, dtype=torch.float32)
    worst, greedy, margins = 0.0, [], []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokens = list(completion.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for row, found in zip(expected, completion.logprobs, strict=True):
            worst = max(worst, *(abs(row[token].item() - entry.logprob) for token, entry in found.items()))
        best = expected.topk(2).values
        margins.append((best[:, 0] - best[:, 1]).min().item())
        greedy.append(expected.argmax(-1).tolist())
    return {"worst_logprob_error": worst, "greedy_of_reference": greedy, "smallest_margin": min(margins)}


if __name__ == "__main__":
    main(*sys.argv[1:])
