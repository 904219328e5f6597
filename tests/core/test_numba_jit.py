"""How numba compiles: where it cannot keep what it made, and where what it kept is of other sources."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("numba")

from numba.core.dispatcher import Dispatcher

from alrp_triton.backends import numba_jit
from tests.support.processes import ROOT, run_together


def test_without_a_place_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(x: int) -> int:
        return 2 * x

    def refuse(*_: object) -> None:
        raise RuntimeError("no locator available")

    monkeypatch.setattr("numba.core.dispatcher.Dispatcher.enable_caching", refuse)
    with pytest.warns(RuntimeWarning, match="twice anew in every process.*NUMBA_CACHE_DIR"):
        compiled = numba_jit.jit(twice)
    assert compiled(21) == 42


CALL = """
import sys
from pathlib import Path
from alrp_triton.backends import numba_jit
numba_jit.SOURCES += [Path(sys.argv[1], "theirs.py"), Path(sys.argv[1], "ours.py")]
sys.path.insert(0, sys.argv[1])
from ours import call
print(call(1.0), sum(call.stats.cache_hits.values()))
"""


def test_an_edit_in_another_file_is_compiled(tmp_path: Path) -> None:
    """Which numba itself does not see: it looks at the file of the function that calls."""
    theirs, ours = tmp_path / "theirs.py", tmp_path / "ours.py"
    theirs.write_text("def formula(x):\n    return x + 1\n")
    ours.write_text(
        "from alrp_triton.backends.numba_jit import jit\nimport theirs\nformula = jit(theirs.formula)\n"
        "@jit\ndef call(x):\n    return formula(x)\n"
    )

    def run() -> str:
        (done,) = run_together(["-c", CALL, str(tmp_path)])
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run() == "2.0 0\n"
    assert run() == "2.0 1\n"
    theirs.write_text("def formula(x):\n    return x + 2\n")
    assert run() == "3.0 0\n"


def test_all_that_is_compiled_in_is_watched() -> None:
    """What a compiled function uses of another module of the package, be it a function or a constant."""
    backends, used = ROOT / "alrp_triton" / "backends", set[Path]()
    for file in sorted(backends.glob("numba_*.py")):
        module = import_module(f"alrp_triton.backends.{file.stem}")
        imported: dict[str, Path] = {}
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                source = (backends if node.level == 1 else backends.parent) / f"{node.module}.py"
                imported |= {alias.asname or alias.name: source for alias in node.names}
        for compiled in vars(module).values():
            if isinstance(compiled, Dispatcher):
                used |= {imported[name] for name in compiled.py_func.__code__.co_names if name in imported}
    assert used
    assert used <= set(numba_jit.SOURCES)
    assert backends.parent / "formulas.py" in numba_jit.SOURCES
