"""The documentation's site: its pages are all reachable, its figures say what the package computes. `make docs` builds it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from alrp_triton import operators
from docs.tools import breaks, figures, notebook, stages
from tests.support.processes import ROOT


def test_navigation_has_every_page() -> None:
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")} | {notebook.PAGE}
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(pages)


def test_skipped_tiles_are_zero() -> None:
    scene = figures.make_scene()
    h = figures.matrix(scene.positives, scene.negatives)
    tiles = h.reshape(-1, figures.ROWS, len(scene.negatives) // figures.COLUMNS, figures.COLUMNS)
    skipped = figures.skipped(scene)
    assert (tiles.max((1, 3))[skipped] == 0).all()
    assert 0 < skipped.sum() < skipped.size
    dense = (scene.negatives[None, :] - scene.positives[:, None]) / (2 * figures.DELTA) + 0.5
    assert abs(h - dense.clip(0, 1)).max() < 1e-12


def test_bins_give_false_positives() -> None:
    small = figures.make_small()
    found = [small.false_positives(row) for row in range(len(small.scores))]
    assert np.allclose(found, small.operator.matvec().numpy(), rtol=1e-12)


def test_figures_have_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = (figures.draw(tmp_path / name) for name in "ab")
    for path, again in zip(first, second, strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert (ROOT / "docs" / "plots" / path.name).exists()


def test_gradient_of_the_figure_is_linear_between_knots() -> None:
    small = figures.make_small()
    weights = torch.tensor(small.weights)
    at_knots = small._replace(logits=small.knots).operator.rmatvec(weights).numpy()
    between = np.interp(small.logits, small.knots, at_knots)
    assert np.allclose(between, small.operator.rmatvec(weights).numpy(), rtol=1e-12)


def test_stages_are_the_operators() -> None:
    defined = {name for name in vars(operators) if hasattr(torch.ops.alrp_triton, name) and not name.startswith("_")}
    assert {stage.name for stage in stages.STAGES} == defined
    page = (ROOT / "docs" / "stages.md").read_text()
    assert all(name in page for name in defined)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/lessons.md", "docs/stages.md"])
def test_files_that_are_named_exist(page: str) -> None:
    """By name, path or pattern."""
    folders = ("alrp_triton", "bench", "docs", "examples", "reference", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    named = set(re.findall(r"`([\w/*]+\.py)`", (ROOT / page).read_text()))
    assert named
    assert [name for name in named if not any(path.match(name) for path in files)] == []


def test_notebook_becomes_a_page() -> None:
    stored = json.loads((ROOT / notebook.NOTEBOOK).read_text())
    page = notebook.convert(stored)
    assert len(page.plots) == 3
    assert all(data.startswith(b"\x89PNG") and f"]({name})" in page.text for name, data in page.plots.items())
    assert "R3        0.50  0.65  0.80  0.95                       0.36       0.89\n```" in page.text
    assert "aLRP Loss\nR1 " in page.text  # stored in two pieces
    assert notebook.on_page_markdown(f"[a](../{notebook.NOTEBOOK})", page=None) == f"[a]({notebook.PAGE})"


def test_what_may_not_break_is_marked() -> None:
    head = '<tr>\n<th>loss</th>\n<th>what it is</th>\n<th style="text-align: right;">AP</th>\n</tr>'
    row = "<tr>\n<td>aLRP</td>\n<td>{}</td>\n<td>0.40 (0.35 to 0.41)</td>\n</tr>"
    table = (
        f"<table>\n<thead>\n{head}\n</thead>\n<tbody>\n{row.format('GIoU, balanced in every step')}\n</tbody>\n</table>"
    )
    expected = table.replace("<th>what", '<th class="words">what').replace(
        "(0.35 to 0.41)", '<span class="whole">(0.35 to 0.41)</span>'
    )
    assert breaks.read(table) == expected
    assert breaks.read("<code>fit --data.root DIR</code>") == (
        '<code>fit <span class="whole">--data.root</span> DIR</code>'
    )
    block = "<pre><span></span><code>fit --data.root DIR</code></pre>"
    assert breaks.read(block) == block


def code_of(text: str) -> list[str]:
    """The lines of its fenced blocks, and those that are indented as one."""
    fence = re.compile(r"^ *```[^\n`]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^\n|\A)((?: {4}.*\n)+)", fence.sub("", text), re.MULTILINE)
    return [line for block in [*fence.findall(text), *indented] for line in block.splitlines()]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_code_fits_in_80_columns(page: Path) -> None:
    """So that nobody has to scroll it sideways."""
    assert [line for line in code_of(page.read_text()) if len(line.rstrip()) > 80] == []


def test_code_of_the_notebook_fits_in_80_columns() -> None:
    lines = code_of(notebook.convert(json.loads((ROOT / notebook.NOTEBOOK).read_text())).text)
    assert len(lines) > 50
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_links_stay_inside(page: Path) -> None:
    """What lies outside of docs/ is no page of the site; the notebook is, by a hook."""
    outside = re.findall(r"\]\((\.\./[^)]*)\)", page.read_text())
    assert set(outside) <= {f"../{notebook.NOTEBOOK}"}
