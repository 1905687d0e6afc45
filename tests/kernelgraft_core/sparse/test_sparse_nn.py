"""Layers on sparse tensors, beside torch's dense ones, and the networks made of them."""

import copy
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernelgraft_core.sparse import ConvGeometry, KernelMap, SparseTensor, kernel_maps, nn
from kernelgraft_core.sparse.coordinates import Coordinates
from kernelgraft_core.sparse.models import MinkUNet, centerpoint_encoder, second_encoder

from .clouds import dense_weight, random_sites


def cloud(channels, dimensions=3, seed=0, **options):
    sites = random_sites(dimensions, seed, **options)
    generator = torch.Generator().manual_seed(seed)
    return SparseTensor(torch.randn(len(sites), channels, generator=generator), sites)


def at(dense, x):
    return dense.movedim(1, -1)[tuple(x.coords.long().T)]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolution_layers_are_the_dense_ones(dimensions):
    x = cloud(6, dimensions)
    dense = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dimensions - 1](6, 4, 3, 2, 1, groups=2)
    layer = getattr(nn, f"Conv{dimensions}d")(6, 4, 3, 2, 1, groups=2)
    with torch.no_grad():
        dense.weight.copy_(dense_weight(layer.weight, (3,) * dimensions))
        dense.bias.copy_(layer.bias)
    out = layer(x)
    assert out.stride == (2,) * dimensions
    torch.testing.assert_close(out.feats, at(dense(x.to_dense()), out), rtol=1e-4, atol=1e-5)


def test_four_dimensions():
    x = cloud(3, 4)
    layer = nn.SubMConv4d(3, 5, 3)
    assert layer.weight.shape == (81, 1, 3, 5)
    out = layer(x)
    assert out.coordinates is x.coordinates
    centre = SparseTensor(x.feats[:1], x.coords[:1], spatial_shape=x.spatial_shape, batch_size=2)
    torch.testing.assert_close(layer(centre).feats, centre.feats @ layer.weight[40, 0] + layer.bias)


def test_a_point_convolution_is_a_linear_layer():
    x = cloud(6)
    layer = nn.SubMConv3d(6, 5, 1)
    torch.testing.assert_close(layer(x).feats, x.feats @ layer.weight[0, 0] + layer.bias)
    assert not x.coordinates.found, "it needs no map"
    grouped = nn.SubMConv3d(6, 4, 1, groups=2)
    wanted = torch.cat([x.feats[:, 3 * g : 3 * g + 3] @ grouped.weight[0, g] for g in range(2)], 1) + grouped.bias
    torch.testing.assert_close(grouped(x).feats, wanted)


def test_down_and_up_gives_the_sites_back():
    x = cloud(4)
    down, up = nn.Conv3d(4, 6, 3, 2, 1), nn.InverseConv3d(6, 5, 3)
    low = nn.SubMConv3d(6, 6, 3)(down(x))
    high = up(low)
    assert high.coordinates is x.coordinates
    known = up.map_of(low.coordinates)
    wanted = torch.zeros(len(x.feats), 5)
    for k in range(27):
        rows = known.neighbors[:, k]
        wanted[rows >= 0] += low.feats[rows[rows >= 0].long()] @ up.weight[k, 0]
    torch.testing.assert_close(high.feats, wanted + up.bias, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="were not made by a convolution"):
        up(cloud(6))
    with pytest.raises(ValueError, match=r"kernel_size \(3, 3, 3\), this layer has \(2, 2, 2\)"):
        nn.InverseConv3d(6, 5, 2)(low)


def test_generative_convolution_reaches_new_sites():
    x = cloud(3, density=0.05)
    layer = nn.GenerativeConv3d(3, 4, 2, 2)
    out = layer(x)
    assert len(out.feats) == 8 * len(x.feats)
    assert out.spatial_shape == tuple(2 * n for n in x.spatial_shape)
    kernel = layer.weight[:, 0].permute(1, 2, 0).reshape(3, 4, 2, 2, 2)
    dense = torch.nn.functional.conv_transpose3d(x.to_dense(), kernel, layer.bias, 2)
    torch.testing.assert_close(out.feats, at(dense, out), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}], ids=str)
def test_pooling_sees_the_sites_that_are_there(options):
    x = cloud(5)
    x.feats.requires_grad_()
    out = nn.MaxPool(**options)(x)
    there = x.replace(torch.ones(len(x.feats), 1)).to_dense()
    low = torch.where(there > 0, x.to_dense(), -torch.inf)
    dense = torch.nn.functional.max_pool3d(low, **options)
    torch.testing.assert_close(out.feats, at(dense, out))
    grad = torch.randn_like(out.feats)
    found = torch.autograd.grad(out.feats, x.feats, grad)[0]
    torch.testing.assert_close(found, torch.autograd.grad(at(dense, out), x.feats, grad)[0])

    mean = nn.AvgPool(**options)(x)
    total, count = (
        torch.nn.functional.avg_pool3d(each, **options, divisor_override=1) for each in (x.to_dense(), there)
    )
    wanted = at(total / count, mean)
    torch.testing.assert_close(mean.feats, wanted)
    found = torch.autograd.grad(mean.feats, x.feats, grad)[0]
    torch.testing.assert_close(found, torch.autograd.grad(wanted, x.feats, grad)[0])


def test_pooling_of_what_is_not_finite():
    coords = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 4], [0, 5]])
    nan, inf = float("nan"), float("inf")
    x = SparseTensor(torch.tensor([[1.0, -inf], [nan, -inf], [3, 2], [2, nan], [nan, 1]]), coords)
    out = nn.MaxPool(2)(x).feats
    assert torch.equal(out.isnan(), torch.tensor([[True, False], [False, False], [True, True]]))
    assert out[0, 1] == -inf
    assert out[1].tolist() == [3, 2]


@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
def test_whole_grids(reduce):
    x = cloud(3, batch=3)
    x = x.prune(x.coords[:, 0] != 1)
    x.feats.requires_grad_()
    out = nn.GlobalPool(reduce)(x)
    assert out.shape == (3, 3)
    assert out[1].eq(0).all()
    for b in (0, 2):
        rows = x.feats[x.coords[:, 0] == b]
        wanted = rows.amax(0) if reduce == "max" else getattr(rows, reduce)(0)
        torch.testing.assert_close(out[b], wanted)
    out.sum().backward()
    assert torch.isfinite(x.feats.grad).all()
    with pytest.raises(ValueError, match="'median'"):
        nn.GlobalPool("median")


def test_norms_and_activations_are_torchs_own():
    x = cloud(8)
    for layer, own in (
        (nn.BatchNorm(8), torch.nn.BatchNorm1d(8)),
        (nn.LayerNorm(8), torch.nn.LayerNorm(8)),
        (nn.LeakyReLU(0.2), torch.nn.LeakyReLU(0.2)),
        (nn.GELU(), torch.nn.GELU()),
        (nn.SiLU(), torch.nn.SiLU()),
    ):
        torch.testing.assert_close(layer(x).feats, own(x.feats))
        assert layer.state_dict().keys() == own.state_dict().keys()
    none = SparseTensor(torch.zeros(0, 8), Coordinates(torch.zeros(0, 4, dtype=torch.int64), (2, 2, 2), 1))
    assert len(nn.BatchNorm(8)(none).feats) == 0
    assert nn.Linear(8, 3)(none).feats.shape == (0, 3)


def test_group_norm_sees_each_grid_by_itself():
    x = cloud(8)
    layer = nn.GroupNorm(2, 8)
    torch.nn.init.normal_(layer.weight)
    out = layer(x)
    for b in range(2):
        rows = x.coords[:, 0] == b
        wanted = torch.nn.functional.group_norm(x.feats[rows].T[None], 2, layer.weight, layer.bias)[0].T
        torch.testing.assert_close(out.feats[rows], wanted)


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match="x has 3 channels, expected 4"):
        nn.SubMConv3d(4, 4, 3)(cloud(3))
    with pytest.raises(ValueError, match="groups is 3"):
        nn.SubMConv3d(4, 4, 3, groups=3)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return MinkUNet(4, 5, 0.25)


def test_unet_trains(unet):
    model, x = copy.deepcopy(unet), cloud(4, density=0.1, shape=(40, 36, 20))
    target = (x.feats[:, 0] > 0).long() + 2 * (x.feats[:, 1] > 0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_unet_does_not_depend_on_the_order_of_rows(unet):
    model, x = copy.deepcopy(unet).eval(), cloud(4, density=0.1, shape=(40, 36, 20))
    order = torch.randperm(len(x.feats))
    turned = SparseTensor(x.feats[order], x.coords[order], spatial_shape=x.spatial_shape, batch_size=2)
    with torch.no_grad():
        torch.testing.assert_close(model(turned), model(x)[order], rtol=1e-4, atol=1e-4)


def test_state_dict_is_stable(unet):
    again = MinkUNet(4, 5, 0.25)
    again.load_state_dict(unet.state_dict(), strict=True)
    x = cloud(4, density=0.1, shape=(20, 20, 20))
    assert torch.equal(again.eval()(x), copy.deepcopy(unet).eval()(x))
    assert {name: tuple(p.shape) for name, p in nn.SubMConv3d(3, 4, 3).state_dict().items()} == {
        "weight": (27, 1, 3, 4),
        "bias": (4,),
    }


def test_autocast_trains_in_bfloat16(unet):
    model, x = copy.deepcopy(unet), cloud(4, density=0.1, shape=(20, 20, 20))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    x, layers = cloud(8), torch.nn.Sequential(nn.SubMConv3d(8, 8, 3), nn.ReLU(), nn.SubMConv3d(8, 8, 3))
    x.feats.requires_grad_()

    def run(feats):
        return layers(x.replace(feats)).feats

    wanted = torch.autograd.grad(run(x.feats).square().sum(), [x.feats, *layers.parameters()])
    found = checkpoint(run, x.feats, use_reentrant=False).square().sum()
    for a, b in zip(torch.autograd.grad(found, [x.feats, *layers.parameters()]), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("encoder", [second_encoder, centerpoint_encoder])
def test_encoders_give_a_picture(encoder):
    model = encoder(4).eval()
    x = cloud(4, density=0.05, shape=(64, 48, 41))
    with torch.no_grad():
        out = model(x)
    assert out.shape == (2, 256, 8, 6)


def test_compiles_with_maps_that_are_there():
    x = cloud(8)
    layer = torch.nn.Sequential(nn.SubMConv3d(8, 16, 3), nn.BatchNorm(16), nn.ReLU(), nn.SubMConv3d(16, 8, 3))
    wanted = layer(x).feats

    def run(feats):
        return layer(x.replace(feats)).feats

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.feats), wanted)


def test_a_whole_network_compiles_while_its_maps_are_kept(unet):
    unet.eval()
    x = cloud(4)
    wanted, kept = unet(x), kernel_maps(unet, x)

    def run(feats):
        return unet(x.replace(feats))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.feats), wanted)
    assert len(kept) > 20


def test_sync_batch_norm_keeps_weights():
    layer = torch.nn.Sequential(nn.SubMConv3d(4, 4, 3), nn.BatchNorm(4))
    torch.nn.init.normal_(layer[1].weight)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    converted = nn.SyncBatchNorm.convert(layer)
    assert isinstance(converted[1], nn.SyncBatchNorm)
    for name, value in converted.state_dict().items():
        assert torch.equal(value, state[name])


STEP = """
import sys, torch
from kernelgraft_core.sparse import ConvGeometry, KernelMap, SparseTensor, kernel_maps, nn
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(nn.SubMConv3d(4, 4, 3), nn.Linear(4, 1)))
generator = torch.Generator().manual_seed(rank)
x = SparseTensor.from_dense(torch.randn(1, 4, 6, 6, 6, generator=generator))
model(x).feats.square().mean().backward()
torch.save([p.grad for p in model.parameters()], f"{out}-{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_a_step_and_agree(tmp_path):
    command = [sys.executable, "-c", STEP]
    started = [subprocess.Popen([*command, str(rank), tmp_path / "store", tmp_path / "grads"]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    first, second = (torch.load(tmp_path / f"grads-{rank}.pt", weights_only=True) for rank in range(2))
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.SubMConv3d(4, 4, 3), nn.Linear(4, 1))
    for rank in range(2):
        dense = torch.randn(1, 4, 6, 6, 6, generator=torch.Generator().manual_seed(rank))
        (model(SparseTensor.from_dense(dense)).feats.square().mean() / 2).backward()
    for parameter, a, b in zip(model.parameters(), first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(parameter.grad, a)


def test_a_minkunet_takes_any_grid_and_loses_no_site():
    torch.manual_seed(0)
    model = MinkUNet(2, 3, 0.125).eval()
    indices = torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(7), torch.arange(1))
    thin = SparseTensor(torch.randn(35, 2), indices)
    out = model(thin)
    assert thin.coordinates.rounded(16) is thin.coordinates.rounded(16)
    whole = SparseTensor(thin.feats, indices, spatial_shape=(16, 16, 16))
    assert torch.equal(out, model(whole))
    assert whole.coordinates.rounded(16) is whole.coordinates


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_means_do_not_lose_count_in_half_types(dtype):
    indices = torch.cartesian_prod(torch.arange(1), torch.arange(40), torch.arange(40), torch.arange(30))
    x = SparseTensor(torch.ones(len(indices), 2, dtype=dtype), indices)
    assert nn.GlobalPool("mean")(x).eq(1).all()
    large = x.replace(torch.full_like(x.feats, 3008))
    assert nn.AvgPool(3)(large).feats.eq(3008).all()


def test_norms_without_rows_keep_their_parameters_in_the_graph():
    norm = nn.BatchNorm(3)
    empty = SparseTensor(torch.empty(0, 3), torch.empty(0, 4, dtype=torch.int32), spatial_shape=(4, 4, 4))
    norm(empty).feats.sum().backward()
    assert norm.weight.grad.eq(0).all()
    assert SparseTensor(torch.empty(0, 3), torch.empty(0, 4, dtype=torch.int32)).spatial_shape == (1, 1, 1)


def test_a_layer_of_one_tap_keeps_rows_in_their_order():
    x = cloud(4)
    found = nn.Conv3d(4, 5, 1)(x)
    assert found.coordinates is x.coordinates
    with pytest.raises(ValueError, match="were not made by a convolution"):
        nn.InverseConv3d(5, 4, 1)(found)


def test_coordinates_are_their_own_and_travel(tmp_path):
    rows = cloud(2).coords.clone()
    x = SparseTensor(torch.randn(len(rows), 2), rows)
    layer = nn.SubMConv3d(2, 2, 3)
    wanted = layer(x).feats
    rows[:, 1] += 1
    assert torch.equal(layer(x).feats, wanted)
    torch.save(x, tmp_path / "x.pt")
    again = torch.load(tmp_path / "x.pt", weights_only=False)
    assert torch.equal(layer(again).feats, wanted)
    with pytest.raises(ValueError, match=r"stride = 2.* are given beside"):
        SparseTensor(x.feats, x.coordinates, stride=2)


def test_maps_of_inputs_that_are_gone_are_dropped():
    target = cloud(2).coordinates
    geometry = ConvGeometry.of(3, 3, padding=1)
    for seed in range(8):
        KernelMap.of(geometry, random_sites(3, seed, shape=target.spatial_shape, batch=target.batch_size), target)
    assert len(target.found) <= 2


def test_maps_are_found_without_a_trace(unet):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.train()
    kernel_maps(unet, cloud(4))
    assert all(module.training for module in unet.modules())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
