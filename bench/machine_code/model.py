"""What a GPU would say, without one: times modelled from the machine code and the data sheets.

A kernel takes as long as its busiest pipe: instructions of a class over what the GPU issues of that class in a second,
times the share of that which the kernel was seen to reach; or bytes over what its memory copies in a second. Launches,
caches and clocks that vary are left out.
"""

from typing import Any, NamedTuple

from alrp_triton.cost import prefer_binned

from ..speed.problems import CASES
from ..tables import number, table
from .reading import CLASSES

NOTE = "Modelled from the machine code, not measured. What was measured stands above."


class GPU(NamedTuple):
    """Instructions of a class, threads together, in a cycle of a multiprocessor; and what is beside them."""

    name: str
    target: str
    multiprocessors: int
    hertz: float
    bytes_per_s: float  # of a copy
    fp32: int
    fp64: int
    integer: int = 64
    memory: int = 32  # loads, stores and atomics
    convert: int = 16
    issue: int = 128


GPUS = (
    GPU("A100", "sm_80", 108, 1.41e9, 1.35e12, fp32=64, fp64=32),
    GPU("H100", "sm_90", 132, 1.7e9, 3.0e12, fp32=128, fp64=64),
    GPU("H200", "sm_90", 132, 1.98e9, 4.26e12, fp32=128, fp64=64),  # clock and copy as measured
)
# Of the busiest pipe's rate, on an H200 by its counters (commit 3e84b52; bench/results). The tiled kernels are held up
# by latencies, with a quarter of the warps that fit; the linear ones by loads that are spread over many lines of the L1
# cache. Of the kernel that counts more is read than runs: a block goes one of its ways, to one bin or to many.
REACHED = {"tiled matvec": 0.55, "tiled rmatvec": 0.66, "binned count": 1.7, "binned evaluate": 0.78}
_MORE = {"RetinaNet, many positives": (CASES["RetinaNet"][0], 4000)}


def seconds(gpu: GPU, by_unit: dict[str, float], units: float, moved: float, reached: float) -> float:
    """Time of a kernel that spends ``by_unit`` instructions on each unit, and moves so many bytes.

    It reaches so much of the rate at which instructions are issued.
    """
    of = {name: by_unit.get(name, 0.0) for name in CLASSES}
    cycles = max(
        of["fp32"] / gpu.fp32,
        of["integer"] / gpu.integer,
        of["fp64"] / gpu.fp64,
        of["convert"] / gpu.convert,
        (of["load"] + of["store"] + of["atomic"]) / gpu.memory,
        sum(by_unit.values()) / gpu.issue,
    )
    issued = cycles * units / (gpu.multiprocessors * gpu.hertz) / reached
    return max(issued, moved / gpu.bytes_per_s)


class Modelled(NamedTuple):
    """Seconds of the two products at a size, pair by pair and linear."""

    floor: float  # logits read twice, gradient written
    tiled: tuple[float, float]
    binned: tuple[float, float]
    transpose_floor: float  # logits and mask read, gradient written


def model(gpu: GPU, kernels: list[dict[str, Any]], anchors: int, positives: int) -> Modelled:
    """The model of all kernels whose time grows with N, for float32 logits, delta > 0, and a mask."""
    unit = {r["kernel"]: r["by_unit"] for r in kernels if r["target"] == gpu.target and "by_unit" in r}
    pairs, read, write = anchors * positives, 5.0 * anchors, 9.0 * anchors

    def of(name: str, units: float, moved: float) -> float:
        return seconds(gpu, unit[name], units, moved, REACHED[name])

    return Modelled(
        12.0 * anchors / gpu.bytes_per_s,
        (of("tiled matvec", pairs, read), of("tiled rmatvec", pairs, write)),
        (of("binned count", anchors, read), of("binned evaluate", anchors, write)),
        write / gpu.bytes_per_s,
    )


def _milliseconds(value: float) -> str:
    return number(1e3 * value)


def _model_table(kernels: list[dict[str, Any]]) -> str:
    head = [
        "model", "GPU", "N", "P", "12 N floor ms", "tiled forward", "tiled transpose", "binned forward",
        "binned transpose", "transpose / 9 N floor", "dispatch",
    ]  # fmt: skip
    lines: list[list[str]] = []
    for case, (anchors, positives) in (CASES | _MORE).items():
        for gpu in GPUS:
            m = model(gpu, kernels, anchors, positives)
            times = (m.floor, *m.tiled, *m.binned)
            relative, chosen = m.binned[1] / m.transpose_floor, ("tiled", "binned")[prefer_binned(positives, anchors)]
            size = f"{anchors:,}", f"{positives:,}"
            lines.append([case, gpu.name, *size, *map(_milliseconds, times), f"{relative:.1f}", chosen])
    return f"{NOTE}\n\n{table(head, lines, left=2)}"


def _kernel_table(kernels: list[dict[str, Any]]) -> str:
    head = ["kernel", "target", "registers", "spills", "shared", "unit", *CLASSES, "other"]
    lines = [
        [r["kernel"], r["target"], *(str(r[key]) for key in ("registers", "spills", "shared")), r.get("unit", "")]
        + [f"{r['by_unit'].get(name, 0):.2f}" if "by_unit" in r else "" for name in (*CLASSES, "other")]
        for r in kernels
    ]
    return table(head, lines, left=2)


# What the first step of a training compiles: aLRP Loss, binned, class indices, float32, one ranking.
STEP = (
    "targets classes", "order", "binned tables", "binned count of classes", "sums of bins", "alrp terms",
    "lines of bins", "binned evaluate of classes",
)  # fmt: skip


def _seconds(kernels: list[dict[str, Any]]) -> str:
    """How many variants there are with float32 logits, and how long it takes to compile them."""
    of = {record["kernel"]: record["seconds"] for record in kernels if record["target"] == "sm_90"}
    return (
        f"For sm_90: {len(of)} variants of kernels, {sum(of.values()):.0f} s to compile; a training of aLRP Loss "
        f"(binned, class indices, one ranking) has {len(STEP)}, {sum(of[name] for name in STEP):.1f} s."
    )


def render(report: dict[str, Any], name: str) -> str:
    """A table of a report of compiled kernels: ``kernels``, those that read columns or targets; ``all``; ``model``.

    ``seconds`` is a sentence, of how long it takes to compile them.
    """
    kernels = report["kernels"]
    if name == "seconds":
        return _seconds(kernels)
    if name == "model":
        return _model_table(kernels)
    return _kernel_table(kernels if name == "all" else [record for record in kernels if "unit" in record])
