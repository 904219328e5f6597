"""The stages as operators of torch: schema, fake kernels, sizes that nobody knows before."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from alrp_triton.dispatch import Backend


def every_stage(
    backend: Backend, device: str, loss: str, form: str, grouped: bool, delta: float
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Each operator with the arguments that a loss hands it."""
    ops, classes = torch.ops.alrp_triton, 4
    logits = torch.randn(100, device=device)
    targets = torch.tensor([0, 3, 4, -1, 2] * 5, device=device)
    groups = torch.tensor([2, 0, 1, 2, 0], device=device) if grouped else None
    how = classes, 4, -1, False
    if form != "classes":
        dense = torch.nn.functional.one_hot(targets.clamp(0), 5)[:, :4].reshape(-1)
        targets, how = dense.to(torch.int8 if form == "bytes" else torch.int64), (None, 0, -1, False)
        classes = None
    count = 15 if form == "classes" else 20
    values = torch.rand(count, device=device)
    of_targets = logits, targets, values, groups, *how, True, count, "ious", "", backend
    yield ops.find, of_targets
    positives, marks, rows, row_values, row_groups, order = ops.find(*of_targets)
    marks, row_groups = targets.view(torch.uint8) if form == "bytes" else marks, row_groups if grouped else None
    of_logits = logits, marks, classes, groups
    yield ops.count, (rows, row_groups, *of_logits, delta, backend)
    false_positives, tables = ops.count(rows, row_groups, *of_logits, delta, backend)
    of_terms = loss, rows, row_groups, row_values, order, false_positives, delta, 1e-5, torch.float32, backend
    yield ops.terms, of_terms
    ranking, auxiliary, _, grad_positives, grad_per_fp = ops.terms(*of_terms)
    for incoming in (
        (ranking, auxiliary, None),
        (None, auxiliary, None),
        (ranking, None, auxiliary),
        (None, None, auxiliary),
    ):
        in_dtype = *incoming, torch.float64 if loss == "alrp" else torch.float32
        yield (
            ops.spread,
            (rows, row_groups, grad_per_fp, grad_positives, positives, *in_dtype, *of_logits, tables, delta, backend),
        )


# The step is a matter of the kernels, and of no shape or dtype.
@pytest.mark.parametrize(
    ("loss", "delta"), [("alrp", 1.0), ("alrp", 0.0), ("ap", 1.0), ("interpolated_ap", 1.0), ("rank_sort", 1.0)]
)
@pytest.mark.parametrize("form", ["classes", "bytes", "dense"])
def test_operators_pass_opcheck(loss: str, form: str, delta: float, backend: Backend, device: str) -> None:
    grouped = form == "dense" and backend != "triton_tiled"
    for operator, arguments in every_stage(backend, device, loss, form, grouped, delta):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("grouped", [False, True])
def test_operators_pass_opcheck_with_unknown_sizes(grouped: bool, backend: Backend, device: str) -> None:
    if grouped and backend == "triton_tiled":
        pytest.skip("it ranks one group")
    tests = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    for operator, arguments in every_stage(backend, device, "rank_sort", "classes", grouped, 1.0):
        if operator is not torch.ops.alrp_triton.count:  # it compares bits, and what is not used of the tables is any
            torch.library.opcheck(operator, arguments, test_utils=tests)
    unknown = torch.randn(100, device=device), torch.zeros(25, dtype=torch.int64, device=device), None, None
    arguments = *unknown, 4, 4, -1, False, False, None, "num_positives", "", backend
    torch.library.opcheck(torch.ops.alrp_triton.find, arguments, test_utils=tests[:2])
