"""A LightningModule of one's own: period, checkpoints, resumption, and what is logged."""

# pyright: reportIncompatibleMethodOverride=false
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("torchvision.ops", reason="torchvision is an extra", exc_type=ImportError)
pytest.importorskip("lightning", reason="lightning is an extra")

from lightning.pytorch import Callback, LightningModule, Trainer

from alrp_triton.integrations.head_loss import Boxes, HeadLoss
from alrp_triton.integrations.lightning import LogRankingLoss
from alrp_triton.integrations.torchvision import use_ranking_loss
from tests.support.compare import assert_near
from tests.support.torchvision_models import SIZE, retinanet

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        r".*isinstance\(treespec, LeafSpec\).* is deprecated:FutureWarning",
        "The '.*_dataloader' does not have many workers:UserWarning",
        "Checkpoint directory .* exists and is not empty:UserWarning",
    )
]
BATCHES = 3


class Detector(LightningModule):
    def __init__(self, loss: Any = "alrp") -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = retinanet()
        self.ranking = use_ranking_loss(self.model, loss, period="later")
        self.losses: list[dict[str, Tensor]] = []

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.trainer.fit_loop.setup_data()
            self.ranking.set_period(int(self.trainer.num_training_batches))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses: dict[str, Tensor] = self.model(*batch)
        self.losses.append({key: loss.detach() for key, loss in losses.items()})
        return torch.stack(list(losses.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Keep(Callback):
    """What was logged at each step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append({key: value.item() for key, value in trainer.logged_metrics.items()})


def collate(samples: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    samples: list[Any] = []
    for number in range(BATCHES):
        corner = torch.tensor([[4.0 + 5 * number, 6.0, 30.0, 40.0]])
        image = torch.rand(3, SIZE, SIZE, generator=generator)
        samples.append((image, {"boxes": corner, "labels": torch.tensor([number])}))
    return DataLoader(samples, batch_size=1, collate_fn=collate)  # pyright: ignore[reportArgumentType]


def trainer(epochs: int, folder: Path, *callbacks: Callback, every: int = 1) -> Trainer:
    return Trainer(
        max_epochs=epochs, callbacks=[LogRankingLoss(), *callbacks], default_root_dir=folder, log_every_n_steps=every,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def test_period_checkpoint_and_resumption(tmp_path: Path) -> None:
    """An epoch is a period; the balance is in the checkpoint; a resumed run ends as an uninterrupted one."""
    whole, first = Detector(), Detector()
    trainer(2, tmp_path).fit(whole, loader())
    assert whole.ranking["head"].period == BATCHES
    one = trainer(1, tmp_path)
    one.fit(first, loader())
    state = first.ranking["head"].state_dict()
    columns = [torch.stack([step[key] for step in first.losses]) for key in ("classification", "bbox_regression")]
    weights = torch.tensor([50.0] * (BATCHES - 1) + [float(state["balance.weight"])])
    means = columns[0].mean(), (columns[1] / weights).mean()
    assert_near(state["balance.weight"], (means[0] + means[1]) / means[1], 1e-5)
    one.save_checkpoint(tmp_path / "one.ckpt")
    loaded = Detector.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in loaded.ranking["head"].state_dict().items())
    assert Detector().ranking["head"].state_dict()["balance.weight"] == 50
    resumed = Detector()
    trainer(2, tmp_path).fit(resumed, loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("loss", ["alrp", "ap", "rank_sort"])
def test_what_is_logged(loss: str, tmp_path: Path) -> None:
    keep, model = Keep(), Detector(loss)
    trainer(1, tmp_path, keep, every=2).fit(model, loader())
    names = {f"ranking.head/{name}" for name in ("box_weight", "box_error", "gradient_balance")}
    assert ["ranking.head/gradient_balance" in step for step in keep.logged[:2]] == [False, True]  # every second one
    assert set(keep.logged[1]) == names
    logged, part = keep.logged[1], model.ranking["head"]
    assert logged["ranking.head/gradient_balance"] == pytest.approx(1, abs=1e-5)
    assert logged["ranking.head/box_error"] > 0
    if loss == "alrp":
        assert logged["ranking.head/box_weight"] == 50
    elif loss == "ap":
        assert logged["ranking.head/box_weight"] == 1
    assert part.box_error.isfinite()


class Own(LightningModule):
    """A head of one's own, which names the arguments of its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.rank = nn.Parameter(torch.zeros(6, 2)), HeadLoss("ap", box_loss="giou")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        box = torch.tensor([[0.0, 0, 9, 9]])
        losses = self.rank(logits=self.logits, targets=torch.tensor([0, 2, 2, 2, 2, 2]), boxes=Boxes(box, box + 1))
        return losses.classification + losses.box

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_losses_by_name_and_no_logs(tmp_path: Path) -> None:
    """And ``log_every_n_steps=0``, which is Lightning's word for none."""
    keep = Keep()
    trainer(1, tmp_path, keep).fit(Own(), loader())
    assert keep.logged[-1]["rank/gradient_balance"] == pytest.approx(1, abs=1e-5)
    trainer(1, tmp_path, every=0).fit(Own(), loader())


class Alternating(Own):
    """Two optimisers, each of which steps in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = torch.zeros(())
        for optimizer in self.optimizers():  # pyright: ignore[reportGeneralTypeIssues]
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.logits], lr=0.1), torch.optim.SGD([self.logits], lr=0.1)]


def test_steps_of_two_optimisers_are_counted_as_lightning_does(tmp_path: Path) -> None:
    keep = Keep()
    trainer(1, tmp_path, keep, every=2).fit(Alternating(), loader())
    assert ["rank/gradient_balance" in step for step in keep.logged[:2]] == [False, True]


def halved(gradient: Tensor) -> Tensor:
    return torch.where(gradient < 0, gradient / 2, gradient)


def test_gradients_that_are_treated_apart_show(tmp_path: Path) -> None:
    class Pushed(Detector):
        """Pulls are halved on their way to the logits."""

        def setup(self, stage: str) -> None:
            super().setup(stage)
            criterion = self.ranking["head"].criterion
            criterion.register_forward_pre_hook(self.halve)

        @staticmethod
        def halve(criterion: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            logits = inputs[0].view_as(inputs[0])
            logits.register_hook(halved)
            return (logits, *inputs[1:])

    keep = Keep()
    trainer(1, tmp_path, keep).fit(Pushed(), loader())
    assert keep.logged[-1]["ranking.head/gradient_balance"] == pytest.approx(0.5, abs=1e-5)


def test_without_a_ranking_loss(tmp_path: Path) -> None:
    class Without(Detector):
        def __init__(self) -> None:
            super().__init__()
            del self.ranking

        def setup(self, stage: str) -> None:
            pass

    with pytest.raises(ValueError, match="Without has no ranking loss among its submodules: assign what use_ranking"):
        trainer(1, tmp_path).fit(Without(), loader())
