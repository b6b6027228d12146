"""Pictures of a data set: their sizes, what is left out and why, sheets of them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ldm.drawing.pixels import IMAGE_SUFFIXES, UNREADABLE, open_checked, to_tensor, upright
from train.batches.buckets import Size

# where most of this package takes them from
__all__ = [
    "IMAGE_SUFFIXES",
    "UNREADABLE",
    "by_reason",
    "grid",
    "opacity",
    "open_checked",
    "printable",
    "tell_rejected",
    "to_images",
    "to_tensor",
    "upright",
    "upright_size",
]

log = logging.getLogger(__name__)


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
