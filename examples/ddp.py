"""One ranking over several processes, as small as can be: ``torchrun --nproc-per-node 2 -m examples.ddp``.

A toy detector on random features learns to tell three classes from background, and to predict a box overlap. Every
process has images of its own; the ranking is that of all of them. On GPUs take "nccl" and move model and batch there.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alrp_triton import ALRPLoss, SelfBalance, localisation_error

from .process_group import process_group

CLASSES, FEATURES, STEPS = 3, 8, 60


class Detector(nn.Module):
    """Class scores and overlaps of anchors, from features."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.scores, self.overlaps = nn.Linear(FEATURES, 32), nn.Linear(32, CLASSES), nn.Linear(32, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.shared(features).relu()
        return self.scores(hidden), self.overlaps(hidden).squeeze(-1).sigmoid()


def batch(generator: torch.Generator, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors, of which one in ten has a class; the number differs from process to process and step to step."""
    anchors = int(torch.randint(100, 300, (), generator=generator))
    classes = torch.randint(0, CLASSES * 10, (anchors,), generator=generator).clamp(max=CLASSES)
    features = torch.randn(anchors, FEATURES, generator=generator)
    return features + centres[classes], classes


def train() -> None:
    """Train; the default process group is to exist."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    centres = torch.randn(CLASSES + 1, FEATURES, generator=torch.Generator().manual_seed(7)) * 2
    torch.manual_seed(0)
    model = DistributedDataParallel(Detector())
    criterion, balance = ALRPLoss(process_group="world"), SelfBalance(period=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        features, classes = batch(generator, centres)
        logits, overlaps = model(features)
        out = criterion(logits, classes, localisation_error(overlaps[classes < CLASSES]))
        loss = out.classification + balance(out.classification, out.localisation)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 10 in (0, 9):
            print(f"step {step:2d}  1 - precision {out.classification:.3f}  localisation {out.localisation:.3f}")


def main() -> None:
    """Train in a process group of what torchrun started."""
    with process_group("gloo"):
        train()


if __name__ == "__main__":
    main()
