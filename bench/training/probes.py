"""What stands before the loss of a RetinaNet's head: sees what goes in and which gradients come out, takes its time."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Probe:
    """Stands before the loss of a RetinaNet's head, and sees what goes in and which gradients come out."""

    def __init__(self, model: Any) -> None:
        head: Any = model.head
        self.inner: Callable[..., dict[str, Tensor]] = head.compute_loss
        head.compute_loss = self.compute_loss
        self.outputs: dict[str, Tensor] = {}
        self.positive = torch.empty(0)

    def compute_loss(
        self, targets: list[dict[str, Tensor]], outputs: dict[str, Tensor], anchors: Any, matched: list[Tensor]
    ) -> dict[str, Tensor]:
        self.outputs = outputs
        self.see_positives(targets, outputs, matched)
        for output in outputs.values():
            output.retain_grad()
        return self.inner(targets, outputs, anchors, matched)

    def see_positives(
        self, targets: list[dict[str, Tensor]], outputs: dict[str, Tensor], matched: list[Tensor]
    ) -> None:
        self.positive = torch.zeros_like(outputs["cls_logits"], dtype=torch.bool)
        for image, (target, match) in enumerate(zip(targets, matched, strict=True)):
            anchor = torch.where(match >= 0)[0]
            self.positive[image, anchor, target["labels"][match[anchor]]] = True

    def gradients(self) -> dict[str, float]:
        """Sums of magnitudes: of the positives' and the negatives' logits, and of the boxes."""
        logits, boxes = self.outputs["cls_logits"].grad, self.outputs["bbox_regression"].grad
        assert logits is not None
        assert boxes is not None
        magnitude = logits.abs().double()
        positives = magnitude[self.positive].sum().item()
        return {
            "positives": positives,
            "negatives": magnitude.sum().item() - positives,
            "boxes": boxes.abs().double().sum().item(),
        }


class Watch(Protocol):
    """Takes a time between two calls."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    @property
    def seconds(self) -> float: ...


class HostWatch:
    """By the clock of the host."""

    begin = end = 0.0

    def start(self) -> None:
        self.begin = time.perf_counter()

    def stop(self) -> None:
        self.end = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class DeviceWatch:
    """By events of a GPU, for which :attr:`seconds` waits."""

    def __init__(self) -> None:
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self.begin.record()

    def stop(self) -> None:
        self.end.record()

    @property
    def seconds(self) -> float:
        self.end.synchronize()
        return 1e-3 * self.begin.elapsed_time(self.end)


class LossClock(Probe):
    """Also takes the time of the loss, forward and backward, by itself."""

    def __init__(self, model: Any, watch: Watch | None = None) -> None:
        super().__init__(model)
        self.watch = watch or HostWatch()

    def compute_loss(
        self, targets: list[dict[str, Tensor]], outputs: dict[str, Tensor], anchors: Any, matched: list[Tensor]
    ) -> dict[str, Tensor]:
        self.see_positives(targets, outputs, matched)
        leaves = {name: output.detach().requires_grad_() for name, output in outputs.items()}
        self.watch.start()
        losses = self.inner(targets, leaves, anchors, matched)
        sum(losses.values(), torch.zeros(())).backward()
        self.watch.stop()
        # The gradients go on from here to the network.
        through = [(outputs[name] * leaf.grad).sum() for name, leaf in leaves.items() if leaf.grad is not None]
        return {"through": torch.stack(through).sum()}
