"""Average Localisation-Recall-Precision (aLRP) Loss for object detectors: exact, fast, on any device."""

from .balance import SelfBalance as SelfBalance
from .boxes import giou_localisation_error as giou_localisation_error
from .boxes import localisation_error as localisation_error
from .comparison import ComparisonMatrix as ComparisonMatrix
from .functional import ALRPLossOutput as ALRPLossOutput
from .functional import alrp_loss as alrp_loss
from .modules import ALRPLoss as ALRPLoss

__version__ = "0.2.0"
__all__ = [
    "ALRPLoss",
    "ALRPLossOutput",
    "ComparisonMatrix",
    "SelfBalance",
    "alrp_loss",
    "giou_localisation_error",
    "localisation_error",
]
