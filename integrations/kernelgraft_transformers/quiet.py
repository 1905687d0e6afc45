"""Transformers without its progress bars and advice, for commands that show progress of their own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, only errors are shown; afterwards everything is as it was."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    gguf_bar = getattr(gguf, "tqdm", None)  # the one bar that does not ask logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if gguf_bar is not None:
        gguf.tqdm = logging.EmptyTqdm
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if gguf_bar is not None:
            gguf.tqdm = gguf_bar
