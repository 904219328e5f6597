"""What is too long for CI: 50,000 steps on changing sizes, and one step on more logits than 32 bits can count.

``python -m bench soak`` and ``python -m bench large``; results go to bench/results/.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from alrp_triton import alrp_loss, ap_loss, rank_sort_loss

from .speed.timing import resident
from .tables import table

LARGE = (
    (300_000_000, torch.float32, "torch"),
    (300_000_000, torch.float32, "numba"),
    (2_200_000_000, torch.bfloat16, "numba"),
)


def _problem(generator: torch.Generator, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, targets with up to 300 positives (often few, sometimes none), their values, and groups."""

    def upto(high: int) -> int:
        return int(math.exp(float(torch.rand((), generator=generator)) * math.log(high)))

    anchors, positives = upto(most), upto(301) - 1
    logits = torch.randn(anchors, generator=generator)
    targets = torch.zeros(anchors, dtype=torch.int64)
    targets[torch.randperm(anchors, generator=generator)[:positives]] = 1
    values = torch.rand(int(targets.sum()), generator=generator)
    return logits, targets, values, torch.arange(anchors) * 4 // anchors


def soak(steps: int, most: int, seed: int) -> dict[str, Any]:
    """Forward + backward of all losses in turn, by torch and numba, with and without groups, on changing sizes."""
    generator, memory = torch.Generator().manual_seed(seed), dict[int, float]()
    begin = time.perf_counter()
    for step in tqdm(range(steps)):
        logits, targets, values, groups = _problem(generator, most)
        logits.requires_grad_()
        settings: dict[str, Any] = {"backend": ("torch", "numba")[step % 2], "delta": (1.0, 0.5, 0.0)[step // 2 % 3]}
        settings["groups"] = groups if step % 5 == 0 else None
        if step % 3 == 0:
            values.requires_grad_()
            out = alrp_loss(logits, targets, values, **settings)
            total = out.classification + out.localisation
        elif step % 3 == 1:
            total = ap_loss(logits, targets, **settings)
        else:
            total = sum(rank_sort_loss(logits, targets, values, **settings))
        assert isinstance(total, Tensor)
        total.backward()
        assert logits.grad is not None
        if not (total.isfinite() and logits.grad.isfinite().all() and 0 <= total <= 2):
            raise ArithmeticError(f"step {step}: the loss is {total}")
        if (step + 1) % max(steps // 50, 1) == 0:
            memory[step + 1] = round(resident("VmRSS") / 2**20, 1)
    return {"steps": steps, "most": most, "seed": seed, "seconds": time.perf_counter() - begin, "resident_mib": memory}


def _chunks(n: int, size: int = 1 << 24) -> list[slice]:
    return [slice(begin, min(begin + size, n)) for begin in range(0, n, size)]


def large(
    n: int, dtype: torch.dtype, backend: Any, seed: int, positives: int = 1000, device: str = "cpu"
) -> dict[str, Any]:
    """One step on n logits; ranks of some positives and gradients of some negatives against sums in float64 by hand."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(n, dtype=dtype, device=device)
    for part in _chunks(n):
        logits[part] = torch.randn(part.stop - part.start, generator=generator, device=device)
    # The last logit is a positive.
    where = torch.linspace(0, n - 1, positives, dtype=torch.float64).long().to(device)
    logits[where] += 1
    targets = torch.zeros(n, dtype=torch.int8, device=device)
    targets[where] = 1
    errors = torch.rand(positives, generator=generator, device=device, requires_grad=True)
    logits.requires_grad_()
    begin = now()
    out = alrp_loss(logits, targets, errors, backend=backend)
    middle = now()
    (out.classification + out.localisation).backward()
    end = now()
    gradient, x = logits.grad, logits.detach()
    assert gradient is not None

    s, e = x[where].double(), errors.detach().double()
    some = [0, 1, positives // 2, positives - 1]
    false_positives = torch.zeros(len(some), dtype=torch.float64, device=device)
    for part in _chunks(n):
        columns, keep = x[part].double(), targets[part] == 0
        for k, row in enumerate(some):
            false_positives[k] += (columns - s[row]).div_(2).add_(0.5).clamp_(0, 1).mul_(keep).sum()
    h = (s[None, :] - s[:, None]).div(2).add(0.5).clamp(0, 1).fill_diagonal_(0)
    rank = 1 + h[some].sum(1) + false_positives
    fp = out.rank.double() - 1 - h.sum(1)
    share = (fp + h @ e) / out.rank.double() / fp / positives
    negatives = torch.tensor([1, n // 2 + 1, n - 2, min(n - 2, 2**31 + 3)], device=device)
    expected = (x[negatives].double()[:, None] - s).div(2).add(0.5).clamp(0, 1) @ share
    return {
        "elements": n,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend,
        "positives": positives,
        "seed": seed,
        "forward_s": middle - begin,
        "backward_s": end - middle,
        "rank_error": float(((out.rank[some].double() - rank) / rank).abs().max()),
        "gradient_error": float(((gradient[negatives].double() - expected) / expected).abs().max()),
    }


def render(report: dict[str, Any]) -> str:
    """The Markdown of a result."""
    run = report["run"]
    on = f"{run['device']}, {run['threads']} threads, torch {run['torch']}, {run['date']}"
    if "soak" in report:
        found = report["soak"]
        head = ["steps done", *(f"{int(step):,}" for step in list(found["resident_mib"])[4::5])]
        line = table(head, [["resident MiB", *(f"{mib:,.0f}" for mib in list(found["resident_mib"].values())[4::5])]])
        return f"{line}\n\n{found['steps']:,} steps in {found['seconds']:.0f} s, every loss finite; {on}."
    lines = [
        [
            f"{row['elements']:,}",
            *(row[key] for key in ("dtype", "backend")),
            *(f"{row[key]:.1f}" for key in ("forward_s", "backward_s")),
            *(f"{row[key]:.0e}" for key in ("rank_error", "gradient_error")),
        ]
        for row in report["large"]
    ]
    head = ["N", "dtype", "backend", "forward s", "backward s", "rank off by", "gradient off by"]
    return f"{table(head, lines, left=3)}\n\nP = 1,000; {on}."
