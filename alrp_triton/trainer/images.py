"""Image files, as the pixels that they store."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import UserError


class opened:  # noqa: N801
    """``with opened(path) as file``: PIL's image. What goes wrong in it is a UserError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Image.Image:
        try:
            self.file = Image.open(self.path)
        except Exception as error:
            raise self._named(error) from error
        if self.file.mode.startswith(("I", "F")) and not (
            self.file.mode.startswith("I;16") or self.file.format == "PNG"
        ):
            self.file.close()
            raise UserError(f"{self.path} has 32 bits a pixel, of which none knows what is white: store 8 or 16")
        return self.file

    def __exit__(self, _: object, error: BaseException | None, *trace: object) -> None:
        self.file.close()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise self._named(error) from error

    def _named(self, error: Exception) -> UserError:
        """PIL raises errors of many kinds for files that it cannot read."""
        return UserError(f"{self.path} cannot be read as an image: {error}")


def read_image(path: Path) -> Tensor:
    """Pixels ``(3, H, W)`` in 0..1, as they are stored: an orientation noted by a camera is not applied, as in COCO."""
    with opened(path) as file:
        if file.mode.startswith("I"):  # grey, 16 bits
            return torch.from_numpy(np.array(file, dtype=np.float32) / 65535).expand(3, -1, -1).clone()
        return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).float() / 255
