"""The demo's section on mmcv: its simulated scan, how KITTI is read, and the whole of it on a fast run."""

import html
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kernelgraft.cli.console import console
from kernelgraft.demo import detectors, mmcv, plots, scene
from kernelgraft.demo.sections import FAST, FULL, Context
from kernelgraft.demo.steps import Steps
from kernelgraft.errors import KernelgraftError


def solids_around(generator, count=12):
    """Boxes of all angles around the origin, none of which holds it."""
    azimuth, away = generator.uniform(-np.pi, np.pi, count), generator.uniform(6, 30, count)
    sizes = generator.uniform(0.3, 5, (count, 3))
    place = np.stack([away * np.cos(azimuth), away * np.sin(azimuth), generator.uniform(-3, 1, count)], 1)
    return np.column_stack([place, sizes, generator.uniform(-np.pi, np.pi, count)])


def march(ray, solids, reach, step=0.004):
    """Distance to the first solid or the ground, by walking along the ray."""
    walked = np.arange(0.0, reach, step)
    places = walked[:, None] * ray
    taken = places[:, 2] < scene.GROUND
    for solid in solids:
        taken |= scene.inside(places, solid)
    return walked[taken.argmax()] if taken.any() else np.inf


@pytest.mark.parametrize("seed", range(3))
def test_rays_end_at_the_first_surface(seed):
    generator = np.random.default_rng(seed)
    solids = solids_around(generator)
    rays = generator.normal(size=(120, 3)) * (1, 1, 0.15)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    distance, surface, cosine = scene.cast(rays, solids)
    for ray, far, met in zip(rays, distance, surface, strict=True):
        expected = march(ray, solids, 40.0)
        if expected == np.inf:
            assert far >= 39.9
            continue
        assert far == pytest.approx(expected, abs=0.01)
        if met < 0:
            assert far * ray[2] == pytest.approx(scene.GROUND)
        else:
            assert scene.inside((far * ray)[None], solids[met], 1e-9).all()
    assert len(set(surface)) > 3
    assert ((cosine >= 0) & (cosine <= 1 + 1e-12)).all()


def test_a_ray_along_a_face_and_one_that_meets_nothing():
    box = np.array([[10.0, 0.0, -0.5, 2.0, 2.0, 1.0, 0.0]])
    rays = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]])
    distance, surface, cosine = scene.cast(rays, box)
    assert distance.tolist() == [9.0, np.inf, np.inf, -scene.GROUND, np.inf]
    assert surface[[0, 3]].tolist() == [0, -1]
    assert cosine[[0, 3]].tolist() == [1.0, 1.0]
    grazing, _, _ = scene.cast(np.array([[1.0, 0.0, 0.0]]), box + np.array([0, 1.0, 0, 0, 0, 0, 0]))
    assert grazing[0] in (9.0, np.inf)
    nothing, surface, _ = scene.cast(rays, np.empty((0, 7)))
    assert nothing[3] == -scene.GROUND
    assert surface.tolist() == [-1] * 5


@pytest.mark.parametrize("seed", range(4))
def test_points_lie_on_the_ground_or_on_things_and_boxes_hold_theirs(seed):
    scan = scene.simulate(seed)
    generator = np.random.default_rng(seed)
    cars = scene.place_cars(generator)
    solids = np.concatenate([cars, scene.place_walls(), scene.place_poles(generator)])
    assert scan.points.dtype == scan.boxes.dtype == np.float32
    assert 20_000 < len(scan.points) < 30_000
    xyz = scan.points[:, :3].astype(np.float64)
    assert (np.linalg.norm(xyz, axis=1) < scene.REACH + 0.2).all()
    near = [scene.inside(xyz, solid, 0.12) for solid in solids]
    explained = np.any(near, axis=0) | (np.abs(xyz[:, 2] - scene.GROUND) < 0.06)
    assert explained.all()
    deep = [scene.inside(xyz, solid, -0.12) for solid in solids]
    assert not np.any(deep, axis=0).any(), "a ray went through a face"
    held = [int(scene.inside(xyz, box, 0.1).sum()) for box in scan.boxes]
    assert min(held) >= scene.LEAST_POINTS - 5
    assert 5 <= len(scan.boxes) <= 8
    assert (scan.labels == scene.CAR).all()
    assert ((scan.points[:, 3] >= 0) & (scan.points[:, 3] <= 1)).all()
    low, high = np.array(detectors.AREA[:2]), np.array(detectors.AREA[3:5])
    assert ((low < scan.boxes[:, :2]) & (scan.boxes[:, :2] < high)).all()


def test_cars_stand_apart_and_hidden_ones_have_no_box():
    missing = 0
    for seed in range(20):
        cars = scene.place_cars(np.random.default_rng(seed))
        for i, car in enumerate(cars):
            others = np.concatenate([scene.corners(other) for j, other in enumerate(cars) if j != i])
            flat = np.column_stack([others, np.full(len(others), car[2] + 0.5)])
            assert not scene.inside(flat, car).any()
        missing += len(cars) - len(scene.simulate(seed).boxes) if seed < 4 else 0
    assert missing > 0


def test_a_seed_gives_one_scan_and_another_gives_another():
    first, again, other = scene.simulate(7), scene.simulate(7), scene.simulate(8)
    np.testing.assert_array_equal(first.points, again.points)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert first.points.shape != other.points.shape or (first.points != other.points).any()


def test_corners_are_those_of_a_turned_rectangle():
    box = np.array([5.0, 2.0, -1.0, 4.0, 2.0, 1.5, np.pi / 2])
    np.testing.assert_allclose(scene.corners(box), [(4, 4), (4, 0), (6, 0), (6, 4)], atol=1e-12)


def kitti_files(folder, lidar2cam):
    """An info file with a pedestrian, a car, one of no class we know and one out of the area; the camera's boxes."""
    boxes = [
        (-1.2, 1.6, 7.9, 0.8, 1.8, 0.6, 0.4),
        (8.5, 1.7, 20.0, 4.1, 1.5, 1.7, -1.3),
        (-1000.0, -1000.0, -1000.0, -1.0, -1.0, -1.0, -10.0),
        (2.0, 1.6, 70.0, 4.0, 1.5, 1.6, 1.5),
    ]
    instances = [
        {"bbox_3d": list(box), "bbox_label_3d": label} for box, label in zip(boxes, (0, 2, -1, 2), strict=True)
    ]
    info = {"data_list": [{"images": {"CAM2": {"lidar2cam": lidar2cam.tolist()}}, "instances": instances}]}
    folder.mkdir(parents=True)
    (folder / "000008.pkl").write_bytes(pickle.dumps(info))
    np.arange(20, dtype=np.float32).tofile(folder / "000008.bin")
    return np.array(boxes)


LIDAR2CAM = np.array([(0.0075, -0.99997, -0.0006, -0.004), (0.0148, 0.0007, -0.99989, -0.076),
                      (0.99986, 0.0075, 0.0148, -0.27), (0, 0, 0, 1)])  # fmt: skip


def test_kitti_is_read_where_the_variable_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_TEST_DATA", str(tmp_path))
    assert mmcv.choose_scan().file is None, "nothing is there"
    kitti_files(tmp_path / "lidar/kitti", LIDAR2CAM)
    scan = mmcv.choose_scan()
    assert scan.file == tmp_path / "lidar/kitti/000008.bin"
    assert scan.points.shape == (5, 4)
    assert scan.labels.tolist() == [0, 2]
    monkeypatch.delenv("KERNELGRAFT_TEST_DATA")
    assert mmcv.choose_scan().file is None


HOSTED = """
import json, sys
import kernelgraft.mmcv
import numpy
from mmdet3d.structures import Box3DMode, CameraInstance3DBoxes
from mmengine.config import Config
from kernelgraft.demo.detectors import flatformer

def without_norms(value):
    if isinstance(value, dict):
        return {key: without_norms(each) for key, each in value.items() if key not in ("norm_cfg", "_scope_")}
    return [without_norms(each) for each in value] if isinstance(value, list | tuple) else value

boxes, to_camera, example = json.load(sys.stdin)
found = CameraInstance3DBoxes(numpy.array(boxes)).convert_to(Box3DMode.LIDAR, numpy.linalg.inv(numpy.array(to_camera)))
models = [without_norms(config.model.to_dict()) for config in (flatformer(), Config.fromfile(example))]
print(json.dumps({"boxes": found.tensor.tolist(), "models": models}))
"""


def test_boxes_of_kitti_and_the_model_are_those_of_mmdet3d_and_the_example(tmp_path):
    """In a process of its own: mmdet3d cannot be imported without the plugin, which stays with what it imports."""
    pytest.importorskip("mmengine")
    pytest.importorskip("mmdet3d")
    camera = kitti_files(tmp_path / "k", LIDAR2CAM)[:2]
    example = Path(__file__).parents[2] / "examples/mmdet3d/flatformer_kitti.py"
    text = json.dumps([camera.tolist(), LIDAR2CAM.tolist(), str(example)])
    done = subprocess.run([sys.executable, "-c", HOSTED], input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    scan = mmcv.read_kitti(tmp_path / "k/000008.bin", tmp_path / "k/000008.pkl")
    np.testing.assert_allclose(scan.boxes, found["boxes"], rtol=1e-4, atol=1e-4)
    ours, examples = found["models"]
    assert ours["middle_encoder"]["type"] == "kernelgraft.FlatFormer"
    assert ours == examples


def some_result(overlaps, labels):
    overlaps = np.array(overlaps, np.float32)
    count = overlaps.shape[1]
    return {
        "voxels": 3, "parameters": 4, "seconds": 0.5, "losses": [2.0, 0.5], "step_seconds": 0.1,
        "boxes": np.tile(np.float32([10, 0, -1.7, 4, 2, 1.5, 0.3]), (count, 1)),
        "scores": np.full(count, 0.9, np.float32), "labels": np.array(labels, np.int64), "overlaps": overlaps,
    }  # fmt: skip


def test_an_object_counts_as_found_by_a_box_of_its_class():
    scan = replace(scene.simulate(), boxes=np.zeros((3, 7), np.float32), labels=np.array([2, 2, 0]))
    overlaps = [(0.9, 0.8, 0.0, 0.5), (0.0, 0.0, 0.0, 0.4), (0.0, 0.0, 0.7, 0.0)]
    assert mmcv.match(scan, some_result(overlaps, [2, 2, 2, 2])) == (1, 2)
    assert mmcv.match(scan, some_result(overlaps, [2, 2, 0, 2])) == (2, 1)
    assert mmcv.match(scan, some_result(np.empty((3, 0)), [])) == (0, 0)


@pytest.fixture
def context(tmp_path):
    """With folders, and without texts, which the section does not read."""
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    return Context(Steps(console(stderr=True)), FAST, None, None, work, out, "cpu")


def test_the_picture_is_drawn_with_and_without_found_boxes(context):
    pytest.importorskip("matplotlib")
    scan = scene.simulate()
    for count in (0, 2):
        result = some_result(np.zeros((len(scan.boxes), count)), [2] * count)
        above, losses = mmcv._figures(context, scan, result)
        assert f"{len(scan.boxes)} true boxes and {count} found" in above.alt
        assert above.svg.count("<image") == 1, "the points are one bitmap, not thousands of circles"
        assert len(above.svg) < 700_000
        assert "data:image/png;base64" in above.svg
        assert above.svg.lower().count(plots.ORANGE) >= 2 * len(scan.boxes)
        assert "<svg" in losses.svg
    assert (context.logs / "bev.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", ["mmdet3d", "mmcv"])
def test_a_missing_host_is_said_with_what_to_install(missing, context, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == missing else object())
    with pytest.raises(KernelgraftError, match=rf"{missing} is not installed: pip install 'kernelgraft\[openmmlab\]'"):
        mmcv.run(context)


def test_an_import_that_works_without_us_is_said_not_hidden(monkeypatch):
    from kernelgraft_openmmlab import beside

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **how: run([command[0], "-c", "pass"], **how))
    for state, words in (("compiled", "mmcv is compiled"), ("enabled", "mmcv enable"), ("foreign", "some/_ext.py")):
        status = beside.Status("folder", "path", state, "some/_ext.py")
        monkeypatch.setattr(beside, "status", lambda status=status: status)
        assert words in mmcv.import_without_kernelgraft()


FUNCTIONS = """
import os
from kernelgraft.cli.console import console
from kernelgraft.demo import detectors

def fails():
    raise RuntimeError("the model broke")

def dies():
    os._exit(3)

def reports():
    for done in range(3):
        detectors._report(done, 3, "so far")
    print("said in the worker")
    return os.getpid()
"""


def test_the_worker_keeps_what_is_printed_and_says_what_broke(tmp_path, monkeypatch, capfd):
    (tmp_path / "functions_of_the_worker.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    functions = importlib.import_module("functions_of_the_worker")
    log, seen = tmp_path / "mmcv.log", []
    with mmcv.Worker(log) as worker:
        process = worker.call(functions.reports, report=lambda *progress: seen.append(progress))
        assert process != os.getpid()
        with pytest.raises(KernelgraftError, match=r"RuntimeError: the model broke \(the output is in .*mmcv\.log\)"):
            worker.call(functions.fails)
        assert worker.call(functions.reports) == process
        with pytest.raises(KernelgraftError, match=r"BrokenProcessPool"):
            worker.call(functions.dies)
    assert seen == [(0, 3, "so far"), (1, 3, "so far"), (2, 3, "so far")]
    assert "said in the worker" in log.read_text()
    assert "Traceback" in log.read_text()
    assert capfd.readouterr() == ("", "")


class FakeWorker:
    """Fails at one model and at nothing else."""

    def __init__(self, log):
        self.log = log

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, function, *arguments, report=None):
        if function is detectors.graft:
            return {"mmdet3d": "1.4.0"}
        if function is detectors.measure:
            if arguments[0].startswith("second/"):
                raise KernelgraftError("no memory")
            return {"voxels": 5, "parameters": 7, "seconds": 0.25}
        scan, steps = arguments[0], arguments[2]
        assert steps == mmcv.STEPS
        report(1, steps, "loss 1.00")
        return some_result(np.eye(len(scan.boxes)), scan.labels)


def test_a_model_that_fails_costs_its_row_only(context, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("KERNELGRAFT_TEST_DATA", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(mmcv, "Worker", FakeWorker)
    monkeypatch.setattr(mmcv, "import_without_kernelgraft", lambda: "No module named 'mmcv._ext'")
    result = mmcv.run(replace(context, effort=FULL))
    assert result.failures == ("SECOND: no memory",)
    assert [row[0] for row in result.table.rows] == [
        "mmcv.ops alone", "PointPillars", "CenterPoint, pillars", "MinkUNet34", mmcv.TRAINED,
    ]  # fmt: skip
    assert {row[4] for row in result.table.rows[1:4]} == {"250"}
    count = len(scene.simulate().boxes)
    assert f"finds {count} of {count} objects and no others." in result.verdict
    assert result.verdict.startswith("3 of mmdet3d's models run where mmcv alone cannot be imported; ")
    assert json.loads(json.dumps(result.data))["objects_found"] == count
    stored = np.fromfile(context.work / "scan5.bin", np.float32).reshape(-1, 5)
    np.testing.assert_array_equal(stored[:, :4], scene.simulate().points)
    assert not stored[:, 4].any()
    assert str(context.logs / "scan.bin") in result.commands[0]


@pytest.mark.slow
def test_the_section_runs_and_its_report_agrees(tmp_path):
    for needed in ("mmengine", "mmcv", "mmdet3d", "jinja2", "matplotlib"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    program = [sys.executable, "-c", "from kernelgraft.cli import main; main()"]
    environment = {name: value for name, value in os.environ.items() if name != "KERNELGRAFT_TEST_DATA"}
    done = subprocess.run(
        [*program, "demo", "--only", "mmcv", "--fast", "--out", str(tmp_path)],
        env=environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "Iter(train)" not in done.stdout + done.stderr
    assert "Iter(train)" in (tmp_path / "mmcv.log").read_text()
    section = json.loads((tmp_path / "demo.json").read_text())["sections"]["mmcv"]
    models = section["data"]["models"]
    assert list(models) == [*mmcv.FAST_MODELS, mmcv.TRAINED]
    assert all(0 < facts["voxels"] < section["data"]["scan"]["points"] for facts in models.values())
    losses = models[mmcv.TRAINED]["losses"]
    assert len(losses) == mmcv.FAST_STEPS
    assert losses[-1] < 0.5 * losses[0]
    page = (tmp_path / "report.html").read_text()
    assert section["verdict"] in html.unescape(page)
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert f"<td>{models[mmcv.TRAINED]['voxels']:,}</td>" in page
    assert (tmp_path / "bev.png").is_file()
    assert (tmp_path / "scan.bin").stat().st_size == 16 * section["data"]["scan"]["points"]
