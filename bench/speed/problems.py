"""What is timed: seeded random problems of stated sizes and score distributions, and the sizes of known detectors."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

PRIOR = -4.595  # -log(99): what a detector's classification bias starts with

# Mean and standard deviation of the negatives' scores, and of the positives'.
SCORES = {
    "random normal": ((-1.0, 1.0), (0.0, 1.0)),
    "initialisation": ((PRIOR, 0.02), (PRIOR, 0.02)),
    "mid-training": ((-5.0, 1.5), (-1.5, 1.5)),
    "late": ((-8.0, 2.0), (1.5, 1.5)),
}
WORST = ("equal logits", "equal positives", "knots in one cell", "huge range")


class Size(NamedTuple):
    """A problem to be made, and the name of the group of sizes in which it is reported."""

    group: str
    anchors: int  # N: logits
    positives: int  # P
    delta: float = 1.0
    scores: str = "random normal"
    case: str = ""  # name of a detector


HEADLINE = (3_000_000, 1000)  # anchors, positives of the row of "anchors" that README shows


class Problem(NamedTuple):
    """Input of a loss."""

    logits: Tensor  # (N,) float32; as class indices go with them: (A, C)
    targets: Tensor  # (N,) int64, the dtype in which the published code passes them; class indices: (A,)
    box_errors: Tensor  # (P,) float32
    delta: float


def _cells(image: int, *strides: int) -> int:
    return sum((image // stride) ** 2 for stride in strides)


# 8 images of 512 x 512 (500, padded to the coarsest stride) a GPU, as the paper trains; COCO has 80 classes and 7.3
# objects an image, LVIS 1203 classes. P is an estimate: anchors assigned to an object times objects, rounded.
_IMAGES = 8
_HEAD = _cells(512, 8, 16, 32, 64, 128)
CASES = {
    "RetinaNet": (_IMAGES * _HEAD * 9 * 80, 800),  # 9 anchors a cell; about 14 of them an object
    "ATSS": (_IMAGES * _HEAD * 80, 800),  # 1 anchor a cell, 9 candidates a level
    "FCOS, FoveaBox": (_IMAGES * _HEAD * 80, 1500),  # points within an object: about 25
    "Faster R-CNN, RPN": (_IMAGES * _cells(512, 4, 8, 16, 32, 64) * 3, 400),  # 3 anchors a cell, one class
    "Faster R-CNN, head": (_IMAGES * 1000 * 80, 1200),  # 1000 proposals an image, 150 of them on an object
    "LVIS, ATSS": (_IMAGES * _HEAD * 1203, 1000),
    "DETR, a decoder layer": (_IMAGES * 300 * 80, 58),  # 300 queries an image, one of them an object; every layer ranks
}
CLASSES = {"Faster R-CNN, RPN": 1, "LVIS, ATSS": 1203}  # of the cases that have not COCO's 80


def sizes(quick: bool) -> list[Size]:
    """All sizes of a run on a CPU, by group."""
    if quick:
        return [Size("anchors", 10_000, 50), Size("anchors", 100_000, 50), Size("positives", 100_000, 200)]
    return [
        *(Size("anchors", n, 1000) for n in (10_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)),
        *(Size("positives", 1_000_000, p) for p in (10, 30, 100, 300, 1000, 2000, 4000)),
        *(Size("small", n, p) for n, p in product((1_000, 10_000, 30_000), (10, 50))),
        *(Size("delta", 1_000_000, 300, delta) for delta in (0.0, 0.01, 0.1, 0.5, 1.0, 2.0)),
        *(Size("scores", 1_000_000, 300, 1.0, scores) for scores in SCORES),
        *(Size("worst cases", 1_000_000, 3000, 1.0, scores) for scores in WORST),
        *(Size("family", *of) for of in ((100_000, 100), (1_000_000, 300), (3_000_000, 1000), (3_000_000, 4000))),
        *(Size("cases", *size, 1.0, "mid-training", case) for case, size in CASES.items()),
    ]


def make_problem(size: Size, device: torch.device, seed: int, ignored: int = 0) -> Problem:
    """Positives scattered among negatives, scores as ``size`` has them; box errors uniform in [0, 1)."""
    _, anchors, positives, delta, scores, _ = size
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same numbers on every device
    of_negatives, of_positives = SCORES.get(scores, SCORES["random normal"])
    logits = torch.randn(anchors, generator=generator).mul_(of_negatives[1]).add_(of_negatives[0])
    where = torch.randint(anchors, (2 * positives + 2 * ignored,), generator=generator).unique()
    where = where[torch.randperm(len(where), generator=generator)]
    if len(where) < positives + ignored:  # most are wanted
        where = torch.randperm(anchors, generator=generator)
    # Distinct, because the published loop leaves ties of positives to its sort.
    distinct = torch.randn(2 * positives, generator=generator).unique()
    distinct = distinct[torch.randperm(len(distinct), generator=generator)][:positives]
    logits[where[:positives]] = distinct * of_positives[1] + of_positives[0]
    targets = torch.zeros(anchors, dtype=torch.int64)
    targets[where[:positives]] = 1
    targets[where[positives : positives + ignored]] = -1
    box_errors = torch.rand(positives, generator=generator)
    if scores == "equal logits":
        logits.fill_(PRIOR)
    elif scores == "equal positives":
        logits[targets == 1] = 0.25
    elif scores == "knots in one cell":
        logits[where[0]] = 1e30
    elif scores == "huge range":
        logits *= 10.0 ** torch.randint(-30, 30, (anchors,), generator=generator)
    return Problem(
        logits.to(device).requires_grad_(), targets.to(device), box_errors.to(device).requires_grad_(), delta
    )


def classes_of(size: Size) -> int:
    """Classes C of a size in which anchors have class indices: those of its detector, else as many as leave anchors."""
    if size.case:
        return CLASSES.get(size.case, 80)
    return next(
        c for c in (80, 20, 5, 1) if size.anchors % c == 0 and (c == 1 or size.anchors // c >= 2 * size.positives)
    )


def draw_problem(size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
    """A problem of the kind that :func:`make_problem` makes, drawn on the device, with class indices as targets.

    Other numbers on other devices; logits ``(A, C)``, and of an anchor at most one logit is positive.
    """
    classes, generator = classes_of(size), torch.Generator(device).manual_seed(seed)
    anchors, count = size.anchors // classes, size.positives
    if anchors * classes != size.anchors or anchors < count:
        raise ValueError(f"{size.anchors} logits of {classes} classes are no anchors for {count} positives")
    of_negatives, of_positives = SCORES[size.scores]
    logits = torch.randn(size.anchors, generator=generator, device=device).mul_(of_negatives[1]).add_(of_negatives[0])
    where = torch.randperm(anchors, generator=generator, device=device)[:count]
    targets = torch.full((anchors,), classes, device=device)
    targets[where] = torch.randint(classes, (count,), generator=generator, device=device)
    scores = torch.randn(count, generator=generator, device=device).mul_(of_positives[1]).add_(of_positives[0])
    logits[where * classes + targets[where]] = scores
    box_errors = torch.rand(count, generator=generator, device=device)
    logits = logits.to(dtype).reshape(anchors, classes)
    return Problem(logits.requires_grad_(), targets, box_errors.requires_grad_(), size.delta)


def as_dense(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem, flat and with dense targets of a dtype; the logits are the same memory."""
    anchors, classes = problem.logits.shape
    targets = torch.zeros(anchors, classes, dtype=dtype, device=problem.logits.device)
    (where,) = torch.nonzero(problem.targets < classes, as_tuple=True)
    targets[where, problem.targets[where]] = 1
    return problem._replace(logits=problem.logits.detach().reshape(-1).requires_grad_(), targets=targets.reshape(-1))
