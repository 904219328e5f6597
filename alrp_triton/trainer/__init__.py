"""A trainer for detectors on data in COCO format, on Lightning: the command ``alrp-train``, and its parts.

::

    data = CocoDataModule("DIR")
    model = RankingDetector(data.categories, "retinanet_resnet50_fpn_v2", loss="alrp")
    Trainer(max_epochs=100, use_distributed_sampler=False).fit(model, datamodule=data)
"""

try:
    import lightning.pytorch  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import torchmetrics  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import torchvision  # noqa: F401  # pyright: ignore[reportUnusedImport]
except ImportError as missing:
    raise ImportError("the trainer needs Lightning and torchvision: pip install 'alrp-triton[trainer]'") from missing

from .coco import Coco, Part, find_part
from .data import Batch, CocoDataModule, CocoDetection
from .detectors import DETECTORS
from .errors import UserError
from .evaluate import Evaluation, Found, as_results, evaluate
from .module import LEARNING_RATES, RankingDetector

__all__ = [
    "DETECTORS",
    "LEARNING_RATES",
    "Batch",
    "Coco",
    "CocoDataModule",
    "CocoDetection",
    "Evaluation",
    "Found",
    "Part",
    "RankingDetector",
    "UserError",
    "as_results",
    "evaluate",
    "find_part",
]
