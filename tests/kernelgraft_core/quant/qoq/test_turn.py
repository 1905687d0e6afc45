"""Changes of basis: orthogonal, spread over all channels, and such that norms commute with them."""

import pytest
import torch

from kernelgraft_core.quant.qoq.hadamard import hadamard
from kernelgraft_core.quant.qoq.turn import Turn
from kernelgraft_core.runtime import testing

WIDTHS = [1, 2, 4, 12, 32, 48, 576, 768, 1536]


def matrix(turn):
    return turn.rows(torch.eye(turn.width, dtype=torch.float64))


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=testing.rng(1))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_turn_is_orthogonal(width, centred):
    q = matrix(Turn(width, centred=centred))
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    if not centred:
        torch.testing.assert_close(q, hadamard(width), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_centred_turn_keeps_the_mean_of_every_row(width):
    x = normal(5, width) + 3
    torch.testing.assert_close(Turn(width, centred=True).rows(x).mean(-1), x.mean(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [576, 768, 1536, 4096])
def test_an_outlier_is_spread_over_all_channels(width):
    for centred in (False, True):
        x = torch.zeros(8, width, dtype=torch.float64)
        x[torch.arange(8), torch.randint(width, (8,))] = width**0.5
        assert Turn(width, centred=centred).rows(x).abs().max() < 2


@pytest.mark.parametrize("centred", [False, True])
def test_norms_commute_with_turns(centred):
    turn, x = Turn(96, centred=centred), normal(7, 96) + 1
    norm = (torch.nn.LayerNorm if centred else torch.nn.RMSNorm)(96, dtype=torch.float64)
    torch.testing.assert_close(norm(turn.rows(x)), turn.rows(norm(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_columns_are_turned_by_the_transpose(centred):
    turn, w = Turn(48, centred=centred), normal(48, 10)
    torch.testing.assert_close(turn.columns(w), matrix(turn).T @ w, rtol=1e-12, atol=1e-12)
    assert turn.columns(w).is_contiguous()


@pytest.mark.parametrize("shape", [(3, 2, 16), (16,), (0, 16), (9000, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shapes_and_dtypes_stay(shape, dtype):
    """Whatever the dtype, the arithmetic is in float64."""
    x = normal(*shape, dtype=torch.float64).to(dtype)
    turned = Turn(16, centred=True).rows(x)
    assert turned.shape == shape
    assert torch.equal(turned, Turn(16, centred=True).rows(x.double()).to(dtype))


def test_a_width_without_hadamard_matrix_is_refused():
    with pytest.raises(ValueError, match="no Hadamard matrix of order 10"):
        Turn(10)
