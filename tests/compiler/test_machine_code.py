"""What the compiler makes of the kernels, for six GPUs, without one: no spills, and two fp32 instructions a pair.

Compiling is left to a process of its own, which starts with the test session: here the interpreter is on.
"""

import json
import os
import re
from typing import Any

import pytest

from alrp_triton import cost
from bench.gpu import results
from bench.gpu.fit import points
from bench.machine_code import model
from tests.conftest import or_skip
from tests.support.processes import ROOT, run_together

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx1100")
# A sample, for all takes minutes: float16 is compiled as bfloat16 is, and for AMD's older card as for its newer one.
COLUMNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(TARGETS, ("fp32", "fp64", "bf16")),
    "sm_90": ("fp32", "fp64", "bf16", "fp16"),
    "gfx90a": ("fp32",),
}
FORM = "( hard| in groups| of classes| of few| of some| elsewhere)"


READ = f"""
import json
from bench.machine_code.reading import matrix
read = "sm_90", "fp32", "bf16"
print(json.dumps([r for target, columns in {COLUMNS}.items() for r in matrix((target,), columns, read)]))
"""


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    or_skip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    (done,) = run_together(["-c", READ], environment=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(records: list[dict[str, Any]], target: str) -> None:
    mine = [record for record in records if record["target"] == target]
    for columns in COLUMNS[target]:
        names = {record["kernel"] for record in mine if record["columns"] == columns}
        for step in ("", " hard") if columns == "fp32" or target == "sm_90" else ("",):
            assert {f"{kernel}{step}" for kernel in ("tiled matvec", "tiled rmatvec", "binned count", "binned evaluate")} <= names  # fmt: skip
    assert {record["kernel"] for record in mine} >= {
        "tiled prepare", "tiled matvec of classes", "binned count of classes", "binned evaluate in groups", "binned tables", "order",
        "among rows in groups", "among grades in groups", "below grades in groups", "below rows in groups", "sums of bins in groups", "lines of bins in groups",
        "alrp terms in groups", "ap terms in groups", "interpolated_ap terms in groups", "rank_sort terms", "targets dense", "targets graded", "targets classes",
    }  # fmt: skip
    if target == "sm_90":
        assert {"sums of bins", "lines of bins hard", "alrp terms", "ap terms hard"} <= {
            record["kernel"] for record in mine
        }
    assert [record for record in mine if record["spills"]] == []


def test_every_kernel_of_the_package_is_compiled(records: list[dict[str, Any]]) -> None:
    source = "".join(path.read_text() for path in (ROOT / "alrp_triton" / "backends").glob("triton_*.py"))
    kernels = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    names = {re.sub(f"{FORM}$", "", record["kernel"]) for record in records}
    forms = {"targets graded", "ap terms", "interpolated_ap terms"}  # of kernels that are there by another name
    assert len(kernels) == len(names - forms)


def test_logits_and_targets_are_addressed_in_64_bits(records: list[dict[str, Any]]) -> None:
    """So there may be more than 2**31 of them, on every target. What is of the size of P has 32."""
    long = {
        "tiled matvec": ["columns_ptr", "marks_ptr"],
        "tiled rmatvec": ["columns_ptr", "marks_ptr", "out_ptr"],
        "binned count": ["columns_ptr", "marks_ptr"],
        "binned evaluate": ["columns_ptr", "marks_ptr", "out_ptr"],
        "targets dense": ["targets_ptr", "marks_ptr"],
        "targets graded": ["targets_ptr", "marks_ptr"],
        "targets classes": ["targets_ptr", "marks_ptr"],
    }
    seen = 0
    for record in records:
        for array in long.get(re.sub(f"{FORM}$", "", record["kernel"]), []):
            assert record["addresses"][array], (record["kernel"], array)
            assert all(record["addresses"][array]), (record["kernel"], record["target"], array)
            seen += 1
    assert seen >= 10 * 2 * len(TARGETS)
    of_rows = [record["addresses"]["weights_ptr"] for record in records if record["kernel"] == "tiled rmatvec"]
    assert not any(any(wide) for wide in of_rows)  # so the reader tells 32 bits from 64


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kernel", ["tiled matvec", "tiled rmatvec"])
def test_two_instructions_a_pair(records: list[dict[str, Any]], kernel: str, hard: bool) -> None:
    wanted = kernel + " hard" * hard, "sm_90", "fp32"
    (record,) = [r for r in records if (r["kernel"], r["target"], r["columns"]) == wanted]
    pairs = record["pairs"]
    # matvec forms x - anchor and the weight, looks for NaN and whether a column is below all rows once a column, which
    # meets all the rows of its block.
    once_a_column = 4 * record["columns_a_thread"] if kernel == "tiled matvec" else 0
    counts = [sum(loop.values()) for loop in record["loops"]]
    assert counts[0] <= 2 * pairs + once_a_column, record["loops"]
    if hard:
        assert len(counts) == 1
    else:  # and the loop for blocks of rows that are far apart in score
        assert len(counts) == 2
        assert counts[1] <= 3 * pairs + once_a_column, record["loops"]
        assert record["loops"][0]["FFMA.SAT"] == pairs  # the clamp costs nothing


def of_the_h200() -> dict[str, Any]:
    """Its newest result: cost and model are those of this card."""
    (file,) = [file for file in results.newest() if file.name.startswith("nvidia-h200_")]
    return results.load(file)


@pytest.mark.parametrize("step", ["", " hard", " of classes"])
def test_whole_blocks_of_logits_are_read_and_written_16_bytes_at_once(records: list[dict[str, Any]], step: str) -> None:
    """A mask that depends on N, of which nothing is known when compiling, would make it 4 bytes."""
    logits_a_thread = 1024 // 128  # a block, over the threads of four warps; 2048 over those of sixteen forward
    for columns, size in (("fp32", 4), ("bf16", 2)):
        of = {
            r["kernel"]: r["of_16_bytes"]
            for r in records
            if (r["target"], r["columns"]) == ("sm_90", columns) and "unit" in r
        }
        times = logits_a_thread * size // 16
        assert of[f"binned evaluate{step}"] == {"LDG.E.128": times, "STG.E.128": times}
        if columns == "fp32":
            assert of[f"binned count{step}"]["LDG.E.128"] == times // 2
            assert of["targets dense"]["LDG.E.128"] == 512 // 128 * 8 // 16  # targets of int64


def test_the_model_of_the_machine_code_is_near_the_counters_of_a_gpu(records: list[dict[str, Any]]) -> None:
    """Each kernel whose time grows with N, at the sizes at which a GPU's counters were read."""
    fp32 = [record for record in records if record["columns"] == "fp32"]
    (gpu,) = [gpu for gpu in model.GPUS if gpu.name == "H200"]
    measured = {
        (one["setting"], one["kernel"]): one["gpu__time_duration.sum"]
        for one in results.records(of_the_h200(), "counters", what="kernel")
    }
    retinanet, atss = (model.model(gpu, fp32, *model.CASES[case]) for case in ("RetinaNet", "ATSS"))
    modelled = {
        ("RetinaNet, binned", "count_kernel"): retinanet.binned[0],
        ("RetinaNet, binned", "evaluate_kernel"): retinanet.binned[1],
        ("RetinaNet, binned, initialisation", "evaluate_kernel"): retinanet.binned[1],
        ("ATSS, tiled", "matvec_kernel"): atss.tiled[0],
        ("ATSS, tiled", "rmatvec_kernel"): atss.tiled[1],
    }
    for which, seconds in modelled.items():
        assert 1 / 1.5 < seconds / measured[which] < 1.5, (which, seconds, measured[which])


def test_logits_are_counted_in_shared_memory(records: list[dict[str, Any]]) -> None:
    """Two additions for each of four logits a thread, and two for a block in one bin; NVIDIA has none of 64 bits."""
    for columns in ("fp32", "bf16"):
        for form in ("", " of classes"):
            wanted = f"binned count{form}", "sm_90", columns
            (record,) = [r for r in records if (r["kernel"], r["target"], r["columns"]) == wanted]
            assert record["atomics"] == {"ATOMS.ADD": 2 * 4 + 2, "ATOMS.CAS": 0, "ATOMS": 2 * 4 + 2}


def test_the_choice_is_that_of_the_newest_result() -> None:
    of = points(results.records(of_the_h200(), "times", group="crossover"))
    tiled = max(one.positives * one.anchors for one in of if one.tiled < one.binned)
    binned = min(one.positives * one.anchors for one in of if one.tiled > one.binned)
    assert tiled < binned
    assert pytest.approx((tiled * binned) ** 0.5, rel=0.02) == cost.PAIRS
    for one in of:
        taken = one.binned if cost.prefer_binned(one.positives, one.anchors) else one.tiled
        assert taken <= 1.05 * min(one.tiled, one.binned), one
