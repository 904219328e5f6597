"""The wheel holds the package and nothing else, is the same each time, and fetches, evaluates and unpickles nothing."""

import ast
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import hatchling.build
import pytest

from hatch_build import long_description
from tests.conftest import ROOT, run_together

SOURCES = sorted((ROOT / "alrp_triton").rglob("*.py"))


def test_wheel_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = zipfile.ZipFile(tmp_path / hatchling.build.build_wheel(str(tmp_path))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"alrp_triton"}
    package = {
        str(p.relative_to(ROOT)) for p in (ROOT / "alrp_triton").rglob("*") if p.suffix == ".py" or p.name == "py.typed"
    }
    assert {name for name in names if not name.startswith("alrp_triton-")} == package
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_description_has_no_relative_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of packages resolves none; HTML in Markdown has none here."""
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / hatchling.build.build_wheel(str(tmp_path))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        metadata = wheel.read(name).decode()
    assert "\nAuthor: The alrp_triton authors\n" in metadata
    assert "\nDescription-Content-Type: text/markdown\n" in metadata
    assert "# alrp_triton\n" in metadata
    assert all(link.startswith(("https://", "#")) for link in re.findall(r"\]\(([^)]*)\)", metadata))
    assert not re.search(r"<(a|img)\b", metadata)


def test_links_of_the_description_are_the_readme_s() -> None:
    text, base = (ROOT / "README.md").read_text(), "https://code.host/owner/name"
    links = re.findall(r"\]\(([^)]*)\)", text)
    described = re.findall(r"\]\(([^)]*)\)", long_description(text, base, "1.2.3"))
    assert len(described) == len(links) > 30
    for link, absolute in zip(links, described, strict=True):
        kind = "raw" if link.endswith(".png") else "blob"
        assert absolute == (link if link.startswith("https://") else f"{base}/{kind}/v1.2.3/{link}")
    unknown = long_description("![a](b.png) [`c[0]`, d](e.md#f) [g](https://h)", "", "1.2.3")
    assert unknown == " `c[0]`, d [g](https://h)"


@pytest.mark.parametrize("build", [hatchling.build.build_wheel, hatchling.build.build_sdist], ids=["wheel", "sdist"])
def test_builds_are_reproducible(build: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, at another time and into another folder."""
    monkeypatch.chdir(ROOT)
    built: list[bytes] = []
    for turn in range(2):
        folder = tmp_path / str(turn)
        folder.mkdir()
        built.append((folder / build(str(folder))).read_bytes())
        time.sleep(2.1 * (1 - turn))  # a ZIP file's time has steps of two seconds
    assert built[0] == built[1]


def test_nothing_is_evaluated_unpickled_or_fetched() -> None:
    """Of the source: no eval or exec, no unpickling of more than weights, nothing that opens a connection or starts a program."""
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "socket", "urllib", "http", "requests", "ftplib", "subprocess"}  # fmt: skip
    calls = {"eval", "exec", "compile", "__import__", "system", "popen", "load_state_dict_from_url", "urlopen", "unpickle"}  # fmt: skip
    assert len(SOURCES) > 30
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [(node.module or "").split(".")[0]]
            assert not modules & set(names), f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert name not in calls, f"{path}:{node.lineno} calls {name}"
                if name in ("load", "loads") and "torch" in ast.dump(node.func):
                    safe = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
                    assert safe.get("weights_only") is True, f"{path}:{node.lineno}"


OFFLINE = """
import sys
watched = ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "subprocess.Popen", "os.system", "os.exec")
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args)[:80])) if event in watched else None)
import torch
before = len(seen)  # what torch does at its import is torch's
from alrp_triton import alrp_loss, ap_loss, rank_sort_loss
logits = torch.randn(500, requires_grad=True)
targets = (torch.arange(500) < 20).long()
for backend in ("torch", "numba"):
    for out in (alrp_loss(logits, targets, torch.rand(20), backend=backend), rank_sort_loss(logits, targets, torch.rand(20), backend=backend)):
        out[0].backward()
    ap_loss(logits, targets, backend=backend).backward()
print(seen[before:])
"""


def test_nothing_is_fetched_or_started_when_it_runs() -> None:
    """Python's audit events of an import and a step of each loss."""
    (done,) = run_together(["-c", OFFLINE])
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
