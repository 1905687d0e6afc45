"""Generate with an AWQ checkpoint on kernelgraft's kernels.

python examples/transformers/generate_awq.py ./SmolLM2-awq "What is the capital of France?"
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import kernelgraft

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("model", help="directory or hub name of an AutoAWQ GEMM checkpoint")
arguments.add_argument("question")
arguments.add_argument("--tokens", type=int, default=64)
given = arguments.parse_args()

with kernelgraft.load_plugin("awq"):
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(given.model)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": given.question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
model.generate(
    **prompt.to(model.device),
    max_new_tokens=given.tokens,
    do_sample=False,
    streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
)
