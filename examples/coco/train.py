"""Training: the recipe, and what it logs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models.detection import RetinaNet
from tqdm import trange

from .detector import ALRPHead
from .scenes import Scene

# The recipe. AdamW and a cosine suit a few hundred steps better than the paper's SGD over a hundred epochs.
BATCH = 8
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-4
WARM_UP = 50
BALANCE_PERIOD = 50
"""Steps between two updates of the localisation weight; the paper takes an epoch, and scenes here never repeat."""


class Step(NamedTuple):
    """What one step logs: both raw losses, and the weight of the second."""

    classification: float
    localisation: float
    weight: float


def train(model: RetinaNet, draw_scene: Callable[[], Scene], iterations: int) -> list[Step]:
    """Trains the model on freshly drawn scenes, with a progress bar.

    Args:
        model: from `build_detector`; changed in place.
        draw_scene: makes the next scene.
        iterations: number of steps.

    Returns:
        The log, one entry a step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / iterations)) / 2

    schedule = LambdaLR(optimizer, factor)
    assert isinstance(model.head, ALRPHead)
    balance = model.head.balance
    log: list[Step] = []
    model.train()
    with trange(iterations, desc="training", unit="step") as progress:
        for _ in progress:
            scenes = [draw_scene() for _ in range(BATCH)]
            losses = model([scene.image for scene in scenes], [scene.target for scene in scenes])
            loss = losses["classification"] + losses["bbox_regression"]  # no gradient clipping
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            weight = balance.weight.item()
            log.append(Step(losses["classification"].item(), losses["bbox_regression"].item() / weight, weight))
            progress.set_postfix({name: f"{value:.3f}" for name, value in log[-1]._asdict().items()})
    return log
