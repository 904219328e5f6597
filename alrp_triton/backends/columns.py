"""What is compared with the rows, and the marks that say which columns count."""

from typing import NamedTuple

import torch
from torch import Tensor

NONE = -1
"""What a mark says of an anchor whose classes are all columns that count."""
ALL = -2
"""What it says of one of which none does."""


class Columns(NamedTuple):
    """Logits that are compared with the rows, and which of them count."""

    values: Tensor
    """``(N,)``, contiguous; float16, bfloat16, float32 or float64."""
    marks: Tensor | None
    """None: all count. One byte each, ``(N,)``: those count where it is 0. With ``num_classes``, int32
    ``(N / num_classes,)``: the one class of an anchor that does not count, or :data:`NONE` or :data:`ALL`. Floats
    ``(N,)``: each counts as often as it says, and where it is 0 it is not looked at."""
    num_classes: int | None = None
    groups: Tensor | None = None
    """int64: the group of each of so many equal runs of the columns; None: there is one group."""

    @property
    def weights(self) -> Tensor | None:
        """The marks, if they are floats."""
        return self.marks if self.marks is not None and self.marks.is_floating_point() else None


def working_dtype(columns: Tensor) -> torch.dtype:
    """The dtype in which columns are compared: half precision is widened, float64 is kept."""
    return torch.float64 if columns.dtype == torch.float64 else torch.float32
