"""Points to voxels and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelgraft_core.sparse.voxels import devoxelize, voxelize


def by_definition(points, feats, size, low, batch):
    found = {}
    for point, feat, b in zip(points.tolist(), feats, batch.tolist(), strict=True):
        site = (b, *(int((p - c) // s) for p, c, s in zip(point, low, size, strict=True)))
        found.setdefault(site, []).append(feat)
    return {site: torch.stack(rows).mean(0) for site, rows in found.items()}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.integers(1, 60), st.integers(1, 3))
def test_voxels_are_means_of_their_points(seed, count, dimensions):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, dimensions, generator=generator, dtype=torch.float64) * 5 + 0.25
    feats = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    batch = torch.randint(0, 3, (count,), generator=generator)
    size = [0.5, 0.25, 1.0][:dimensions]
    x, rows = voxelize(points, feats, size, [0.0] * dimensions, [6.0] * dimensions, batch, 3)
    wanted = by_definition(points, feats, size, [0.0] * dimensions, batch)
    assert sorted(wanted) == [tuple(row) for row in x.coords.tolist()]
    for site, feat in zip(x.coords.tolist(), x.feats, strict=True):
        torch.testing.assert_close(feat, wanted[tuple(site)])
    sites = torch.cat((batch[:, None], torch.floor(points / torch.tensor(size)).long()), 1)
    assert torch.equal(x.coords[rows].long(), sites)
    assert x.spatial_shape == tuple(int(6 / s) for s in size)
    assert torch.equal(devoxelize(x, points / torch.tensor(size), batch, nearest=True), x.feats[rows])


def test_points_outside_are_left_out_and_the_box_is_found():
    points = torch.tensor([[0.1, 0.1], [-0.1, 0.1], [0.9, 0.95], [1.0, 0.5], [0.05, 0.12]])
    feats = torch.arange(5.0).unsqueeze(1).requires_grad_()
    x, rows = voxelize(points, feats, 0.5, (0, 0), (1, 1))
    assert rows.tolist() == [0, -1, 1, -1, 0]
    assert x.feats.flatten().tolist() == [2.0, 2.0]
    x.feats.sum().backward()
    assert feats.grad.flatten().tolist() == [0.5, 0, 1, 0, 0.5]
    whole, rows = voxelize(points, feats.detach(), 0.5)
    assert (rows >= 0).all()
    assert whole.coords.amin(0).tolist() == [0, 0, 0]
    none, _ = voxelize(points, feats, 0.5, (5, 5), (6, 6))
    assert none.feats.shape == (0, 1)
    assert none.batch_size == 1


def test_values_between_centres_are_linear():
    """Features that are a linear function of the site are met exactly inside, and gradients are the weights."""
    sites = torch.cartesian_prod(*[torch.arange(5)] * 3).double()
    centres = sites + 0.5
    feats = (centres @ torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64) + 7).requires_grad_()
    x, _ = voxelize(centres, feats, 1.0, (0, 0, 0), (5, 5, 5))
    points = torch.rand(50, 3, dtype=torch.float64) * 4 + 0.5
    found = devoxelize(x, points)
    torch.testing.assert_close(found, points @ torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64) + 7)
    found.sum().backward()
    torch.testing.assert_close(feats.grad.sum(), torch.tensor(50.0, dtype=torch.float64))
    lonely, _ = voxelize(centres[:1], feats[:1].detach(), 1.0, (0, 0, 0), (5, 5, 5))
    torch.testing.assert_close(devoxelize(lonely, centres[:1] + 0.3), feats[:1].detach())
    assert devoxelize(lonely, centres[-1:]).item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.zeros(3, 2, dtype=torch.int32)}, r"points is torch\.int32"),
        ({"feats": torch.zeros(2, 1)}, r"feats is .* \(2, 1\), expected floating point \(3, C\)"),
        ({"points": torch.tensor([[0.0, 0], [float("nan"), 1], [1, 1]])}, r"point 1 is \[nan, 1\.0\]"),
        ({"voxel_size": 0}, "voxel_size is 0"),
        ({"voxel_size": (1, 1, 1)}, "expected one number or 2"),
        ({"points": torch.tensor([[0.0, 0], [1e30, 1], [1, 1]])}, r"over 2\^31"),
        ({"batch": torch.zeros(3)}, r"batch is torch\.float32"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    right = {"points": torch.rand(3, 2), "feats": torch.rand(3, 1), "voxel_size": 0.5}
    with pytest.raises(ValueError, match=message):
        voxelize(**right | change)
