"""Texts as token ids: calibration samples and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Which part of a text calibrates: ``samples`` sequences of ``length`` tokens, drawn with ``seed``."""

    samples: int = 64
    length: int = 512
    seed: int = 0

    def draw(self, tokens: Tensor, name: str) -> list[Tensor]:
        """Batches ``(1, length)`` of a token stream ``(T,)``; starts are uniform, so samples overlap in a short text.

        Raises:
            ValueError: the stream is shorter than one sample, or a number is not positive.
        """
        if self.samples < 1 or self.length < 2:
            raise ValueError(
                f"calibration wants {self.samples} samples of {self.length} tokens; at least 1 and 2 are needed"
            )
        if len(tokens) < self.length:
            raise ValueError(f"{name} has {len(tokens)} tokens; one calibration sample is {self.length} tokens long")
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(0, len(tokens) - self.length + 1, (self.samples,), generator=generator)
        return [tokens[start : start + self.length].unsqueeze(0) for start in starts.tolist()]


def read_text(path: Path) -> str:
    """A text file as UTF-8.

    Raises:
        ValueError: the file is empty or is not text; OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def encode(tokenizer: Any, text: str) -> Tensor:
    """All tokens of a text in one stream, int64 ``(T,)``, special tokens as the tokenizer adds them."""
    # verbose=False: the stream is cut into windows, so its being longer than the model's context is no news.
    tokens: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return tokens


@torch.no_grad()
def perplexity(
    model: Any,
    tokens: Tensor,
    *,
    window: int = 512,
    windows: int | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
) -> float:
    """``exp`` of the mean negative log-likelihood over disjoint windows; the first token of each is not predicted.

    Args:
        model: a causal language model of Transformers.
        tokens: ``(T,)`` int64.
        window: tokens per window, at least 2.
        windows: only the first so many, at least 1; all whole windows by default.
        on_window: called with the number done, the number in all and the perplexity so far.

    Raises:
        ValueError: the text is shorter than one window, or a number is too small.
    """
    if window < 2 or (windows is not None and windows < 1):
        raise ValueError(f"perplexity wants {windows} windows of {window} tokens; at least 1 and 2 are needed")
    count = len(tokens) // window
    if count == 0:
        raise ValueError(f"the text has {len(tokens)} tokens; perplexity needs one window of {window}")
    count = count if windows is None else min(count, windows)
    total = 0.0
    for done, ids in enumerate(tokens[: count * window].view(count, 1, window).to(model.device), 1):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
        if on_window is not None:
            on_window(done, count, math.exp(total / done))
    return math.exp(total / count)
