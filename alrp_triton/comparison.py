"""The comparison matrix H of a ranking loss, as a matrix-free linear operator::

    H_ij = h(x_j - s_i)
    h(d) = clamp(d / (2 delta) + 1/2, 0, 1)  for delta > 0
    h(d) = 1[d >= 0]                         for delta = 0

with a row for each positive's score s_i and a column for each logit x_j. Ranks, precisions and the error-driven
gradients of AP, aLRP and Rank & Sort Loss are products with H or with its transpose, so this is all that a loss needs.
What runs them is the business of :mod:`alrp_triton.dispatch`.
"""

import torch
from torch import Tensor

from . import dispatch
from .backends.columns import Columns
from .checks import check_delta, check_same_device, check_tensor, describe
from .dispatch import Backend, check_backend


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
        backend: which one computes, see :func:`alrp_triton.alrp_loss`.

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
        check_tensor("columns", columns, "floating")
        if rows.ndim != 1:
            raise ValueError(f"rows must have shape (P,), got {tuple(rows.shape)}")
        check_same_device(rows=rows, columns=columns)
        if mask is not None:
            check_tensor("mask", mask, "bool")
            check_same_device(columns=columns, mask=mask)
            if mask.shape != columns.shape:
                raise ValueError(
                    f"mask must have the shape of columns, {tuple(columns.shape)}, got {tuple(mask.shape)}"
                )
        check_backend(backend, columns.device)
        self._delta, self._backend, self._shape = check_delta(delta), backend, columns.shape
        self._rows, self.order = dispatch.sort_rows(rows.detach().double(), backend)
        """``order``: ascending, stable argsort of the rows, int64 ``(P,)``."""
        marks = None if mask is None else mask.reshape(-1).contiguous().logical_not().view(torch.uint8)
        self._columns = Columns(columns.detach().reshape(-1).contiguous(), marks)
        self._tables = dispatch.tables_for(self._rows, None, self._columns, self._delta, backend)

    def _as_given(self, values: Tensor) -> Tensor:
        """Values ``(…, P)`` of the sorted rows, in the order in which the rows were given."""
        return torch.empty_like(values).index_copy_(-1, self.order, values)

    def _sorted(self, name: str, value: Tensor) -> Tensor:
        """A number for each row, in the order of the sorted ones."""
        check_tensor(name, value, "floating")
        check_same_device(columns=self._columns.values, **{name: value})
        if value.shape != self.order.shape:
            raise ValueError(f"{name} must have shape {tuple(self.order.shape)}, got {tuple(value.shape)}")
        return value.detach().double().index_select(0, self.order)

    def _compare(self, function: str, *vectors: Tensor) -> Tensor:
        """What a function of the rows among themselves makes of sorted vectors, in the order of the rows as given."""
        result = dispatch.compare_rows(function, self._rows, *vectors, delta=self._delta, backend=self._backend)
        return self._as_given(result)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, N)"""
        return self.order.numel(), self._columns.values.numel()

    def matvec(self, v: Tensor | None = None) -> Tensor:
        """H v: for each row the sum of H_ij v_j over the columns that take part.

        Args:
            v: floats in the shape of ``columns``; None stands for ones, so that the result counts columns. Where v is
                0 a column takes no part. ``triton_tiled`` rounds it to the dtype in which it computes.

        Returns:
            float64 ``(P,)``, in the order of ``rows``.
        """
        columns = self._columns
        if v is not None:
            check_tensor("v", v, "floating")
            check_same_device(columns=columns.values, v=v)
            if v.shape != self._shape:
                raise ValueError(f"v must have the shape of columns, {tuple(self._shape)}, got {tuple(v.shape)}")
            v = v.detach().reshape(-1).contiguous()
            columns = columns._replace(marks=v if columns.marks is None else torch.where(columns.marks == 0, v, 0.0))
        sums = dispatch.matvec(self._rows, None, columns, self._delta, self._tables, self._backend)
        if columns.weights is not None:
            sums = sums + columns.weights.mul(0).sum()  # NaN if a weight is not finite
        return self._as_given(sums)

    def rmatvec(self, w: Tensor) -> Tensor:
        """H^T w: for each column the sum of H_ij w_i over the rows; 0 for a column that takes no part.

        Args:
            w: floats ``(P,)``, in the order of ``rows``.

        Returns:
            Shape and dtype of ``columns``.
        """
        weights = self._sorted("w", w)
        product = dispatch.rmatvec(self._rows, None, weights, self._columns, self._delta, self._tables, self._backend)
        return product.reshape(self._shape)

    def among_rows(self, v: Tensor) -> Tensor:
        """The rows compared among themselves, in place of the columns and the mask.

        Args:
            v: floats ``(P,)``, in the order of ``rows``.

        Returns:
            float64 ``(3, P)``, in the order of ``rows``: for each row i, over all rows k with itself, the sums of
            h(s_k - s_i), of h(s_k - s_i) v_k, and of v ranked: v_k for s_k > s_i and for k = i, h(0) v_k for another
            k of s_k = s_i.
        """
        return self._compare("among_rows", self._sorted("v", v))

    def below_rows(self, w: Tensor) -> Tensor:
        """The transpose of the third of :meth:`among_rows`.

        Args:
            w: floats ``(P,)``, in the order of ``rows``.

        Returns:
            float64 ``(P,)``, in the order of ``rows``: for each row k the sum of w_i over s_i < s_k and over i = k, and
            of h(0) w_i over the other i of s_i = s_k.
        """
        return self._compare("below_rows", self._sorted("w", w))

    def among_grades(self, grades: Tensor) -> Tensor:
        """The rows compared among themselves, apart by a second order, as Rank & Sort Loss needs it.

        Args:
            grades: floats t ``(P,)``, in the order of ``rows``: the IoUs of the positives.

        Returns:
            float64 ``(4, P)``, in the order of ``rows``: for each row i the sums of h(s_k - s_i) and of
            h(s_k - s_i) (1 - t_k) over the rows k of t_k >= t_i, with itself; then over those of t_k < t_i.
        """
        return self._compare("among_grades", self._sorted("grades", grades))

    def below_grades(self, grades: Tensor, w: Tensor) -> Tensor:
        """The transpose of the third of :meth:`among_grades`.

        Args:
            grades: as there.
            w: floats ``(P,)``, in the order of ``rows``.

        Returns:
            float64 ``(P,)``, in the order of ``rows``: for each row k the sum of h(s_k - s_i) w_i over the rows i of
            t_i > t_k.
        """
        return self._compare("below_grades", self._sorted("grades", grades), self._sorted("w", w))

    def __repr__(self) -> str:
        p, n = self.shape
        return f"ComparisonMatrix({p} x {n}, {describe(self._columns.values)}, delta={self._delta})"
