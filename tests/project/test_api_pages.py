"""The reference in docs/api has every public name, and what it shows of docstrings is Markdown. `make docs` builds it."""

import ast
import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.processes import ROOT

if TYPE_CHECKING:
    import griffe

PACKAGE = ROOT / "alrp_triton"
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
LISTED = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
}


def public_of(module: ast.Module) -> Iterator[str]:
    """The names in `__all__`, and those that are imported as themselves: a lazy package has no others."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.asname == alias.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            yield from ast.literal_eval(node.value)


PUBLIC = {
    f"{path}.{name}"
    for path, module in MODULES.items()
    if not path.startswith("alrp_triton.backends")
    for name in public_of(module)
}


def test_every_public_name_is_in_the_reference() -> None:
    assert len(PUBLIC) > 60
    assert sorted(PUBLIC - set(LISTED)) == []
    assert sorted(set(LISTED) - PUBLIC - set(MODULES)) == []
    assert len(LISTED) == len(set(LISTED))


def test_what_pages_import_is_public() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    imports = r"^ *from (alrp_triton[\w.]*) import (?:\(([^)]*)\)|([^#(\n]*))"
    found = {
        f"{module}.{name.split(' as ')[0].strip()}"
        for page in pages
        for module, several, one in re.findall(imports, page.read_text(), re.MULTILINE)
        for name in (several or one).split(",")
        if name.strip()
    }
    assert len(found) > 20
    assert sorted(found - PUBLIC - set(MODULES)) == []


def test_what_is_public_of_a_loaded_module_is_listed() -> None:
    """As Python sees it, of what needs no other library."""
    import alrp_triton
    from alrp_triton import compat

    for module in (alrp_triton, compat):
        assert {f"{module.__name__}.{name}" for name in module.__all__} <= set(LISTED)


@pytest.fixture(scope="module")
def package() -> "griffe.Module":
    griffe = pytest.importorskip("griffe", reason="the reference needs the extra docs")
    from docs.tools import reference

    return griffe.load("alrp_triton", search_paths=[ROOT], extensions=griffe.Extensions(reference.Docstrings()))


def documented(owner: "griffe.Object") -> Iterator["griffe.Object"]:
    if owner.docstring:
        yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from documented(member)  # pyright: ignore[reportArgumentType]


def test_docstrings_become_markdown(package: "griffe.Module") -> None:
    """A role that names nothing is an error when the package is loaded."""
    owners = list(documented(package))
    assert len(owners) > 400
    for owner in owners:
        assert owner.docstring is not None
        text = owner.docstring.value
        assert not re.search(r":[a-z]+:`|::$|^ *={4,}", text, re.MULTILINE), owner.path


def test_code_of_docstrings_fits_in_80_columns(package: "griffe.Module") -> None:
    too_long: list[tuple[str, str]] = []
    for name in LISTED:
        docstring = package.modules_collection[name].docstring
        text = docstring.value if docstring else ""
        blocks = re.findall(r"^ *```\w+\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
        code = [line for block in blocks for line in textwrap.dedent(block).splitlines()]
        too_long += [(name, line) for line in code if len(line) > 80]
    assert too_long == []


def test_links_fences_powers_and_defaults(package: "griffe.Module") -> None:
    loss = package["alrp_loss"].final_target
    text = loss.docstring.value
    link = '<autoref identifier="alrp_triton.boxes.localisation_error" optional>`localisation_error`</autoref>'
    assert f"see {link}. May" in text
    assert "```text\nFP_i   = sum_j H_ij\n" in text
    assert r"[2\*\*-126, 2\*\*125]" in text
    assert "`alrp_triton.cost`" in text
    assert str(loss.parameters["delta"].default) == "1.0"
    assert "**Example:**\n\n```python\ncriterion = ALRPLoss()\n" in package["ALRPLoss"].final_target.docstring.value


def test_references_errors_and_what_is_no_default(package: "griffe.Module") -> None:
    assert "\n**Reference:** Oksuz, Cam, Akbas, Kalkan: " in package["alrp_loss"].final_target.docstring.value
    assert "\n    TypeError or ValueError: " in package["SelfBalance"].final_target.docstring.value
    assert str(package["alrp_loss"].final_target.parameters["backend"].default) == '"auto"'
    metric = package["metrics.detection.OptimalLRP"]
    assert metric["__init__"].parameters["kwargs"].default is None
    assert package["functional.ALRPLossOutput.classification"].labels == set()


def test_a_role_that_names_nothing_is_an_error(package: "griffe.Module") -> None:
    from docs.tools import reference

    owner = package["functional.alrp_loss"]
    assert reference.target_of(owner, "ap_loss") == "alrp_triton.functional.ap_loss"
    assert reference.target_of(owner, "torch.Tensor") is None
    for name in ("app_loss", "alrp_triton.app_loss", ".app_loss", "ALRPLossOutput.app"):
        with pytest.raises(ValueError, match=rf"alrp_loss names {re.escape(name)}, which is nowhere"):
            reference.target_of(owner, name)
