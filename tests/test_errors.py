"""Every misuse is an error that names the argument and what was seen, before any work is done."""

import math
from typing import Any

import pytest
import torch

import alrp_triton
from alrp_triton import ALRPLoss, SelfBalance, alrp_loss, giou_localisation_error, localisation_error

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


@pytest.mark.parametrize(
    ("base", "change", "error", "message"),
    [
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
    ],
)  # fmt: skip
def test_alrp_loss(base: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = base | change
    with pytest.raises(error, match=message):
        alrp_loss(**arguments)
    settings = {k: v for k, v in arguments.items() if k not in GOOD}
    with pytest.raises(error, match=message):
        ALRPLoss(**settings)(*(arguments[k] for k in GOOD))


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

    monkeypatch.setattr(dispatch, "_module", {"triton_tiled": NoGPU}.__getitem__)
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA or ROCm GPU, but the logits are on 'cpu'"):
        alrp_loss(**GOOD, backend="triton")
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="backend='triton' needs the package triton, which is not installed"):
        alrp_triton.alrp_loss(**GOOD, backend="triton")
