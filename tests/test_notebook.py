"""The notebook gives what is stored in it: text outputs to the letter, and a plot where one is stored."""

from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

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
    return nbformat.read(NOTEBOOK, as_version=4)  # pyright: ignore[reportPrivateImportUsage]


def test_it_gives_what_is_stored(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    fresh: Any = nbformat.from_dict(stored)  # pyright: ignore[reportPrivateImportUsage]
    for cell in fresh["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    there = {"metadata": {"path": NOTEBOOK.parent}}
    NotebookClient(fresh, timeout=120, kernel_name="python3", resources=there).execute()
    assert outputs(fresh) == outputs(stored)
    assert sum(len(of_cell) for of_cell in outputs(stored)) >= 7


def test_it_is_small_and_holds_nothing_of_a_machine(stored: Any) -> None:
    assert NOTEBOOK.stat().st_size < 200_000
    assert set(stored["metadata"]) == {"kernelspec", "language_info"}
    assert stored["metadata"]["kernelspec"]["name"] == "python3"
    assert stored["metadata"]["language_info"] == {"name": "python"}
    assert all(cell["metadata"] == {} for cell in stored["cells"])
