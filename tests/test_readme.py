"""The README is true: its table comes from the result file, its commands exist, its example runs."""

import re
from importlib.util import find_spec

import pytest

from bench.report import fill, pages
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.skipif(not find_spec("triton"), reason="the tables of compiled kernels need triton")
def test_tables_are_those_of_the_result_files() -> None:
    for page in pages():
        text = page.read_text()
        assert text.count("<!-- end -->") >= 3
        assert fill(text) == text, f"{page.name}: make tables"


def test_links_and_plots_exist() -> None:
    for page in pages():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_are_targets() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z0-9-]+)", README)) <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()
