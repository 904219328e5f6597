"""Every misuse is an error that names the argument and what was seen, before any work is done."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import alrp_triton
from alrp_triton import (
    ALRPLoss,
    SelfBalance,
    alrp_loss,
    ap_loss,
    giou_localisation_error,
    localisation_error,
    rank_sort_loss,
)

GOOD: dict[str, Any] = {
    "logits": torch.zeros(6),
    "targets": torch.tensor([1, 0, 0, -1, 1, 0]),
    "box_errors": torch.zeros(2),
}
CLASSES: dict[str, Any] = {
    "logits": torch.zeros(4, 3),
    "targets": torch.tensor([0, 3, -1, 2]),
    "box_errors": torch.zeros(2),
}


AP: dict[str, Any] = {"logits": torch.zeros(6), "targets": torch.tensor([1, 0, 0, -1, 1, 0])}
GRADED: dict[str, Any] = {"logits": torch.zeros(6), "targets": torch.tensor([0.5, 0, 0, -1, 1, 0])}


# What is passed, what is wrong with it, and what the error says.
Misuse = tuple[dict[str, Any], dict[str, Any], type[Exception], str]
OF_ALRP: list[Misuse] = [
    (GOOD, {"logits": [0.0]}, TypeError, "logits must be a torch.Tensor, got list"),
    (GOOD, {"logits": torch.zeros(6, dtype=torch.int64)}, TypeError, r"logits must be float16.*got int64 \(6,\) on cpu"),
    (GOOD, {"logits": torch.zeros(6).to_sparse()}, TypeError, "logits must be a dense .* tensor, got layout torch.sparse"),
    (GOOD, {"logits": torch.zeros(6, dtype=torch.complex64)}, TypeError, "logits must be float16.*got complex64"),
    (GOOD, {"targets": None}, TypeError, "targets must be a torch.Tensor, got NoneType"),
    (GOOD, {"targets": torch.zeros(5)}, ValueError, r"targets must have the shape of logits, \(6,\).*got \(5,\)"),
    (GOOD, {"targets": torch.zeros(6, dtype=torch.complex64)}, TypeError, "targets must be integer, bool"),
    (GOOD, {"targets": torch.tensor([1, 0, 2, -1, 1, 7])}, ValueError, r"dense targets must be 1 .*got \[2, 7\] among 2"),
    (GOOD, {"targets": torch.tensor([1, 0, 0.5, -1, 1, 0])}, ValueError, r"dense targets .*got \[0.5\] among 1"),
    (GOOD, {"targets": torch.tensor([1, 0, math.nan, -1, 1, 0])}, ValueError, r"dense targets .*got \[nan\] among 1"),
    (GOOD, {"targets": torch.tensor([1, 0, 255, 0, 1, 0], dtype=torch.uint8)}, ValueError, r"got \[255\]"),
    (GOOD, {"background": 3}, ValueError, "background and ignore_index belong to class-index targets; got background=3"),
    (GOOD, {"ignore_index": -100}, ValueError, "belong to class-index targets; got .*ignore_index=-100"),
    (GOOD, {"box_errors": 0.5}, TypeError, "box_errors must be a torch.Tensor, got float"),
    (GOOD, {"box_errors": torch.zeros(2, 1)}, ValueError, r"box_errors must have shape \(P,\).*got \(2, 1\)"),
    (GOOD, {"box_errors": torch.zeros(2, dtype=torch.int64)}, TypeError, "box_errors must be float16.*got int64"),
    (GOOD, {"box_errors": torch.zeros(3)}, ValueError, "got 3 box_errors, but targets mark 2 positives"),
    (GOOD, {"box_errors": torch.zeros(1)}, ValueError, "got 1 box_errors, but targets mark 2 positives"),
    (GOOD, {"box_errors": torch.zeros(0)}, ValueError, "got 0 box_errors, but targets mark 2 positives"),
    (GOOD, {"box_errors": torch.zeros(2, device="meta")}, ValueError, "one device, got logits on cpu, box_errors on meta"),
    (GOOD, {"targets": torch.zeros(6, device="meta")}, ValueError, "one device, got logits on cpu, targets on meta"),
    (GOOD, {"targets": torch.zeros(6, dtype=torch.float8_e4m3fn)}, TypeError, "targets must be integer, bool, float16.*got float8"),
    (GOOD, {"delta": 10**400}, ValueError, "delta must be within the range of a float"),
    (CLASSES, {"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    (CLASSES, {"background": 2**70}, ValueError, "background must be at least .* got 1180591620717411303424"),
    (CLASSES, {"ignore_index": 3}, ValueError, "ignore_index must differ from the number of classes.*both are 3"),
    (CLASSES, {"targets": torch.tensor([0, 3, 255, 2], dtype=torch.uint8)}, ValueError, r"got \[255\]"),
    (GOOD, {"delta": -0.1}, ValueError, "delta must be at least 0 and finite, got -0.1"),
    (GOOD, {"delta": math.nan}, ValueError, "delta must be .*got nan"),
    (GOOD, {"delta": math.inf}, ValueError, "delta must be .*got inf"),
    (GOOD, {"delta": 1e-300}, ValueError, r"delta must be 0 or between 2\*\*-126 and 2\*\*125, got 1e-300"),
    (GOOD, {"delta": "1"}, TypeError, "delta must be a real number, got str"),
    (GOOD, {"delta": True}, TypeError, "delta must be a real number, got bool"),
    (GOOD, {"delta": torch.tensor(1.0)}, TypeError, "delta must be a real number, got Tensor"),
    (GOOD, {"eps": -1e-5}, ValueError, "eps must be at least 0 and finite, got -1e-05"),
    (GOOD, {"eps": math.nan}, ValueError, "eps must be .*got nan"),
    (GOOD, {"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'torch', 'numba', .* got 'cuda'"),
    (CLASSES, {"targets": torch.tensor([0, 3, -1, 4])}, ValueError, r"a class from 0 to 2, 3 \(background\) or -1 .*got \[4\]"),
    (CLASSES, {"targets": torch.tensor([0, 3, -2, 2])}, ValueError, r"got \[-2\] among 1"),
    (CLASSES, {"targets": torch.tensor([0.0, 3.0, -1.0, 2.0])}, TypeError, "class-index targets must have an integer dtype"),
    (CLASSES, {"targets": torch.tensor([True, False, True, True])}, TypeError, "must have an integer dtype, got bool"),
    (CLASSES, {"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"without its last dimension.*got \(3,\)"),
    (CLASSES, {"background": -1}, ValueError, "background and ignore_index must differ, both are -1"),
    (CLASSES, {"background": 1.0}, TypeError, "background must be an int, got float"),
    (CLASSES, {"ignore_index": True}, TypeError, "ignore_index must be an int, got bool"),
    (CLASSES, {"box_errors": torch.zeros(4)}, ValueError, "got 4 box_errors, but targets mark 2 positives"),
    (GOOD, {"logits": torch.zeros(6, device="meta")}, ValueError, "one device, got logits on meta, box_errors on cpu"),
    (GOOD, {"logits": torch.nested.as_nested_tensor([torch.zeros(6)], layout=torch.jagged)}, TypeError, "logits must be a dense .* got a nested tensor"),
    (GOOD, {"targets": torch.zeros(6).to_sparse()}, TypeError, "targets must be a dense .* tensor"),
    (GOOD, {"box_errors": torch.zeros(2, dtype=torch.float8_e5m2)}, TypeError, "box_errors must be float16.*got float8"),
    (GOOD, {"eps": "1e-5"}, TypeError, "eps must be a real number, got str"),
    (GOOD, {"eps": None}, TypeError, "eps must be a real number, got NoneType"),
    (GOOD, {"eps": math.inf}, ValueError, "eps must be at least 0 and finite, got inf"),
    (GOOD, {"delta": None}, TypeError, "delta must be a real number, got NoneType"),
    (GOOD, {"delta": 1j}, TypeError, "delta must be a real number, got complex"),
    (GOOD, {"backend": None}, ValueError, "backend must be one of .* got None"),
    (GOOD, {"groups": [0, 0]}, TypeError, "groups must be a torch.Tensor, got list"),
    (GOOD, {"groups": torch.zeros(5, dtype=torch.int64)}, ValueError, r"groups must have a shape that the shape of logits, \(6,\), begins with.*got \(5,\)"),
    (GOOD, {"groups": torch.zeros(6, 1, dtype=torch.int64)}, ValueError, r"groups must have a shape .* got \(6, 1\)"),
    (GOOD, {"groups": torch.zeros(6)}, TypeError, "groups must have an integer dtype, got float32"),
    (GOOD, {"groups": torch.zeros(6, dtype=torch.bool)}, TypeError, "groups must have an integer dtype, got bool"),
    (GOOD, {"groups": torch.zeros(6, dtype=torch.int64, device="meta")}, ValueError, "one device, got logits on cpu, groups on meta"),
    (GOOD, {"groups": torch.zeros(6, dtype=torch.int64).to_sparse()}, TypeError, "groups must be a dense"),
    (CLASSES, {"groups": torch.zeros(3, dtype=torch.int64)}, ValueError, r"such as \(4,\); got \(3,\)"),
    (GOOD, {"process_group": 0}, TypeError, "process_group must be a torch.distributed.ProcessGroup, 'world' or None, got int"),
    (GOOD, {"process_group": "gloo"}, TypeError, "process_group must be .* got 'gloo'"),
    (GOOD, {"process_group": "world"}, ValueError, "process_group='world' needs torch.distributed.init_process_group"),
    (GOOD, {"process_group": dist.GroupMember.NON_GROUP_MEMBER}, ValueError, "process_group must be one that this process is a member of"),
    (GOOD, {"gradient_reduction": "none"}, ValueError, "gradient_reduction must be 'mean' or 'sum', got 'none'"),
    (GOOD, {"logits": [torch.zeros(4), torch.zeros(2)]}, TypeError, r"logits must be one torch.Tensor, of all levels and images, .* got a list of 2: concatenate them"),
    (GOOD, {"targets": (torch.zeros(4), torch.zeros(2))}, TypeError, "targets must be one torch.Tensor, of all levels .* got a tuple of 2: concatenate"),
    (GOOD, {"reduction": "sum"}, TypeError, "a ranking has no reduction, got reduction='sum': each loss is the mean over its positives"),
    (CLASSES, {"background": 0, "targets": torch.tensor([0, 3, -1, 2])}, ValueError, r"got \[3\] among 1 .*; labels from 1 to 3, with 0 for background, are torch.where\(labels > 0, labels - 1, .* here, without background="),
    (GOOD, {"gradient_reduction": None}, ValueError, "gradient_reduction must be 'mean' or 'sum', got None"),
]  # fmt: skip
OF_FAMILY: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any], type[Exception], str]] = [
    (ap_loss, AP, {"logits": [0.0]}, TypeError, "logits must be a torch.Tensor, got list"),
    (ap_loss, AP, {"targets": torch.zeros(5)}, ValueError, r"targets must have the shape of logits, \(6,\)"),
    (ap_loss, AP, {"targets": torch.full((6,), 3)}, ValueError, r"dense targets must be 1 .*got \[3\] among 6"),
    (ap_loss, AP, {"interpolate": 1}, TypeError, "interpolate must be True or False, got int"),
    (ap_loss, AP, {"delta": -1}, ValueError, "delta must be at least 0"),
    (ap_loss, AP, {"num_positives": 3}, ValueError, "num_positives is 3, but targets mark 2 positives"),
    (ap_loss, AP, {"num_positives": -1}, ValueError, "num_positives must be at least 0 and at most 6, got -1"),
    (ap_loss, AP, {"num_positives": 2.0}, TypeError, "num_positives must be an int, got float"),
    (ap_loss, AP, {"reduction": "none"}, TypeError, "a ranking has no reduction, got reduction='none'"),
    (rank_sort_loss, GRADED, {"reduction": None}, TypeError, "a ranking has no reduction, got reduction=None"),
    (ap_loss, AP, {"backend": "gpu"}, ValueError, "backend must be one of"),
    (rank_sort_loss, GRADED, {"targets": torch.tensor([0.5, 0, 0, -1, 3.0, 0])}, ValueError, r"must be an IoU above 0 .*got \[3.0\]"),
    (rank_sort_loss, GRADED, {"targets": torch.tensor([0.5, 0, 0, -0.5, 1, 0])}, ValueError, r"must be an IoU .*got \[-0.5\] among 1"),
    (rank_sort_loss, GRADED, {"targets": torch.tensor([0.5, 0, 0, torch.nan, 1, 0])}, ValueError, r"must be an IoU .*got \[nan\]"),
    (rank_sort_loss, GRADED, {"logits": torch.zeros(6, 3)}, ValueError, r"targets without ious must have the shape of logits, \(6, 3\)"),
    (rank_sort_loss, GRADED, {"targets": AP["targets"]}, TypeError, "targets without ious hold the IoUs .* must be floating, got int64"),
    (rank_sort_loss, AP, {"ious": torch.tensor([1.5, -0.25])}, ValueError, r"ious must be in \[0, 1\], got \[1.5, -0.25\] among 2"),
    (rank_sort_loss, GRADED, {"ious": torch.rand(2)}, ValueError, r"dense targets must be 1 .*got \[0.5\] among 1"),
    (rank_sort_loss, AP, {"ious": torch.rand(3)}, ValueError, "got 3 ious, but targets mark 2 positives"),
    (rank_sort_loss, AP, {"ious": torch.rand(2, 1)}, ValueError, r"ious must have shape \(P,\)"),
    (rank_sort_loss, AP, {"ious": torch.ones(2, dtype=torch.int64)}, TypeError, "ious must be float16.*got int64"),
    (rank_sort_loss, AP, {"ious": [0.5, 0.5]}, TypeError, "ious must be a torch.Tensor, got list"),
    (rank_sort_loss, AP, {"ious": torch.rand(2), "num_positives": 2}, ValueError, "num_positives must not be given beside ious.*got 2"),
    (rank_sort_loss, GRADED, {"num_positives": 1}, ValueError, "num_positives is 1, but targets mark 2 positives"),
    (rank_sort_loss, GRADED, {"eps": -1e-3}, ValueError, "eps must be at least 0"),
]  # fmt: skip


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return [] if tensor.is_meta else tensor.untyped_storage().tolist()


@contextmanager
def left_alone(arguments: dict[str, Any]) -> Generator[None]:
    """The tensors among the arguments are what they were: the same numbers, never written to."""
    tensors = [
        value for value in arguments.values() if isinstance(value, torch.Tensor) and value.layout == torch.strided
    ]
    before = [(tensor._version, as_bytes(tensor)) for tensor in tensors]
    yield
    assert [(tensor._version, as_bytes(tensor)) for tensor in tensors] == before
    assert all(tensor.grad is None for tensor in tensors)


def test_the_battery_is_large() -> None:
    calls = {(id(base), repr(change)) for base, change, _, _ in OF_ALRP} | {
        (function.__name__, repr(change)) for function, _, change, _, _ in OF_FAMILY
    }
    assert len(calls) == len(OF_ALRP) + len(OF_FAMILY) >= 90


@pytest.mark.parametrize(("base", "change", "error", "message"), OF_ALRP)
def test_alrp_loss(base: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = base | change
    with left_alone(arguments), pytest.raises(error, match=message):
        alrp_loss(**arguments)
    settings = {k: v for k, v in arguments.items() if k not in GOOD and k != "groups"}
    with left_alone(arguments), pytest.raises(error, match=message):
        ALRPLoss(**settings)(*(arguments[k] for k in GOOD), groups=arguments.get("groups"))


@pytest.mark.parametrize(("function", "base", "change", "error", "message"), OF_FAMILY)
def test_ap_and_rank_sort(function: Callable[..., Any], base: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str) -> None:  # fmt: skip
    arguments = base | change
    with left_alone(arguments), pytest.raises(error, match=message):
        function(**arguments)
    if function is ap_loss or base is GRADED:
        function(**base)


def test_the_good_cases_are_good() -> None:
    for case in (GOOD, CLASSES):
        assert alrp_loss(**case).classification.isfinite()


@pytest.mark.parametrize("function", [localisation_error, giou_localisation_error], ids=["iou", "giou"])
def test_boxes(function: Any) -> None:
    name = "iou" if function is localisation_error else "giou_loss"
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got float"):
        function(0.5)
    with pytest.raises(TypeError, match=f"{name} must be float16.*got int64"):
        function(torch.tensor([1]))
    for tau in (1.0, -0.1, math.nan, 2):
        with pytest.raises(ValueError, match=f"tau must be at least 0 and less than 1, got {tau}"):
            function(torch.tensor([0.5]), tau)
    with pytest.raises(TypeError, match="tau must be a real number, got str"):
        function(torch.tensor([0.5]), "0.5")


def test_self_balance() -> None:
    for period, error in ((0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="period must be"):
            SelfBalance(period)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"initial_weight must be .* got nan"):
        SelfBalance(3, initial_weight=math.nan)
    balance = SelfBalance(3)
    with pytest.raises(TypeError, match=r"classification must be a torch\.Tensor, got float"):
        balance(0.5, torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"localisation must be 0-d, got shape \(2,\)"):
        balance(torch.tensor(0.5), torch.zeros(2))
    assert balance.steps == 0  # nothing was recorded


def test_triton_backend_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from alrp_triton import dispatch

    class NoGPU:
        @staticmethod
        def runs_on(device: torch.device) -> bool:
            return False

    monkeypatch.setattr(dispatch, "backend_module", {"triton_tiled": NoGPU}.__getitem__)
    monkeypatch.setattr(dispatch, "_triton_lacks", lambda: "")
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA or ROCm GPU, but the logits are on 'cpu'"):
        alrp_loss(**GOOD, backend="triton")


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "needs the package triton, which is not installed"), ("3.3.1", "needs triton 3.4 or newer.* found 3.3.1")],
)
def test_triton_that_is_not_there_or_old(version: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU then runs by default is torch's operations."""
    from alrp_triton import dispatch

    lacks = dispatch._triton_lacks.__wrapped__  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(dispatch, "_triton_lacks", lacks)
    found = None if version is None else ModuleSpec("triton", None)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: found)  # pyright: ignore
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: SimpleNamespace(__version__=version))  # pyright: ignore
    with pytest.raises(ValueError, match=f"backend='triton' {message}"):
        alrp_triton.alrp_loss(**GOOD, backend="triton")
    assert dispatch.resolve("auto", "cuda", 1000, 1000) == "torch"


@pytest.mark.parametrize("version", ["3.4.0", "3.10.0+git1a2b3c"])
def test_triton_that_is_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alrp_triton import dispatch

    lacks = dispatch._triton_lacks.__wrapped__  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(dispatch, "_triton_lacks", lacks)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: ModuleSpec("triton", None))  # pyright: ignore
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: SimpleNamespace(__version__=version))  # pyright: ignore
    assert dispatch.resolve("auto", "cuda", 1, 1) == "triton_tiled"
