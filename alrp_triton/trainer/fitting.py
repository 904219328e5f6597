"""``alrp-train fit``."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from .callbacks import EvaluateAtEnd, History, KeepBest, KeepLast, Progress
from .data import CocoDataModule
from .dataset import CocoDetection
from .detectors import SMALL, load_weights, read_weights
from .errors import UserError
from .evaluation import as_results
from .module import RankingDetector
from .parsers import Parser, value_ahead
from .pictures import save_curves, save_detections
from .reports import OF_CATEGORY, print_rows, write_json
from .runs import BEST, CONFIG, LAST, find_checkpoint, read_checkpoint
from .stopping import Stop

_SHOWN = 12  # pictures
_MEMORY = 3400  # bytes a square of the shorter side, in a step of torchvision's RetinaNet in float32 on images of 4:3


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
        if config.patience is not None and config.patience < 1:
            raise UserError(f"--patience must be at least 1, got {config.patience}")
        if config.ema is not None and not 0 <= config.ema <= 1:
            raise UserError(f"--ema must be in 0..1, got {config.ema}")
        if config.out.exists() and not config.out.is_dir():
            raise UserError(f"--out {config.out} is no folder")
        for left, instead in ((LAST, "--resume its run"), (BEST, f"begin with it: --weights {config.out / BEST}")):
            if (config.out / left).exists() and not config.resume:
                raise UserError(f"checkpoint {config.out / left}: take another --out, or {instead}")
        if config.resume:
            read_checkpoint(find_checkpoint(config.out, LAST))
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
        if trainer.is_global_zero and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            config = self.config.clone()
            config.resume = False  # for a new run with these settings; --resume says it itself
            config.data.root = Path(config.data.root).resolve()
            self.parser.save(config, config.out / CONFIG, overwrite=True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config, out = self.config, self.config.out
        given: Any = self.config_init
        self.history, self.last = History(), KeepLast(out, config.ema)
        save_config = LambdaCallback(on_train_start=self._save_config)
        callbacks: list[Any] = [Stop(), self.history, EvaluateAtEnd(), KeepBest(out), self.last, save_config]
        if given.trainer.enable_progress_bar is not False:
            callbacks.append(Progress(refresh_rate=1 if sys.stdout.isatty() else 50))  # a file keeps each state of it
        if config.ema is not None:
            callbacks.append(EMAWeightAveraging(decay=config.ema))
        if config.patience is not None:
            callbacks.append(EarlyStopping("AP", mode="max", patience=config.patience, check_finite=False))
        self.trainer_defaults = {"callbacks": callbacks}
        loggers = [CSVLogger(out, name="logs"), TensorBoardLogger(out, name="tensorboard")]
        logger = loggers if given.trainer.logger is None else given.trainer.logger
        return super().instantiate_trainer(default_root_dir=out, logger=logger, **kwargs)


def fit(words: Sequence[str]) -> int:
    """Trains; 1 if the goal was not reached."""
    words = list(words)
    if "--resume" in words and (out := value_ahead(words, "--out")):
        before = find_checkpoint(Path(out), LAST).with_name(CONFIG)
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
        parser_class=Parser,
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
    pixels = config.model.size**2 * config.data.batch
    if trainer.strategy.root_device.type == "cpu" and pixels > 10**6:
        needed = (
            "" if config.model.detector == SMALL else f", and take some {pixels * _MEMORY / 2**30:.0f} GiB of memory"
        )
        rank_zero_info(
            f"note: {config.data.batch} images of size {config.model.size} are a long step on a CPU{needed}: "
            "--data.batch, --model.size and --model.detector retinanet_small make it shorter"
        )


def _finish(config: Namespace, trainer: Trainer, model: RankingDetector, data: CocoDataModule, history: History) -> int:
    """Prints and writes what the run has come to; 1 if the goal was not reached."""
    assert model.evaluation is not None
    rows = {one["step"]: one for one in history.evaluations}
    best = max(rows.values(), key=lambda one: one["AP"] if one["AP"] == one["AP"] else -1)
    last = history.evaluations[-1]
    named = {"before training": rows.get(0), f"best, step {best['step']}": best, f"last, step {last['step']}": last}
    print_rows(
        {name: row for name, row in named.items() if row},
        ("AP", "AP50", "AP75", "oLRP", "oLRP_loc", "oLRP_FP", "oLRP_FN"),
        "oLRP: less is better",
    )
    print_rows(model.evaluation.by_category, OF_CATEGORY, f"step {last['step']}, category")
    result = {"settings": dict(model.settings), "step": trainer.global_step, "images": len(model.found)}
    result |= {"evaluations": history.evaluations, "by_category": model.evaluation.by_category}
    write_json(config.out / "metrics.json", result, indent=2)
    write_json(
        config.out / "detections.json", as_results(model.found, data.held_out.coco.image_ids, model.settings.categories)
    )
    _draw(save_curves, history.state_dict(), config.out / "curves.png")
    _draw(_save_found, model, data.held_out, config.out / "detections.png")
    if len(model.found) < len(data.held_out):
        print(f"note: evaluated on {len(model.found)} of {len(data.held_out)} images", file=sys.stderr)
    results = ("metrics.json", "detections.json", "curves.png", "detections.png")
    names = (BEST, LAST, *results, CONFIG, "logs", "tensorboard")
    print(f"in {config.out}/: {', '.join(name for name in names if (config.out / name).exists())}")
    print(f"to detect: alrp-train predict --run {config.out} --threshold optimal --images FOLDER")
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
