"""The oracle: aLRP, AP and Rank & Sort Loss in NumPy, float64, slow on purpose. Not installed with the package; no
torch in here. ``lrp`` is the oracle of the metric.

Twice, written independently: ``dense`` states the equations with the whole comparison matrix, ``loop`` walks over the
positives as the published implementations do. The tests hold the two against each other, and the package against them.
"""

from .dense import Result as Result
from .dense import comparison_matrix as comparison_matrix
