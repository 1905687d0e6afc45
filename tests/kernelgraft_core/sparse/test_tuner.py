"""The autotuner: groups by map, choices by cost, and a file that ships with a model."""

import dataclasses
import json

import pytest
import torch

from kernelgraft_core.sparse import SparseTensor, TuneResult, nn, tune, tuner
from kernelgraft_core.sparse.conv.dataflow import Dataflow
from kernelgraft_core.sparse.models import MinkUNet

from .clouds import random_sites


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MinkUNet(3, 5, 0.125).eval()


@pytest.fixture(scope="module")
def sample():
    sites = random_sites(3, shape=(33, 20, 17))
    return SparseTensor(torch.randn(len(sites), 3), sites)


@pytest.fixture(scope="module")
def result(model, sample):
    return tune(model, [sample], "training", repeats=1)


def test_layers_of_one_map_are_a_group(model, sample, result):
    names = [name for group in result.groups for name in group.layers]
    layers = {name for name, layer in model.named_modules() if isinstance(layer, nn.SparseConvolution)}
    pointwise = {name for name in layers if model.get_submodule(name).pointwise}
    assert sorted(names) == sorted(layers - pointwise)
    # Submanifold layers at five resolutions, and four pairs of a layer down and one up again.
    assert len(result.groups) == 9
    down = next(group for group in result.groups if "down.0.0.0" in group.layers)
    assert down.layers == ("down.0.0.0", "up.3.0")


def test_a_result_is_a_file_that_applies_to_a_model(model, sample, result, tmp_path):
    path = tmp_path / "tuned.json"
    result.save(path)
    assert [child.name for child in tmp_path.iterdir()] == ["tuned.json"]
    again = TuneResult.load(path)
    assert again == result
    other = MinkUNet(3, 5, 0.125).eval()
    other.load_state_dict(model.state_dict())
    before = model(sample)
    again.apply(other)
    dataflows = {layer.dataflow for layer in other.modules() if isinstance(layer, nn.SparseConvolution)}
    assert dataflows - {"auto"} == {group.dataflow for group in result.groups}
    torch.testing.assert_close(other(sample), before, rtol=1e-4, atol=1e-4)
    assert "down.0.0.0 and 1 more: " in result.summary()
    assert result.arch
    assert (result.mode, result.dtype) == ("training", "float32")
    assert set(result.groups[0].us) == {"forward", "dgrad", "wgrad"}


def test_inference_leaves_gradients_alone(model, sample):
    found = tune(model, [(sample,), {"x": sample}], repeats=1)
    assert all(group.dataflow.endswith(",auto,auto") for group in found.groups)
    assert set(found.groups[0].us) == {"forward"}


def costs(**directions):
    return {
        direction: {Dataflow.parse(name): tuner._Cost(*cost) for name, cost in each.items()}
        for direction, each in directions.items()
    }


def test_orders_are_paid_for_once():
    known = costs(
        forward={"implicit_gemm:1": (10, 5), "implicit_gemm:2": (9, 7)},
        dgrad={"implicit_gemm:1": (10, 5), "implicit_gemm:2": (9.5, 7)},
    )
    one, two = Dataflow("implicit_gemm", 1), Dataflow("implicit_gemm", 2)
    total = tuner._total
    assert total({"forward": one, "dgrad": one}, known, True, "free") == 25
    assert total({"forward": one, "dgrad": one}, known, False, "free") == 30
    assert total({"forward": one, "dgrad": two}, known, True, "free") == 31.5
    assert total({"forward": one, "dgrad": two}, known, True, "forward_dgrad") == float("inf")


def test_directions_may_be_bound_to_each_other():
    known = costs(
        forward={"implicit_gemm": (1, 0), "gather_scatter": (5, 0)},
        dgrad={"implicit_gemm": (1, 0), "gather_scatter": (5, 0)},
        wgrad={"implicit_gemm": (5, 0), "gather_scatter": (1, 0)},
    )
    here, there = Dataflow("implicit_gemm"), Dataflow("gather_scatter")
    chosen = {"forward": here, "dgrad": here, "wgrad": there}
    assert tuner._total(chosen, known, True, "free") == 3
    assert tuner._total(chosen, known, True, "dgrad_wgrad") == float("inf")
    assert tuner._total(chosen, known, True, "forward_dgrad") == 3


def test_what_wastes_most_is_not_measured_on_a_gpu():
    wasted = {"implicit_gemm": 5.0, "implicit_gemm:1": 2.5, "implicit_gemm:2": 1.6, "implicit_gemm:3": 1.3,
              "implicit_gemm:4": 1.2, "fetch_on_demand": 1.1, "gather_scatter": 1.1}  # fmt: skip
    found = [str(each) for each in tuner._candidates("cuda", True, "forward", wasted)]
    assert found == ["implicit_gemm:2", "implicit_gemm:3", "implicit_gemm:4", "fetch_on_demand", "gather_scatter"]
    assert "fetch_on_demand_atomic" in [str(each) for each in tuner._candidates("cuda", False)]
    assert [str(each) for each in tuner._candidates("cuda", True, "wgrad", wasted)] == [
        "implicit_gemm", "gather_scatter"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "both"}, "mode is 'both'"),
        ({"bind": "all"}, "bind is 'all'"),
        ({"samples": []}, "no samples"),
        ({"model": torch.nn.Identity()}, "ran no sparse convolution"),
    ],
)
def test_what_cannot_be_tuned_is_named(change, message, model, sample):
    with pytest.raises(ValueError, match=message):
        tune(**{"model": model, "samples": [sample]} | change)


def test_another_model_is_refused_and_left_alone(result):
    other = torch.nn.ModuleDict({"stem": nn.SubMConv3d(3, 3, 3)})
    with pytest.raises(ValueError, match="no sparse convolution"):
        result.apply(other)
    assert other["stem"].dataflow == "auto"


@pytest.mark.parametrize("change", [{"schema": 9}, {"groups": 3}, {"groups": [{"layers": ["a"]}]}, {"more": 1}])
def test_a_file_of_another_kind_is_refused(change, result, tmp_path):
    path = tmp_path / "tuned.json"
    result.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"tuned\.json is no result of tune"):
        TuneResult.load(path)
    changed = json.loads(path.read_text())
    path.write_text("not JSON" if changed else "")
    with pytest.raises(ValueError, match=r"tuned\.json is no result"):
        TuneResult.load(path)


def test_what_a_cpu_knows_of_a_map_is_paid_for_once():
    known = costs(
        forward={"implicit_gemm": (10, 5), "gather_scatter": (11, 5)},
        dgrad={"implicit_gemm": (10, 5)},
        wgrad={"implicit_gemm": (10, 5), "gather_scatter": (10, 5)},
    )
    here, there = Dataflow("implicit_gemm"), Dataflow("gather_scatter")
    total = tuner._total({"forward": here, "dgrad": here, "wgrad": here}, known, True, "free", "cpu")
    assert total == 35
    assert tuner._total({"forward": here, "dgrad": here, "wgrad": here}, known, False, "free", "cpu") == 40
    assert tuner._total({"forward": there, "dgrad": here, "wgrad": there}, known, True, "free", "cpu") == 41


def test_a_result_of_a_gpu_is_not_for_a_cpu(model, result):
    with pytest.raises(ValueError, match="tuned on sm_90, the model is on cpu"):
        dataclasses.replace(result, arch="sm_90").apply(model)
