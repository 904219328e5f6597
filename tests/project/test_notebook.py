"""The notebook gives what is stored in it: text outputs to the letter, and a plot where one is stored."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT, run_together

nbformat: Any = pytest.importorskip("nbformat", reason="the notebook's tools are the tests', not the package's")
pytest.importorskip("nbclient", reason="the notebook's tools are the tests', not the package's")
pytest.importorskip("ipykernel", reason="the notebook's tools are the tests', not the package's")

NOTEBOOK = ROOT / "examples" / "figure1.ipynb"


def outputs(notebook: Any) -> list[list[tuple[str, str]]]:
    """For each cell of code its outputs, text and plots, with what they say as text."""
    return [
        [
            ("plot" if "image/png" in output.get("data", {}) else output["output_type"], text(output))
            for output in cell["outputs"]
        ]
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def text(output: Any) -> str:
    return str(output.get("text") or output["data"]["text/plain"])


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


# In a process of its own, which is watched: the limits here are of the clock, and so long that they are none.
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
source, target, folder = sys.argv[1:]
limits = dict.fromkeys(["timeout", "startup_timeout", "iopub_timeout"], 100_000)
notebook = nbformat.read(source, as_version=4)
NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": folder}}, **limits).execute()
nbformat.write(notebook, target)
"""


def test_it_gives_what_is_stored(stored: Any, tmp_path: Path) -> None:
    fresh: Any = nbformat.from_dict(stored)
    for cell in fresh["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    nbformat.write(fresh, tmp_path / "in.ipynb")
    target = tmp_path / "out.ipynb"
    (done,) = run_together(["-c", EXECUTE, str(tmp_path / "in.ipynb"), str(target), str(NOTEBOOK.parent)])
    assert done.returncode == 0, done.stderr
    fresh = nbformat.read(target, as_version=4)
    assert outputs(fresh) == outputs(stored)
    assert sum(len(of_cell) for of_cell in outputs(stored)) >= 7


def test_it_is_small_and_holds_nothing_of_a_machine(stored: Any) -> None:
    assert NOTEBOOK.stat().st_size < 200_000
    assert set(stored["metadata"]) == {"kernelspec", "language_info"}
    assert stored["metadata"]["kernelspec"]["name"] == "python3"
    assert stored["metadata"]["language_info"] == {"name": "python"}
    assert all(cell["metadata"] == {} for cell in stored["cells"])
