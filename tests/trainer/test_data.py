"""Data sets of the trainer: files in COCO format and what is wrong with them, images, batches of a step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="sklearn is the examples', not the package's", exc_type=ImportError)
pytest.importorskip("pycocotools", reason="pycocotools is the tests', not the package's", exc_type=ImportError)
pytest.importorskip("tests.support.coco_data")

from PIL import Image
from pycocotools.coco import COCO

from alrp_triton.trainer import CocoDataModule, CocoDetection, UserError, find_part
from alrp_triton.trainer.images import opened, read_image
from alrp_triton.trainer.sampling import EpochSampler
from examples import digits
from tests.support.coco_data import MARKS, Content, content, cut_short, data_set, said, two_images

pytestmark = MARKS


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    digits.write(folder, training=14, held_out=3, seed=5)
    return folder


def test_scenes_are_a_data_set(scenes: Path, tmp_path: Path) -> None:
    """pycocotools reads it; the same seed writes the same bytes; boxes lie in the images."""
    digits.write(tmp_path, training=14, held_out=3, seed=5)
    files = sorted(path.relative_to(scenes) for path in scenes.rglob("*.*"))
    assert len(files) == 14 + 3 + 2
    assert all((scenes / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)
    truth = COCO(str(scenes / "annotations" / "instances_train.json"))
    assert len(truth.getImgIds()) == 14
    assert [category["name"] for category in truth.loadCats(truth.getCatIds())] == list("0123456789")
    data = CocoDetection(find_part(scenes, "train"))
    data.check_images()
    for image, target, _ in (data[index] for index in range(14)):
        boxes = target["boxes"]
        assert image.shape == (3, digits.SCENE_SIZE, digits.SCENE_SIZE)
        assert 1 <= len(boxes) == len(target["labels"]) <= 7
        assert ((boxes >= 0) & (boxes <= digits.SCENE_SIZE)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_digits_are_held_out() -> None:
    training, held_out = digits.split_digits(np.random.default_rng(0))
    assert len(training.labels) + len(held_out.labels) == 1797
    assert len(held_out.labels) > 400


@pytest.mark.parametrize("images", ["images", "images/val", "images/val2017", "val", "val2017", "images/instances_val2017", "."])  # fmt: skip
def test_folders_of_images(images: str, tmp_path: Path) -> None:
    """The one of the part comes before the one of all; names may have folders, too, or folders that are gone."""
    held_out = content(2, "val{}.png")
    held_out["images"][1]["file_name"] = "some/where/val2.png"
    data_set(tmp_path, content(2), held_out, ("instances_train2017.json", "instances_val2017.json"), images)
    if images != ".":
        data_set(tmp_path, content(2), held_out, ("instances_train2017.json", "instances_val2017.json"), ".")
    data = CocoDetection(find_part(tmp_path, "val"))
    data.check_images()
    assert [data.path(index) for index in range(2)] == [tmp_path / images / f"val{i}.png" for i in (1, 2)]


def test_images_of_one_last_name(tmp_path: Path) -> None:
    """In folders of their own: each entry has its own pixels; where the folders are gone, none has another's."""
    part = content(2)
    for image, name in zip(part["images"], ("train/im1.png", "val\\im1.png"), strict=True):
        image["file_name"] = name
    data_set(tmp_path, part)
    (tmp_path / "images" / "val\\im1.png").unlink()
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (64, 48)).save(tmp_path / folder / "im1.png")
    data = CocoDetection(find_part(tmp_path, "train"))
    data.check_images()
    assert [data.path(index) for index in range(2)] == [tmp_path / one / "im1.png" for one in ("train", "val")]
    (tmp_path / "images" / "im1.png").write_bytes((tmp_path / "train" / "im1.png").read_bytes())
    for folder in ("train", "val"):
        (tmp_path / folder / "im1.png").unlink()
    with pytest.raises(UserError, match=r"train/im1\.png and val\\im1\.png of .* would both be .*images/im1\.png"):
        data.check_images()


def test_images_that_are_in_both_parts(tmp_path: Path) -> None:
    """In whatever folder."""
    parts = content(2), content(2)
    for part, names in zip(parts, (("a/im1.png", "b/im2.png"), ("b/im2.png", "c/im3.png")), strict=True):
        for image, name in zip(part["images"], names, strict=True):
            image["file_name"] = name
    data_set(tmp_path, *parts)
    for name in ("a/im1.png", "b/im2.png", "c/im3.png"):
        (tmp_path / "images" / name).parent.mkdir()
        (tmp_path / "images" / Path(name).name).rename(tmp_path / "images" / name)
    with said() as log:
        CocoDataModule(tmp_path, batch=2).setup("fit")
    assert "note: 1 images are in both parts" in log.getvalue()


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    data = CocoDetection(find_part(data_set(tmp_path, content(2)), "val"))
    data.path(1).unlink()
    with pytest.raises(UserError, match=r"there is no image val2\.png of .*instances_val\.json in .*/images, "):
        data.check_images()


def test_images_of_lvis(tmp_path: Path) -> None:
    """Without file_name, whose last part coco_url has."""
    part = content(2)
    for image in part["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
    data = CocoDetection(find_part(data_set(tmp_path, part), "train"))
    data.check_images()
    assert data.coco.names == ["im1.png", "im2.png"]


def test_data(tmp_path: Path) -> None:
    data = CocoDetection(find_part(two_images(tmp_path), "val"))
    assert data.coco.categories == {3: "three", 7: "seven"}
    assert data.coco.image_ids == [4, 9]
    (grey, of_grey, first), (red, of_red, second) = data[0], data[1]
    assert (first, second) == (0, 1)
    assert grey.shape == (3, 10, 20)
    assert of_grey["boxes"].tolist() == [[0, 1, 4, 6], [10, 2, 20, 6]]
    assert of_grey["labels"].tolist() == [1, 0]
    assert of_grey["truth"].tolist() == [[-2, 1, 6, 5], [0, 0, 9, 9], [10, 2, 30, 4]]  # what evaluation is given
    assert of_grey["truth_labels"].tolist() == [1, 1, 0]
    assert of_grey["iscrowd"].tolist() == [False, True, False]
    assert of_red["boxes"].shape == of_red["truth"].shape == (0, 4)
    assert (red[0] > 0.9).all()
    assert (red[1:] < 0.1).all()


def test_pixels(tmp_path: Path) -> None:
    """16 bits a pixel, palettes, transparency; an image of another size than the file says."""
    data = CocoDetection(find_part(two_images(tmp_path), "val"))
    file = tmp_path / "images" / "grey.png"
    steps = np.linspace(0, 65535, 200).round().astype(np.uint16).reshape(10, 20)
    Image.fromarray(steps).save(file)
    assert torch.equal(data[0][0], torch.from_numpy(steps.astype(np.float32) / 65535).expand(3, -1, -1))
    for mode in ("P", "RGBA", "LA", "1", "CMYK"):
        Image.new(mode, (20, 10)).save(file, format="PNG" if mode != "CMYK" else "JPEG")
        assert data[0][0].shape == (3, 10, 20)
    Image.new("L", (10, 20)).save(file)
    with pytest.raises(UserError, match=r"grey\.png has \(10, 20\) pixels, its annotation file says \[20\.0, 10\.0\]"):
        data.check_images()


@pytest.mark.parametrize("kind", ["float 0..1", "integer 0..255", "integer 0..1e6", "16 bits"])
def test_tiff(kind: str, tmp_path: Path) -> None:
    """In 0..1, as all images, or an error that names the file."""
    ramp, file = np.tile(np.linspace(0, 1, 64), (48, 1)), tmp_path / "image.tiff"
    pixels = {"float 0..1": ramp.astype(np.float32), "integer 0..255": (ramp * 255).astype(np.int32),
              "integer 0..1e6": (ramp * 1e6).astype(np.int32), "16 bits": (ramp * 65535).astype(np.uint16)}  # fmt: skip
    Image.fromarray(pixels[kind]).save(file)
    if kind == "16 bits":
        assert read_image(file).amax() == 1
        assert read_image(file).mean() == pytest.approx(0.5, abs=0.01)
    else:
        with pytest.raises(UserError, match=r"image\.tiff has 32 bits a pixel"):
            read_image(file)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    """The file is named, whatever is wrong with it, and whether that is found at its header or later."""
    for suffix in ("jpg", "png", "webp", "bmp", "gif"):
        file = tmp_path / f"image.{suffix}"
        Image.effect_noise((64, 48), 90).convert("RGB").save(file)
        assert read_image(file).shape == (3, 48, 64)
        cut_short(file)
        if suffix != "webp":  # of which nothing can be read then
            with opened(file) as image:
                assert image.size == (64, 48)
        with pytest.raises(UserError, match=rf"image\.{suffix} cannot be read as an image"):
            read_image(file)
        for other in (b"", b"\x89PNG\r\n\x1a\n", b"<html>"):
            file.write_bytes(other)
            with pytest.raises(UserError, match=rf"image\.{suffix} cannot be read as an image"):
                read_image(file)


def test_flips_are_those_of_the_epoch(tmp_path: Path) -> None:
    """About half of the images; the same for the same seed, epoch and image; none where an epoch is not given."""
    two_images(tmp_path)
    whole = [CocoDataModule(tmp_path, train="val", seed=seed).training for seed in (0, 0, 1)]
    boxes = [[one[epoch, 0][1]["boxes"].tolist() for epoch in range(40)] for one in whole]
    plain, flipped = [[0, 1, 4, 6], [10, 2, 20, 6]], [[16, 1, 20, 6], [0, 2, 10, 6]]
    assert boxes[0] == boxes[1] != boxes[2]
    assert 10 < sum(one == flipped for one in boxes[0]) < 30
    assert all(one in (plain, flipped) for one in boxes[0])
    never = CocoDataModule(tmp_path, train="val", flip=False).training
    assert whole[0][0][1]["boxes"].tolist() == plain
    assert all(never[epoch, 0][1]["boxes"].tolist() == plain for epoch in range(8))


@pytest.mark.parametrize("size", [[20, 0.6], [0.02, 0.02]])
def test_boxes_of_less_than_a_pixel_are_trained_on(size: list[float], tmp_path: Path) -> None:
    """Flipped or not, as they are without transforms."""
    data_set(tmp_path, content(2, bbox=[10, 10, *size]))
    for flip in (True, False):
        data = CocoDataModule(tmp_path, flip=flip).training
        assert all(len(data[epoch, index][1]["boxes"]) == 1 for epoch in range(8) for index in range(2))


def test_transforms(tmp_path: Path) -> None:
    """Pixels and boxes together; what leaves the image is no box any more, and its label goes with it."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    two_images(tmp_path)
    data = CocoDataModule(tmp_path, train="val", transforms=[v2.RandomCrop((10, 8)), v2.ColorJitter(0.5)]).training
    before = torch.get_rng_state()
    for epoch in range(12):
        image, target, _ = data[epoch, 0]
        assert image.shape == (3, 10, 8)
        assert type(image) is type(target["boxes"]) is torch.Tensor
        assert len(target["boxes"]) == len(target["labels"])
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        assert ((target["boxes"] >= 0) & (target["boxes"] <= torch.tensor([8, 10, 8, 10]))).all()
        assert len(target["truth"]) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_batches_are_those_of_the_step() -> None:
    """Taken up again at any step; shared by processes; every image once an epoch."""

    def some(first: int, epochs: int, rank: int = 0, processes: int = 1) -> list[tuple[int, int]]:
        taken, found = first, list[tuple[int, int]]()
        while taken < 2 * epochs:
            found += EpochSampler(11, 4, 3, rank, processes, lambda taken=taken: taken)
            taken += 2 - taken % 2
        return found

    whole = some(0, 3)
    assert [len(EpochSampler(11, 4, 3, rank, 2, lambda: 0)) for rank in range(2)] == [4, 4]
    assert [whole[4 * step :] for step in range(5)] == [some(step, 3) for step in range(5)]
    halves = [some(0, 3, rank, 2) for rank in range(2)]
    shares = [[half[2 * step : 2 * step + 2] for step in range(6)] for half in halves]
    assert [one for pair in zip(*shares, strict=True) for share in pair for one in share] == whole
    assert [epoch for epoch, _ in whole] == [0] * 8 + [1] * 8 + [2] * 8
    assert all(len({index for _, index in whole[8 * epoch : 8 * epoch + 8]}) == 8 for epoch in range(3))
    with pytest.raises(UserError, match="a batch of 12 images is more than the 11 there are"):
        EpochSampler(11, 12, 0, 0, 1, lambda: 0)
    with pytest.raises(UserError, match="a batch of 4 images cannot be shared by 3 processes"):
        EpochSampler(11, 4, 0, 0, 3, lambda: 0)


def test_workers_load_the_same(scenes: Path) -> None:
    before = torch.get_rng_state()
    one, two = (list(CocoDataModule(scenes, batch=4, workers=workers).train_dataloader()) for workers in (0, 1))
    assert len(one) == 3
    assert [batch.indices for batch in one] == [batch.indices for batch in two]
    assert all(
        torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x.images, y.images, strict=True)
    )
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (content(2) | {"annotations": []}, None, "instances_train.json has no box to train on, in 2 images"),
        (content(2, iscrowd=1), None, "instances_train.json has no box to train on, in 2 images"),
        (content(2), content(2) | {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}]}, "other categories"),
        ({k: v for k, v in content(2).items() if k != "annotations"}, None, "instances_train.json has no "),
        (content(2), {k: v for k, v in content(2).items() if k != "annotations"}, "instances_val.json has no annotations"),
        (content(1), None, "a batch of 2 images is more than the 1 there are"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_used(train: Content, val: Content | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        CocoDataModule(data_set(tmp_path, train, val), batch=2).setup("fit")


def test_numbers_of_a_data_module(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [{"batch": 0}, {"workers": -1}, {"seed": -1}]
    for wrong in cases:
        with pytest.raises(UserError, match="batch must be at least 1, workers and seed at least 0, got"):
            CocoDataModule(tmp_path, **wrong)
    with said() as log:
        CocoDataModule(data_set(tmp_path, content(4)), batch=2).setup("fit")
    assert "instances_train.json: 4 images, 4 boxes, 2 categories to train on" in log.getvalue()
    assert "instances_val.json: 2 images, 2 boxes, 2 categories to evaluate on" in log.getvalue()


def test_one_file_for_both_parts(tmp_path: Path) -> None:
    """Nothing is evaluated on what it was trained on, unasked."""
    data_set(tmp_path, content(4))
    annotations = tmp_path / "annotations"
    with pytest.raises(UserError, match="'train' and 'train' to train and to evaluate on are both"):
        CocoDataModule(tmp_path, val="train").setup("fit")
    (annotations / "instances_val.json").unlink()
    (annotations / "instances_val.json").symlink_to(annotations / "instances_train.json")
    with pytest.raises(UserError, match="'train' and 'val' to train and to evaluate on are both"):
        CocoDataModule(tmp_path).setup("fit")
    (annotations / "instances_val.json").unlink()
    (annotations / "instances_val.json").write_bytes((annotations / "instances_train.json").read_bytes())
    with said() as log:
        CocoDataModule(tmp_path, batch=2).setup("fit")
    assert "note: 4 images are in both parts" in log.getvalue()


def test_more_processes_than_images_to_evaluate_on(tmp_path: Path) -> None:
    """One of them would have nothing to do, and the others would wait for it."""
    data = CocoDataModule(data_set(tmp_path, content(6)), batch=6)
    for processes in (2, 3):
        data.trainer = SimpleNamespace(global_rank=0, world_size=processes, limit_train_batches=1.0, overfit_batches=0)  # pyright: ignore[reportAttributeAccessIssue]
        if processes == 2:
            data.setup("fit")
        else:
            with pytest.raises(UserError, match=r"each of 3 processes needs an image to evaluate on, got 2 images in "):
                data.setup("fit")
