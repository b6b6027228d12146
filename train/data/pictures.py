"""Pictures from files, whatever kind they are: upright RGB, never decoded before their header is judged."""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from train.batches.buckets import Size

log = logging.getLogger(__name__)
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


def printable(name: str) -> str:
    """A name as it may be shown: signs that could act on a terminal are written out."""
    return name if name.isprintable() else ascii(name)


def by_reason(rejected: Mapping[str, str]) -> str:
    """How often each reason comes, numbers and names in it aside."""
    reasons = Counter(re.sub(r"\d+", "N", why.split(" cannot be decoded: ")[-1]) for why in rejected.values())
    return "; ".join(f"{count} times {why}" for why, count in reasons.most_common(10))


def tell_rejected(where: str, rejected: Mapping[str, str], count: int, max_bad_fraction: float) -> None:
    """Says which of `count` pictures are left out. Raises ValueError if these are too many, or all."""
    if not count:
        raise ValueError(f"{where} holds no captioned picture")
    lines = [f"\n  {printable(name)}: {why}" for name, why in list(rejected.items())[:10]]
    if len(rejected) > 1:
        lines.append(f"\nIn all: {by_reason(rejected)}")
    problem = f"{len(rejected)} of {count} pictures in {where} cannot be used"
    if len(rejected) > max_bad_fraction * count or len(rejected) == count:
        limit = "all" if len(rejected) == count else f"more than data.max_bad_fraction={max_bad_fraction}"
        raise ValueError(f"{problem}, {limit}; the first are" + "".join(lines))
    if rejected:
        log.warning("%s and are left out; the first are%s", problem, "".join(lines))


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


def upright_size(image: Image.Image) -> Size:
    """The size that `upright` gives a picture, without decoding it (EXIF behind a PNG's pixels aside)."""
    exif = Image.Image.getexif(image)  # a PNG's own would decode all of it, to look for EXIF at its end
    # Pillow turns the size of a TIFF when it opens one
    turned = exif.get(ExifTags.Base.Orientation, 1) >= 5 and image.format != "TIFF"
    return Size(image.height, image.width) if turned else Size(image.width, image.height)


def opacity(image: Image.Image) -> Image.Image:
    """The alpha channel as greys (L), turned as EXIF says; 255 everywhere in a picture without one."""
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def to_tensor(image: Image.Image) -> Tensor:
    """RGB to (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 127.5 - 1


def to_images(image: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], clamped, to RGB pictures."""
    pixels = (
        ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    )
    return [Image.fromarray(picture) for picture in pixels]


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures of one size, row by row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        page.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return page
