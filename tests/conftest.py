"""What every test gets: fixed seeds and threads, cache directories of its own, and poisoned memory for the kernels."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from kernelgraft_core.runtime import testing

KERNEL_TESTS = Path(__file__).parent / "kernelgraft_core"


@pytest.fixture(scope="session", autouse=True)
def own_cache_directories(tmp_path_factory):
    """Nothing a test compiles, measures or remembers touches the user's files, nor depends on them."""
    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELGRAFT_CACHE_DIR", str(root / "kernelgraft"))
        patch.setenv("TRITON_CACHE_DIR", str(root / "triton"))
        patch.delenv("KERNELGRAFT_BACKEND", raising=False)
        patch.delenv("KERNELGRAFT_PLANS", raising=False)
        yield root


@pytest.fixture(autouse=True)
def reproducible(request):
    """Seeded generators, and the session's number of threads again after a test that changes it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    # Kernels must not read memory they never wrote; hosts are not ours to test for that.
    poisoned = KERNEL_TESTS in request.path.parents
    with testing.poison_empty() if poisoned else contextlib.nullcontext():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng():
    return testing.rng()


@pytest.fixture(scope="session")
def float_llama(tmp_path_factory):
    """A directory with a random Llama of two blocks in float16 and a tokenizer of the words w0 to w95."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = ["<s>", "</s>", "<unk>", *(f"w{index}" for index in range(96))]
    splitter = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.125,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[[3, 40]] = 12  # a few channels are large, as they are in real models
    directory = tmp_path_factory.mktemp("float_llama")
    model.half().save_pretrained(directory)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitter, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def words():
    """Two thousand words that the tokenizer of ``float_llama`` knows."""
    indices = torch.randint(0, 96, (2000,), generator=testing.rng())
    return " ".join(f"w{index}" for index in indices.tolist())


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_configure():
    # Two threads show what one hides, and more would only wait for each other on a small machine.
    torch.set_num_threads(min(2, os.cpu_count() or 1))
