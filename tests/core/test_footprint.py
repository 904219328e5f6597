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
from tests.conftest import or_skip
from tests.support.inside import Inside, replace_kernels

N, P, CLASSES = 8000, 20, 80


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


def record(
    backend: Backend, form: str, device: str, logits: int = N, groups: int | None = None
) -> tuple[Recorder, Recorder]:
    """Forward, and backward."""
    shape = (logits // CLASSES, CLASSES)
    scores = torch.randn(shape, device=device, requires_grad=True)
    errors = torch.rand(P, device=device, requires_grad=True)
    indices = torch.full((shape[0],), CLASSES, device=device)
    indices[:: shape[0] // P][:P] = 3
    targets = indices
    if form != "classes":
        dense = torch.nn.functional.one_hot(indices, CLASSES + 1)[:, :CLASSES].contiguous()
        targets = dense.byte() if form == "bytes" else dense
    apart = None if groups is None else torch.arange(shape[0], device=device) % groups
    forward, backward = Recorder(logits), Recorder(logits)
    with gpu_path(forward):
        out = alrp_loss(scores, targets, errors, groups=apart, backend=backend)
    one = torch.ones((), device=device)
    with gpu_path(backward):
        torch.autograd.grad([out.classification, out.localisation], [scores, errors], [one, one])
    return forward, backward


@pytest.mark.parametrize("form", ["bytes", "dense", "classes"])
@pytest.mark.parametrize(
    ("kernels", "groups"), [("triton_tiled", None), ("triton_binned", None), ("triton_binned", 1), ("triton_binned", 5)]
)
def test_footprint(kernels: Backend, groups: int | None, form: str, device: str) -> None:
    """At most 8 launches of ours and 8 operations of torch, whatever the groups.

    Of size N: the gradient; and a mask, if the targets cannot stand for it and are dense. Tables are made once.
    """
    forward, backward = record(kernels, form, device, groups=groups)
    marks = {"bytes": [], "dense": [1], "classes": []}[form]
    assert forward.of_size_n() == marks
    assert backward.of_size_n() == [4]
    find = ["classes_kernel" if form == "classes" else "dense_kernel", "order_kernel"]
    if kernels == "triton_tiled":
        assert forward.launches == [*find, "matvec_kernel", "terms_kernel"]
        assert backward.launches == ["prepare_kernel", "rmatvec_kernel"]
    else:
        assert forward.launches == [*find, "tables_kernel", "count_kernel", "sums_kernel", "terms_kernel"]
        assert backward.launches == ["lines_kernel", "evaluate_kernel"]
    # Groups are copied, memory is made 0, and it is asserted that targets are sound.
    asserts = 2 * ["_assert_async" if device == "cuda" else "is_nonzero"]
    of_product = ["sum"] if kernels == "triton_tiled" else ["zero_", "zeros"]
    assert forward.operations == [*([] if groups is None else ["_to_copy"]), "zeros", *asserts, *of_product]
    assert backward.operations == ["index_copy_"]


@pytest.mark.parametrize(("groups", "more"), [(None, 7), (5, 12)])
def test_torch_sorts_many_positives(
    groups: int | None, more: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In so many operations, and one launch less; on a GPU one more gives all NaN one sign."""
    or_skip("triton")
    from alrp_triton.backends import triton_sort

    few, _ = record("triton_binned", "classes", device, groups=groups)
    monkeypatch.setattr(triton_sort, "MAX_COUNT", P - 1)
    many, _ = record("triton_binned", "classes", device, groups=groups)
    assert [name for name in few.launches if name != "order_kernel"] == many.launches
    assert len(many.operations) - len(few.operations) == more + (device == "cuda")


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_no_mask_on_a_cpu(kernels: Backend) -> None:
    """With class indices a mark for each anchor; beside it the gradient alone is of size N."""
    forward, backward = record(kernels, "classes", "cpu", logits=4_000_000)
    assert forward.of_size_n() == []
    assert backward.of_size_n() == [4]


class _Aligned:
    """A kernel that tells by what Triton specialises: which arguments are at addresses that 16 bytes divide; constants."""

    def __init__(self, kernel: Any, name: str, seen: set[tuple[Any, ...]]) -> None:
        self.kernel, self.name, self.seen = kernel, name, seen

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            tensors = (value for value in args if isinstance(value, torch.Tensor))
            self.seen.add((self.name, *(value.data_ptr() % 16 == 0 for value in tensors), *sorted(kwargs.items())))
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
    assert len(seen[0]) >= 6
    assert all(of_step == seen[0] for of_step in seen), [of_step ^ seen[0] for of_step in seen]
