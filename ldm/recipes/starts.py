"""What recipes and lines start from: the files of pictures and masks, two passes, and variations.

Imports no torch, so that a file that is missing is told before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ldm.recipes import options
from ldm.recipes.noted import file_hash

if TYPE_CHECKING:
    from ldm.recipes.recipe import Recipe
    from ldm.recipes.requests import Request

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


def noted(path: str, name: str) -> tuple[str, str]:
    """A picture's file and its hash, as a recipe notes them. Raises ValueError unless it can be read."""
    read_picture(path, name)
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


def start_of(asked: Recipe | Request) -> Start:
    """The pictures that a recipe or a request starts from.

    Raises ValueError where one cannot be read, and for a mask of another shape than its picture.
    """
    files = [each if each is None or isinstance(each, str) else each[0] for each in (asked.image, asked.mask)]
    if files[0] is None:
        return Start()
    image = read_picture(files[0])
    if asked.extend is not None:
        return Start(*extended(image, asked.extend))
    if files[1] is None:
        return Start(image)
    mask = read_picture(files[1], "mask").convert("L")
    options.check_mask_shape(mask.size, image.size)
    return Start(image, mask)


def settle_start(values: MutableMapping[str, Any], image: Image.Image | None) -> None:
    """Fills in what options of a start, by Recipe's names, leave open: the size of the picture, the strength.

    Raises ValueError for options that do not go together.
    """
    options.check_together(values)
    if image is not None:
        sides = values.get("extend") or (0, 0, 0, 0)
        own = image.width + sides[0] + sides[2], image.height + sides[1] + sides[3]
        for name, side in zip(("width", "height"), own, strict=True):
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
