"""The two products of the comparison matrix in Triton: tiles of rows by columns, two fp32 instructions a pair.

Both kernels walk over tiles of the P x N matrix H, which is never stored. A tile's rows are neighbours in score, so the
step is evaluated relative to the least of them, the **anchor** a of their block:

    h(x - s) = clamp((x - a) * scale + offset, 0, 1),   offset = 1/2 - (s - a) * scale,   scale = 1/(2 delta)

which is one saturating fused multiply-add a pair (`FFMA.SAT`), and one more multiplies by the weight and accumulates.
Rounding the offset moves a score by at most half a unit in the last place of its distance from the anchor. Where a
block of rows is wider than ``_TIGHT`` times delta that would be too coarse, and x - s is formed first (three
instructions).

Columns are read in place, in their own dtype; all arithmetic is in the dtype of the rows. Results do not depend on the
order in which programs run: there are no atomics.

``among_rows`` compares the rows among themselves in float64 tiles, all three of its sums in one pass.
"""

# Kernels are written in Triton's language, not Python's: its types are not Python's either.
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportInvalidTypeForm=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .knots import working_dtype

# Tiles, by the dtype of the arithmetic; found by reading the machine code of six targets from two versions of Triton:
# 64 pairs a thread at 128 threads in float32, as much as fits without spills in float64 (which only float64 logits use;
# the rows among themselves have tiles of their own). On AMD the rows of a tile live in scalar registers; half the
# columns leave enough of them.
FORWARD_TILE = {torch.float32: {"ROWS": 32, "COLUMNS": 256}, torch.float64: {"ROWS": 16, "COLUMNS": 128}}
FORWARD_TILE_AMD = FORWARD_TILE | {torch.float32: {"ROWS": 32, "COLUMNS": 128}}
TRANSPOSE_TILE = {
    torch.float32: {"ROWS": 64, "CHUNK": 4, "COLUMNS": 2048},
    torch.float64: {"ROWS": 64, "CHUNK": 2, "COLUMNS": 1024},
}
AMONG_TILE = {"ROWS": 16, "COLUMNS": 64}
PREPARE_BLOCK = 1024
WARPS = 4
# The forward product cuts the columns into splits, one partial sum each: enough programs to fill the largest GPU (about
# 1000 at a time on an H100) several times over, few enough that the partial sums stay O(P).
_SPLITS = 4096
_TIGHT: tl.constexpr = tl.constexpr(2.0)

# How a tile evaluates the step.
_ANCHORED: tl.constexpr = tl.constexpr(0)  # delta > 0, rows of the block close together: row holds the offset
_DIRECT: tl.constexpr = tl.constexpr(1)  # delta > 0: row holds the score
_HARD: tl.constexpr = tl.constexpr(2)  # delta = 0: row holds the score


@triton.jit
def _accumulate(acc, x, row, weight, anchor, scale, MODE: tl.constexpr):
    """Acc + h * weight on a tile; x [1, COLUMNS] and row [ROWS, 1], weight either of the two."""
    if MODE == _HARD:
        acc = tl.where(x >= row, acc + weight, acc)
    else:
        if MODE == _ANCHORED:
            h = tl.fma(x - anchor, scale, row)
        else:
            h = tl.fma(x - row, scale, 0.5)
        acc = tl.fma(tl.minimum(tl.maximum(h, 0.0), 1.0), weight, acc)
    return acc


@triton.jit
def _sum_columns(
    columns_ptr, weights_ptr, length, row, floor, anchor, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Sum of h * weight over ``length`` columns for one block of rows; NaN if a column that counts is NaN."""
    dtype = row.dtype
    acc = tl.zeros([ROWS, COLUMNS], dtype)
    nan = tl.zeros([COLUMNS], tl.int1)
    for begin in range(0, length, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = column < length
        x = tl.load(columns_ptr + column, mask=inside, other=float("-inf")).to(dtype)
        if weights_ptr is None:
            weight = tl.where(inside, 1.0, 0.0).to(dtype)
        else:
            weight = tl.load(weights_ptr + column, mask=inside, other=0).to(dtype)
        # Saturation turns NaN into 0, so NaN is looked for here, once a column and not once a pair.
        live = (weight != 0) & ~(x < floor)
        if tl.max(live.to(tl.int32), axis=0) > 0:
            nan = nan | (live & (x != x))
            acc = _accumulate(acc, x[None, :], row[:, None], weight[None, :], anchor, scale, MODE)
    return tl.where(tl.max(nan.to(tl.int32), axis=0) > 0, float("nan"), tl.sum(acc, axis=1))


@triton.jit(do_not_specialize=["P", "N", "span"])
def matvec_kernel(
    rows_ptr, columns_ptr, weights_ptr, partial_ptr, P, N: tl.int64, span: tl.int64, delta: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program (b, k): the sum over split k of the columns, for block b of the rows -> partial[k, rows of b]."""
    dtype = partial_ptr.dtype.element_ty
    first = tl.program_id(0) * ROWS
    anchor = tl.load(rows_ptr + first).to(dtype)
    last = tl.load(rows_ptr + tl.minimum(first + ROWS, P) - 1).to(dtype)
    index = first + tl.arange(0, ROWS)
    row = tl.load(rows_ptr + tl.minimum(index, P - 1)).to(dtype)  # past the end: the last one, and not stored
    poison = (tl.load(rows_ptr) + tl.load(rows_ptr + P - 1)).to(dtype) * 0.0  # rows ascend, NaN last
    floor = anchor - tl.full([], delta, dtype)

    split = tl.program_id(1).to(tl.int64)
    start = split * span
    length = tl.minimum(N - start, span).to(tl.int32)
    columns_ptr += start
    if weights_ptr is not None:
        weights_ptr += start
    if HARD:
        y = _sum_columns(columns_ptr, weights_ptr, length, row, floor, anchor, 0.0, ROWS, COLUMNS, _HARD)
    else:
        scale = tl.full([], 0.5 / delta, dtype)
        if last - anchor <= tl.full([], _TIGHT * delta, dtype):
            offset = 0.5 - (row - anchor) * scale
            y = _sum_columns(columns_ptr, weights_ptr, length, offset, floor, anchor, scale, ROWS, COLUMNS, _ANCHORED)
        else:
            y = _sum_columns(columns_ptr, weights_ptr, length, row, floor, anchor, scale, ROWS, COLUMNS, _DIRECT)
    tl.store(partial_ptr + split * P + index, y + poison, mask=index < P)


@triton.jit
def _sum_rows(
    acc, x, row_ptr, weights_ptr, first, P, anchor, scale, ROWS: tl.constexpr, CHUNK: tl.constexpr, MODE: tl.constexpr
):
    """Acc + h * weight for the rows from ``first`` on, CHUNK of them at a time."""
    for begin in range(first, tl.minimum(first + ROWS, P), CHUNK):
        index = begin + tl.arange(0, CHUNK)
        row = tl.load(row_ptr + index, mask=index < P, other=0.0)
        weight = tl.load(weights_ptr + index, mask=index < P, other=0.0)
        acc = _accumulate(acc, x[None, :], row[:, None], weight[:, None], anchor, scale, MODE)
    return acc


@triton.jit(do_not_specialize=["P"])
def prepare_kernel(
    rows_ptr, weights_ptr, scores_ptr, offsets_ptr, shares_ptr, P, delta: tl.float64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """What rmatvec_kernel reads: rows, offsets, weights in its dtype, and shares[P], 0 if all are finite, else NaN."""
    dtype = scores_ptr.dtype.element_ty
    poison = (tl.load(rows_ptr) + tl.load(rows_ptr + P - 1)) * 0.0 + tl.zeros([BLOCK], tl.float64)
    for begin in range(0, P, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        inside = index < P
        row = tl.load(rows_ptr + index, mask=inside, other=0.0)
        weight = tl.load(weights_ptr + index, mask=inside, other=0.0)
        tl.store(scores_ptr + index, row.to(dtype), mask=inside)
        tl.store(shares_ptr + index, weight.to(dtype), mask=inside)
        if not HARD:
            anchor = tl.load(rows_ptr + index // ROWS * ROWS, mask=inside, other=0.0)
            tl.store(offsets_ptr + index, (0.5 - (row - anchor) * (0.5 / delta)).to(dtype), mask=inside)
        poison += weight * 0.0
    tl.store(shares_ptr + P, tl.sum(poison, axis=0).to(dtype))


@triton.jit(do_not_specialize=["P", "N"])
def rmatvec_kernel(
    rows_ptr, offsets_ptr, weights_ptr, columns_ptr, mask_ptr, out_ptr, P, N: tl.int64, delta: tl.float64,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Program b: block b of the columns, summed over all rows -> out[columns of b]. weights[P] is added to all."""
    dtype = rows_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * COLUMNS
    column = tl.arange(0, COLUMNS)
    inside = column < N - start
    x = tl.load(columns_ptr + start + column, mask=inside, other=float("-inf")).to(dtype)
    live = inside
    if mask_ptr is not None:
        live = tl.load(mask_ptr + start + column, mask=inside, other=0) != 0
    top = tl.max(tl.where(live, x, float("-inf")), axis=0)
    acc = tl.zeros([CHUNK, COLUMNS], dtype)
    scale = 0.0
    if not HARD:
        scale = tl.full([], 0.5 / delta, dtype)
    for first in range(0, P, ROWS):
        anchor = tl.load(rows_ptr + first)
        if not (top < anchor - tl.full([], delta, dtype)):
            if HARD:
                acc = _sum_rows(acc, x, rows_ptr, weights_ptr, first, P, anchor, scale, ROWS, CHUNK, _HARD)
            else:
                last = tl.load(rows_ptr + tl.minimum(first + ROWS, P) - 1)
                if last - anchor <= tl.full([], _TIGHT * delta, dtype):
                    acc = _sum_rows(acc, x, offsets_ptr, weights_ptr, first, P, anchor, scale, ROWS, CHUNK, _ANCHORED)
                else:
                    acc = _sum_rows(acc, x, rows_ptr, weights_ptr, first, P, anchor, scale, ROWS, CHUNK, _DIRECT)
    g = tl.sum(acc, axis=0) + tl.load(weights_ptr + P)
    g = tl.where(x != x, float("nan"), g)
    tl.store(out_ptr + start + column, tl.where(live, g, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def step(distance, scale, HARD: tl.constexpr):
    """The step h in float64; scale is 1 / (2 delta)."""
    if HARD:
        h = tl.where(distance >= 0.0, 1.0, 0.0).to(tl.float64)
    else:
        h = tl.minimum(tl.maximum(tl.fma(distance, scale, 0.5), 0.0), 1.0)
    return h


@triton.jit
def place(distance, itself, HARD: tl.constexpr):
    """What a row counts in the ranking of another: 1 above it, h(0) where it ties, 1 as itself."""
    if HARD:
        counted = tl.where(distance >= 0.0, 1.0, 0.0).to(tl.float64)
    else:
        counted = tl.where((distance > 0.0) | itself, 1.0, tl.where(distance == 0.0, 0.5, 0.0)).to(tl.float64)
    return counted


@triton.jit(do_not_specialize=["P"])
def among_rows_kernel(
    rows_ptr, values_ptr, out_ptr, P, delta: tl.float64, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr
):
    """Program b: block b of the rows against all rows -> out[0 … 2, rows of b]: sums of h, of h v, of v ranked."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows_ptr + tl.minimum(index, P - 1))
    count = tl.zeros([ROWS, COLUMNS], tl.float64)
    soft = tl.zeros([ROWS, COLUMNS], tl.float64)
    ranked = tl.zeros([ROWS, COLUMNS], tl.float64)
    poison = tl.zeros([COLUMNS], tl.float64)
    scale = 0.0 if HARD else 0.5 / delta
    for begin in range(0, P, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        x = tl.load(rows_ptr + column, mask=column < P, other=float("-inf"))
        value = tl.load(values_ptr + column, mask=column < P, other=0.0)
        poison += value * 0.0
        distance = x[None, :] - row[:, None]
        h = step(distance, scale, HARD)
        count += h
        soft += h * value[None, :]
        ranked += place(distance, column[None, :] == index[:, None], HARD) * value[None, :]
    of_rows = (tl.load(rows_ptr) + tl.load(rows_ptr + P - 1)) * 0.0
    of_both = of_rows + tl.sum(poison, axis=0)
    tl.store(out_ptr + index, tl.sum(count, axis=1) + of_rows, mask=index < P)
    tl.store(out_ptr + P + index, tl.sum(soft, axis=1) + of_both, mask=index < P)
    tl.store(out_ptr + 2 * P + index, tl.sum(ranked, axis=1) + of_both, mask=index < P)


@triton.jit(do_not_specialize=["P"])
def below_rows_kernel(rows_ptr, weights_ptr, out_ptr, P, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HARD: tl.constexpr):
    """Program b: block b of the rows, the sum of the weights of those in whose ranking they count -> out[rows of b]."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.load(rows_ptr + tl.minimum(index, P - 1))
    acc = tl.zeros([ROWS, COLUMNS], tl.float64)
    poison = tl.zeros([COLUMNS], tl.float64)
    for begin in range(0, P, COLUMNS):
        other = begin + tl.arange(0, COLUMNS)
        row = tl.load(rows_ptr + other, mask=other < P, other=float("inf"))
        weight = tl.load(weights_ptr + other, mask=other < P, other=0.0)
        poison += weight * 0.0
        acc += place(x[:, None] - row[None, :], other[None, :] == index[:, None], HARD) * weight[None, :]
    bad = (tl.load(rows_ptr) + tl.load(rows_ptr + P - 1)) * 0.0 + tl.sum(poison, axis=0)  # rows ascend, NaN last
    tl.store(out_ptr + index, tl.sum(acc, axis=1) + bad, mask=index < P)


def runs_on(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device: a CUDA or ROCm GPU, or any under Triton's interpreter."""
    return device.type == "cuda" or not isinstance(matvec_kernel, triton.JITFunction)


def readable(tensor: Tensor | None) -> Tensor | None:
    """A tensor as a kernel reads it: contiguous, bool as bytes."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def parts(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Empty vectors in one allocation, each at an address that 16 bytes divide.

    Triton compiles a kernel again where an address is no longer, or not yet, divisible so: sizes change with P.
    """
    step = 16 // dtype.itemsize
    lengths = [-(-size // step) * step for size in sizes]
    whole = torch.empty(sum(lengths), dtype=dtype, device=device)
    return [part[:size] for part, size in zip(whole.split(lengths), sizes, strict=True)]


def matvec(rows: Tensor, columns: Tensor, weights: Tensor | None, delta: float) -> Tensor:
    """y_i = sum_j h(x_j - s_i) v_j; contract in :mod:`alrp_triton.operators`."""
    p, n, working = rows.numel(), columns.numel(), working_dtype(columns)
    tile = (FORWARD_TILE_AMD if torch.version.hip else FORWARD_TILE)[working]
    blocks = triton.cdiv(p, tile["ROWS"])
    tiles = triton.cdiv(n, tile["COLUMNS"])
    most = max(_SPLITS // blocks, 1 + n // 2**30)  # offsets within a split are 32-bit
    span = triton.cdiv(tiles, min(tiles, most)) * tile["COLUMNS"]
    splits = triton.cdiv(n, span)
    partial = torch.empty(splits, p, dtype=working, device=rows.device)
    with torch.cuda.device_of(rows):
        matvec_kernel[(blocks, splits)](
            rows, columns.contiguous(), readable(weights), partial, p, n, span, delta,
            HARD=delta == 0, num_warps=WARPS, **tile,
        )  # fmt: skip
    return partial.sum(0, dtype=torch.float64)


def rmatvec(rows: Tensor, weights: Tensor, columns: Tensor, mask: Tensor | None, delta: float) -> Tensor:
    """g_j = sum_i h(x_j - s_i) w_i; contract in :mod:`alrp_triton.operators`."""
    p, n, working, hard = rows.numel(), columns.numel(), working_dtype(columns), delta == 0
    tile = TRANSPOSE_TILE[working]
    scores, offsets, shares = parts((p + 1,) * 3, working, rows.device)
    out = torch.empty(columns.shape, dtype=columns.dtype, device=columns.device)
    with torch.cuda.device_of(rows):
        # In the loop over rows every instruction counts, so what belongs to a row is made here, once.
        prepare_kernel[(1,)](
            rows, weights, scores, offsets, shares, p, delta, ROWS=tile["ROWS"], BLOCK=PREPARE_BLOCK, HARD=hard,
            num_warps=WARPS,
        )  # fmt: skip
        rmatvec_kernel[(triton.cdiv(n, tile["COLUMNS"]),)](
            scores, offsets, shares, columns.contiguous(), readable(mask), out, p, n, delta, HARD=hard,
            num_warps=WARPS, **tile,
        )  # fmt: skip
    return out


def among_rows(rows: Tensor, values: Tensor, delta: float) -> Tensor:
    """Products of the rows' own matrix with 1 and v, and v ranked; contract in :mod:`alrp_triton.operators`."""
    p = rows.numel()
    out = rows.new_empty(3, p)
    with torch.cuda.device_of(rows):
        among_rows_kernel[(triton.cdiv(p, AMONG_TILE["ROWS"]),)](
            rows, values, out, p, delta, HARD=delta == 0, num_warps=WARPS, **AMONG_TILE
        )
    return out


def below_rows(rows: Tensor, weights: Tensor, delta: float) -> Tensor:
    """The transpose of the last of :func:`among_rows`; contract in :mod:`alrp_triton.operators`."""
    p = rows.numel()
    out = torch.empty_like(rows)
    with torch.cuda.device_of(rows):
        below_rows_kernel[(triton.cdiv(p, AMONG_TILE["ROWS"]),)](
            rows, weights, out, p, HARD=delta == 0, num_warps=WARPS, **AMONG_TILE
        )
    return out
