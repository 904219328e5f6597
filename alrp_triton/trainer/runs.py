"""The folder of a run, and its checkpoints."""

from pathlib import Path
from typing import Any

import torch

from .errors import UserError, in_a_line
from .module import RankingDetector

BEST, LAST, CONFIG = "best.ckpt", "last.ckpt", "config.yaml"


def find_checkpoint(run: Path, *names: str) -> Path:
    """The first of these checkpoints that a run has; a file is itself. UserError: there is none."""
    for file in (run, *(run / name for name in names)):
        if file.is_file():
            return file
    raise UserError(f"there is no checkpoint {run / names[0]}")


def read_checkpoint(file: Path) -> dict[str, Any]:
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


def read_model(run: Path) -> RankingDetector:
    """The model of a run's best checkpoint, or of the one that is given."""
    file = find_checkpoint(run, BEST, LAST)
    checkpoint = read_checkpoint(file)
    try:
        model = RankingDetector(**checkpoint["hyper_parameters"])
        model.load_state_dict(checkpoint["state_dict"])
        model.on_load_checkpoint(checkpoint)
    except Exception as error:  # of many kinds: of names, shapes
        raise _no_checkpoint(file, error) from error
    return model


def _no_checkpoint(file: Path, error: object) -> UserError:
    return UserError(f"{file} is no checkpoint of alrp-train: {in_a_line(error)}")
