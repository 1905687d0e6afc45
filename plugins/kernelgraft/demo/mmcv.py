"""mmcv's ops on real models of mmdet3d: what fails without them runs, and a detector learns to find the objects."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from kernelgraft.errors import KernelgraftError

from . import detectors, plots
from .scene import Scan, corners, simulate
from .sections import FAST, Context, Figure, Section, SectionResult, Table

INSTALL = "pip install 'kernelgraft[openmmlab]', and mmdet3d as docs/hosts/openmmlab.md says"
STEPS, FAST_STEPS = 50, 10
TRAINED = "FlatFormer, small"


@dataclass(frozen=True)
class Shipped:
    """A config that mmdet3d ships, and how many columns of points it loads."""

    config: str
    columns: int = 4


MODELS = {
    "PointPillars": Shipped("pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py"),
    "SECOND": Shipped("second/second_hv_secfpn_8xb6-80e_kitti-3d-3class.py"),
    "CenterPoint, pillars": Shipped(
        "centerpoint/centerpoint_pillar02_second_secfpn_head-circlenms_8xb4-cyclic-20e_nus-3d.py", columns=5
    ),
    "MinkUNet34": Shipped("minkunet/minkunet34_w32_spconv_8xb2-laser-polar-mix-3x_semantickitti.py"),
}
FAST_MODELS = ("PointPillars",)


def run(context: Context) -> SectionResult:
    if missing := [name for name in ("mmengine", "mmcv", "mmdet3d") if importlib.util.find_spec(name) is None]:
        raise KernelgraftError(f"{' and '.join(missing)} is not installed: {INSTALL}")
    fast, step = context.effort == FAST, context.steps.step
    with step("mmcv.ops without kernelgraft"):
        stock = import_without_kernelgraft()
    scan = choose_scan()
    files = write_files(scan, context)
    measured: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    with Worker(context.logs / "mmcv.log") as worker:
        with step("Loading mmdet3d with the plugins mmcv and sparse-conv"):
            versions = worker.call(detectors.graft)
        for name in FAST_MODELS if fast else MODELS:
            model = MODELS[name]
            try:
                with step(f"{name} on {scan.name}"):
                    measured[name] = worker.call(detectors.measure, model.config, files[model.columns], context.device)
            except KernelgraftError as error:  # costs its row only
                failures.append(f"{name}: {error}")
        try:
            with step("Training a small FlatFormer on it") as report:
                arguments = (scan, files[4], FAST_STEPS if fast else STEPS, context.work / "runner", context.device)
                measured[TRAINED] = worker.call(detectors.train, *arguments, report=report)
        except KernelgraftError as error:
            failures.append(f"training: {error}")
    return summarize(context, scan, files[4], stock, versions, measured, tuple(failures))


SECTION = Section("mmcv", "mmcv: OpenMMLab's detectors without compiled ops", run, needs=("mmcv", "mmdet3d"))


class Worker:
    """A process for :mod:`.detectors`; what it prints goes to ``log``. Ends with the block."""

    def __init__(self, log: Path) -> None:
        fresh = multiprocessing.get_context("spawn")
        self._log, self._queue = log, fresh.SimpleQueue()
        self._pool = futures.ProcessPoolExecutor(1, fresh, detectors.begin, (log, self._queue))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def call(self, function: Callable[..., Any], *arguments: Any, report: Callable[..., None] | None = None) -> Any:
        """What the function returns there; ``report`` is given its progress.

        Raises:
            KernelgraftError: it raised, or the process died; the message says where its output is.
        """
        try:
            future = self._pool.submit(detectors.call, function, *arguments)
            running = True
            while running:
                running = bool(futures.wait([future], timeout=0.2).not_done)
                while not self._queue.empty():
                    progress = self._queue.get()
                    if report:
                        report(*progress)
            return future.result()
        except KernelgraftError:
            raise
        except Exception as error:
            said = ": ".join(filter(None, (type(error).__name__, str(error))))
            raise KernelgraftError(f"{said} (the output is in {self._log})") from error


def import_without_kernelgraft() -> str:
    """What comes of ``import mmcv.ops`` in a new process that does not load kernelgraft."""
    from kernelgraft_openmmlab.beside import status

    words = {
        "compiled": "imports: mmcv is compiled",
        "enabled": "imports: `kernelgraft mmcv enable` was run",
    }
    done = subprocess.run([sys.executable, "-c", "import mmcv.ops"], capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        now = status()
        return words.get(now.state, f"imports: ops from {now.found or 'elsewhere'}")
    lines = done.stderr.strip().splitlines() or [f"ends with code {done.returncode}"]
    return lines[-1].removeprefix("ModuleNotFoundError: ")


def choose_scan() -> Scan:
    """A labelled scan of KITTI from ``$KERNELGRAFT_TEST_DATA`` where it is there, else a simulated street."""
    root = os.environ.get("KERNELGRAFT_TEST_DATA")
    if root:
        points, labels = (Path(root, "lidar/kitti", f"000008.{kind}") for kind in ("bin", "pkl"))
        if points.is_file() and labels.is_file():
            return read_kitti(points, labels)
    return simulate()


def read_kitti(points: Path, labels: Path) -> Scan:
    """A scan and the objects of it that lie where the detector looks, from an info file of mmdet3d's with one scan."""
    (described,) = pickle.loads(labels.read_bytes())["data_list"]
    objects = [each for each in described["instances"] if 0 <= each["bbox_label_3d"] < 3]
    camera = np.array([each["bbox_3d"] for each in objects], np.float64).reshape(-1, 7)
    to_lidar = np.linalg.inv(np.array(described["images"]["CAM2"]["lidar2cam"]))
    place = camera[:, :3] @ to_lidar[:3, :3].T + to_lidar[:3, 3]
    # In the camera's frame y points down, sizes are (length, height, width), and angles turn about y from x.
    boxes = np.column_stack([place, camera[:, [3, 5, 4]], -camera[:, 6] - np.pi / 2]).astype(np.float32)
    low, high = np.array(detectors.AREA[:2]), np.array(detectors.AREA[3:5])
    within = ((low <= place[:, :2]) & (place[:, :2] < high)).all(axis=1)
    return Scan(
        f"KITTI's scan {points.stem}",
        np.fromfile(points, np.float32).reshape(-1, 4),
        boxes[within],
        np.array([each["bbox_label_3d"] for each in objects], np.int64)[within],
        points,
    )


def write_files(scan: Scan, context: Context) -> dict[int, Path]:
    """Files with the points, by columns; the fifth column is the time within a sweep, which nuScenes has: zero."""
    four, five = scan.file or context.logs / "scan.bin", context.work / "scan5.bin"
    if scan.file is None:
        scan.points.tofile(four)
    np.pad(scan.points, ((0, 0), (0, 1))).tofile(five)
    return {4: four, 5: five}


def match(scan: Scan, trained: dict[str, Any]) -> tuple[int, int]:
    """How many objects have a box of their class over them, and how many boxes are over none."""
    fits = trained["overlaps"] > detectors.LEAST_OVERLAP
    fits &= scan.labels[:, None] == trained["labels"]
    return int(fits.any(axis=1).sum()), int((~fits.any(axis=0)).sum())


def summarize(
    context: Context,
    scan: Scan,
    points: Path,
    stock: str,
    versions: dict[str, str],
    measured: dict[str, dict[str, Any]],
    failures: tuple[str, ...],
) -> SectionResult:
    trained = measured.get(TRAINED)
    return SectionResult(
        verdict=_verdict(scan, stock, measured),
        table=_table(scan, stock, measured),
        figures=_figures(context, scan, trained) if trained else (),
        notes=_notes(context, scan, versions, trained),
        commands=_commands(points),
        failures=failures,
        data={
            "without_kernelgraft": stock,
            "versions": versions,
            "scan": {"name": scan.name, "points": len(scan.points), "boxes": scan.boxes.tolist()},
            "models": {name: _plain(facts) for name, facts in measured.items()},
            "objects_found": match(scan, trained)[0] if trained else None,
            "boxes_over_no_object": match(scan, trained)[1] if trained else None,
        },
    )


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in facts.items()}


def _verdict(scan: Scan, stock: str, measured: dict[str, dict[str, Any]]) -> str:
    shipped = sum(name in MODELS for name in measured)
    models = f"{shipped} of mmdet3d's models run" if shipped != 1 else "One of mmdet3d's models runs"
    parts = [models + (" where mmcv alone cannot be imported" if stock.startswith("No module") else "")]
    if trained := measured.get(TRAINED):
        losses = trained["losses"]
        found, wrong = match(scan, trained)
        parts.append(
            f"a small FlatFormer trained for {len(losses)} steps on {scan.name}, whose loss goes from {losses[0]:.2f} "
            f"to {losses[-1]:.2f}, finds {found} of {len(scan.boxes)} objects and "
            + (f"{wrong} that are not there" if wrong else "no others")
        )
    return "; ".join(parts) + "."


def _table(scan: Scan, stock: str, measured: dict[str, dict[str, Any]]) -> Table:
    rows = [("mmcv.ops alone", "–", "–", "–", "–", stock)]
    for name, facts in measured.items():
        weights, result = "random", "runs"
        if name == TRAINED:
            weights = f"{len(facts['losses'])} steps on the scan"
            result = f"finds {match(scan, facts)[0]} of {len(scan.boxes)}"
        numbers = (f"{len(scan.points):,}", f"{facts['voxels']:,}", f"{1000 * facts['seconds']:,.0f}")
        rows.append((name, weights, *numbers, result))
    return Table(("", "weights", "points", "voxels", "ms per scan", "result"), tuple(rows))


def _figures(context: Context, scan: Scan, trained: dict[str, Any]) -> tuple[Figure, ...]:
    found, _ = match(scan, trained)

    def paint_scene(figure: Any) -> None:
        paint_from_above(figure.subplots(), scan, trained)
        figure.set_dpi(180)  # for the points, the only part of the SVG that is a bitmap
        figure.savefig(context.logs / "bev.png", dpi=180, facecolor="white")

    def paint_losses(figure: Any) -> None:
        axes, losses = figure.subplots(), trained["losses"]
        axes.plot(range(1, len(losses) + 1), losses, color=plots.BLUE, linewidth=1.4)
        axes.set(yscale="log", xlabel="step", ylabel="loss")
        axes.grid(True, axis="y", color=plots.RULE, linewidth=0.7)

    return (
        Figure(
            f"Seen from above: {found} of {len(scan.boxes)} objects found",
            plots.draw(paint_scene, 9.6, 5.8),
            f"The points of {scan.name}, {len(scan.boxes)} true boxes and {len(trained['boxes'])} found ones, "
            "each with a stroke from its middle to its front.",
        ),
        Figure(
            "Loss of the training",
            plots.draw(paint_losses, 9.6, 2.2),
            f"From {trained['losses'][0]:.2f} down to {trained['losses'][-1]:.2f}.",
        ),
    )


def paint_from_above(axes: Any, scan: Scan, trained: dict[str, Any]) -> None:
    """Points, true boxes and found boxes with their scores on matplotlib's axes, x forward to the right."""
    x, y = scan.points[:, :2].T
    low, high = np.array(detectors.AREA[:2]), np.array(detectors.AREA[3:5])
    axes.scatter(x, y, s=0.6, color=plots.GRAY, linewidths=0, rasterized=True, label="points")
    for kind, boxes, color, width in (
        ("true box", scan.boxes, plots.ORANGE, 3.2),
        ("found box and its score", trained["boxes"], plots.BLUE, 1.3),
    ):
        for number, box in enumerate(boxes):
            outline = corners(box)
            axes.plot(*outline[[0, 1, 2, 3, 0]].T, color=color, linewidth=width, label=None if number else kind)
            front = (outline[0] + outline[3]) / 2
            axes.plot(*np.stack([box[:2], front]).T, color=color, linewidth=width)
    behind = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8}
    for box, score in zip(trained["boxes"], trained["scores"], strict=True):
        above = (box[0], corners(box)[:, 1].max())
        style = {"ha": "center", "fontsize": 8, "color": plots.BLUE, "bbox": behind}
        axes.annotate(f"{score:.2f}", above, xytext=(0, 4), textcoords="offset points", **style)
    shown = (low[0] <= x) & (x < high[0]) & (low[1] <= y) & (y < high[1])
    most = np.quantile(y[shown], (0.003, 0.997))  # not what a few rays meet between the houses
    sides = np.concatenate([most, *(corners(box)[:, 1] for box in (*scan.boxes, *trained["boxes"]))])
    axes.set(xlim=(low[0], high[0]), ylim=(sides.min() - 2, sides.max() + 2))
    axes.set(xlabel="ahead, metres", ylabel="to the left, metres", aspect="equal")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=3, markerscale=10)


def _notes(context: Context, scan: Scan, versions: dict[str, str], trained: dict[str, Any] | None) -> tuple[str, ...]:
    hosts = ", ".join(f"{name} {version}" for name, version in versions.items())
    notes = [
        f"{hosts}, on {context.device}, from the configs that mmdet3d ships. Weights are random where the table says "
        "so: these models show that everything runs and how long it takes, they find nothing.",
        "A time is that of the second pass, from the file to boxes or classes; voxels are those of the model's grid.",
    ]
    if scan.file is None:
        notes.append(
            "The scan is made by casting rays into a street of boxes, as KERNELGRAFT_TEST_DATA names no folder with "
            "lidar/kitti/000008.bin and .pkl of KITTI."
        )
    if trained:
        notes.append(
            f"The detector is tested on the scan it was trained on, {trained['step_seconds']:.2f} s a step: this shows "
            "that gradients are right, not how well it would do elsewhere. An object is found when a box of its class "
            f"and a score over {detectors.LEAST_SCORE} has an intersection over union with it, seen from above, over "
            f"{detectors.LEAST_OVERLAP}. The model is that of examples/mmdet3d/flatformer_kitti.py.",
        )
    return tuple(notes)


def _commands(points: Path) -> tuple[str, ...]:
    config, scan = f"mmdet3d::{MODELS['PointPillars'].config}", str(points)
    program = (
        "import kernelgraft.mmcv; from mmdet3d.apis import inference_detector, init_model; "
        f"from mmengine.hub import get_config; model = init_model(get_config({json.dumps(config)}), None, "
        f'"cpu"); print(inference_detector(model, {json.dumps(scan)})[0])'
    )
    return (shlex.join(["python", "-c", program]),)
