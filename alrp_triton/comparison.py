"""The comparison matrix H of a ranking loss, as a matrix-free linear operator.

    H_ij = h(x_j - s_i),   h(d) = clamp(d / (2 delta) + 1/2, 0, 1) for delta > 0,   h(d) = 1[d >= 0] for delta = 0

with a row for each positive's score s_i and a column for each logit x_j. Ranks, precisions and the error-driven
gradients of AP, aLRP and Rank & Sort Loss are products with H or with its transpose, so this is all that a backend has
to offer. Which backend runs is decided by torch's dispatcher: both products are torch custom operators with a kernel a
device and a fake kernel (``torch.ops.alrp_triton.matvec`` and ``.rmatvec``).

Contract of the two operators, the same for every backend:

* ``rows`` is float64, ascending; ``columns`` float16, bfloat16, float32 or float64 of any shape.
* ``matvec(rows, columns, weights, delta, backend)``: y_i = sum_j H_ij v_j, float64 ``(P,)``. ``weights`` is v: None
  (all ones), a bool mask, or floats, in the shape of the columns. A column of weight 0 or False is not looked at.
* ``rmatvec(rows, weights, columns, mask, delta, backend)``: g_j = sum_i H_ij w_i in the dtype and shape of the columns,
  0 where the mask is False.
* A column that counts and is NaN makes ``matvec`` NaN; in ``rmatvec`` its own entry is NaN. The weights of ``rmatvec``
  are all finite or all NaN, and in the latter case every entry is NaN.
* Results are bitwise repeatable on the CPU and in the Triton kernels.
"""

import copy
import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from .checks import check_delta, check_same_device, check_tensor, describe

Backend = Literal["auto", "triton", "torch"]

_library = torch.library.Library("alrp_triton", "DEF")
_library.define("matvec(Tensor rows, Tensor columns, Tensor? weights, float delta, str backend) -> Tensor")
_library.define(
    "rmatvec(Tensor rows, Tensor weights, Tensor columns, Tensor? mask, float delta, str backend) -> Tensor"
)


_HAS_TRITON = importlib.util.find_spec("triton") is not None


@cache
def _backend_module(name: str) -> ModuleType:
    """The module of a backend. Imported at first use: triton is neither needed nor always there on a CPU."""
    return importlib.import_module(
        {"torch": ".backends.torch_binned", "triton": ".backends.triton_tiled"}[name], __package__
    )


def check_backend_name(backend: object) -> None:
    """Raise ValueError if ``backend`` is unknown."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError, saying why, if ``backend`` is unknown or cannot run on tensors of ``device``."""
    check_backend_name(backend)
    if backend == "triton":
        if not _HAS_TRITON:
            raise ValueError("backend='triton' needs the package triton, which is not installed (pip install triton)")
        if not _backend_module("triton").runs_on(device):
            raise ValueError(
                f"backend='triton' needs a CUDA or ROCm GPU, but the logits are on {str(device)!r}: "
                "use 'torch' or 'auto' (to try the kernels without a GPU: TRITON_INTERPRET=1 before their first use)"
            )


def _register(dispatch_key: str, auto: str) -> None:
    """Register both products for a torch dispatch key, with the backend that ``"auto"`` stands for there."""

    def matvec(rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float, backend: str) -> Tensor:
        if rows.numel() == 0 or columns.numel() == 0:
            return torch.zeros_like(rows)
        return _backend_module(auto if backend == "auto" else backend).matvec(rows, columns, weights, delta)

    def rmatvec(
        rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float, backend: str
    ) -> Tensor:
        if rows.numel() == 0 or columns.numel() == 0:
            return torch.zeros_like(columns, memory_format=torch.contiguous_format)
        return _backend_module(auto if backend == "auto" else backend).rmatvec(rows, weights, columns, mask, delta)

    _library.impl("matvec", matvec, dispatch_key)
    _library.impl("rmatvec", rmatvec, dispatch_key)


_register("CompositeExplicitAutograd", auto="torch")  # every device that has no kernel of its own below
_register("CUDA", auto="triton" if _HAS_TRITON else "torch")  # ROCm builds of torch use this key too


@torch.library.register_fake("alrp_triton::matvec", lib=_library)
def _matvec_fake(rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float, backend: str) -> Tensor:
    return torch.empty_like(rows)


@torch.library.register_fake("alrp_triton::rmatvec", lib=_library)
def _rmatvec_fake(
    rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float, backend: str
) -> Tensor:
    return torch.empty_like(columns, memory_format=torch.contiguous_format)


class ComparisonMatrix:
    """H for given rows and columns: a P x N matrix that is applied and never stored.

    The names are those of :class:`scipy.sparse.linalg.LinearOperator`; the adjoint identity
    ``(H.matvec(v) * w).sum() == (v * H.rmatvec(w)).sum()`` holds up to rounding. Not differentiable: the ranking losses
    define their own gradients.

    Args:
        rows: scores s of the positives, ``(P,)``, any float dtype, in any order, ties allowed; values of the columns'
            dtype, for the Triton kernels compute in float32 unless the columns are float64. A row that is not finite
            makes every product NaN, for a rank among such scores has no meaning.
        columns: logits x, N elements in any shape; float16, bfloat16, float32 or float64. They are read in place if
            contiguous. ``-inf`` and ``+inf`` behave as the step says; NaN makes ``matvec`` NaN.
        mask: bool, shape of ``columns``; True where the column takes part. None: all do.
        delta: half-width of the step, 0 or in [2**-126, 2**125].
        backend: ``"auto"`` (``"triton"`` on CUDA and ROCm where triton is installed, else ``"torch"``), ``"triton"`` or
            ``"torch"``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; a backend that cannot run.

    Reference: Oksuz et al., "A Ranking-based, Balanced Loss Function Unifying Classification and Localisation in Object
    Detection", NeurIPS 2020, Section 2 (the step H) and Equation 8.
    """

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        *,
        mask: Tensor | None = None,
        delta: float = 1.0,
        backend: Backend = "auto",
    ) -> None:
        check_tensor("rows", rows, "floating")
        if rows.ndim != 1:
            raise ValueError(f"rows must have shape (P,), got {tuple(rows.shape)}")
        self._rows = rows
        self.backend: Backend = backend
        self._set_columns(columns, mask, delta)
        self.order: Tensor
        """Ascending, stable argsort of the rows, int64 ``(P,)``."""
        self._rows, self.order = rows.detach().double().sort(stable=True)
        # 0 if all rows are finite, else NaN: added to a product, it says what no backend has to look for.
        self._poison = (self._rows * 0).sum()

    def _set_columns(self, columns: Tensor, mask: Tensor | None, delta: float) -> None:
        self.delta = check_delta(delta)
        check_tensor("columns", columns, "floating")
        check_same_device(rows=self._rows, columns=columns)
        check_backend(self.backend, columns.device)
        if mask is not None:
            check_tensor("mask", mask, "bool")
            check_same_device(columns=columns, mask=mask)
            if mask.shape != columns.shape:
                raise ValueError(
                    f"mask must have the shape of columns, {tuple(columns.shape)}, got {tuple(mask.shape)}"
                )
        self.columns = columns.detach()
        self.mask = mask

    def against(self, columns: Tensor, *, mask: Tensor | None = None, delta: float | None = None) -> "ComparisonMatrix":
        """The same rows against other columns; ``delta`` None keeps this matrix' own."""
        other = copy.copy(self)
        other._set_columns(columns, mask, self.delta if delta is None else delta)
        return other

    @property
    def shape(self) -> tuple[int, int]:
        """(P, N)"""
        return self._rows.numel(), self.columns.numel()

    @property
    def at_zero(self) -> float:
        """h(0), the entry of a row against its own score: 1 for delta = 0, else 1/2."""
        return 0.5 if self.delta > 0 else 1.0

    def matvec(self, v: Tensor | None = None) -> Tensor:
        """H v: for each row the sum of H_ij v_j over the columns that take part.

        Args:
            v: floats in the shape of ``columns``; None stands for ones, so that the result counts columns. Where v is
                0 a column takes no part.

        Returns:
            float64 ``(P,)``, in the order of ``rows``.
        """
        weights, poison = self.mask, self._poison
        if v is not None:
            check_tensor("v", v, "floating")
            check_same_device(columns=self.columns, v=v)
            if v.shape != self.columns.shape:
                raise ValueError(f"v must have the shape of columns, {tuple(self.columns.shape)}, got {tuple(v.shape)}")
            weights = v.detach() if self.mask is None else torch.where(self.mask, v.detach(), 0.0)
            poison = poison + (weights * 0).sum()
        sums = torch.ops.alrp_triton.matvec(self._rows, self.columns, weights, self.delta, self.backend)
        result = torch.empty_like(sums)
        result[self.order] = sums + poison
        return result

    def rmatvec(self, w: Tensor) -> Tensor:
        """H^T w: for each column the sum of H_ij w_i over the rows; 0 for a column that takes no part.

        Args:
            w: floats ``(P,)``, in the order of ``rows``.

        Returns:
            Shape and dtype of ``columns``.
        """
        check_tensor("w", w, "floating")
        check_same_device(columns=self.columns, w=w)
        if w.shape != self._rows.shape:
            raise ValueError(f"w must have shape {tuple(self._rows.shape)}, got {tuple(w.shape)}")
        weights = w.detach().double()[self.order]
        weights = weights + (weights * 0).sum() + self._poison
        return torch.ops.alrp_triton.rmatvec(self._rows, weights, self.columns, self.mask, self.delta, self.backend)

    def __repr__(self) -> str:
        return f"ComparisonMatrix({self.shape[0]} x {self.shape[1]}, {describe(self.columns)}, delta={self.delta})"
