"""Trains a detector of torchvision with a ranking loss on data in COCO format, evaluates it, and detects with it.

::

    alrp-train fit --data.root DIR --out RUN          trains; ends with AP, oLRP and thresholds by category
    alrp-train fit --out RUN --resume                 goes on where RUN stopped, with its settings
    alrp-train fit --out RUN --resume --trainer.max_epochs 200     and makes it longer
    alrp-train validate --run RUN                     evaluates the best checkpoint of RUN, on its data or others
    alrp-train predict --run RUN --images FOLDER      detects; writes COCO's format of results, and pictures

Each command has --help, and takes --config FILE, such as the config.yaml that a run leaves.
"""

import argparse
import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from .callbacks import BEST, LAST, EvaluateAtEnd, History, KeepBest, KeepLast, Progress
from .coco import find_part
from .data import CocoDataModule, CocoDetection, Images, collate
from .detectors import SMALL, load_weights, read_weights
from .errors import UserError, in_a_line
from .evaluation import Found, as_results
from .module import RankingDetector
from .pictures import save_curves, save_detections

_CONFIG = "config.yaml"
_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SHOWN = 12  # pictures
_NOT_EVALUATED = "{}: this checkpoint is of before the first evaluation; take best.ckpt"
_OF_CATEGORY = ("AP", "oLRP", "threshold")


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description."""


class _Parser(LightningArgumentParser):
    """Options by their whole names; errors in one line, without the list of all options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        of_ours: dict[str, Any] = {"description": __doc__, "formatter_class": _Help, "allow_abbrev": False}
        super().__init__(*args, **of_ours | options)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        raise UserError(f"{' '.join(lines)}; see {self.prog} --help") from ex


class _Fit(LightningCLI):
    """Lightning's command line for this model and these data, with what a run needs beside them."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add: Callable[..., Any] = parser.add_argument
        add("--out", type=Path, required=True, help="folder of the run")
        add("--resume", action="store_true", help="go on from the last checkpoint in --out, with its settings")
        add(
            "--weights",
            type=str | None,
            help="to begin with: a file, or the name of weights that torchvision downloads",
        )
        add("--ema", type=float | None, help="decay of an exponential moving average of the weights, such as 0.999")
        add("--patience", type=int | None, help="stop after so many evaluations without a better AP")
        add("--evaluate_first", action="store_true", help="also before training")
        add("--goal", type=float | None, help="exit with status 1 if AP50 ends below")
        add("--seed", type=int, default=0, help="of weights, batches and transforms")
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("seed", "data.seed")
        parser.link_arguments("data.categories", "model.categories", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # without Lightning's warning that they are given

    def before_instantiate_classes(self) -> None:
        config = self.config
        last = config.out / LAST
        if config.patience is not None and config.patience < 1:
            raise UserError(f"--patience must be at least 1, got {config.patience}")
        if config.ema is not None and not 0 <= config.ema <= 1:
            raise UserError(f"--ema must be in 0..1, got {config.ema}")
        if config.out.exists() and not config.out.is_dir():
            raise UserError(f"--out {config.out} is no folder")
        if last.exists() and not config.resume:
            raise UserError(f"checkpoint {last}: --resume it, or take another --out")
        if config.resume:
            _read_checkpoint(_found_in(config.out, LAST))
        self.tensors: dict[str, torch.Tensor] = {}
        if config.weights and not config.resume:
            self.tensors, about = read_weights(config.weights)
            # Published for pretrained weights; and what was trained with other deviations of boxes keeps them.
            if config.model.freeze_norm is None:
                config.model.freeze_norm = any("running_var" in name for name in self.tensors)
            of_detector = any("regression_head." in name or "rpn.head." in name for name in self.tensors)
            if config.model.box_coder is None and config.model.loss != "torchvision" and of_detector:
                config.model.box_coder = about.get("box_coder", "model")
                rank_zero_info(f"boxes are coded as in {config.weights}: model.box_coder={config.model.box_coder}")

    def _save_config(self, trainer: Trainer, _: Any) -> None:
        """Once it is known that a checkpoint to resume is of these settings."""
        if trainer.is_global_zero:
            config = self.config.clone()
            config.resume = False  # for a new run with these settings; --resume says it itself
            config.data.root = Path(config.data.root).resolve()
            self.parser.save(config, config.out / _CONFIG, overwrite=True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config, out = self.config, self.config.out
        given: Any = self.config_init
        self.history, self.last = History(), KeepLast(out)
        save_config = LambdaCallback(on_train_start=self._save_config)
        callbacks: list[Any] = [self.history, EvaluateAtEnd(), KeepBest(out), self.last, save_config]
        if given.trainer.enable_progress_bar is not False:
            callbacks.append(Progress())
        if config.ema is not None:
            callbacks.append(EMAWeightAveraging(decay=config.ema))
        if config.patience is not None:
            callbacks.append(EarlyStopping("AP", mode="max", patience=config.patience, check_finite=False))
        self.trainer_defaults = {"callbacks": callbacks}
        loggers = [CSVLogger(out, name="logs"), TensorBoardLogger(out, name="tensorboard")]
        logger = loggers if given.trainer.logger is None else given.trainer.logger
        return super().instantiate_trainer(default_root_dir=out, logger=logger, **kwargs)


def _ahead(words: Sequence[str], name: str) -> str:
    """The value of an option that others take their defaults from; empty where it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, nargs="?", const="", default="", dest="value")
    return parser.parse_known_args(list(words))[0].value


def fit(words: Sequence[str]) -> int:
    """Trains; 1 if the goal was not reached."""
    words = list(words)
    if "--resume" in words and (out := _ahead(words, "--out")):
        before = _found_in(Path(out), LAST).with_name(_CONFIG)
        words = ["--config", str(before), *words] if before.is_file() else words
    cli = _Fit(
        RankingDetector,
        CocoDataModule,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        trainer_defaults={
            "max_epochs": 100,
            "log_every_n_steps": 10,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
        },
        parser_class=_Parser,
        parser_kwargs={"prog": "alrp-train fit"},
        args=words,
        run=False,
    )
    config, trainer, model, data = cli.config, cli.trainer, cli.model, cli.datamodule
    if cli.tensors:
        rank_zero_info(f"{config.weights}: {load_weights(model.detector, cli.tensors)}")
    _advise(config, trainer)
    if trainer.limit_val_batches == 0:
        raise UserError("--trainer.limit_val_batches 0 leaves nothing to evaluate on")
    config.out.mkdir(parents=True, exist_ok=True)
    if config.evaluate_first and not config.resume:
        trainer.validate(model, datamodule=data, verbose=False)
    trainer.fit(model, datamodule=data, ckpt_path=config.out / LAST if config.resume else None, weights_only=True)
    history = cli.history
    if config.resume and not cli.last.has_trained(trainer):
        rank_zero_info(
            f"note: the run is at its end, step {trainer.global_step}; a greater --trainer.max_epochs, or max_steps "
            "where it ends by that, makes it longer"
        )
    # There was nothing left to do, or the last evaluation is of before the end, such as that before training.
    if not model.found or not history.evaluations or history.evaluations[-1]["step"] != trainer.global_step:
        trainer.validate(model, datamodule=data, verbose=False)
    if not trainer.is_global_zero:
        return 0
    return _finish(config, trainer, model, data, history)


def _advise(config: Namespace, trainer: Trainer) -> None:
    if not config.weights and not config.resume and config.model.detector != SMALL:
        rank_zero_info(
            "note: the weights are random, and published schedules expect a backbone of ImageNet's: "
            "--weights ResNet50_Weights.IMAGENET1K_V2, or a file"
        )
    if trainer.strategy.root_device.type == "cpu" and config.model.size**2 * config.data.batch > 10**6:
        rank_zero_info(
            f"note: {config.data.batch} images of size {config.model.size} are a long step on a CPU: "
            "--data.batch, --model.size and --model.detector retinanet_small make it shorter"
        )


def _finish(config: Namespace, trainer: Trainer, model: RankingDetector, data: CocoDataModule, history: History) -> int:
    assert model.evaluation is not None
    rows = {one["step"]: one for one in history.evaluations}
    best = max(rows.values(), key=lambda one: one["AP"] if one["AP"] == one["AP"] else -1)
    last = history.evaluations[-1]
    named = {"before training": rows.get(0), f"best, step {best['step']}": best, f"last, step {last['step']}": last}
    _print_rows(
        {name: row for name, row in named.items() if row},
        ("AP", "AP50", "AP75", "oLRP", "oLRP_loc", "oLRP_FP", "oLRP_FN"),
    )
    _print_rows(model.evaluation.by_category, _OF_CATEGORY, f"step {last['step']}, category")
    result = {"settings": dict(model.settings), "step": trainer.global_step, "images": len(model.found)}
    result |= {"evaluations": history.evaluations, "by_category": model.evaluation.by_category}
    _write(config.out / "metrics.json", result, indent=2)
    _write(
        config.out / "detections.json", as_results(model.found, data.held_out.coco.image_ids, model.settings.categories)
    )
    _draw(save_curves, history.state_dict(), config.out / "curves.png")
    _draw(_save_found, model, data.held_out, config.out / "detections.png")
    if len(model.found) < len(data.held_out):
        print(f"note: evaluated on {len(model.found)} of {len(data.held_out)} images", file=sys.stderr)
    names = (BEST, LAST, "metrics.json", "detections.json", "curves.png", "detections.png", "logs", "tensorboard")
    print(f"in {config.out}/: {', '.join(name for name in names if (config.out / name).exists())}")
    ap50 = last["AP50"]
    if config.goal is not None and not ap50 >= config.goal:
        print(f"AP50 ended at {ap50:.3f}, below {config.goal}", file=sys.stderr)
        return 1
    return 0


def _save_found(model: RankingDetector, part: CocoDetection, file: Path) -> None:
    pictures = [(part[one.index][0], one.detections, one.target) for one in model.found[:_SHOWN]]
    save_detections(pictures, list(model.settings.categories.values()), file)


def _draw(draw: Callable[..., None], *arguments: Any) -> None:
    """What is drawn never decides how a run ends."""
    try:
        draw(*arguments)
    except Exception as error:
        print(f"note: {arguments[-1]} could not be drawn: {type(error).__name__}: {error}", file=sys.stderr)


def _prepare(file: Path) -> None:
    """What cannot be written is found before the work."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{file} cannot be written to")


def _write(file: Path, content: Any, **options: Any) -> None:
    """JSON has no NaN: what is undefined is null."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    file.write_text(json.dumps(content, **options) + "\n", encoding="utf-8")


def _print_rows(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str], title: str = "") -> None:
    print(f"\n{title:<24}" + "".join(f"{name:>11}" for name in columns))
    for name, row in rows.items():
        print(f"{name:<24.24}" + "".join(f"{row[column]:>11.3f}" for column in columns))


def _parser(command: str) -> _Parser:
    parser = _Parser(f"alrp-train {command}")
    parser.add_argument("--config", action="config", help="a file of these options")
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, or one of its checkpoints")
    parser.add_argument("--accelerator", default="auto", help="Lightning's: cpu, gpu, mps, auto")
    return parser


def _trained(run: Path) -> RankingDetector:
    """The model of a run's best checkpoint, or of the one that is given."""
    file = _found_in(run, BEST, LAST)
    checkpoint = _read_checkpoint(file)
    try:
        model = RankingDetector(**checkpoint["hyper_parameters"])
        model.load_state_dict(checkpoint["state_dict"])
        model.on_load_checkpoint(checkpoint)
    except Exception as error:  # of many kinds: of names, shapes
        raise _no_checkpoint(file, error) from error
    return model


def _found_in(run: Path, *names: str) -> Path:
    """The first of these checkpoints that a run has; a file is itself. UserError: there is none."""
    for file in (run, *(run / name for name in names)):
        if file.is_file():
            return file
    raise UserError(f"there is no checkpoint {run / names[0]}")


def _read_checkpoint(file: Path) -> dict[str, Any]:
    """UserError: it is none, or was cut short."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        missing = [
            key for key in ("hyper_parameters", "state_dict", "pytorch-lightning_version") if key not in checkpoint
        ]
    except Exception as error:  # of many kinds: of unpickling, zip
        raise _no_checkpoint(file, error) from error
    if missing or not isinstance(checkpoint, dict):
        raise _no_checkpoint(file, f"there is no {missing[0] if missing else 'dict'} in it")
    return checkpoint


def _no_checkpoint(file: Path, error: object) -> UserError:
    return UserError(f"{file} is no checkpoint of alrp-train: {in_a_line(error)}")


def validate(words: Sequence[str]) -> int:
    """Evaluates a trained detector."""
    parser = _parser("validate")
    parser.add_argument("--out", type=Path | None, help="file for the metrics, as JSON")
    parser.add_class_arguments(CocoDataModule, "data")
    run = _ahead(words, "--run")
    # The data of the run, but for what is given.
    if run and (before := _found_in(Path(run), BEST, LAST).with_name(_CONFIG)).is_file():
        try:
            settings = yaml.safe_load(before.read_text(encoding="utf-8"))["data"]
            parser.set_defaults({f"data.{name}": value for name, value in settings.items()})
        except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{before} has no settings of data: {in_a_line(error)}") from error
    config = parser.parse_args(list(words))
    if config.out:
        _prepare(config.out)
    model = _trained(config.run)
    data = cast("Any", parser.instantiate_classes(config)).data
    trainer = Trainer(accelerator=config.accelerator, devices=1, logger=False, enable_checkpointing=False)
    trainer.validate(model, datamodule=data, verbose=False)
    assert model.evaluation is not None
    _print_rows({data.names[1]: model.evaluation.overall}, tuple(model.evaluation.overall))
    _print_rows(model.evaluation.by_category, _OF_CATEGORY, "category")
    if config.out:
        _write(config.out, {"overall": model.evaluation.overall, "by_category": model.evaluation.by_category}, indent=2)
    return 0


def predict(words: Sequence[str]) -> int:
    """Detects with a trained detector."""
    parser = _parser("predict")
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
    _prepare(config.out)
    if config.pictures:
        config.pictures.mkdir(parents=True, exist_ok=True)
    model = _trained(config.run)
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
    _write(config.out, [result | {"file_name": file_of[result["image_id"]]} for result in results])
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


def _image_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"--images: there is no {path}")
        found = sorted(one for one in path.rglob("*") if one.suffix.lower() in _IMAGES) if path.is_dir() else [path]
        if not found:
            raise UserError(f"--images: no image in {path}")
        files += found
    return files


def _without_noise() -> None:
    """What Lightning says of every run as this one, and a user can do nothing about."""
    for message in (
        "Checkpoint directory .* exists and is not empty",  # the logs are there before the checkpoints
        "The number of training batches .* is smaller than the logging interval",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


COMMANDS = {"fit": fit, "validate": validate, "predict": predict}


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command; what a user can mend ends in one line, and status 2."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] not in COMMANDS:
        print(__doc__, file=sys.stdout if set(words) & {"-h", "--help"} else sys.stderr)
        return 0 if set(words) & {"-h", "--help"} else 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of categories need not be of the terminal's alphabet
            stream.reconfigure(errors="backslashreplace")
    _without_noise()
    try:
        return COMMANDS[words[0]](words[1:])
    except SIGTERMException:
        return 143
    except (MisconfigurationException, OSError, ValueError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
        if not isinstance(error, (UserError, MisconfigurationException, OSError)) and "lightning" not in raised_in:
            raise  # Lightning refuses arguments by a ValueError, but others are faults
        # Of a process that loads images comes the whole traceback, as the text of the error.
        print(
            f"error: {str(error).strip().splitlines()[-1].removeprefix(f'{UserError.__module__}.UserError: ')}",
            file=sys.stderr,
        )
        return 2
    except FloatingPointError as error:
        print(f"error: {error}: try a lower --model.lr or a longer --model.warm_up", file=sys.stderr)
        return 1
