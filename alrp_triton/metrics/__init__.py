"""LRP and oLRP, the detection metric that aLRP Loss extends; and score levels, which a ranking leaves free.

``OptimalLRP`` needs torchmetrics, and ``coco_calibration`` scikit-learn.
"""

from typing import TYPE_CHECKING

from .calibration import Calibration as Calibration
from .calibration import coco_calibration as coco_calibration
from .coco import LRPResult as LRPResult
from .coco import coco_lrp as coco_lrp
from .coco import coco_olrp as coco_olrp
from .lrp import LRPErrors as LRPErrors
from .lrp import lrp_at as lrp_at
from .lrp import lrp_curve as lrp_curve
from .lrp import optimal_lrp as optimal_lrp

if TYPE_CHECKING:
    from .detection import OptimalLRP as OptimalLRP

# Not OptimalLRP: a star would import torchmetrics.
__all__ = [
    "Calibration",
    "LRPErrors",
    "LRPResult",
    "coco_calibration",
    "coco_lrp",
    "coco_olrp",
    "lrp_at",
    "lrp_curve",
    "optimal_lrp",
]


def __getattr__(name: str) -> object:
    """Imports the torchmetrics class when it is asked for, and only then."""
    if name == "OptimalLRP":
        from .detection import OptimalLRP

        return OptimalLRP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
