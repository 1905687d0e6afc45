"""Linear layers of rows: every backend equals a product in float64, for rows of any number and layout."""

import pytest
import torch

from kernelgraft_core.point_attention.linear import examples
from kernelgraft_core.point_attention.linear.ops import ROW_LINEAR
from kernelgraft_core.runtime.testing import assert_close, poison_empty

RATIO = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["cpu", "torch", "reference"])
def backend(request, monkeypatch):
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("KERNELGRAFT_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("dtype", RATIO, ids=["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "channels"), [(1, 1, 1), (192, 128, 384), (205, 37, 70), (95, 64, 64)], ids=str
)
def test_is_a_product(rows, depth, channels, biased, dtype, backend):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the reference's")
    wide = torch.randn(rows, depth + 9).to(dtype)
    x, weight = wide[:, 3 : 3 + depth], torch.randn(depth, channels).to(dtype).T
    bias = torch.randn(channels).to(dtype) if biased else None
    with poison_empty():
        found = ROW_LINEAR(x, weight, bias)
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert found.is_contiguous()
    assert_close("y", wanted, found, RATIO[dtype])


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_nothing_to_multiply(shape, backend):
    rows, depth, channels = shape
    bias = torch.randn(channels)
    found = ROW_LINEAR(torch.zeros(rows, depth), torch.zeros(channels, depth), bias)
    assert torch.equal(found, bias.expand(rows, channels))


def test_threads_do_not_change_the_result():
    pytest.importorskip("numba")
    x, weight, before, found = torch.randn(500, 128), torch.randn(256, 128), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ROW_LINEAR(x, weight, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_it_is_a_sound_op():
    args = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    torch.library.opcheck(ROW_LINEAR._overload, args, test_utils=("test_schema", "test_faketensor"))
    (args,) = examples.example_args("cpu", dtype=torch.float32).values()
    assert ROW_LINEAR(*args).isfinite().all()
