"""Compile the package's kernels for GPUs that are not there, and read what came out.

``python -m bench.machine_code`` prints it as JSON. It cannot be done where Triton's interpreter is on.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alrp_triton.backends import triton_binned, triton_targets, triton_tiled

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COLUMN_DTYPES = ("fp32", "fp64", "bf16", "fp16")

# Triton types of all arguments; {C} is the dtype of the columns, {W} that of the arithmetic.
_TYPES = {
    "P": "i32", "M": "i32", "N": "i64", "span": "i64", "copies": "i32", "count": "i32", "anchors": "i64",
    "classes": "i64", "background": "i64", "ignore_index": "i64", "delta": "fp64", "scale": "fp64", "unit": "fp64",
    "rows_ptr": "*fp64", "values_ptr": "*fp64", "columns_ptr": "*{C}", "out_ptr": "*{C}", "mask_ptr": "*u8",
    "weights_ptr": "*fp64", "partial_ptr": "*{W}", "scores_ptr": "*{W}", "offsets_ptr": "*{W}", "shares_ptr": "*{W}",
    "knots_ptr": "*{W}", "lines_ptr": "*{W}", "lut_ptr": "*i32", "most_ptr": "*i32", "rise_ptr": "*i32", "done_ptr": "*i32",
    "table_ptr": "*i64", "targets_ptr": "*i64", "negatives_ptr": "*i8", "positives_ptr": "*i64", "status_ptr": "*i64",
}  # fmt: skip


class Kernel(NamedTuple):
    """A kernel as the package launches it."""

    function: Any
    constants: dict[str, Any]
    types: dict[str, str]  # of the arguments whose type is not that in _TYPES
    warps: int


def kernels(target: str, columns: str) -> dict[str, Kernel]:
    """All kernels that depend on the dtype of the columns, by name; with fp32 those that do not, too."""
    working = torch.float64 if columns == "fp64" else torch.float32
    forward = triton_tiled.FORWARD_TILE_AMD if target.startswith("gfx") else triton_tiled.FORWARD_TILE
    transpose = triton_tiled.TRANSPOSE_TILE[working]
    block, tile = {"BLOCK": triton_binned.BLOCK}, triton_binned.TILE
    mask, shares = {"weights_ptr": "*u8"}, {"rows_ptr": "*{W}", "weights_ptr": "*{W}"}
    found: dict[str, Kernel] = {}
    for step, hard in (("", False), (" hard", True)):
        flag = {"HARD": hard}
        found |= {
            f"tiled matvec{step}": Kernel(triton_tiled.matvec_kernel, forward[working] | flag, mask, triton_tiled.WARPS),
            f"tiled rmatvec{step}": Kernel(triton_tiled.rmatvec_kernel, transpose | flag, shares, triton_tiled.WARPS),
            f"tiled prepare{step}": Kernel(
                triton_tiled.prepare_kernel,
                flag | {"ROWS": transpose["ROWS"], "BLOCK": triton_tiled.PREPARE_BLOCK},
                {},
                triton_tiled.WARPS,
            ),
            f"binned count{step}": Kernel(triton_binned.count_kernel, block | flag, mask, triton_binned.WARPS),
            f"binned evaluate{step}": Kernel(triton_binned.evaluate_kernel, block | flag, {}, triton_binned.WARPS),
            f"binned rows{step}": Kernel(
                triton_binned.rows_kernel, tile | flag, {"out_ptr": "*fp64"}, triton_binned.WARPS
            ),
            f"binned lines{step}": Kernel(triton_binned.lines_kernel, tile | flag, {}, triton_binned.WARPS),
        }
    if columns in ("bf16", "fp16"):  # what does not touch the columns is that of fp32
        reads_columns = ("tiled matvec", "tiled rmatvec", "binned count", "binned evaluate")
        return {name: kernel for name, kernel in found.items() if name.removesuffix(" hard") in reads_columns}
    found["binned knots"] = Kernel(triton_binned.knots_kernel, {"BLOCK": 128}, {}, triton_binned.WARPS)
    found["binned table"] = Kernel(triton_binned.lut_kernel, {"BLOCK": 256}, {}, triton_binned.WARPS)
    if columns == "fp32":
        among, out = triton_tiled.AMONG_TILE, {"out_ptr": "*fp64"}
        dense = {"SIGNED": True, "BLOCK": triton_targets.BLOCK}
        found |= {
            "among rows": Kernel(triton_tiled.among_rows_kernel, among | {"HARD": False}, out, triton_tiled.WARPS),
            "among rows hard": Kernel(triton_tiled.among_rows_kernel, among | {"HARD": True}, out, triton_tiled.WARPS),
            "targets dense": Kernel(triton_targets.dense_kernel, dense, {}, triton_targets.WARPS),
            "targets classes": Kernel(triton_targets.classes_kernel, triton_targets.CLASS_TILE, {}, triton_targets.WARPS),
        }
    return found


@cache
def compile_kernel(name: str, target: str, columns: str = "fp32") -> Any:
    """Compile a kernel of :func:`kernels` for a target."""
    kernel = kernels(target, columns)[name]
    working = "fp64" if columns == "fp64" else "fp32"
    signature = {
        argument: "constexpr" if argument in kernel.constants
        else (_TYPES | kernel.types)[argument].format(C=columns, W=working)
        for argument in kernel.function.arg_names
    }  # fmt: skip
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=kernel.constants)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": kernel.warps})


def _disassemble(compiled: Any, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([_TOOLS / tool, option, file.name], check=True, capture_output=True, text=True).stdout


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes of spills, bytes of shared memory; from the object file, or AMD's assembly."""
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        usage = _disassemble(compiled, "cuobjdump", "-res-usage")
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"], "shared": shared}
    text = compiled.asm["amdgcn"]
    read = {
        key: int(value)
        for key, value in re.findall(r"\.(vgpr_count|\w+_spill_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    return {"registers": read.pop("vgpr_count"), "spills": sum(read.values()), "shared": shared}


class Block(NamedTuple):
    """A basic block of machine code."""

    instructions: Counter[str]  # by name, with modifiers
    in_loop: bool  # between the target of a backward branch and the branch


def _lines(compiled: Any) -> Iterator[tuple[str | None, str | None, str | None]]:
    """(label, instruction, target of a branch) of each line of machine code."""
    if "cubin" in compiled.asm:
        for line in _disassemble(compiled, "nvdisasm", "-c").splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                yield label[1], None, None
            elif found := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
                target = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
                yield None, found[1], target and target[0]
    else:
        for line in compiled.asm["amdgcn"].splitlines():
            if label := re.match(r"(\.LBB\d+_\d+):", line):
                yield label[1], None, None
            elif found := re.match(r"\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+)(.*)", line):
                target = re.search(r"\.LBB\d+_\d+", found[2]) if "branch" in found[1] else None
                yield None, found[1], target and target[0]


def basic_blocks(compiled: Any) -> list[Block]:
    """The basic blocks of a kernel, in the order of its code."""
    blocks: list[Counter[str]] = [Counter()]
    labels: dict[str, int] = {}
    loops: set[int] = set()
    for label, instruction, target in _lines(compiled):
        if label:
            blocks.append(Counter())
            labels[label] = len(blocks) - 1
        if instruction:
            blocks[-1][instruction] += 1
        if target:
            # To itself is how NVIDIA's code ends; it is no loop.
            if target in labels and sum(blocks[labels[target]].values()) > 1:
                loops |= set(range(labels[target], len(blocks)))
            blocks.append(Counter())
    return [Block(block, index in loops) for index, block in enumerate(blocks)]


# What an instruction is, by the beginning of its name; the first that fits.
_CLASSES = (
    ("atomic", r"ATOM|RED\b|RED\.|global_atomic|buffer_atomic|flat_atomic"),
    ("load", r"LDG|LDS|LD\.|LDSM|global_load|buffer_load|flat_load|ds_(load|read)"),
    ("store", r"STG|STS|ST\.|STSM|global_store|buffer_store|flat_store|ds_(store|write)"),
    ("fp64", r"D(ADD|MUL|FMA|SETP|MNMX)|v_\w+_f64"),
    ("fp32", r"F(ADD|MUL|FMA|SETP|SEL|SET|MNMX|CHK)|MUFU|v_\w+_f32"),
    ("convert", r"I2F|F2I|F2F|F2FP|FRND|HADD|v_cvt"),
    ("integer", r"I|LOP|SHF|LEA|SEL|PRMT|VI|POPC|FLO|BMSK|SGXT|PLOP|ISETP|R2P|P2R|U[A-Z]|v_\w+_[ui]\d+|v_\w+_b\d+|v_\w+"),
)  # fmt: skip


def classify(instructions: Counter[str]) -> Counter[str]:
    """Number of instructions by class: fp32, fp64, integer, convert, load, store, atomic, other."""
    result: Counter[str] = Counter()
    for name, number in instructions.items():
        result[next((kind for kind, pattern in _CLASSES if re.match(pattern, name)), "other")] += number
    return result


def tile_loops(compiled: Any, pairs: int) -> list[dict[str, int]]:
    """Fp32 instructions of the blocks that work on a tile: one saturating or comparing instruction a pair or more."""
    result: list[dict[str, int]] = []
    for block in basic_blocks(compiled):
        steps = sum(n for name, n in block.instructions.items() if ".SAT" in name or name.startswith("FSETP"))
        if steps >= pairs:
            result.append(
                {name: n for name, n in block.instructions.items() if classify(Counter({name: 1}))["fp32"]}
            )
    return result


def matrix() -> list[dict[str, Any]]:
    """All that is compiled and read: a record for each kernel, target, and dtype of the columns."""
    records: list[dict[str, Any]] = []
    for columns in COLUMN_DTYPES:
        for target in TARGETS:
            for name, kernel in kernels(target, columns).items():
                compiled = compile_kernel(name, target, columns)
                record: dict[str, Any] = {"kernel": name, "target": target, "columns": columns, **resources(compiled)}
                if target == "sm_90" and columns == "fp32" and name.removesuffix(" hard") in ("tiled matvec", "tiled rmatvec"):  # fmt: skip
                    tile, threads = kernel.constants, 32 * kernel.warps
                    record["columns_a_thread"] = tile["COLUMNS"] // threads
                    record["pairs"] = tile.get("CHUNK", tile["ROWS"]) * tile["COLUMNS"] // threads
                    record["loops"] = tile_loops(compiled, record["pairs"])
                records.append(record)
    return records


if __name__ == "__main__":
    print(json.dumps(matrix()))
