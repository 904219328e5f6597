"""What a step costs beside its arithmetic, on the GPU path: operations, kernel launches, and memory of size N.

Every operation that torch dispatches in forward + backward is recorded, those inside our own operators included, while
the Triton kernels run (in the interpreter where there is no GPU). Views cost nothing and are left out.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

# pyright: reportPrivateUsage=false
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss
from alrp_triton.dispatch import Backend
from tests.inside import Inside, replace_kernels

N, P = 6000, 20


class Recorder(Inside):
    """Names of operations and launches, and sizes in bytes of what they allocated."""

    def __init__(self, logits: int) -> None:
        super().__init__()
        self.logits = logits
        self.operations: list[str] = []
        self.launches: list[str] = []
        self.allocated: list[tuple[str, int]] = []
        self.known: dict[int, torch.UntypedStorage] = {}

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        for value in args:
            if isinstance(value, torch.Tensor):
                self.known[value.untyped_storage().data_ptr()] = value.untyped_storage()
        result = func(*args, **kwargs)
        if not func.is_view:
            if not func._opname.startswith(("empty", "new_empty", "promote_types")):  # which launch nothing
                self.operations.append(func._opname)
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.known:
                    self.known[value.untyped_storage().data_ptr()] = value.untyped_storage()
                    self.allocated.append((func._opname, value.untyped_storage().nbytes()))
        return result

    def of_size_n(self) -> list[int]:
        """Bytes for each of the N logits of every allocation that grows with N."""
        return [size // self.logits for _, size in self.allocated if size >= self.logits // 2]


@contextmanager
def gpu_path(recorder: Recorder) -> Generator[None]:
    """Every launch recorded; what the interpreter does for itself is not."""
    with pytest.MonkeyPatch.context() as monkeypatch, recorder:
        replace_kernels(monkeypatch, lambda kernel, name: _Recorded(kernel, name, recorder))
        yield


class _Recorded:
    """A kernel that tells of its launch."""

    def __init__(self, kernel: Any, name: str, recorder: Recorder) -> None:
        self.kernel, self.name, self.recorder = kernel, name, recorder

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.recorder.launches.append(self.name)
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


def record(backend: Backend, form: str, device: str, logits: int = N) -> tuple[Recorder, Recorder]:
    """Forward, and backward."""
    classes = 8 if logits == N else 80
    shape = (logits // classes, classes)
    scores = torch.randn(shape, device=device, requires_grad=True)
    errors = torch.rand(P, device=device, requires_grad=True)
    indices = torch.full((shape[0],), classes, device=device)
    indices[:P] = 3
    targets = indices
    if form != "classes":
        dense = torch.nn.functional.one_hot(indices, classes + 1)[:, :classes].contiguous()
        targets = dense.byte() if form == "bytes" else dense
    forward, backward = Recorder(logits), Recorder(logits)
    with gpu_path(forward):
        out = alrp_loss(scores, targets, errors, backend=backend)
    one = torch.ones((), device=device)
    with gpu_path(backward):
        torch.autograd.grad([out.classification, out.localisation], [scores, errors], [one, one])
    return forward, backward


@pytest.mark.parametrize("form", ["bytes", "dense", "classes"])
@pytest.mark.parametrize(("kernels", "in_forward", "in_backward"), [("triton_tiled", 11, 6), ("triton_binned", 12, 6)])
def test_footprint(kernels: Backend, in_forward: int, in_backward: int, form: str, device: str) -> None:
    """Of size N: one mask, if the targets cannot stand for it, one gradient, and each read by as few kernels as it takes.

    Tables are made once. Of size P: few operations. (On a GPU four more of size 1, which assert that targets are sound.)
    """
    forward, backward = record(kernels, form, device)
    assert forward.of_size_n() == ([] if form == "bytes" else [1])
    assert backward.of_size_n() == [4]
    # Indices of the positives, and their scores, are sorted.
    find = ["classes_kernel" if form == "classes" else "dense_kernel", "sort_kernel", "sort_kernel"]
    terms = ["terms_kernel"]
    if kernels == "triton_tiled":
        assert forward.launches == [*find, "matvec_kernel", *terms]
        assert backward.launches == ["prepare_kernel", "rmatvec_kernel"]
    else:
        assert forward.launches == [*find, "knots_kernel", "lut_kernel", "count_kernel", "rows_kernel", *terms]
        assert backward.launches == ["lines_kernel", "evaluate_kernel"]
    in_forward += 4 * (device == "cuda")
    assert len(forward.operations) <= in_forward, forward.operations
    assert len(backward.operations) <= in_backward, backward.operations


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_no_mask_on_a_cpu(kernels: Backend) -> None:
    """With class indices a mark for each anchor; beside it the gradient alone is of size N."""
    forward, backward = record(kernels, "classes", "cpu", logits=4_000_000)  # 80 of an anchor
    assert forward.of_size_n() == []
    assert backward.of_size_n() == [4]


class _Aligned:
    """A kernel that tells which of its arguments are at addresses that 16 bytes divide, by which Triton specialises."""

    def __init__(self, kernel: Any, name: str, seen: set[tuple[Any, ...]]) -> None:
        self.kernel, self.name, self.seen = kernel, name, seen

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            tensors = (value for value in args if isinstance(value, torch.Tensor))
            self.seen.add((self.name, *(value.data_ptr() % 16 == 0 for value in tensors)))
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize("loss", ["alrp", "ap", "rank_sort"])
@pytest.mark.parametrize("backend", ["triton_tiled", "triton_binned"])
def test_no_number_of_positives_compiles_a_kernel_again(backend: Backend, loss: str, device: str) -> None:
    """P changes in each step of a training, and a kernel that Triton compiles again stops it for a second."""
    seen: list[set[tuple[Any, ...]]] = []
    for positives in range(40, 44):
        logits = torch.randn(600, 4, device=device, requires_grad=True)
        targets = torch.full((600,), 4, device=device)
        targets[:positives] = 1
        values = torch.rand(positives, device=device) * 0.9 + 0.05
        of_step = set[tuple[Any, ...]]()
        with pytest.MonkeyPatch.context() as monkeypatch:
            replace_kernels(monkeypatch, lambda kernel, name, of=of_step: _Aligned(kernel, name, of))
            if loss == "alrp":
                alrp_loss(logits, targets, values.requires_grad_(), backend=backend).total.backward()
            elif loss == "ap":
                ap_loss(logits, targets, num_positives=positives, backend=backend).backward()
            else:
                rank_sort_loss(logits, targets, values, backend=backend).total.backward()
        seen.append(of_step)
    assert len(seen[0]) >= 7
    assert all(of_step == seen[0] for of_step in seen), [of_step ^ seen[0] for of_step in seen]
