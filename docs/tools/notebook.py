"""A hook of mkdocs: examples/figure1.ipynb becomes a page of the site, with the outputs that are stored in it.

Links to the notebook, which a code host shows by itself, lead to that page.
"""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

NOTEBOOK = "examples/figure1.ipynb"
PAGE = "figure1.md"


class Page(NamedTuple):
    """A notebook as Markdown, and the plots that it links to by name."""

    text: str
    plots: dict[str, bytes]


def convert(notebook: dict[str, Any], folder: str = "plots/figure1") -> Page:
    """Cells and outputs one after the other: plots, and all that a cell printed, which may be stored in pieces."""
    parts: list[str] = []
    plots: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = ""
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{folder}-{len(plots) + 1}.png"
                plots[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![plot of the cell above]({name})")
            else:
                printed += "".join(output.get("text", data.get("text/plain", "")))
        if printed:
            parts.append(f"```\n{printed.rstrip()}\n```")
    return Page("\n\n".join(parts) + "\n", plots)


def on_files(files: Any, *, config: Any) -> None:
    """Adds the page and its plots."""
    from mkdocs.structure.files import File  # here, for the tests do without mkdocs

    root = Path(config.config_file_path).parent
    page = convert(json.loads((root / NOTEBOOK).read_text()))
    for name, content in {PAGE: page.text, **page.plots}.items():
        files.append(File.generated(config, name, content=content))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leads links to the page."""
    return markdown.replace(f"](../{NOTEBOOK}", f"]({PAGE}")
