"""README and docs are true: tables come from result files, commands and links exist, examples run."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.report import fill, pages
from tests.support.processes import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.skipif(not find_spec("triton"), reason="the tables of compiled kernels need triton")
def test_tables_are_those_of_the_result_files() -> None:
    for page in pages():
        text = page.read_text()
        assert "<!-- end -->" in text
        assert fill(text) == text, f"{page.name}: make tables"


def test_links_and_plots_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_are_targets() -> None:
    targets = set(re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z0-9-]+(?:\.[0-9]+)?)", README)) <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def examples(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_first_examples_run() -> None:
    with_torchvision, function = examples(README)[:2]
    names: dict[str, Any] = {}
    exec(function, names)
    assert names["logits"].grad.abs().sum() > 0
    pytest.importorskip("torchvision.ops", reason="the first example needs torchvision", exc_type=ImportError)
    exec(with_torchvision, names)
    assert names["model"].head.classification_head.cls_logits.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\).* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning")
@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_examples_of_the_docs_run(page: Path) -> None:
    """One after the other, in one place."""
    if page.stem in ("metrics", "training"):
        pytest.importorskip("torchmetrics")
        pytest.importorskip("faster_coco_eval")
        pytest.importorskip("sklearn")
    if page.stem == "lightning":
        pytest.importorskip("lightning")
    if page.stem in ("index", "integrations", "lightning", "training"):
        pytest.importorskip("torchvision.ops", exc_type=ImportError)
    names: dict[str, object] = {}
    for code in examples(page.read_text()):
        exec(code, names)
    without = {"behaviour", "comparison", "lessons", "performance", "published", "support", "trainer"}
    assert (page.stem in without) == ("torch" not in names and "np" not in names)
