"""Pictures from files, whatever kind they are: upright RGB, never decoded before their header is judged.

Imports no torch.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_PIXELS = 64_000_000  # of a file, read from its header before anything is decoded
BACKGROUND = "white"  # what transparent pictures are laid on
# what Pillow raises for files that are cut, or are not what they say
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


def open_checked(file: Path | IO[bytes]) -> Image.Image:
    """A file opened, not yet decoded. Raises ValueError for what is no picture or has too many pixels."""
    if (file.stat().st_size if isinstance(file, Path) else file.seek(0, io.SEEK_END)) == 0:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(file)
    except UnidentifiedImageError:
        raise ValueError("not a picture that Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS // 10**6} million pixels")
    return image


def upright(image: Image.Image) -> Image.Image:
    """RGB, turned as EXIF says, transparency laid on white, 16-bit greys scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB to (3, H, W) float32 in [-1, 1]."""
    import torch  # a command line reads pictures before it pays for that

    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 127.5 - 1
