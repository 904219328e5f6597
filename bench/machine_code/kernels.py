"""The package's kernels as it launches them, compiled for GPUs that are not there.

It cannot be done where Triton's interpreter is on.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alrp_triton.backends import (
    triton_among,
    triton_binned,
    triton_graded,
    triton_marks,
    triton_positives,
    triton_prefix,
    triton_shared,
    triton_sort,
    triton_sums,
    triton_tables,
    triton_targets,
    triton_tiled,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
COLUMN_DTYPES = ("fp32", "fp64", "bf16", "fp16")

# Triton types of all arguments; {C} is the dtype of the columns, {W} that of the arithmetic.
_TYPES = {
    "P": "i32", "N": "i64", "span": "i64", "run": "i64", "runs": "i32", "copies": "i32", "count": "i32",
    "anchors": "i64", "positives": "i32", "each": "i32",
    "classes": "i64", "background": "i64", "ignore_index": "i64", "delta": "fp64", "scale": "fp64", "unit": "fp64",
    "rate": "fp64",
    "rows_ptr": "*fp64", "values_ptr": "*fp64", "columns_ptr": "*{C}", "out_ptr": "*{C}", "marks_ptr": "*u8",
    "weights_ptr": "*fp64", "partial_ptr": "*{W}", "scores_ptr": "*{W}", "offsets_ptr": "*{W}", "narrow_ptr": "*{W}",
    "knots_ptr": "*{W}", "lines_ptr": "*{W}", "below_ptr": "*{W}", "lut_ptr": "*i32", "rise_ptr": "*i32",
    "bounds_ptr": "*i32", "run_groups_ptr": "*i64", "nan_ptr": "*i64", "logits_ptr": "*fp32", "found_ptr": "*i64",
    "places_ptr": "*i64", "row_groups_ptr": "*i64", "row_values_ptr": "*fp64", "done_ptr": "*i32",
    "false_positives_ptr": "*fp64", "among_ptr": "*fp64",
    "order_ptr": "*i64", "ranking_loss_ptr": "*fp32", "auxiliary_loss_ptr": "*fp32", "rank_ptr": "*fp32",
    "grad_positives_ptr": "*fp64", "grad_per_fp_ptr": "*fp64", "auxiliary_errors_ptr": "*fp64", "groups_ptr": "*i64",
    "at_zero": "fp64", "eps": "fp64", "grades_ptr": "*fp64",
    "errors_ptr": "*fp64", "grad_scores_ptr": "*fp64", "grad_values_ptr": "*fp32", "ranking_scale_ptr": "*fp32",
    "auxiliary_scale_ptr": "*fp32", "values_scale_ptr": "*fp32", "work_ptr": "*i64",
    "table_ptr": "*i64", "targets_ptr": "*i64", "positives_ptr": "*i64", "status_ptr": "*i64",
}  # fmt: skip


class Kernel(NamedTuple):
    """A kernel as the package launches it."""

    function: Any
    constants: dict[str, Any]
    types: dict[str, str]  # of the arguments whose type is not that in _TYPES
    warps: int
    unit: str = ""  # what it does most of: pair, column, target
    units: int = 0  # so many a program
    options: tuple[tuple[str, int], ...] = ()  # of the compiler

    def of(self, constants: dict[str, Any], types: dict[str, str]) -> "Kernel":
        """The same in another form."""
        others = {name: value for name, value in self.constants.items() if name not in types}
        return self._replace(constants=others | constants, types=self.types | types)

    @property
    def pairs(self) -> int:
        """Pairs of a tile."""
        return self.constants.get("CHUNK", self.constants["ROWS"]) * self.constants["COLUMNS"]


def _of_rows(
    function: Any, constants: dict[str, Any], launch: dict[str, int], types: dict[str, str] | None = None
) -> Kernel:
    """One of size P, with its arguments of a launch."""
    options = dict(launch)
    constants, warps = {"BLOCK": options.pop("BLOCK")} | constants, options.pop("num_warps")
    return Kernel(function, constants, types or {}, warps, options=tuple(options.items()))


def kernels(target: str, columns: str) -> dict[str, Kernel]:
    """All kernels that depend on the dtype of the columns, by name; with fp32 those that do not, too.

    To compile takes long: for sm_90 alone what is of size P without groups, or with delta = 0; and with delta = 0 all
    that reads no float32 columns.
    """
    working = torch.float64 if columns == "fp64" else torch.float32
    forward = triton_tiled.FORWARD_TILE_AMD if target.startswith("gfx") else triton_tiled.FORWARD_TILE
    transpose = triton_tiled.TRANSPOSE_TILE[working]
    block = {"BLOCK": triton_binned.BLOCK[working], "CELLS": triton_tables.CELLS}
    # On NVIDIA unweighted columns that are no float64 are counted in shared memory.
    shared = working == torch.float32 and not target.startswith("gfx")
    counting = {"SHARED": shared, "THREADS": triton_shared.THREADS if shared else 0}
    counting |= {"BLOCK": triton_shared.BLOCK} if shared else {}
    count_warps = triton_shared.WARPS if shared else triton_binned.WARPS
    in_working = {"rows_ptr": "*{W}", "weights_ptr": "*{W}"}
    bytes_, one = {"CLASSES": 0}, {"bounds_ptr": None}  # marks of one byte; one group
    lanes = {"LANES": triton_marks.LANES}
    per_column = "column", triton_binned.BLOCK[working]
    found: dict[str, Kernel] = {}
    for step, hard in [("", False)] + [(" hard", True)] * (columns == "fp32" or target == "sm_90"):
        flag = {"HARD": hard} | bytes_
        found |= {
            f"tiled matvec{step}": Kernel(
                triton_tiled.matvec_kernel, forward[working] | flag, {}, triton_tiled.WARPS, "pair"
            ),
            f"tiled rmatvec{step}": Kernel(
                triton_tiled.rmatvec_kernel, transpose | flag | lanes, in_working, triton_tiled.WARPS, "pair"
            ),
            f"tiled prepare{step}": Kernel(
                triton_tiled.prepare_kernel,
                {"HARD": hard, "ROWS": transpose["ROWS"], "BLOCK": triton_tiled.PREPARE_BLOCK},
                {},
                triton_tiled.WARPS,
            ),
            f"binned count{step}": Kernel(
                triton_binned.count_kernel,
                block | flag | one | counting,
                {},
                count_warps,
                "column",
                counting.get("BLOCK", block["BLOCK"]),
                (("maxnreg", triton_shared.SETTINGS["maxnreg"]),) if shared else (),
            ),
            f"binned evaluate{step}": Kernel(
                triton_binned.evaluate_kernel, block | flag | one | lanes, {}, triton_binned.WARPS, *per_column
            ),
        }
    if shared and columns == "fp32":
        elsewhere = {"SHARED": False, "THREADS": 0} | block
        found["binned count elsewhere"] = (
            found["binned count"]
            .of(elsewhere, {})
            ._replace(warps=triton_binned.WARPS, units=block["BLOCK"], options=())
        )
    for product in ("tiled matvec", "tiled rmatvec", "binned count", "binned evaluate"):
        found[f"{product} of classes"] = found[product].of({"CLASSES": 80}, {"marks_ptr": "*i32"})
        if product.startswith("binned") and columns == "fp32":
            found[f"{product} in groups"] = found[product].of({}, {"bounds_ptr": "*i32"})
    if columns in ("bf16", "fp16"):  # what does not touch the columns is that of fp32
        reads_columns = ("tiled matvec", "tiled rmatvec", "binned count", "binned evaluate")
        return {name: kernel for name, kernel in found.items() if name.startswith(reads_columns)}
    tables = {"CELLS": triton_tables.CELLS, "ROWS": triton_tables.ROWS}
    alone = tables | {"groups_ptr": None, "run_groups_ptr": None, "bounds_ptr": None}
    bound = () if target.startswith("gfx") else tuple(triton_prefix.MAX_REGISTERS.items())
    for form, constants in (("", alone), (" in groups", tables)):
        found[f"binned tables{form}"] = Kernel(
            triton_tables.tables_kernel, constants, {}, triton_tables.WARPS, options=bound
        )
    # With groups what they add is in the code; without, it is not.
    one = {"groups_ptr": None}
    many = triton_prefix.AMD if target.startswith("gfx") else triton_prefix.MANY
    many = triton_prefix.SOME if target == "sm_100" else many  # as launch() has it
    steps = [(" in groups", {"HARD": False}, many)]
    if target == "sm_90":
        soft, hard = one | {"HARD": False}, one | {"HARD": True}
        steps += [("", soft, many), (" hard", hard, many), (" of few", soft, triton_prefix.FEW)]
        steps.append((" of some", soft, triton_prefix.SOME))
    for step, flags, launch in steps:
        found |= {
            f"sums of bins{step}": _of_rows(triton_sums.sums_kernel, flags, launch, {"out_ptr": "*fp64"}),
            f"lines of bins{step}": _of_rows(triton_sums.lines_kernel, flags, launch),
        }
    if columns == "fp32":
        rows, out = triton_positives, {"out_ptr": "*fp64"}
        dense = {"SIGNED": True, "GRADED": False, "BLOCK": triton_targets.BLOCK}
        for step, flags, launch in steps:
            graded = triton_graded.TILE | flags
            found |= {
                f"among rows{step}": _of_rows(triton_among.among_rows_kernel, flags, launch, out),
                f"below rows{step}": _of_rows(triton_among.below_rows_kernel, flags, launch, out),
                f"among grades{step}": Kernel(triton_graded.among_grades_kernel, graded, out, triton_graded.WARPS),
                f"below grades{step}": Kernel(triton_graded.below_grades_kernel, graded, out, triton_graded.WARPS),
            }
            for loss, number in rows.LOSSES.items():
                found[f"{loss} terms{step}"] = _of_rows(rows.terms_kernel, flags | {"LOSS": number}, launch)
        found["rank_sort terms"] = Kernel(
            rows.rank_sort_kernel, {"BLOCK": rows.RANK_SORT_BLOCK}, {}, rows.RANK_SORT_WARPS
        )
        found |= {
            "order": Kernel(
                triton_sort.order_kernel, triton_sort.TILE | {"BY_PLACE": True, "IOUS": True}, {}, triton_sort.WARPS
            ),
            "targets dense": Kernel(
                triton_targets.dense_kernel, dense, {}, triton_targets.WARPS, "target", triton_targets.BLOCK
            ),
            "targets graded": Kernel(
                triton_targets.dense_kernel, dense | {"GRADED": True}, {"targets_ptr": "*fp32"}, triton_targets.WARPS
            ),
            "targets classes": Kernel(
                triton_targets.classes_kernel,
                {"SIGNED": True, "BLOCK": triton_targets.BLOCK},
                {"marks_ptr": "*i32"},
                triton_targets.WARPS,
            ),
        }
    return found


def compile_for(kernel: Kernel, target: str, columns: str = "fp32") -> Any:
    """Compile a kernel for a target, with the alignment that its launches have."""
    working = "fp64" if columns == "fp64" else "fp32"
    signature = {
        argument: "constexpr" if argument in kernel.constants
        else (_TYPES | kernel.types)[argument].format(C=columns, W=working)
        for argument in kernel.function.arg_names
    }  # fmt: skip
    # All are at addresses that 16 bytes divide.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.function.arg_names)
        if signature[argument].startswith("*")
    }
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=kernel.constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": kernel.warps, **dict(kernel.options)})


@cache
def compile_kernel(name: str, target: str, columns: str = "fp32") -> Any:
    """Compile a kernel of :func:`kernels` for a target."""
    return compile_for(kernels(target, columns)[name], target, columns)
