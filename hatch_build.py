"""The description that a package index shows: README.md with links and images that lead to the repository.

Where the repository is, pyproject.toml says once, in `[tool.hatch.metadata.hooks.custom]`. While it says nothing, links
become their text and images are left out, for an index resolves no relative ones.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[((?:`[^`]*`|[^\]`])*)\]\((?!\w+:|#)([^)]+)\)")


def long_description(text: str, repository: str, version: str) -> str:
    """The text with its relative links made absolute, to the files of this version's tag."""

    def absolute(link: re.Match[str]) -> str:
        image, label, target = link.groups()
        if not repository:
            return "" if image else label
        return f"{image}[{label}]({repository}/{'raw' if image else 'blob'}/v{version}/{target})"

    return _LINK.sub(absolute, text)


class ReadmeHook(MetadataHookInterface):
    """Sets `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository = str(self.config["repository"]).rstrip("/")
        text = (Path(self.root) / "README.md").read_text("utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": long_description(text, repository, metadata["version"]),
        }
        files = f"{repository}/blob/v{metadata['version']}"
        metadata["urls"] = {
            name: url
            for name, url in {
                "Repository": repository,
                "Documentation": f"{files}/docs/index.md",
                "Changelog": f"{files}/CHANGELOG.md",
                "Issues": f"{repository}/issues",
            }.items()
            if repository
        }
