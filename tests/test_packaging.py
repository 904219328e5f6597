"""The wheel holds the package and nothing else."""

import zipfile
from pathlib import Path

import hatchling.build
import pytest

from tests.conftest import ROOT


def test_wheel_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = zipfile.ZipFile(tmp_path / hatchling.build.build_wheel(str(tmp_path))).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"alrp_triton"}
    package = {
        str(p.relative_to(ROOT)) for p in (ROOT / "alrp_triton").rglob("*") if p.suffix == ".py" or p.name == "py.typed"
    }
    assert {name for name in names if not name.startswith("alrp_triton-")} == package
    assert any(name.endswith("licenses/LICENSE") for name in names)
