"""What is compared: losses, pictures, budgets."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

from torchvision.transforms import v2

from alrp_triton.trainer import CocoDataModule, RankingDetector
from examples import digits, trees


class Loss(NamedTuple):
    """As the trainer takes it; what is None is as its paper has it."""

    loss: str
    box_loss: str | None = None
    box_weight: float | None = None


LOSSES = {
    "aLRP": Loss("alrp"),
    "aLRP, weight 1": Loss("alrp", None, 1.0),
    "AP + smooth L1": Loss("ap"),
    "AP + GIoU": Loss("ap", "giou"),
    "focal + L1": Loss("torchvision", "l1"),
    "focal + GIoU": Loss("torchvision", "giou"),
    "RS": Loss("rank_sort"),
    "RS, weight 1": Loss("rank_sort", None, 1.0),
}
_FIVE = ("aLRP", "AP + smooth L1", "AP + GIoU", "focal + GIoU", "RS")

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
TUNING_SEED = 100


class Tuned(NamedTuple):
    """A learning rate is chosen for each loss: three are tried, and more while the best is at an end."""

    first: int
    """Index in ``RATES`` of the least of the three."""
    steps: int


class Study(NamedTuple):
    """One comparison."""

    about: str
    data: str
    """Key of ``DATA``."""
    model: Mapping[str, Any]
    """Arguments of :class:`RankingDetector`, but for those of the loss, ``lr`` and ``seed``."""
    losses: tuple[str, ...]
    steps: int
    seeds: int
    rates: Tuned | str
    """Or the study whose rates are taken."""
    evaluations: int = 4
    """Of a run, the last at its end."""
    batch: int = 8
    turns: int = 0
    """Steps of each loss to take the time of."""


class Data(NamedTuple):
    """Pictures in COCO format."""

    transforms: tuple[v2.Transform, ...]
    has_test: bool
    """Whether there is a part ``test`` that no learning rate was chosen on."""


# Those of examples/trees.yaml.
_FROM_ABOVE = (
    v2.RandomHorizontalFlip(),
    v2.RandomVerticalFlip(),
    v2.RandomPhotometricDistort(p=0.8),
    v2.RandomGrayscale(p=0.3),
)
DATA = {
    "digits": Data((), has_test=False),
    "trees": Data(_FROM_ABOVE, has_test=True),
}

_ADAMW = {"optimizer": "adamw", "warm_up": 50, "schedule": "cosine"}
_DIGITS = MappingProxyType({"detector": "retinanet_small", "size": 128, "period": 50, **_ADAMW})
STUDIES = {
    "digits": Study("digits, a short budget", "digits", _DIGITS, tuple(LOSSES), 400, 3, Tuned(2, 200), turns=40),
    "sgd": Study(
        "the same by SGD with momentum and the published schedule, lower by tenths",
        "digits",
        MappingProxyType({**_DIGITS, "optimizer": "sgd", "schedule": "steps"}),
        _FIVE,
        400,
        3,
        Tuned(3, 200),
    ),
    "long": Study(
        "digits, five times the steps, the self-balancing period an epoch",
        "digits",
        MappingProxyType({**_DIGITS, "period": None}),
        _FIVE,
        2000,
        2,
        "digits",
        evaluations=10,
    ),
    "trees": Study(
        "tree crowns in aerial photographs",
        "trees",
        MappingProxyType({**_DIGITS, "period": None}),
        _FIVE,
        1000,
        3,
        Tuned(2, 500),
        evaluations=5,
        turns=20,
    ),
}


def settings_of(study: str, loss: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """What a run is: arguments of :class:`RankingDetector`, and ``batch`` and ``steps``."""
    of = STUDIES[study]
    return {**of.model, "batch": of.batch, "steps": steps, "lr": lr, "seed": seed, **LOSSES[loss]._asdict()}


def make(study: str, settings: Mapping[str, Any], folder: Path) -> tuple[RankingDetector, CocoDataModule]:
    """The model and the data of a run."""
    data = open_data(study, folder, settings["batch"], settings["seed"])
    of_model = {name: value for name, value in settings.items() if name not in ("batch", "steps")}
    return RankingDetector(data.categories, **of_model), data


def open_data(study: str, folder: Path, batch: int, seed: int, held_out: str = "val") -> CocoDataModule:
    """Pictures that :func:`write_data` has written."""
    transforms = list(DATA[STUDIES[study].data].transforms)
    return CocoDataModule(folder, val=held_out, batch=batch, workers=0, transforms=transforms, seed=seed)


def data_of(name: str, work: Path, tuning: bool = False) -> Path:
    """The folder of these pictures, written if they are not there. For digits rates are chosen on other scenes."""
    folder = work / "data" / (f"{name}-to-tune" if tuning and not DATA[name].has_test else name)
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        if name == "digits":
            digits.write(partial, 1600, 200, seed=int(tuning))
        else:
            with TemporaryDirectory() as wheel:
                trees.write(partial, trees.fetch(Path(wheel)))
        partial.replace(folder)
    return folder
