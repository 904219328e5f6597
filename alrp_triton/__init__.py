"""Ranking losses for object detectors, aLRP, AP and Rank & Sort: exact, fast, on any device."""

from .balance import SelfBalance as SelfBalance
from .balance import balance_by_value as balance_by_value
from .boxes import giou_localisation_error as giou_localisation_error
from .boxes import localisation_error as localisation_error
from .comparison import ComparisonMatrix as ComparisonMatrix
from .functional import ALRPLossOutput as ALRPLossOutput
from .functional import PositiveRanks as PositiveRanks
from .functional import RankSortLossOutput as RankSortLossOutput
from .functional import alrp_loss as alrp_loss
from .functional import ap_loss as ap_loss
from .functional import rank_sort_loss as rank_sort_loss
from .modules import ALRPLoss as ALRPLoss
from .modules import APLoss as APLoss
from .modules import RankSortLoss as RankSortLoss

__version__ = "0.5.0"
__all__ = [
    "ALRPLoss",
    "ALRPLossOutput",
    "APLoss",
    "ComparisonMatrix",
    "PositiveRanks",
    "RankSortLoss",
    "RankSortLossOutput",
    "SelfBalance",
    "alrp_loss",
    "ap_loss",
    "balance_by_value",
    "giou_localisation_error",
    "localisation_error",
    "rank_sort_loss",
]
