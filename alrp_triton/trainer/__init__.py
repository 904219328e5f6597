"""A trainer for detectors on data in COCO format, on Lightning: the command ``alrp-train``, and its parts.

::

    data = CocoDataModule("DIR")
    model = RankingDetector(data.categories, loss="alrp")
    trainer = Trainer(max_epochs=100, use_distributed_sampler=False)
    trainer.fit(model, datamodule=data)

A name is imported when it is asked for: Lightning and torchmetrics take seconds, and the detectors need neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .coco import Coco as Coco
    from .coco import Part as Part
    from .coco import find_part as find_part
    from .data import CocoDataModule as CocoDataModule
    from .dataset import Batch as Batch
    from .dataset import CocoDetection as CocoDetection
    from .detectors import DETECTORS as DETECTORS
    from .errors import UserError as UserError
    from .evaluation import Evaluation as Evaluation
    from .evaluation import Found as Found
    from .evaluation import as_results as as_results
    from .evaluation import evaluate as evaluate
    from .module import LEARNING_RATES as LEARNING_RATES
    from .module import RankingDetector as RankingDetector

_NAMES = {
    "coco": ("Coco", "Part", "find_part"),
    "data": ("CocoDataModule",),
    "dataset": ("Batch", "CocoDetection"),
    "detectors": ("DETECTORS",),
    "errors": ("UserError",),
    "evaluation": ("Evaluation", "Found", "as_results", "evaluate"),
    "module": ("LEARNING_RATES", "RankingDetector"),
}


def __getattr__(name: str) -> object:
    """ImportError, with what to install, where Lightning or another part of the extra is missing."""
    for module, names in _NAMES.items():
        if name in names:
            try:
                return getattr(import_module(f".{module}", __name__), name)
            except ImportError as missing:
                raise ImportError(f"{missing}: pip install 'alrp-triton[trainer]'") from missing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
