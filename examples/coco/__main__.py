"""Trains a detector of torchvision on a data set in COCO format, and evaluates it.

::

    python -m examples.coco train --data DIR --out RUN             a data set laid out like COCO; ends with its AP
    python -m examples.coco train --data DIR --out RUN --resume    goes on where RUN stopped, with its settings
    torchrun --nproc-per-node 8 -m examples.coco train ...         one ranking over 8 GPUs
    python -m examples.coco evaluate --data DIR --out RUN          evaluates RUN's checkpoint, writes detections.json
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist

from ..process_group import process_group
from .data import CocoDetection, StepSampler, find_split, rank_and_processes
from .detectors import DETECTORS
from .evaluate import Detections, as_results, detect, evaluate
from .figures import save_detections, save_losses
from .train import CHECKPOINT, LEARNING_RATES, STEPS_CSV, Run, Settings, box_coder_of, check_same, train

_TIMEOUT = timedelta(minutes=10)


def _from_zero(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def _count(text: str) -> int:
    if _from_zero(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return int(text)


def _weight(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.coco", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, required=True, help="folder with annotations/*.json and images, as COCO's")
    common.add_argument("--out", type=Path, required=True, help="folder of the run")
    common.add_argument("--val", default="val", help="name of the part to evaluate on (default %(default)s)")
    common.add_argument(
        "--workers", type=_from_zero, default=2, help="processes that load images (default %(default)s)"
    )
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    of_train = commands.add_parser("train", parents=[common], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = of_train.add_argument
    add("--train", default="train", help="name of the part to train on")
    add("--detector", choices=DETECTORS, default="retinanet_resnet50", help="of torchvision")
    add(
        "--loss",
        choices=["alrp", "ap", "rank_sort", "torchvision"],
        default="alrp",
        help="torchvision: the detector's own",
    )
    add("--box-loss", choices=["giou", "smooth_l1", "l1"], help="other than the paper's; l1: with --loss torchvision")
    add("--box-weight", type=float, help="a constant in place of the balance of the loss' paper")
    add(
        "--box-coder",
        choices=["published", "model"],
        help="deviations of the box deltas: the papers' or torchvision's; without it the papers' with a ranking loss, "
        "or those that the detector of --init has",
    )
    add(
        "--initial-weight",
        type=_weight,
        default=50.0,
        help="of aLRP's box loss, until its balance is known; auto to fine-tune",
    )
    add("--assignment", choices=["iou", "atss"], default="iou", help="of RetinaNet's anchors")
    add("--size", type=_count, default=500, help="shorter side of the images")
    add("--batch", type=_count, default=32, help="images a step, of all processes together")
    length = of_train.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_count, default=100, help="as published")
    length.add_argument("--steps", type=_count, help="in place of epochs")
    add("--optimizer", choices=["sgd", "adamw"], default="sgd", help="SGD with momentum, as published, or AdamW")
    add("--lr", type=float, help="default for sgd: the published one, times batch / 32; for adamw 1e-3")
    add("--warm-up", type=_from_zero, default=500, help="steps")
    add("--schedule", choices=["steps", "cosine"], default="steps", help="steps down at 3/4 and 19/20, or a cosine")
    add("--period", type=_count, help="of the self-balancing in steps; without it an epoch")
    add("--no-flip", action="store_true", help="do not flip images at random")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")
    add(
        "--freeze-norm",
        action=argparse.BooleanOptionalAction,
        help="BatchNorm keeps the statistics of the beginning; without it: if there is --init, as published",
    )
    add("--every", type=_count, help="steps between evaluations and checkpoints; without it an epoch")
    add("--evaluate-first", action="store_true", help="also before training")
    add(
        "--init",
        type=Path,
        help="a file of weights to begin with: a state_dict of the detector or its backbone, or a checkpoint",
    )
    add("--seed", type=_from_zero, default=0, help="of weights and batches")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--until", type=_count, help="stop at this step, to be resumed")
    add("--goal", type=float, help="exit with status 1 if AP50 ends below")
    commands.add_parser("evaluate", parents=[common])
    return parser


def _given(words: Sequence[str]) -> set[str]:
    """The names of the options that the command line has, other than by default."""
    parser = _parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))  # pyright: ignore[reportPrivateUsage]
    for command in commands.choices.values():
        for action in command._actions:
            action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(words)))


def _resumed(options: argparse.Namespace, given: set[str], before: dict[str, Any], images: int) -> Settings:
    """The settings of the checkpoint; what the command line says beside them has to be the same."""
    if "init" in given:
        raise ValueError("--init and --resume are two beginnings: give one")
    before = asdict(Settings(**before))  # with the settings that an older one lacks
    now = vars(options) | {"flip": not options.no_flip}
    if "epochs" in given:
        now["steps"] = options.epochs * (images // before["batch"])
    same = {"no_flip": "flip", "epochs": "steps"}
    names = {same.get(name, name) for name in given} & set(before)
    check_same(before, {name: now[name] for name in sorted(names)})
    return Settings(**before)


def _settings(options: argparse.Namespace, data: CocoDetection, begin: dict[str, Any] | None) -> Settings:
    if options.loss != "torchvision" and options.box_loss == "l1":
        raise ValueError(f"--box-loss l1 is of --loss torchvision; --loss {options.loss} takes giou or smooth_l1")
    if options.loss == "torchvision" and options.assignment != "iou":
        raise ValueError(f"--assignment {options.assignment} needs a ranking loss; torchvision's has its own matcher")
    if options.loss == "torchvision" and options.box_weight is not None:
        raise ValueError(f"--box-weight {options.box_weight} needs a ranking loss; torchvision's weighs its own")
    sampler = StepSampler(len(data), options.batch, range(0), options.seed, *rank_and_processes())
    steps = options.steps or options.epochs * sampler.steps_per_epoch
    lr = options.lr
    if lr is None and options.optimizer == "adamw":
        lr = 1e-3
    elif lr is None:
        published = LEARNING_RATES[options.detector.split("_")[0]]
        if options.loss not in published:
            raise ValueError(f"no learning rate is published for {options.detector} and {options.loss}: give --lr")
        lr = published[options.loss] * options.batch / 32
    freeze_norm = options.init is not None if options.freeze_norm is None else options.freeze_norm
    same = ("detector", "loss", "box_loss", "box_weight", "assignment", "size", "batch", "optimizer", "warm_up",
            "schedule", "period", "amp", "seed", "initial_weight")  # fmt: skip
    return Settings(
        **{name: getattr(options, name) for name in same},
        steps=steps,
        lr=lr,
        flip=not options.no_flip,
        freeze_norm=freeze_norm,
        box_coder=_box_coder(options, begin),
    )


def _box_coder(options: argparse.Namespace, begin: dict[str, Any] | None) -> str:
    """As asked for; else the papers', but where the weights to begin with were trained with others."""
    usual = box_coder_of(options.detector, options.loss)
    if options.box_coder == "published" and usual == "model":
        raise ValueError(f"--box-coder published is not for --detector {options.detector} --loss {options.loss}")
    if options.box_coder is not None:
        return options.box_coder
    if usual == "published" and begin is not None:
        if _is_checkpoint(begin):
            return begin["settings"].get("box_coder", "model")
        if any(name.startswith(("head.regression_head.", "rpn.head.")) for name in begin):
            _note(f"boxes have torchvision's deviations, as in {options.init}; --box-coder published: the papers'")
            return "model"
    return usual


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (EOFError, OSError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"{file} holds no weights: {error}") from error


def _is_checkpoint(state: dict[str, Any]) -> bool:
    """Of another run; else a state_dict."""
    return {"model", "settings"} <= set(state)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


class _Evaluation:
    """Evaluates a run; keeps the last detections, on the first process."""

    def __init__(self, run: Run, data: CocoDetection, workers: int) -> None:
        self.run, self.data, self.workers = run, data, workers
        self.detections: list[Detections] = []

    def __call__(self) -> dict[str, float]:
        run = self.run
        run.share_buffers()
        share = max(run.settings.batch // run.processes, 1)
        self.detections = detect(run.model, self.data, run.detector.first_label, run.device, share, self.workers)
        found = [evaluate(as_results(self.detections, self.data), self.data) if run.rank == 0 else {}]
        if run.processes > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def write(self, out: Path) -> None:
        (out / "detections.json").write_text(json.dumps(as_results(self.detections, self.data)) + "\n")
        save_detections(self.data, self.detections, out / "detections.png")


def _print(rows: dict[str, dict[str, float]], images: int) -> None:
    columns = list(next(iter(rows.values())))
    print(f"\n{f'{images} images':<16}" + "".join(f"{name:>10}" for name in columns))
    for row, values in rows.items():
        print(f"{row:<16}" + "".join(f"{values[name]:>10.3f}" for name in columns))


def _train(options: argparse.Namespace, device: torch.device, held_out: CocoDetection) -> int:
    data = CocoDetection(find_split(options.data, options.train))
    if data.categories != held_out.categories:
        raise ValueError(f"{data.split.annotations} and {held_out.split.annotations} have other categories")
    if not data.boxes:
        raise ValueError(f"{data.split.annotations} has no box to train on, in {len(data)} images")
    checkpoint = options.out / CHECKPOINT
    if checkpoint.exists() != options.resume:
        wrong = "there is none to --resume" if options.resume else "--resume it, or take another --out"
        raise ValueError(f"checkpoint {checkpoint}: {wrong}")
    state = _load(checkpoint) if options.resume else None
    begin = None
    if state:
        settings = _resumed(options, _given(sys.argv[1:]), state["settings"], len(data))
    else:
        begin = _load(options.init) if options.init else None
        settings = _settings(options, data, begin)
    data.flip, data.seed = settings.flip, settings.seed
    run = Run(settings, data, device, begin["model"] if begin and _is_checkpoint(begin) else begin)
    if run.rank == 0:
        print(f"{len(data)} images, {data.boxes} boxes, {len(data.categories)} categories to train on")
        if data.odd > data.boxes / 2:
            _note(
                f"{data.odd} boxes reach out of their image or are smaller than a pixel; is bbox x, y, width, height?"
            )
        if settings.steps <= settings.warm_up:
            _note(f"the warm-up of {settings.warm_up} steps is as long as the run of {settings.steps}")
    evaluation = _Evaluation(run, held_out, options.workers)
    if state:
        run.load(state)
    options.out.mkdir(parents=True, exist_ok=True)
    every = options.every or len(data) // settings.batch
    evaluations = train(
        run,
        options.out,
        evaluation,
        every=every,
        workers=options.workers,
        until=options.until,
        first=options.evaluate_first,
    )
    if run.rank:
        return 0
    names = {0: "before training", settings.steps: "after training"}
    rows = {names.get(step, f"step {step}"): evaluations[step] for step in sorted({min(evaluations), run.step})}
    found = evaluations[run.step]
    evaluation.write(options.out)
    save_losses(options.out / STEPS_CSV, options.out / "losses.png")
    result = {"settings": run.state()["settings"], "images": len(held_out), "step": run.step, **rows}
    (options.out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    _print(rows, len(held_out))
    print(f"losses.png, detections.png, metrics.json, steps.csv and the checkpoint are in {options.out}/")
    if options.goal is not None and not found["AP50"] >= options.goal:
        print(f"AP50 ended at {found['AP50']:.3f}, below {options.goal}", file=sys.stderr)
        return 1
    return 0


def _evaluate(options: argparse.Namespace, device: torch.device, held_out: CocoDetection) -> int:
    state = _load(options.out / CHECKPOINT)
    if state["categories"] != held_out.categories:
        raise ValueError(
            f"{options.out} was trained on the categories {state['categories']}, not those of {options.data}"
        )
    run = Run(Settings(**state["settings"]), held_out, device)
    run.model.load_state_dict(state["model"])
    run.step = state["step"]
    evaluation = _Evaluation(run, held_out, options.workers)
    found = evaluation()
    if run.rank == 0:
        evaluation.write(options.out)
        _print({f"step {run.step}": found}, len(held_out))
    return 0


def main() -> int:
    """Train or evaluate; the exit status says whether the goal was reached."""
    options = _parser().parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"error: --device {options.device}: torch sees no GPU here", file=sys.stderr)
        return 2
    if "LOCAL_RANK" in os.environ:  # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        together = process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    else:
        together = nullcontext()
    with together:
        try:
            held_out = CocoDetection(find_split(options.data, options.val))
            return {"train": _train, "evaluate": _evaluate}[options.command](options, device, held_out)
        except (FileNotFoundError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except FloatingPointError as error:
            print(f"error: {error}: try a lower --lr or a longer --warm-up", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
