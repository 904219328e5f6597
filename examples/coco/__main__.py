"""Trains a RetinaNet with aLRP Loss on scenes of handwritten digits. See `python -m examples.digits --help`."""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import faster_coco_eval
import numpy as np
import torch
import torchvision

import alrp_triton

from .detector import build_detector
from .evaluate import average_precision, detect
from .figures import save_detections, save_losses
from .scenes import compose_scene, split_digits
from .train import BALANCE_PERIOD, train

ITERATIONS = 400
GOAL = 0.7
"""AP50 on held-out scenes below which the demo counts as failed."""


def main() -> int:
    """Trains, evaluates before and after, writes the results; the exit status says whether AP50 reached its goal."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for figures and metrics (default demo)")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help=f"training steps (default {ITERATIONS})")
    parser.add_argument("--scenes", type=int, default=100, help="held-out scenes to evaluate on (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of scans, scenes and weights (default 0)")
    options = parser.parse_args()
    if options.iterations < 1 or options.scenes < 1 or options.seed < 0:
        parser.error("--iterations and --scenes must be at least 1, --seed at least 0")
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    torch.manual_seed(options.seed)
    split, training, evaluation = (np.random.default_rng(s) for s in np.random.SeedSequence(options.seed).spawn(3))
    training_digits, held_out_digits = split_digits(split)
    scenes = [compose_scene(held_out_digits, evaluation) for _ in range(options.scenes)]
    model = build_detector(BALANCE_PERIOD)

    before = average_precision(scenes, detect(model, scenes))
    log = train(model, lambda: compose_scene(training_digits, training), options.iterations)
    detections = detect(model, scenes)
    after = average_precision(scenes, detections)

    save_losses(log, options.out / "losses.png")
    save_detections(scenes, detections, options.out / "detections.png")
    metrics = {
        "before": before,
        "after": after,
        "iterations": options.iterations,
        "seed": options.seed,
        "scenes": options.scenes,
        "seconds": round(time.perf_counter() - start, 1),
        "last_step": log[-1]._asdict(),
        "versions": {
            **{m.__name__: m.__version__ for m in (alrp_triton, torch, torchvision, faster_coco_eval)},
            "python": platform.python_version(),
        },
    }
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    print(f"\n{options.scenes} held-out scenes  " + "  ".join(f"{name:>5}" for name in after))
    for name, values in (("before training", before), ("after training", after)):
        print(f"{name:<{len(str(options.scenes)) + 16}}  " + "  ".join(f"{value:5.3f}" for value in values.values()))
    print(f"{metrics['seconds']} s; losses.png, detections.png and metrics.json are in {options.out}/")
    if after["AP50"] < GOAL:
        print(f"AP50 ended at {after['AP50']:.3f}, below {GOAL}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
