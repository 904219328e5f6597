"""Files in COCO format as the trainer reads them: which one is a part's, and what is wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tests.support.coco_data")


from alrp_triton.trainer import Coco, UserError, find_part
from tests.support.coco_data import MARKS, Content, content, data_set, two_images

pytestmark = MARKS


def empty(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


@pytest.mark.parametrize(
    ("files", "name", "found"),
    [
        (["annotations/instances_train2017.json", "annotations/instances_val2017.json"], "val", 1),
        (["annotations/instances_trainval.json", "annotations/instances_train.json"], "train", 1),
        (["annotations/instances_val.json", "annotations/captions_val.json"], "val", 0),
        (["annotations/person_keypoints_val2017.json", "annotations/instances_val2017.json"], "val2017", 1),
        (["annotations/val.json", "annotations/instances_val.json"], "val", 0),
        (["annotations/lvis_v1_train.json", "annotations/lvis_v1_val.json"], "lvis_v1_val", 1),
        (["annotations/Instances-Val.json", "annotations/retrieval.json"], "val", 0),
        (["train/_annotations.coco.json", "valid/_annotations.coco.json"], "valid", 1),
    ],
)
def test_parts_are_found(files: list[str], name: str, found: int, tmp_path: Path) -> None:
    empty(tmp_path, *files)
    assert find_part(tmp_path, name).annotations == tmp_path / files[found]


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        ([], "val", "want one file annotations/*val*.json in "),
        (["annotations/instances_trainval.json", "annotations/instances_test.json"], "val", "found annotations/instances_test.json, annotations/"),
        (["annotations/instances_trainval.json", "annotations/instances_test.json"], "train", "want one file "),
        (["annotations/instances_val2014.json", "annotations/instances_val2017.json"], "val", "val2014.json, annotations/instances_val2"),
        (["annotations/instances_val.json"], "", "found annotations/instances_val.json"),
        (["annotations/instances_val.json"], "/etc/val.json", "found annotations/instances_val.json"),
    ],
)  # fmt: skip
def test_parts_that_are_not_there(files: list[str], name: str, words: str, tmp_path: Path) -> None:
    empty(tmp_path, *files)
    with pytest.raises(UserError) as seen:
        find_part(tmp_path, name)
    assert words in str(seen.value)


def test_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        find_part(tmp_path / "nowhere", "val")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    part = content(1)
    part["categories"][0]["name"] = "Löwe 狮子"
    file = tmp_path / "val.json"
    file.write_bytes(json.dumps(part, ensure_ascii=False).encode(encoding))
    assert Coco(file).categories == {1: "Löwe 狮子", 2: "dog"}
    file.write_bytes(json.dumps(part, ensure_ascii=False).encode("latin-1", "replace"))
    with pytest.raises(UserError, match=r"val\.json is no JSON"):
        Coco(file)


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "NaN", "[]", "[{}]", '"' + "x" * 10**6 + '"', "0", "null", "{}", "\x00"])  # fmt: skip
def test_what_is_no_annotation_file(text: str, tmp_path: Path) -> None:
    """Said in a line, however much there is."""
    (tmp_path / "val.json").write_text(text)
    with pytest.raises(UserError, match=r"val\.json is no (JSON|COCO annotation file): ") as seen:
        Coco(tmp_path / "val.json")
    assert len(str(seen.value)) < 600
    assert "\n" not in str(seen.value)


def coco(folder: Path, change: Callable[[Content], Any] = dict) -> Coco:
    return Coco(find_part(two_images(folder, change), "val").annotations)


def of(key: str, number: int = 0, **values: Any) -> Callable[[Content], Any]:
    return lambda part: part[key][number].update(values)


def without(key: str, number: int, name: str) -> Callable[[Content], Any]:
    return lambda part: part[key][number].pop(name)


WRONG: list[tuple[Callable[[Content], Any], str]] = [
    (lambda part: part.pop("categories"), "is no COCO annotation file: 'categories' is None and no list"),
    (lambda part: part.pop("images"), "is no COCO annotation file: 'images' is None and no list"),
    (lambda part: part.update(annotations={"1": {}}), "'annotations' is {'1': {}} and no list"),
    (lambda part: part.update(annotations="x" * 10**6), "'annotations' is 'xxx"),
    (lambda part: part.update(images=[], annotations=[]), "lists no image"),
    (lambda part: part.update(categories=[], annotations=[]), "lists no category"),
    (lambda part: part["images"].append(None), "images, number 2, without an id: "),
    (lambda part: part["annotations"].append([1, 2]), "annotations, number 4, without an id: "),
    (of("images", id=0.5), "images, id 0.5: id is 0.5 and no whole number"),
    (of("images", id="9"), "id is '9' and no whole number"),
    (of("images", id=True), "id is True and no whole number"),
    (of("images", id=4), "more than one image has the id 4"),
    (of("images", file_name=None), "images, id 9: file_name is None"),
    (without("images", 0, "file_name"), "images, id 9: has no 'file_name'"),
    (without("images", 0, "id"), "images, number 0, without an id: has no 'id'"),
    (of("images", width=None), "images, id 9: width is None and no whole number"),
    (of("images", width=0), "images, id 9: width and height are 0 and 8"),
    (of("categories", id="7"), "categories, id '7': id is '7' and no whole number"),
    (of("categories", id=3), "more than one category has the id 3"),
    (of("annotations", category_id=99), "annotations, id 1: its category_id is 99, which the file does not list"),
    (of("annotations", 1, image_id="4"), "annotations, id 2: its image_id is '4', which the file does not list"),
    (of("annotations", 1, image_id=4.0), "annotations, id 2: its image_id is 4.0, which"),
    (of("annotations", 1, image_id=[4]), "annotations, id 2: its image_id is [4], which"),
    (without("annotations", 1, "image_id"), "annotations, id 2: has no 'image_id'"),
    (of("annotations", id=7654321, bbox=[1, 2, 3]), "annotations, id 7654321: bbox is [1, 2, 3] and not four"),
    (of("annotations", id=7654321, bbox=[1, 2, "3", 4]), "annotations, id 7654321: bbox has '3', which is no number"),
    (of("annotations", id=7654321, bbox=[1, 2, None, 4]), "id 7654321: bbox has None, which is no number"),
    (of("annotations", id=7654321, bbox={"x": 1}), "id 7654321: bbox is {'x': 1} and not four numbers"),
    (of("annotations", id=7654321, bbox=[10**400, 2, 3, 4]), "id 7654321: int too large"),
    (of("annotations", id=7654321, iscrowd=2), "annotations, id 7654321: iscrowd is 2 and not 0 or 1"),
    (of("annotations", id=7654321, iscrowd="0"), "annotations, id 7654321: iscrowd is '0' and not 0 or 1"),
    (of("annotations", id=7654321, iscrowd=[]), "annotations, id 7654321: iscrowd is [] and not 0 or 1"),
    (of("annotations", id=7654321, area="360"), "annotations, id 7654321: area has '360', which is no number"),
    (of("annotations", id="x" * 10**6, area=[]), "area has [], which is no number"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_the_entry_that_is_wrong_is_named(change: Callable[[Content], Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as seen:
        coco(tmp_path, change)
    assert words in str(seen.value)
    assert "val.json" in str(seen.value)
    assert len(str(seen.value)) < 600


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        (of("annotations", bbox=[]), "without a box"),
        (of("annotations", bbox=None), "without a box"),
        (without("annotations", 0, "bbox"), "without a box"),
        (of("annotations", bbox=[1, 2, 3, float("nan")]), "with a box that is not finite"),
        (of("annotations", bbox=[1, 2, float("inf"), 3]), "with a box that is not finite"),
        (of("annotations", bbox=[1e308, 2, 1e308, 3]), "with a box that is not finite"),
        (of("annotations", bbox=[10, 9, -5, -5]), "with a box that has no area inside"),
        (of("annotations", bbox=[25, 1, 5, 5]), "with a box that has no area inside"),
        (of("annotations", bbox=[19.9999999, 1, 5, 5]), "with a box that has no area inside"),
        (of("annotations", bbox=[3, 3, 1e-30, 5]), "with a box that has no area inside"),
        (of("annotations", bbox=[3.0, 3, 1e-7, 5]), "with a box that has no area inside"),
        (of("annotations", iscrowd=None), None),
        (of("annotations", iscrowd=False), None),
        (of("annotations", area=None), None),
        (of("annotations", area=0), None),
        (without("annotations", 0, "area"), None),
        (without("annotations", 0, "iscrowd"), None),
        (without("annotations", 0, "id"), None),
        (of("annotations", 1, id=1), None),
        (without("categories", 0, "name"), None),
    ],
)
def test_boxes_that_are_left_out(change: Callable[[Content], Any], left_out: str | None, tmp_path: Path) -> None:
    """And it is said which; the others stay. One that is empty in float32 is one of them."""
    seen = coco(
        tmp_path, lambda part: (part["annotations"].pop(2), part["annotations"][0].update(id=7654321), change(part))
    )
    assert [note for note in seen.notes if "left out" in note] == (
        [f"{seen.file}: left out 1 annotations {left_out}{' of its image' * ('area' in left_out)} (id 7654321)"] if left_out else []
    )  # fmt: skip
    assert len(seen.label) == 2 + (not left_out)
    assert (seen.corners[:, 2:] > seen.corners[:, :2]).all()


def test_many_that_are_left_out_are_counted(tmp_path: Path) -> None:
    data_set(tmp_path, content(5, bbox=[29, 26, -20, -18]))  # drawn from the lower right corner
    (note,) = Coco(tmp_path / "annotations" / "instances_train.json").notes
    assert "left out 5 annotations with a box that has no area inside of its image (id 1, 2, 3, …)" in note


@pytest.mark.parametrize(("area", "taken"), [(-360.0, 360), (float("nan"), 360), (1e12, 360), (None, 360), (100, 100), (0, 0)])  # fmt: skip
def test_areas(area: float | None, taken: float, tmp_path: Path) -> None:
    """Those that would make evaluation ignore an object are the box' own, and it is said."""
    data_set(tmp_path, content(2, area=area))
    seen = Coco(tmp_path / "annotations" / "instances_train.json")
    assert seen.area.tolist() == [taken, taken]
    assert [note.partition(": ")[2][:16] for note in seen.notes] == (["took the area of"] if area not in (None, 100, 0) else [])  # fmt: skip


@pytest.mark.parametrize("first", [2**53, 2**70, 20210406123456784, 0, -5])
def test_ids_are_whole_numbers_of_any_size(first: int, tmp_path: Path) -> None:
    part = content(3)
    for image, annotation in zip(part["images"], part["annotations"], strict=True):
        image["id"] = annotation["image_id"] = image["id"] + first
    for category in part["categories"]:
        category["id"] += first
    for annotation in part["annotations"]:
        annotation["category_id"] += first
    data_set(tmp_path, part)
    seen = Coco(tmp_path / "annotations" / "instances_train.json")
    assert seen.image_ids == [first + number for number in (1, 2, 3)]
    assert seen.categories == {first + 1: "cat", first + 2: "dog"}
    assert seen.image.tolist() == [0, 1, 2]
    assert seen.label.tolist() == [1, 0, 1]


def test_categories_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """As Roboflow has them: of results by name none may vanish."""
    names = coco(tmp_path, of("categories", name="three")).categories
    assert len(set(names.values())) == 2
    assert all("three" in name for name in names.values())


def test_boxes_that_look_wrong(tmp_path: Path) -> None:
    """A hint where most boxes are no x, y, width, height in pixels."""
    for scale, hint in ((1.0, True), (0.01, True), (0.5, False)):

        def scaled(part: Content, scale: float = scale) -> None:
            for one in part["annotations"]:
                one["bbox"] = [scale * number for number in one["bbox"]]

        notes = coco(tmp_path, scaled).notes
        assert (
            any("reach out of their image or are smaller than a pixel; is bbox x, y" in note for note in notes) == hint
        )


def test_data_sets_are_told_apart(tmp_path: Path) -> None:
    first = coco(tmp_path).fingerprint
    assert coco(tmp_path).fingerprint == first
    changes = (of("annotations", bbox=[0, 0, 1, 1]), of("annotations", category_id=3), of("annotations", iscrowd=1),
               of("annotations", area=2), of("annotations", image_id=9), of("images", file_name="other.png"),
               of("categories", name="other"), of("images", id=8))  # fmt: skip
    assert len({first, *(coco(tmp_path, change).fingerprint for change in changes)}) == 1 + len(changes)


def test_flags_that_are_not_read(tmp_path: Path) -> None:
    """Are counted: such objects are trained on and evaluated, as pycocotools does."""
    seen = coco(tmp_path, of("annotations", 1, ignore=1))
    assert any("1 annotations have ignore (id 2), which is not read" in note for note in seen.notes)
    assert not any("ignore" in note for note in coco(tmp_path, of("annotations", 1, ignore=0)).notes)


def test_categories_that_are_named_as_others_are_told_apart(tmp_path: Path) -> None:
    def change(part: Content) -> None:
        part["categories"] = [{"id": 7, "name": "a"}, {"id": 3, "name": "a"}, {"id": 5, "name": "a (7)"}]

    assert len(set(coco(tmp_path, change).categories.values())) == 3


def test_a_part_of_two_layouts(tmp_path: Path) -> None:
    empty(tmp_path, "annotations/train.json", "train/_annotations.coco.json", "annotations/instances_train_val.json")
    with pytest.raises(UserError, match=r"found annotations/train\.json, train/_annotations\.coco\.json"):
        find_part(tmp_path, "train")
    with pytest.raises(UserError, match="want one file "):  # which is train, too
        find_part(tmp_path, "val")
    assert find_part(tmp_path, "train_val").annotations.name == "instances_train_val.json"
