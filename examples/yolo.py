# pyright: reportMissingImports=false
"""Train a small YOLO of Ultralytics with its own loss and with ranking losses, on scenes of handwritten digits.

``python -m examples.yolo runs`` takes the settings that it is asked for one after the other, and adds what it finds to
``runs/results.json``. AP is Ultralytics' own.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from alrp_triton.integrations.head_loss import Loss
from examples.digits import NUM_CLASSES, SCENE_SIZE, write

LEAST_CONFIDENCE = 0.001  # of a detection: that of Ultralytics, in training too

SETTINGS = [
    "yolo11n:bce:0.5", "yolo11n:rank_sort:0.5", "yolo11n:rank_sort:2", "yolo11n:rank_sort:4", "yolo11n:rank_sort:8",
    "yolo11n:alrp:2", "yolo11n:alrp:8", "yolo26n:bce:0.5", "yolo26n:rank_sort:4", "yolo26n:alrp:2",
]  # fmt: skip
VALIDATED = 4
"""Scenes at once. The fewer, the longer non-maximum suppression may take for each before it leaves some out, unsaid."""


def write_labels(folder: Path) -> Path:
    """Turns a folder of :mod:`examples.digits` into one that Ultralytics reads. Returns the file that describes it."""
    for part in ("train", "val"):
        content = json.loads((folder / "annotations" / f"instances_{part}.json").read_text())
        images, labels = folder / "images" / part, folder / "labels" / part
        images.parent.mkdir(exist_ok=True)
        (folder / part).rename(images)
        labels.mkdir(parents=True)
        lines: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for each in content["annotations"]:
            x, y, w, h = (side / SCENE_SIZE for side in each["bbox"])
            lines[each["image_id"]].append(f"{each['category_id'] - 1} {x + w / 2} {y + h / 2} {w} {h}")
        for image in content["images"]:
            (labels / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines[image["id"]]))
    names = "\n".join(f'  {digit}: "{digit}"' for digit in range(NUM_CLASSES))
    described = folder / "digits.yaml"
    described.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    return described


def train(setting: str, data: Path, folder: Path, steps: int, batch: int, seed: int) -> dict[str, Any]:
    """One training. A setting is ``model:loss:cls``, as in ``yolo11n:rank_sort:2``; the loss ``bce`` is YOLO's own."""
    from ultralytics import YOLO

    from alrp_triton.integrations.ultralytics import use_ranking_loss

    name, loss, cls = setting.split(":")
    yolo: Any = YOLO(f"{name}.yaml")
    if loss != "bce":
        use_ranking_loss(yolo, cast("Loss", loss))
    epochs = max(1, steps * batch // len(list((data.parent / "images" / "train").iterdir())))
    began = time.perf_counter()
    yolo.train(
        data=str(data), project=str(folder), name=f"{name}_{loss}_{cls}_{seed}", exist_ok=True, imgsz=SCENE_SIZE,
        batch=batch, nbs=batch, epochs=epochs, cls=float(cls), seed=seed, workers=0, plots=False, val=False, fliplr=0.0,
        mosaic=0.0, warmup_epochs=1.0, optimizer="AdamW", lr0=2e-3, device=0 if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    seconds = time.perf_counter() - began
    results = yolo.val(
        data=str(data), imgsz=SCENE_SIZE, batch=VALIDATED, workers=0, plots=False, conf=LEAST_CONFIDENCE, verbose=False,
        project=str(folder), name="val", exist_ok=True,
    )  # fmt: skip
    rows = (folder / f"{name}_{loss}_{cls}_{seed}" / "results.csv").read_text().splitlines()
    header, last = (line.split(",") for line in (rows[0], rows[epochs]))
    logged = {key: float(value) for key, value in zip(header, last, strict=True) if key.startswith("train/")}
    found = {"AP": float(results.box.map), "AP50": float(results.box.map50)}
    return {"setting": setting, "seed": seed, **found, "epochs": epochs, "seconds": round(seconds, 1), "losses": logged}


def table(found: dict[str, Any]) -> str:
    """The results in Markdown, one line a training."""
    lines = [
        "| model | loss | `cls` | seed | AP | AP50 | `box_loss` | `cls_loss` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        name, loss, cls = run["setting"].split(":")
        box, classes = (run["losses"][f"train/{each}_loss"] for each in ("box", "cls"))
        ap = f"{100 * run['AP']:.1f} | {100 * run['AP50']:.1f}"
        lines.append(f"| {name} | `{loss}` | {cls} | {run['seed']} | {ap} | {box:.2f} | {classes:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the scenes, if they are not there; train; add to the results."""
    parser = argparse.ArgumentParser(prog="python -m examples.yolo", description=__doc__)
    parser.add_argument("folder", type=Path, help="of scenes, runs and results")
    parser.add_argument("settings", nargs="*", default=SETTINGS)
    parser.add_argument("--train", type=int, default=800, help="scenes to train on (default %(default)s)")
    parser.add_argument("--val", type=int, default=200, help="held-out scenes (default %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of training (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="scenes a step (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of trainings (default %(default)s)")
    options = parser.parse_args()
    # Nothing is to be downloaded, and no settings kept elsewhere.
    os.environ.setdefault("YOLO_CONFIG_DIR", str(options.folder.resolve() / "settings"))
    os.environ.setdefault("YOLO_OFFLINE", "true")
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
    data = options.folder / "scenes" / "digits.yaml"
    if not data.exists():
        write(data.parent, options.train, options.val, seed=0)
        write_labels(data.parent)
    path = options.folder / "results.json"
    about = {"torch": torch.__version__, "numpy": np.__version__, "machine": platform.processor() or platform.machine()}
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {**about, "runs": []}
    for seed in options.seeds:
        for setting in options.settings:
            found["runs"].append(train(setting, data, options.folder / "runs", options.steps, options.batch, seed))
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
