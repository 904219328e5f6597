"""Localisation errors, by hand and with torchvision's losses."""

import pytest
import torch

from alrp_triton import giou_localisation_error, localisation_error
from tests.support.compare import assert_near


def test_by_hand() -> None:
    iou = torch.tensor([1.0, 0.75, 0.5, 0.0])
    assert_near(localisation_error(iou), [0, 0.5, 1, 2], 1e-7)
    assert_near(localisation_error(iou, tau=0.7), [0, 0.25 / 0.3, 0.5 / 0.3, 1 / 0.3], 1e-6)
    assert_near(localisation_error(iou, tau=0), [0, 0.25, 0.5, 1], 1e-7)
    assert_near(giou_localisation_error(torch.tensor([0.0, 0.5, 1.0, 2.0])), [0, 0.5, 1, 2], 1e-7)


def test_shape_dtype_and_gradient() -> None:
    for function, slope in ((localisation_error, -2.0), (giou_localisation_error, 1.0)):
        value = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
        error = function(value)
        assert error.shape == value.shape
        assert error.dtype == value.dtype
        error.sum().backward()
        assert value.grad is not None
        assert_near(value.grad, torch.full((3, 4), slope), 1e-12)
    assert localisation_error(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert localisation_error(torch.zeros(0)).shape == (0,)


def test_with_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is the demo's, not the package's")
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    half = torch.tensor([[0.0, 0.0, 10.0, 5.0]])  # IoU 0.5, and the hull is the truth: GIoU 0.5
    apart = torch.tensor([[20.0, 0.0, 30.0, 10.0]])  # IoU 0, hull 300, union 200: GIoU -1/3
    for boxes, from_iou, from_giou in ((truth, 0, 0), (half, 1, 0.5), (apart, 2, 4 / 3)):
        assert_near(localisation_error(ops.box_iou(boxes, truth)), [[from_iou]], 1e-5)
        assert_near(giou_localisation_error(ops.generalized_box_iou_loss(boxes, truth)), [from_giou], 1e-5)
