"""LRP as a metric of torchmetrics: collects boxes batch by batch and has a COCO package evaluate them."""

import contextlib
import importlib
import io
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ..boxes import TAU
from ..checks import check_bool, check_integer, check_number
from .coco import COCOEvaluation, LRPResult, coco_lrp, coco_olrp
from .images import BOX_FORMATS, BoxFormat, Image, annotations, read_entry, state_dtype, to_xywh

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.distributed import gather_all_tensors
except ImportError as missing:
    raise ImportError("OptimalLRP needs torchmetrics: pip install 'alrp-triton[metrics]'") from missing

Backend = Literal["faster_coco_eval", "pycocotools"]

_BACKENDS = {
    "faster_coco_eval": ("faster_coco_eval", "faster_coco_eval", "COCOeval_faster"),
    "pycocotools": ("pycocotools.coco", "pycocotools.cocoeval", "COCOeval"),
}
_COMPONENTS = {"": "lrp", "_loc": "localisation", "_fp": "false_positive", "_fn": "false_negative"}
# State -> argument of update, key there.
_STATES = {
    "detection_boxes": ("preds", "boxes"),
    "detection_scores": ("preds", "scores"),
    "detection_labels": ("preds", "labels"),
    "truth_boxes": ("target", "boxes"),
    "truth_labels": ("target", "labels"),
    "truth_iscrowd": ("target", "iscrowd"),
    "truth_area": ("target", "area"),
}


class OptimalLRP(Metric):
    """Optimal LRP (oLRP) of boxes with its components, averaged over classes; lower is better.

    ``update(preds, target)`` takes what torchmetrics' ``MeanAveragePrecision`` takes: lists with a dict for each image.

    - ``preds``: ``boxes`` (N, 4) floating, ``scores`` (N,) floating, ``labels`` (N,) integer.
    - ``target``: ``boxes`` (M, 4), ``labels`` (M,); optional ``iscrowd`` (M,) integer or bool, and ``area`` (M,), by
      which the sizes small, medium and large are told apart (0: the area of the box).

    Empty tensors may have any dtype. ``compute()`` returns tensors of the metric's dtype on its device, NaN where
    undefined: ``olrp``, ``olrp_loc``, ``olrp_fp``, ``olrp_fn``, each also with ``_small``, ``_medium``, ``_large``, see
    :class:`alrp_triton.metrics.LRPResult`. With ``score_threshold`` the same with ``lrp`` for ``olrp``. With
    ``class_metrics`` these by class, too, (C,), ``olrp_per_class`` and so on, and ``olrp_thresholds`` (C,) float64, the
    scores from which on to keep detections; ``classes`` (C,) int64 are the labels seen, ascending. If there is but one
    class, torchmetrics makes scalars of these.

    Synchronised over processes by torchmetrics, like any metric; processes may have different numbers of images.

    Args:
        box_format: ``"xyxy"``, ``"xywh"`` or ``"cxcywh"``.
        tau: IoU from which on a detection is true, in [0, 1).
        max_detections: detections counted for an image and class, the best first; COCO's 100.
        score_threshold: also compute LRP of the detections that score at least this.
        class_metrics: also return the results of the classes.
        backend: the package that matches, ``"faster_coco_eval"`` or ``"pycocotools"``.
        **kwargs: those of :class:`torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: an argument that means nothing. In ``update``: lists of different length, missing keys,
            wrong types, shapes and dtypes, values that are not finite, boxes of negative size.
        ImportError: the backend is not installed.

    Reference: Oksuz et al., ECCV 2018, arXiv:1807.01696; TPAMI 2021, arXiv:2011.10772.
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = False
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(
        self,
        *,
        box_format: BoxFormat = "xyxy",
        tau: float = TAU,
        max_detections: int = 100,
        score_threshold: float | None = None,
        class_metrics: bool = False,
        backend: Backend = "faster_coco_eval",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if box_format not in BOX_FORMATS:
            raise ValueError(f"box_format must be one of {', '.join(BOX_FORMATS)}, got {box_format!r}")
        if backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
        check_bool("class_metrics", class_metrics)
        self.tau = check_number("tau", tau, 0.0, 1.0, high_open=True)
        self.max_detections = check_integer("max_detections", max_detections, 1, 2**31 - 1)
        self.score_threshold = (
            None
            if score_threshold is None
            else check_number("score_threshold", score_threshold, -np.finfo(np.float64).max, np.inf)
        )
        self.box_format: BoxFormat = box_format
        self.class_metrics = class_metrics
        self.backend: Backend = backend
        _load(backend)
        for state in _STATES:
            self.add_state(state, default=[], dist_reduce_fx=None)

    def update(self, preds: Sequence[Image], target: Sequence[Image]) -> None:
        """Add images; see the class. Nothing is added if anything is wrong."""
        for name, images in (("preds", preds), ("target", target)):
            if not isinstance(images, Sequence):
                raise TypeError(f"{name} must be a sequence of dicts, one an image, got {type(images).__name__}")
        if len(preds) != len(target):
            raise ValueError(f"preds and target must have one length, got {len(preds)} and {len(target)}")
        images = {"preds": preds, "target": target}
        values = {
            state: [
                read_entry(f"{name}[{number}]", image, key, self.box_format, self.device)
                for number, image in enumerate(images[name])
            ]
            for state, (name, key) in _STATES.items()
        }
        for state, tensors in values.items():
            self._state(state).extend(tensors)

    def compute(self) -> dict[str, Tensor]:
        """The results of all images so far; see the class."""
        evaluation = self._evaluation()
        results = {"olrp": coco_olrp(evaluation, tau=self.tau)}
        if self.score_threshold is not None:
            results["lrp"] = coco_lrp(evaluation, self.score_threshold, tau=self.tau)
        out: dict[str, Tensor] = {}
        for name, result in results.items():
            for suffix, component in _COMPONENTS.items():
                out[name + suffix] = self._tensor(getattr(result, component))
                for size, part in _sizes(result).items():
                    out[f"{name}{suffix}_{size}"] = self._tensor(getattr(part, component))
                if self.class_metrics:
                    out[f"{name}{suffix}_per_class"] = self._tensor(getattr(result.per_class, component))
        if self.class_metrics:
            # As they are: rounded up, a threshold would drop the detection that it is the score of.
            exact = state_dtype("scores", self.device)
            out["olrp_thresholds"] = torch.tensor(results["olrp"].per_class.threshold, dtype=exact, device=self.device)
            out["classes"] = torch.tensor(results["olrp"].classes, dtype=torch.int64, device=self.device)
        return out

    def _state(self, name: str) -> list[Tensor]:
        return cast("list[Tensor]", getattr(self, name))

    def _tensor(self, value: Any) -> Tensor:
        return torch.tensor(value, dtype=self.dtype, device=self.device)

    def evaluation(self) -> COCOEvaluation:
        """The finished COCO evaluation of all images, of all processes, for :func:`coco_olrp` and its kin."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self._evaluation()

    def _evaluation(self) -> COCOEvaluation:
        """The same of the images that are here, in the memory of the CPU."""
        dataset, evaluator, options = _load(self.backend)
        state = {name: [tensor.cpu() for tensor in self._state(name)] for name in _STATES}
        labels = torch.cat(
            [torch.zeros(0, dtype=torch.int64), *state["detection_labels"], *state["truth_labels"]]
        ).long()
        sets: list[Any] = []
        for side, extra, key in (("truth", "iscrowd", "iscrowd"), ("detection", "scores", "score")):
            coco = dataset()
            coco.dataset = {
                "images": [{"id": number} for number in range(len(state["truth_boxes"]))],
                "categories": [{"id": label, "name": str(label)} for label in labels.unique().tolist()],
                "annotations": annotations(
                    [to_xywh(boxes.double(), self.box_format) for boxes in state[f"{side}_boxes"]],
                    state[f"{side}_labels"],
                    state["truth_area"] if side == "truth" else None,
                    key,
                    state[f"{side}_{extra}"],
                ),
            }
            sets.append(coco)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            for coco in sets:
                coco.createIndex()
            evaluation = evaluator(*sets, iouType="bbox", **options)
            evaluation.params.iouThrs = np.array([self.tau])
            evaluation.params.maxDets = [self.max_detections]
            evaluation.evaluate()
        return evaluation

    def _sync_dist(
        self,
        dist_sync_fn: Callable[..., Any] = gather_all_tensors,
        process_group: Any | None = None,
    ) -> None:
        """Gather each state in one piece and cut it into images again.

        torchmetrics gathers a list tensor by tensor, which never ends where processes have different numbers of images.
        """
        lengths: dict[str, list[Tensor]] = {}
        for state, (_, key) in _STATES.items():
            tensors = self._state(state)
            empty = torch.zeros(
                (0, 4) if key == "boxes" else 0, dtype=state_dtype(key, self.device), device=self.device
            )
            lengths[state] = [torch.tensor([len(tensor) for tensor in tensors], dtype=torch.int64, device=self.device)]
            setattr(self, state, [torch.cat([empty, *tensors])])
        super()._sync_dist(dist_sync_fn, process_group)
        for state in _STATES:
            counts = dist_sync_fn(lengths[state][0], group=process_group or self.process_group)
            pieces = zip(self._state(state), counts, strict=True)
            setattr(self, state, [image for all_, count in pieces for image in all_.split(count.tolist())])


def _sizes(result: LRPResult) -> dict[str, LRPResult]:
    return {size: part for size, part in result.by_size.items() if size != "all"}


def _load(backend: Backend) -> tuple[Any, Any, dict[str, bool]]:
    """The package's dataset and evaluator, and what the evaluator must be told to keep its matches."""
    home, evaluator_home, evaluator = _BACKENDS[backend]
    try:
        dataset = importlib.import_module(home).COCO
        return (
            dataset,
            getattr(importlib.import_module(evaluator_home), evaluator),
            {"separate_eval": True} if backend == "faster_coco_eval" else {},
        )
    except ImportError as error:
        raise ImportError(
            f"backend {backend!r} is not installed: pip install {home.partition('.')[0].replace('_', '-')}"
        ) from error
