"""A hook of mkdocs: where lines of text and of tables may not break.

- Short words of code stay whole: an option is not parted after its hyphens.
- So do ranges in tables, such as (0.35 to 0.41), and sizes of grids.
- The head of a column of text gets the class ``words``, for which site.css keeps some room on a narrow screen.
"""

import re
from typing import Any

_CODE = re.compile(r"(?<!</span>)<code>([^<]*)</code>")
_WORD = re.compile(r"(?<!\S)(?=\S*[-.\[/])\S{3,36}(?!\S)")
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_ROW = re.compile(r"<tr>.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<t[hd][^>]*>(.*?)</t[hd]>", re.DOTALL)
_RANGE = re.compile(r"\([-\d.,]+ to [-\d.,]+\)|\(\d+, \d+, \d+\)")
_TEXT = 24  # letters


def read(html: str) -> str:
    """A page with what is to stay whole marked."""
    html = _TABLE.sub(lambda found: _table(found[0]), html)
    return _CODE.sub(lambda found: f"<code>{_WORD.sub(_whole, found[1])}</code>", html)


def _whole(found: re.Match[str]) -> str:
    return f'<span class="whole">{found[0]}</span>'


def _table(table: str) -> str:
    rows = [[len(re.sub("<[^>]+>", "", cell)) for cell in _CELL.findall(row)] for row in _ROW.findall(table)]
    longest = iter([max(lengths) for lengths in zip(*rows, strict=True)])
    # Numbers have a style, to the right.
    table = re.sub("<th(?: [^>]*)?>", lambda head: _head(head[0], next(longest)), table)
    return _RANGE.sub(_whole, table)


def _head(tag: str, letters: int) -> str:
    return '<th class="words">' if tag == "<th>" and letters >= _TEXT else tag


def on_page_content(html: str, **_: Any) -> str:
    """Of each page, once it is HTML."""
    return read(html)
