"""Generate text from an AutoAWQ checkpoint with vLLM's offline engine on kernelgraft's kernels.

    python examples/vllm/serve_awq.py DIR
    python examples/vllm/serve_awq.py DIR --prompt "Name three rivers." --max-tokens 64

DIR is any AutoAWQ checkpoint in GEMM layout, e.g. one written by ``kernelgraft quantize``. The same engine behind an
OpenAI-compatible server is ``vllm serve DIR --quantization kernelgraft_awq``.
"""

from __future__ import annotations

import argparse
import time

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="DIR")
    parser.add_argument("--prompt", action="append", help="may be given more than once; all run in one batch")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model: slower to start")
    arguments = parser.parse_args()
    prompts = arguments.prompt or ["What is the capital of France?"]

    # Nothing of kernelgraft is imported: vLLM finds the plugin by its entry point, the user only names the method.
    llm = LLM(
        model=arguments.checkpoint,
        quantization="kernelgraft_awq",
        max_model_len=arguments.max_model_len,
        enforce_eager=not arguments.compile,
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    started = time.perf_counter()
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=arguments.max_tokens))
    seconds = time.perf_counter() - started

    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"\n> {prompt}\n{output.outputs[0].text.strip()}")
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"\n{tokens} tokens in {seconds:.1f} s")


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
