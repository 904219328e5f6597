"""Files in COCO format: which part of a data set they are, and what of them means something."""

import hashlib
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import UserError, in_a_line

MIN_SIDE = 0.01
"""Pixels. A box with a shorter side, inside of its image, is none: in float32 it may have no area once resized."""

_MAX_AREA = 1e10  # of COCO's range "all": objects with more would be ignored
_PARTS = {"train", "val", "test"}


class Part(NamedTuple):
    """One part of a data set: its annotation file, and the folders in which its images may lie, likeliest first."""

    annotations: Path
    folders: tuple[Path, ...]


def find_part(root: Path, name: str) -> Part:
    """Finds a part of a data set that is laid out like COCO, ``annotations/instances_train2017.json``, or Roboflow's.

    ``name`` is a file's whole name, without ``.json``, or whole words of it (``train``, but not ``trainval``); of
    several such files the one that begins with ``instances``. Images are in a folder that is named as the end of the
    file's name or as the part, beside ``annotations`` or in ``images``; or in ``images`` itself.

    Raises:
        UserError: there is no such folder or file, or more than one; says what was seen.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    files = {file.stem: file for file in sorted((root / "annotations").glob("*.json"))}
    for file in sorted(root.glob("*/_annotations.coco.json")):
        if file.parent.name in files and file.parent.name == name:
            seen = f"{files[name].relative_to(root)}, {file.relative_to(root)}"
            raise UserError(f"want one file of {name} in {root}, found {seen}")
        files[file.parent.name] = file
    found = [one for one in files if one == name] or [one for one in files if _has_words(one, name)]
    found = [one for one in found if one.startswith("instances")] or found
    if len(found) != 1:
        seen = ", ".join(str(files[one].relative_to(root)) for one in found or files) or "none"
        raise UserError(f"want one file annotations/*{name}*.json in {root}, found {seen}")
    (stem,) = found
    file, names = files[stem], (stem.split("_")[-1], stem, name)
    folders = [*(root / one for one in names), *(root / "images" / one for one in names), root / "images", root]
    return Part(file, tuple(folder for folder in dict.fromkeys(folders) if folder.is_dir()))


def _has_words(text: str, name: str) -> bool:
    """But ``train_val`` is no ``val``: it has words of another part, too."""
    words, wanted = (re.findall("[a-z]+|[0-9]+", one.lower()) for one in (text, name))
    if _PARTS & {*wanted} and _PARTS & {*words} - {*wanted}:
        return False
    return any(words[first : first + len(wanted)] == wanted != [] for first in range(len(words)))


class Coco:
    """The content of an annotation file, checked.

    Attributes:
        categories: names by id, in the order of the labels.
        image_ids: ascending; in their order ``names`` of files, and ``sizes`` (I, 2), width and height.
        image: (R,) which image a box is in, ascending; and of it ``label`` (R,), ``xywh`` (R, 4) float64, ``corners``
            (R, 4) float32, cut at the border of the image, ``area`` (R,) and ``crowd`` (R,).
        annotated: whether the file has annotations; that of a test set may have none.
        notes: sentences on what was left out or changed, and on what looks wrong.
        fingerprint: of all this; two data sets that differ have two of them.

    Raises:
        UserError: the file is not of this format; names the entry that is wrong.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        content = _read_json(file)
        self.annotated = "annotations" in content
        self.notes: list[str] = []
        categories = self._each(content, "categories", lambda row: (_whole(row, "id"), str(row.get("name", row["id"]))))
        named, times = sorted(self._by_id("category", categories).items()), Counter(name for _, name in categories)
        # Results are by name: those of one name, as Roboflow writes them, are told apart by their ids.
        self.categories = {one: name if times[name] == 1 else f"{name} ({one})" for one, name in named}
        if len(set(self.categories.values())) < len(named):  # one is named as another is told apart
            self.categories = {one: f"{name} ({one})" for one, name in named}
        images = self._each(content, "images", _read_image_entry)
        described = dict(sorted(self._by_id("image", images).items()))
        self.image_ids, self.names = list(described), [name for name, _, _ in described.values()]
        self.sizes = np.array([size for _, *size in described.values()], np.float64)
        index_of = {number: index for index, number in enumerate(self.image_ids)}
        label_of = {number: label for label, number in enumerate(self.categories)}
        content.setdefault("annotations", [])
        rows = self._each(content, "annotations", lambda row: _read_annotation(row, index_of, label_of))
        flagged = [row.get("id") for row in content["annotations"] if row.get("ignore")]
        self._note("{} have ignore", flagged, ", which is not read, as in COCO: iscrowd is")
        rows.sort(key=lambda row: row[0])
        self._keep_meaningful(rows)
        digest = hashlib.sha256(json.dumps([self.image_ids, self.names, list(self.categories.items())]).encode())
        for column in (self.image, self.label, self.xywh, self.area, self.crowd):
            digest.update(column.tobytes())
        self.fingerprint = digest.hexdigest()

    def _each(self, content: dict[str, Any], key: str, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
        rows, out = content.get(key), []
        if not isinstance(rows, list):
            raise UserError(f"{self.file} is no COCO annotation file: {key!r} is {reprlib.repr(rows)} and no list")
        for number, row in enumerate(rows):
            try:
                out.append(read(row))
            except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:  # noqa: PERF203
                known = isinstance(row, dict) and "id" in row
                name = f"id {row['id']!r:.40}" if known else f"number {number}, without an id"
                text = f"has no {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{self.file}: {key}, {name}: {in_a_line(text)}") from error
        return out

    def _by_id(self, what: str, rows: list[tuple[Any, ...]]) -> dict[int, Any]:
        by_id = {number: rest[0] if len(rest) == 1 else rest for number, *rest in rows}
        if len(by_id) < len(rows):
            (twice, _), *_ = Counter(number for number, *_ in rows).most_common(1)
            raise UserError(f"{self.file}: more than one {what} has the id {twice}")
        if not by_id:
            raise UserError(f"{self.file} lists no {what}")
        return by_id

    def _note(self, text: str, ids: list[Any], more: str = "") -> None:
        """Says of which annotations, if there are any, the text is."""
        if ids:
            some = ", ".join([f"{one!r:.40}" for one in ids[:3]] + ["…"] * (len(ids) > 3))
            self.notes.append(f"{self.file}: {text.format(f'{len(ids)} annotations')} (id {some}){more}")

    def _keep_meaningful(self, rows: list[tuple[Any, ...]]) -> None:
        """Leaves out boxes that mean nothing, and says so."""
        columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * 6
        image, label, area, crowd = (
            np.array(columns[of], kind) for of, kind in ((0, "i8"), (1, "i8"), (3, "f8"), (4, "?"))
        )
        boxes, ids = columns[2], columns[5]
        missing = np.array([box is None for box in boxes], np.bool_)
        xywh = np.array([box or [0.0] * 4 for box in boxes], np.float64).reshape(-1, 4)
        with np.errstate(invalid="ignore", over="ignore"):
            corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
            border = np.tile(self.sizes[image], 2)
            inside = np.clip(corners, 0, border).astype(np.float32)
            finite = np.isfinite(corners).all(1)
            empty = ~(inside[:, 2:] - inside[:, :2] >= MIN_SIDE).all(1)
            of_box = np.minimum(xywh[:, 2] * xywh[:, 3], _MAX_AREA)
            bad_area = ~np.isnan(area) & ~((area >= 0) & (area <= _MAX_AREA))
            over = ((corners < -1) | (corners > border + 1)).any(1)  # less than a pixel is rounding
            odd = np.logical_or(over, (xywh[:, 2:] < 1).all(1))
        kept = ~missing & finite & ~empty
        for text, which in (
            ("left out {} without a box", missing),
            ("left out {} with a box that is not finite", ~missing & ~finite),
            ("left out {} with a box that has no area inside of its image", ~missing & finite & empty),
            ("took the area of the box for {} with an area below 0 or beyond 1e10", kept & bad_area),
            ("cut {} at the border of their image, in training alone", kept & over),
        ):
            self._note(text, [ids[row] for row in np.flatnonzero(which)])
        self.image, self.xywh, self.corners = image[kept], xywh[kept], inside[kept]
        self.label, self.crowd = label[kept], crowd[kept]
        self.area = np.where(bad_area | np.isnan(area), of_box, area)[kept]
        single, strange = int((~self.crowd).sum()), int((odd[kept] & ~self.crowd).sum())
        if strange > single / 2:
            self.notes.append(
                f"{self.file}: {strange} of {single} boxes reach out of their image or are smaller than a pixel; "
                "is bbox x, y, width, height in pixels?"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())  # UTF-8, with a byte order mark or without, UTF-16 or UTF-32
    except (RecursionError, ValueError) as error:
        raise UserError(f"{file} is no JSON: {in_a_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no COCO annotation file: it holds {reprlib.repr(content)}")
    return content


def _read_image_entry(row: dict[str, Any]) -> tuple[int, str, int, int]:
    name = row["file_name"] if "coco_url" not in row else row.get("file_name", str(row["coco_url"]).rpartition("/")[2])
    if not isinstance(name, str) or not name:
        raise ValueError(f"file_name is {reprlib.repr(name)}")
    width, height = _whole(row, "width"), _whole(row, "height")
    if width < 1 or height < 1:
        raise ValueError(f"width and height are {width} and {height}")
    return _whole(row, "id"), name, width, height


def _read_annotation(row: dict[str, Any], index_of: dict[int, int], label_of: dict[int, int]) -> tuple[Any, ...]:
    """Image, label, box or None, area or NaN, whether a crowd, id."""
    place: list[int] = []
    for key, known in (("image_id", index_of), ("category_id", label_of)):
        if isinstance(row[key], bool) or not isinstance(row[key], int) or row[key] not in known:
            raise ValueError(f"its {key} is {reprlib.repr(row[key])}, which the file does not list")
        place.append(known[row[key]])
    box, crowd = row.get("bbox"), row.get("iscrowd")
    if box is not None and not (isinstance(box, list) and len(box) in (0, 4)):
        raise ValueError(f"bbox is {reprlib.repr(box)} and not four numbers")
    if crowd not in (None, 0, 1):
        raise ValueError(f"iscrowd is {reprlib.repr(crowd)} and not 0 or 1")
    area = np.nan if row.get("area") is None else np.nan_to_num(_number(row["area"], "area"), nan=-1.0)
    numbers = [_number(number, "bbox") for number in box] if box else None
    return *place, numbers, area, bool(crowd), row.get("id")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} has {reprlib.repr(value)}, which is no number")
    return float(value)


def _whole(row: dict[str, Any], key: str) -> int:
    if isinstance(row[key], bool) or not isinstance(row[key], int):
        raise TypeError(f"{key} is {reprlib.repr(row[key])} and no whole number")
    return row[key]
