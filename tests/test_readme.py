"""The README is true: its table comes from the result file, its commands exist, its example runs."""

import json
import re

from bench.report import markdown
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_result_files() -> None:
    tables = re.findall(r"<!-- (bench/results/\S+) -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert tables
    for file, table in tables:
        assert table.strip() == markdown(json.loads((ROOT / file).read_text())).strip()


def test_commands_are_targets() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z0-9-]+)", README)) <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()
