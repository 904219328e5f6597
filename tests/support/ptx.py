"""Shared memory for Triton's interpreter, which knows no inline assembly: what that of ``triton_shared`` says, in NumPy.

Words are of 32 bits, and hold rubbish at first, as on a GPU. A thread does nothing that another does, too: vectors
shorter than there are threads would be done several times there, so they are an error here.
"""

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Words = NDArray[np.uint32]
_BASE = 64  # the address of the table


class SharedMemory:
    """Of one program at a time, as the interpreter runs them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.words = np.zeros(0, np.uint32)
        self.additions = 0

    def run(self, assembly: str, operands: list[NDArray[Any]]) -> NDArray[Any]:
        """The results of one piece of assembly for all elements."""
        if ".shared .align" in assembly:
            size = int(re.findall(r"\[(\d+)\]", assembly)[0])
            self.words = np.random.default_rng(0).integers(0, 2**32, size // 4, np.uint32)
            return np.array([_BASE], np.int32)
        address, *values = (operand.reshape(-1).view(np.uint32) for operand in operands)
        assert address.size % self.threads == 0, "several threads would do the same"
        at = (address - _BASE) // 4
        if "st.shared.v2" in assembly:
            (value,) = values
            self.words[at], self.words[at + 1] = value, value
            return value
        if "ld.shared" in assembly:
            return self.words[at + ("+4" in assembly)]
        assert "atom.shared.add.u32" in assembly
        low, high, on = values
        carried = np.zeros_like(low)
        for index in np.flatnonzero(on):
            word = int(self.words[at[index]]) + int(low[index])
            self.words[at[index]] = word % 2**32
            carried[index] = (int(high[index]) + (word >> 32)) % 2**32
            self.words[at[index] + 1] = (int(self.words[at[index] + 1]) + int(carried[index])) % 2**32
            self.additions += 1
        return carried


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> SharedMemory:
    """That of programs in the interpreter."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    memory = SharedMemory(import_module("alrp_triton.backends.triton_shared").THREADS)

    class Results:
        def __init__(self, handles: list[Any]) -> None:
            self.get_result: Callable[[int], Any] = handles.__getitem__

    def create_inline_asm(
        _: Any, assembly: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
    ) -> Results:
        assert constraints.count(",") == len(values)
        assert (pure, pack) == (False, 1)
        shape = np.shape(values[0].data)
        (of,) = types
        result = memory.run(assembly, [np.asarray(value.data) for value in values]).view(
            np.uint32 if "uint" in str(of) or "u32" in str(of) else np.int32
        )
        return Results([interpreter.TensorHandle(result.reshape(shape), of.scalar)])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    return memory
