"""torch.compile passes through every function of point clouds whose sizes do not depend on the data."""

import pytest
import torch

from kernelgraft_core import points as clouds

B, N, M = 2, 50, 7
CALLS = {
    "dynamic_voxelize": lambda x, y, f, i: clouds.dynamic_voxelize(x[0], (0.3, 0.3, 0.5), (-1, -1, -1, 1, 1, 1)),
    "furthest_point_sampling": lambda x, y, f, i: clouds.furthest_point_sampling(x, 9),
    "knn": lambda x, y, f, i: clouds.knn(x, y, 4),
    "ball_query": lambda x, y, f, i: clouds.ball_query(x, y, 0.7, 5),
    "gather_points": lambda x, y, f, i: clouds.gather_points(f, i),
    "three_interpolate": lambda x, y, f, i: clouds.three_interpolate(f, i, i.float()),
    "chamfer_distance": lambda x, y, f, i: clouds.chamfer_distance(x, y),
    "reduce_groups": lambda x, y, f, i: clouds.reduce_groups(
        f[0], torch.arange(6), torch.tensor([0, 2, 2, 6]), "max"
    ),
    "roi_point_pool": lambda x, y, f, i: clouds.roi_point_pool(x, x, y.repeat(1, 1, 3)[..., :7].abs(), 5),
    "roi_aware_pool": lambda x, y, f, i: clouds.roi_aware_pool(
        y[0].repeat(1, 3)[:, :7].abs(), x[0], x[0], (2, 2, 2), 6
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_compiles_in_one_piece(name):
    x, y, feats = torch.randn(B, N, 3), torch.randn(B, M, 3), torch.randn(B, 6, N)
    index = torch.randint(N, (B, M, 3), dtype=torch.int32)
    wanted = CALLS[name](x, y, feats, index)
    torch._dynamo.reset()
    found = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")(x, y, feats, index)
    for right, each in zip(*[t if isinstance(t, tuple) else (t,) for t in (wanted, found)], strict=True):
        assert torch.equal(each, right)


@pytest.mark.parametrize("name", ["gather_points", "three_interpolate", "reduce_groups"])
def test_gradients_compile_in_one_piece(name):
    x, y = torch.randn(B, N, 3), torch.randn(B, M, 3)
    index = torch.randint(N, (B, M, 3), dtype=torch.int32)
    found = []
    torch._dynamo.reset()
    for function in (CALLS[name], torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        feats = torch.randn(B, 6, N, requires_grad=True)
        found.append(torch.autograd.grad(function(x, y, feats, index).square().sum(), feats)[0])
    assert torch.equal(*found)
