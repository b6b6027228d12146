"""What recipes and lines start from: the files of pictures and masks, two passes, and variations.

Imports no torch, so that a file that is missing is told before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ldm.recipes import options
from ldm.recipes.noted import file_hash

Sides = tuple[int, int, int, int]  # pixels at the left, top, right and bottom


# Files


def read_picture(path: str, name: str = "image") -> Image.Image:
    """Upright RGB of a file. Raises ValueError, naming it, for what is no picture."""
    from ldm.drawing.pixels import UNREADABLE, open_checked, upright  # numpy

    try:
        with open_checked(Path(path).expanduser()) as image:
            return upright(image)
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file {path}") from None
    except UNREADABLE as error:
        raise ValueError(f"{name} {path}: {error}") from None


def noted(path: str) -> tuple[str, str]:
    """A picture's file and its hash, as a recipe notes them."""
    return path, file_hash(Path(path).expanduser())


def extended(image: Image.Image, sides: Sides) -> tuple[Image.Image, Image.Image]:
    """The picture with so many pixels more at its sides, and the mask that is white there: outpainting.

    What is new continues the edge's pixels, so that a strength below 1 has colours to start from.
    Raises ValueError for sides that cannot be.
    """
    import numpy as np

    from ldm.drawing.pixels import upright

    options.check_extend(sides)
    (left, top, right, bottom), image = sides, upright(image)
    pixels = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), "edge")
    mask = Image.new("L", pixels.shape[1::-1], 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return Image.fromarray(pixels), mask


class Start(NamedTuple):
    """The pictures of a call, by the names of its arguments."""

    image: Image.Image | None = None
    mask_image: Image.Image | None = None


def start_of(values: Mapping[str, Any]) -> Start:
    """The pictures to start from, by Recipe's names: files, with or without their hashes.

    Raises ValueError where one cannot be read, and for a mask of another shape than its picture.
    """
    given = [values.get(name) for name in ("image", "mask")]
    files = [each if each is None or isinstance(each, str) else each[0] for each in given]
    if files[0] is None:
        return Start()
    image, sides = read_picture(files[0]), values.get("extend")
    if sides is not None:
        return Start(*extended(image, sides))
    if files[1] is None:
        return Start(image)
    mask = read_picture(files[1], "mask").convert("L")
    options.check_mask_shape(mask.size, image.size)
    return Start(image, mask)


def settle_start(values: MutableMapping[str, Any], image: Image.Image | None) -> None:
    """Fills in what options of a start, by Recipe's names, leave open: the size of the picture, the strength.

    image: of start_of. Raises ValueError for options that do not go together.
    """
    options.check_together(values)
    if image is not None:
        for name, side in zip(("width", "height"), image.size, strict=True):
            values[name] = values.get(name) or side
        masked = bool(values.get("mask") or values.get("extend"))
        values["strength"] = options.usual_strength(values.get("strength"), masked=masked)
    if not values.get("variation_strength") or values.get("variation_seed") is None:
        values.pop("variation_seed", None)


# Two passes


def first_size(width: int, height: int, own: tuple[int, int], factor: int) -> tuple[int, int]:
    """Width and height of the first of two passes: of this shape, with about as many pixels as suit a model.

    own: height and width that the model draws by itself. factor: pixels a latent.
    Raises ValueError if that is not smaller.
    """
    scale = math.sqrt(own[0] * own[1] / (width * height))
    first = max(round(width * scale / factor), 1) * factor, max(round(height * scale / factor), 1) * factor
    if first[0] >= width or first[1] >= height:
        raise ValueError(
            f"two_pass draws at {first[0]}x{first[1]} first: ask for a larger width and height than "
            f"{width}x{height}"
        )
    return first
