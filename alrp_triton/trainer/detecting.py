"""``alrp-train validate`` and ``alrp-train predict``."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from .coco import find_part
from .data import CocoDataModule
from .dataset import CocoDetection, Images, collate
from .errors import UserError, in_a_line
from .evaluation import Found, as_results
from .module import RankingDetector
from .parsers import parser_of_run, value_ahead
from .pictures import save_detections
from .reports import OF_CATEGORY, prepare_file, print_rows, write_json
from .runs import BEST, CONFIG, LAST, find_checkpoint, read_model

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_NOT_EVALUATED = "{}: this checkpoint is of before the first evaluation; take best.ckpt"


def validate(words: Sequence[str]) -> int:
    """Evaluates a trained detector."""
    parser = parser_of_run("validate")
    parser.add_argument("--out", type=Path | None, help="file for the metrics, as JSON")
    parser.add_class_arguments(CocoDataModule, "data")
    run = value_ahead(words, "--run")
    # The data of the run, but for what is given.
    if run and (before := find_checkpoint(Path(run), BEST, LAST).with_name(CONFIG)).is_file():
        try:
            settings = yaml.safe_load(before.read_text(encoding="utf-8"))["data"]
            parser.set_defaults({f"data.{name}": value for name, value in settings.items()})
        except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{before} has no settings of data: {in_a_line(error)}") from error
    config = parser.parse_args(list(words))
    if config.out:
        prepare_file(config.out)
    model = read_model(config.run)
    data = cast("Any", parser.instantiate_classes(config)).data
    trainer = Trainer(accelerator=config.accelerator, devices=1, logger=False, enable_checkpointing=False)
    trainer.validate(model, datamodule=data, verbose=False)
    assert model.evaluation is not None
    print_rows({data.parts[1]: model.evaluation.overall}, tuple(model.evaluation.overall), "oLRP: less is better")
    print_rows(model.evaluation.by_category, OF_CATEGORY, "category")
    if config.out:
        write_json(
            config.out, {"overall": model.evaluation.overall, "by_category": model.evaluation.by_category}, indent=2
        )
    return 0


def predict(words: Sequence[str]) -> int:
    """Detects with a trained detector."""
    parser = parser_of_run("predict")
    parser.add_argument("--images", nargs="+", type=Path, help="image files, and folders of them")
    parser.add_argument("--root", type=Path | None, help="a data set in COCO format, annotated or not, in their place")
    parser.add_argument("--part", default="test", help="name of its part")
    parser.add_argument(
        "--threshold",
        type=float | Literal["optimal"],
        default=0.0,
        help="least score; optimal: that of each category, by the last evaluation",
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="scores become shares of detections that are right, by the same"
    )
    parser.add_argument("--out", type=Path, default=Path("detections.json"), help="file of results in COCO's format")
    parser.add_argument("--pictures", type=Path | None, help="folder for a picture of each image")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    config = parser.parse_args(list(words))
    if bool(config.images) == bool(config.root):
        raise UserError("give --images, or --root and --part")
    if config.batch < 1:
        raise UserError(f"--batch must be at least 1, got {config.batch}")
    if config.threshold != "optimal" and not 0 <= config.threshold <= 1:
        raise UserError(f"--threshold must be in 0..1, or optimal, got {config.threshold}")
    prepare_file(config.out)
    if config.pictures:
        config.pictures.mkdir(parents=True, exist_ok=True)
    model = read_model(config.run)
    names = list(model.settings.categories.values())
    least = _thresholds(config.threshold, model)
    if config.calibrate and model.calibration is None:
        raise UserError(_NOT_EVALUATED.format("--calibrate"))
    data = Images(_image_files(config.images)) if config.images else CocoDetection(find_part(config.root, config.part))
    data.check_images()
    model.check_sizes(data)
    if isinstance(data, CocoDetection) and data.coco.categories != model.settings.categories:
        print(f"note: {data.coco.file} has other categories; results have the ids of the model's", file=sys.stderr)
    trainer = Trainer(accelerator=config.accelerator, devices=1, logger=False, enable_checkpointing=False)
    loader: DataLoader[Any] = DataLoader(data, config.batch, collate_fn=collate)
    batches: Any = trainer.predict(model, loader)
    found = []
    for index, one in enumerate(one for batch in batches for one in batch):
        scores = one["scores"]
        if config.calibrate and model.calibration:
            one["scores"] = model.calibration(scores, one["labels"])
        kept = (scores if config.threshold == "optimal" else one["scores"]) >= least[one["labels"]]
        order = one["scores"].argsort(descending=True, stable=True)
        found.append(Found(index, {key: value[order[kept[order]]] for key, value in one.items()}, {}))
    ids = data.coco.image_ids if isinstance(data, CocoDetection) else range(1, len(data) + 1)
    results = as_results(found, ids, model.settings.categories)
    file_of = {number: str(data.path(index)) for index, number in enumerate(ids)}
    write_json(config.out, [result | {"file_name": file_of[result["image_id"]]} for result in results])
    if config.pictures:
        for one in found:
            save_detections(
                [(data[one.index][0], one.detections, None)],
                names,
                config.pictures / f"{one.index + 1:06}_{data.path(one.index).stem}.png",
            )
    print(f"{len(results)} detections in {len(data)} images: {config.out}")
    return 0


def _thresholds(wanted: float | str, model: RankingDetector) -> torch.Tensor:
    names = model.settings.categories.values()
    if wanted != "optimal":
        return torch.full((len(names),), float(wanted))
    if not model.thresholds:
        raise UserError(_NOT_EVALUATED.format("--threshold optimal"))
    # A category of which nothing was found in evaluation has none: nothing of it is kept.
    return torch.tensor([model.thresholds[name] for name in names], dtype=torch.float64).nan_to_num(torch.inf)


def _below(folder: Path) -> Iterator[Path]:
    """All files, also those of folders that are links."""
    seen = set[str]()
    for at, folders, names in os.walk(folder, followlinks=True):
        if (here := os.path.realpath(at)) in seen:  # a link to where it is
            folders.clear()
        else:
            seen.add(here)
            yield from (Path(at, name) for name in names)


def _image_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"--images: there is no {path}")
        found = sorted(one for one in _below(path) if one.suffix.lower() in _SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise UserError(f"--images: no image in {path}")
        files += found
    return files
