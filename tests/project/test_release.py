"""What a release consists of beside the code says the same everywhere: versions, dates, extras, targets, papers."""

import re
from pathlib import Path
from typing import Any

import pytest

import alrp_triton
from tests.support.processes import ROOT

yaml = pytest.importorskip("yaml", reason="CITATION.cff and what is in .github are YAML")
tomllib = pytest.importorskip("tomllib", reason="Python reads TOML from 3.11 on")

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "alrp_triton").rglob("*.py")])
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def test_changelog_has_dates_from_new_to_old() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if headings[0] == "Unreleased":
        headings.pop(0)
    releases = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) \((\d{4}-\d\d-\d\d)\)", heading) for heading in headings]
    assert all(releases), headings
    order = [(*map(int, release.groups()[:3]), release[4]) for release in releases if release]
    assert order == sorted(order, reverse=True)
    assert headings[0].startswith(f"{alrp_triton.__version__} (")


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f"## {citation['version']} ({citation['date-released']})" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["version"] == alrp_triton.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    first, *others = citation["preferred-citation"], *citation["references"]
    assert first["title"] in (ROOT / "README.md").read_text().replace("\n", " ")
    assert [author["family-names"] for author in first["authors"]] == ["Oksuz", "Cam", "Akbas", "Kalkan"]
    functions = re.sub(r"\s+", " ", (ROOT / "alrp_triton" / "functional.py").read_text())
    for paper in (first, *others):
        assert f'"{paper["title"]}"' in functions
        assert paper["url"].replace("https://arxiv.org/abs/", "arXiv:") in functions
        assert ", ".join(author["family-names"] for author in paper["authors"]) in functions


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_extras_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"(?:alrp-triton|['\"]\.|-e \.)\[([^\]]+)\]", page.read_text())
    assert {extra.strip() for extras in named for extra in extras.split(",")} <= set(PROJECT["optional-dependencies"])


def test_some_extras_are_named() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert all(f'[{extra}]"' in text for extra in ("cpu", "metrics", "trainer", "cpu,torchvision"))


def test_jobs_are_the_parts_of_ci() -> None:
    jobs = workflow("ci.yml")["jobs"]["make"]["strategy"]["matrix"]["include"]
    script = (ROOT / ".ci" / "run").read_text()
    parts = {*re.findall(r"^make (\S+)$", script, re.MULTILINE), *re.findall(r"\binstall-check\b", script)}
    assert {job["target"] for job in jobs} == parts
    assert parts <= set(re.findall(r"^([a-z0-9.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    table = re.findall(r"^\| (3\.\d+) \|.*\| `make (\S+)`, in CI \|$", (ROOT / "docs" / "support.md").read_text(), re.MULTILINE)  # fmt: skip
    assert {(job["python"], job["target"]) for job in jobs if job["target"].startswith("test")} == set(table)


def test_only_the_job_that_publishes_may_ask_for_a_token() -> None:
    release = workflow("release.yml")
    assert release["permissions"] == {"contents": "read"}
    assert [name for name, job in release["jobs"].items() if "permissions" in job] == ["publish"]
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path: Path) -> None:
    """As code hosts take them: a name, a description, and fields with an id of their own each."""
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])
    if "versions" in ids:
        (versions,) = (field for field in form["body"] if field["id"] == "versions")
        assert "`python -m torch.utils.collect_env; python -m pip list`" in versions["attributes"]["description"]
