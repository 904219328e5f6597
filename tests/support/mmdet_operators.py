"""mmdet without mmcv's compiled operators: those of torchvision stand in for the few that tests run.

mmdet asks for them at import. Where they are not built (mmcv-lite), all others are empty classes. Skips where mmdet is
missing. To be imported before mmdet.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for _needed in ("mmengine", "mmcv"):
    pytest.importorskip(
        _needed, reason="mmdet, mmengine and mmcv are a user's, not the package's", exc_type=ImportError
    )
ops = pytest.importorskip("torchvision.ops", reason="the integrations need torchvision", exc_type=ImportError)


class RoIAlign(nn.Module):
    def __init__(self, output_size: int, spatial_scale: float, sampling_ratio: int = 0) -> None:
        super().__init__()
        self.output_size = (output_size, output_size)  # mmdet asks for it
        self.settings = self.output_size, spatial_scale, sampling_ratio

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        return roi_align(features, rois, *self.settings)


def roi_align(
    features: Tensor, rois: Tensor, size: Any, scale: float, ratio: int, mode: str = "avg", aligned: bool = True
) -> Tensor:
    assert mode == "avg"
    return ops.roi_align(features, rois, size, scale, ratio, aligned)


def batched_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, nms_cfg: Mapping[str, Any], class_agnostic: bool = False
) -> tuple[Tensor, Tensor]:
    assert nms_cfg["type"] == "nms"
    kept = ops.batched_nms(
        boxes, scores, torch.zeros_like(groups) if class_agnostic else groups, nms_cfg["iou_threshold"]
    )
    return torch.cat([boxes[kept], scores[kept, None]], 1), kept


class Operators(types.ModuleType):
    """``mmcv.ops`` or a module in it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        stand_ins = {"RoIAlign": RoIAlign, "roi_align": roi_align, "batched_nms": batched_nms}
        return stand_ins.get(name) or type(name, (nn.Module,), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if f"{fullname}.".startswith("mmcv.ops."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Operators(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of mmengine, mmcv and mmdet, which are older than what they import
    if importlib.util.find_spec("mmcv._ext") is None:
        sys.meta_path.insert(0, Finder())
    pytest.importorskip("mmdet.models", reason="mmdet is a user's, not the package's", exc_type=ImportError)
