"""What the compiler made of the kernels: registers, spills, and instructions by class, from the machine code.

``python -m bench compiled`` makes tables of it. Instructions may be read of one target and some dtypes alone: NVIDIA's
disassembler needs half a second for each kernel, which is most of the time.
"""

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton

from .kernels import COLUMN_DTYPES, TARGETS, Kernel, compile_kernel, kernels

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _disassemble(compiled: Any, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([_TOOLS / tool, option, file.name], check=True, capture_output=True, text=True).stdout


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes of spills, bytes of shared memory; from the object file, or AMD's assembly.

    AMD's scalar registers that are saved in lanes of a vector register are no spills: nothing goes to memory.
    """
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        usage = _disassemble(compiled, "cuobjdump", "-res-usage")
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"], "shared": shared}
    text = compiled.asm["amdgcn"]
    read = {
        key: int(value)
        for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
    }
    return {"registers": read.pop("vgpr_count"), "spills": sum(read.values()), "shared": shared}


# Arrays with an element for each logit, or target, of a kernel of such a unit; the others are of the size of P.
_LONG_ARRAYS = ("columns_ptr", "marks_ptr", "weights_ptr", "out_ptr", "targets_ptr")
_POINTER = re.compile(
    r"(%\S+) = tt\.(addptr|splat|broadcast|expand_dims) (%[\w#]+)"
    r"(?:, %[\w#-]+ : \S+, (?:tensor<[\dx]*)?(i\d+))?"
)


def addresses(compiled: Any) -> dict[str, list[bool]]:
    """For each long array of a kernel, whether each of its addresses has a 64-bit part in its offset.

    Of Triton's own intermediate code, which all targets have in common. A 32-bit offset is right where 64 bits led to
    the beginning of the block.
    """
    root: dict[str, str] = {f"%{name}": name for name in _LONG_ARRAYS}
    wide: dict[str, bool] = dict.fromkeys(root, False)
    found: dict[str, list[bool]] = {}
    for name, operation, base, offset in _POINTER.findall(compiled.asm["ttir"]):
        if base in root:
            root[name], wide[name] = root[base], wide[base] or offset == "i64"
            if operation == "addptr":
                found.setdefault(root[base], []).append(wide[name])
    return found


class _Line(NamedTuple):
    label: str = ""
    instruction: str = ""
    target: str = ""  # of a branch


def _lines(compiled: Any) -> Iterator[_Line]:
    if "cubin" in compiled.asm:
        for line in _disassemble(compiled, "nvdisasm", "-c").splitlines():
            if line.startswith("$__internal"):  # subroutines follow: divisions of odd numbers
                return
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                yield _Line(label[1])
            elif found := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
                target = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
                yield _Line("", found[1], target[0] if target else "")
    else:
        for line in compiled.asm["amdgcn"].splitlines():
            if label := re.match(r"(\.LBB\d+_\d+):", line):
                yield _Line(label[1])
            elif found := re.match(r"\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+)(.*)", line):
                target = re.search(r"\.LBB\d+_\d+", found[2]) if "branch" in found[1] else None
                yield _Line("", found[1], target[0] if target else "")


class Block(NamedTuple):
    """A basic block of machine code."""

    instructions: Counter[str]  # by name, with modifiers
    loop: range  # indices of the blocks of the innermost loop around it; empty outside of loops
    depth: int = 0  # so many loops are around it


def basic_blocks(compiled: Any) -> list[Block]:
    """The basic blocks of a kernel, in the order of its code."""
    blocks: list[Counter[str]] = [Counter()]
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}  # of loops, by their first block
    for line in _lines(compiled):
        if line.label:
            blocks.append(Counter())
            labels[line.label] = len(blocks) - 1
        if line.instruction:
            blocks[-1][line.instruction] += 1
        if line.target:
            if line.target in labels:
                ends[labels[line.target]] = len(blocks)
            blocks.append(Counter())
    inside = [[range(*loop) for loop in ends.items() if index in range(*loop)] for index in range(len(blocks))]
    return [Block(block, min(of, key=len, default=range(0)), len(of)) for block, of in zip(blocks, inside, strict=True)]


def count(blocks: Iterable[Block], *kinds: str) -> Counter[str]:
    """How many instructions there are in blocks whose names begin so."""
    names = sum((block.instructions for block in blocks), Counter[str]())
    return Counter({kind: sum(n for name, n in names.items() if name.startswith(kind)) for kind in kinds})


# What an instruction is, by the beginning of its name; the first that fits.
_CLASSES = (
    ("atomic", r"ATOM|REDG|RED\.|(global|buffer|flat)_atomic"),
    ("load", r"LD[GSLC.]|LDSM|(global|buffer|flat|s)_load|ds_(load|read)"),
    ("store", r"ST[GSL.]|STSM|(global|buffer|flat)_store|ds_(store|write)"),
    ("fp64", r"D(ADD|MUL|FMA|SETP|MNMX)|v_\w+_f64"),
    ("fp32", r"F(ADD|MUL|FMA|SETP|SEL|SET|MNMX|CHK)|MUFU|v_\w+_f32"),
    ("convert", r"I2F|F2I|F2F|F2FP|FRND|HADD|v_cvt"),
    ("integer", r"I|LOP|SHF|LEA|SEL|PRMT|VI|POPC|FLO|BMSK|SGXT|PLOP|R2P|P2R|U[A-Z]|v_"),
)
CLASSES = tuple(name for name, _ in _CLASSES)


def classify(instructions: Counter[str]) -> Counter[str]:
    """Number of instructions by class: those of ``CLASSES``, and other."""
    result: Counter[str] = Counter()
    for name, number in instructions.items():
        result[next((kind for kind, pattern in _CLASSES if re.match(pattern, name)), "other")] += number
    return result


def _tile_loops(blocks: list[Block], pairs: int) -> list[Counter[str]]:
    """The innermost loops that spend a floating instruction a pair, or more, whatever small loops are in them.

    Cheapest first.
    """
    bodies = {
        loop: sum((blocks[index].instructions for index in loop), Counter[str]())
        for loop in {block.loop for block in blocks if len(block.loop)}
    }
    works = [loop for loop, body in bodies.items() if sum(classify(body)[kind] for kind in ("fp32", "fp64")) >= pairs]
    inner = [loop for loop in works if not any(other.start in loop and len(other) < len(loop) for other in works)]
    return sorted((bodies[loop] for loop in inner), key=lambda body: body.total())


def _by_unit(kernel: Kernel, blocks: list[Block], threads: int) -> dict[str, float]:
    """Instructions by class for a pair (the tiled kernels, in their inner loop), or for a column or target.

    There, all blocks of the program count once, those of a search twice: more than a program executes. In shared memory
    columns are counted block by block, in a loop around all.
    """
    if kernel.unit == "pair":
        of_tile = _tile_loops(blocks, kernel.pairs // threads)[0]
        return {name: n * threads / kernel.pairs for name, n in classify(of_tile).items()}
    total: Counter[str] = Counter()
    around = 1 if kernel.constants.get("SHARED") else 0
    for block in blocks:
        times = 2 if block.depth > around else 1
        total.update({name: n * times for name, n in classify(block.instructions).items()})
    return {name: n * threads / kernel.units for name, n in total.items()}


def read(name: str, target: str, columns: str, *, instructions: bool = True) -> dict[str, Any]:
    """What one compiled kernel is like, with or without its instructions."""
    start = time.perf_counter()
    kernel, compiled = kernels(target, columns)[name], compile_kernel(name, target, columns)
    record: dict[str, Any] = {"kernel": name, "target": target, "columns": columns, **resources(compiled)}
    record["seconds"] = round(time.perf_counter() - start, 2)  # next to none if Triton has it in its cache
    record["addresses"] = addresses(compiled)
    if kernel.unit and instructions:
        threads, blocks = kernel.warps * TARGETS[target].warp_size, basic_blocks(compiled)
        record |= {"unit": kernel.unit, "by_unit": _by_unit(kernel, blocks, threads)}
        record["of_16_bytes"] = count(blocks, "LDG.E.128", "STG.E.128")
        record["atomics"] = count(blocks, "ATOMS.ADD", "ATOMS.CAS", "ATOMS")
        if kernel.unit == "pair":
            loops = _tile_loops(blocks, kernel.pairs // threads)
            record |= {
                "pairs": kernel.pairs // threads,
                "columns_a_thread": kernel.constants["COLUMNS"] // threads,
                "loops": [{name: n for name, n in loop.items() if classify(Counter([name]))["fp32"]} for loop in loops],
            }
    return record


def matrix(
    targets: tuple[str, ...] = tuple(TARGETS),
    dtypes: tuple[str, ...] = COLUMN_DTYPES,
    disassembled: tuple[str, ...] | None = None,
) -> list[dict[str, Any]]:
    """A record for each kernel, target, and dtype of the columns.

    ``disassembled``: the one target, and behind it the dtypes, whose instructions are read; None: those of all.
    """
    return [
        read(
            name,
            target,
            columns,
            instructions=disassembled is None or (target == disassembled[0] and columns in disassembled[1:]),
        )
        for columns in dtypes
        for target in targets
        for name in kernels(target, columns)
    ]
