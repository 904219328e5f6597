"""An extension of griffe, which reads the package's sources for the pages in docs/api: docstrings become Markdown.

Docstrings are written for whoever reads the source or calls ``help``: a role such as ``:func:`alrp_loss``` names what
belongs to the package, and ``::`` announces a block of code or formulas. Here the one becomes a link, if the reference
has what it names, and the other a fenced block.
"""

import ast
import re
import textwrap
from collections.abc import Callable
from typing import Any

import griffe

PACKAGE = "alrp_triton"
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
_POWER = re.compile(r"(?<=\d)\*\*(?=[-\d])(?=[^`]*(?:`[^`]*`[^`]*)*$)")
_COMMAND = "alrp-train"
_REFERENCE = re.compile(r"^Reference:((?: .*)?(?:\n +.*)*)", re.MULTILINE)
_TWO_ERRORS = re.compile(r"^( +\w+Error), (\w+Error:)", re.MULTILINE)
_VARIADIC = {griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword}
# Where an attribute is set is no news for who reads what it is.
_PLACES = {"class-attribute", "instance-attribute", "module-attribute"}


def to_markdown(text: str, link: Callable[[str], str]) -> str:
    """A docstring with fences for ``::``, and with what ``link`` makes of the name in each role.

    A reference is a paragraph, which griffe would make a box of, and errors of one cause are one *or* the other.
    """
    text = _REFERENCE.sub(lambda found: f"**Reference:** {' '.join(found[1].split())}", text)
    lines = _TWO_ERRORS.sub(r"\1 or \2", text).splitlines()
    done: list[str] = []
    while lines:
        line = lines.pop(0)
        if not line.rstrip().endswith("::"):
            done.append(_prose(line, link))
            continue
        indent = len(line) - len(line.lstrip())
        block: list[str] = []
        while lines and (not lines[0].strip() or len(lines[0]) - len(lines[0].lstrip()) > indent):
            block.append(lines.pop(0))
        code = textwrap.dedent("\n".join(block)).strip("\n")
        if line.strip() != "::":
            title = line.rstrip()[:-1]
            done += ["**Example:**" if title == "Example:" else _prose(title, link), ""]
        done += [" " * indent + row for row in ("```" + _language(code), *code.splitlines(), "```", "")]
    return "\n".join(done)


def _prose(line: str, link: Callable[[str], str]) -> str:
    """Links, and powers, whose stars would print what stands between two of them in bold."""
    return _ROLE.sub(lambda role: link(role[1]), _POWER.sub(r"\\*\\*", line))


def _language(code: str) -> str:
    """Python if it can be parsed: formulas cannot."""
    try:
        ast.parse(code)
    except SyntaxError:
        return "console" if code.startswith(_COMMAND) else "text"
    return "python"


def target_of(owner: griffe.Object, name: str) -> str | None:
    """The path of what a role in the docstring of ``owner`` names; None if it is another library's.

    A name is one of the object, of its module, or of a module beside it; with a dot in front, of the latter alone.

    Raises:
        ValueError: nothing in the package has that name.
    """
    root, _, rest = name.removeprefix(".").partition(".")
    if root == PACKAGE:
        found: griffe.Object | griffe.Alias | None = owner.package
    elif not name.startswith("."):
        found = _near(owner, root) or _beside(owner, root)
        if found is None and rest:
            return None
    else:
        found = _beside(owner, root)
    try:
        if found is not None:
            return (found[rest] if rest else found).canonical_path
    except (KeyError, griffe.AliasResolutionError):
        pass
    raise ValueError(f"the docstring of {owner.path} names {name}, which is nowhere")


def _near(owner: griffe.Object, name: str) -> griffe.Object | griffe.Alias | None:
    try:
        return owner.modules_collection[owner.resolve(name)]
    except (KeyError, griffe.NameResolutionError):
        return None


def _beside(owner: griffe.Object, name: str) -> griffe.Object | griffe.Alias | None:
    """A module in the folder of the owner's, or what one of them defines under this name."""
    folder = owner.module if owner.module.is_init_module else owner.module.parent
    assert folder is not None
    modules = folder.modules
    found = [module.members[name] for module in modules.values() if name in module.members]
    return modules.get(name) or next((one for one in found if not one.is_alias), None)


def value_of(owner: griffe.Object, default: str | griffe.Expr | None) -> str | griffe.Expr | None:
    """The number or text that a default stands for, if it is the name of a constant; else the default as it is.

    Text is in double quotes, as in the code.
    """
    while isinstance(default, griffe.ExprName):
        found = _near(owner, default.name)
        constant = found.final_target if isinstance(found, griffe.Alias) else found
        if not isinstance(constant, griffe.Attribute) or constant.value is None:
            break
        owner, default = constant, constant.value
    if isinstance(default, str) and default.startswith("'") and '"' not in default:
        return f'"{default[1:-1]}"'
    return default


class Docstrings(griffe.Extension):
    """Rewrites all docstrings of the package, once it is loaded, and gives default values for the names of them."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._rewrite(pkg)

    def _rewrite(self, owner: griffe.Object) -> None:
        if owner.docstring:
            owner.docstring.value = to_markdown(owner.docstring.value, lambda name: self._link(owner, name))
        owner.labels -= _PLACES
        if isinstance(owner, griffe.Function):
            for parameter in owner.parameters:
                variadic = parameter.kind in _VARIADIC
                parameter.default = None if variadic else value_of(owner, parameter.default)
        for member in owner.members.values():
            if isinstance(member, griffe.Object):
                self._rewrite(member)

    def _link(self, owner: griffe.Object, name: str) -> str:
        """A link where the reference has it, else its name alone: much that docstrings name is internal."""
        target = target_of(owner, name)
        if target is None or owner.modules_collection[target].is_module:
            return f"`{name}`"
        return f'<autoref identifier="{target}" optional>`{name.removeprefix(f"{PACKAGE}.")}`</autoref>'
