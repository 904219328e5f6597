"""Compile the package's kernels for GPUs that are not there, and read what came out.

``python -m tests.machine_code`` prints it as JSON. It cannot be done where Triton's interpreter is on.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alrp_triton.backends import triton_tiled

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# What the machine does with two fp32 numbers; conversions, moves and integer work are not counted.
FP32 = {"FADD", "FMUL", "FFMA", "FSETP", "FSEL", "FSET", "FMNMX", "FCHK", "MUFU"}


def compile_kernel(name: str, target: str, *, hard: bool, columns: str = "fp32") -> Any:
    """Compile ``matvec`` or ``rmatvec`` as the package launches it."""
    rows, working = ("fp64", torch.float64) if columns == "fp64" else ("fp32", torch.float32)
    types = {
        "P": "i32",
        "N": "i64",
        "span": "i64",
        "delta": "fp64",
        "rows_ptr": f"*{rows}",
        "columns_ptr": f"*{columns}",
    }
    if name == "matvec":
        tiles = triton_tiled.FORWARD_TILE_AMD if target.startswith("gfx") else triton_tiled.FORWARD_TILE
        kernel, tile = triton_tiled.matvec_kernel, tiles[working]
        # Counting negatives, the weights are a mask; the float64 products are those of box errors.
        types |= {"weights_ptr": "*fp64" if columns == "fp64" else "*u8", "partial_ptr": f"*{rows}"}
    else:
        kernel, tile = triton_tiled.rmatvec_kernel, triton_tiled.TRANSPOSE_TILE[working]
        types |= {"offsets_ptr": f"*{rows}", "weights_ptr": f"*{rows}", "mask_ptr": "*u8", "out_ptr": f"*{columns}"}
    signature = {parameter: types.get(parameter, "constexpr") for parameter in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={**tile, "HARD": hard})
    return triton.compile(source, target=TARGETS[target], options={"num_warps": triton_tiled.WARPS})


def _disassemble(compiled: Any, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([_TOOLS / tool, option, file.name], check=True, capture_output=True, text=True).stdout


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread and bytes of spills, from the object file (NVIDIA) or the assembly's metadata (AMD)."""
    if "cubin" in compiled.asm:
        usage = _disassemble(compiled, "cuobjdump", "-res-usage")
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}
    text = compiled.asm["amdgcn"]
    read = {
        key: int(value)
        for key, value in re.findall(r"\.(vgpr_count|\w+_spill_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    return {"registers": read.pop("vgpr_count"), "spills": sum(read.values())}


def basic_blocks(compiled: Any) -> list[Counter[str]]:
    """Instructions by name (modifiers kept) for each basic block of a kernel's NVIDIA machine code."""
    blocks: list[Counter[str]] = [Counter()]
    for line in _disassemble(compiled, "nvdisasm", "-c").splitlines():
        if re.match(r"\s*\.L_x_\d+:", line):
            blocks.append(Counter())
        elif found := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            blocks[-1][found[1]] += 1
            if found[1].startswith("BRA"):
                blocks.append(Counter())
    return blocks


def tile_loops(compiled: Any, pairs: int) -> list[dict[str, int]]:
    """Fp32 instructions of the basic blocks that work on a tile: one saturating or comparing instruction a pair or more."""
    blocks = basic_blocks(compiled)
    steps = (sum(n for name, n in block.items() if ".SAT" in name or name.startswith("FSETP")) for block in blocks)
    return [
        {name: n for name, n in block.items() if name.split(".")[0] in FP32}
        for block, step in zip(blocks, steps, strict=True)
        if step >= pairs
    ]


def matrix() -> list[dict[str, Any]]:
    """All that is compiled and read: a record for each kernel, target, dtype of the columns, and step."""
    variants = [(columns, hard) for columns in ("fp32", "fp64") for hard in (False, True)]
    variants += [("bf16", False), ("fp16", False), ("bf16", True), ("fp16", True)]
    records: list[dict[str, Any]] = []
    for kernel in ("matvec", "rmatvec"):
        for target in TARGETS:
            for columns, hard in variants:
                compiled = compile_kernel(kernel, target, hard=hard, columns=columns)
                record: dict[str, Any] = {
                    "kernel": kernel,
                    "target": target,
                    "columns": columns,
                    "hard": hard,
                    **resources(compiled),
                }
                if target == "sm_90" and columns == "fp32":
                    tiles = triton_tiled.FORWARD_TILE if kernel == "matvec" else triton_tiled.TRANSPOSE_TILE
                    tile, threads = tiles[torch.float32], 32 * triton_tiled.WARPS
                    record["columns_a_thread"] = tile["COLUMNS"] // threads
                    record["pairs"] = tile.get("CHUNK", tile["ROWS"]) * tile["COLUMNS"] // threads
                    record["loops"] = tile_loops(compiled, record["pairs"])
                records.append(record)
    return records


if __name__ == "__main__":
    print(json.dumps(matrix()))
