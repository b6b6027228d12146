"""Aspect-ratio buckets: the few shapes that pictures of every shape are resized and cropped to.

A bucket's sides are multiples of a step, and its area is near size²; a picture goes to the bucket whose
aspect ratio is nearest on a logarithmic scale (NovelAI 2022, "Aspect ratio bucketing"; here with both sides
free; a shape that fills less than LEAST_AREA of it is none).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from PIL import Image, ImageOps

from ldm.diffusion.noise import generator

LEAST_AREA = 0.8  # of size², of a bucket


class Size(NamedTuple):
    """Of a picture, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def aspect(self) -> float:
        """The logarithm of width / height: 0 of squares; that of a turned picture has the other sign."""
        return math.log(self.width / self.height)


def bucket_sizes(size: int, multiple: int, max_aspect: float) -> list[Size]:
    """The buckets, the narrowest first. Both sides are multiples of `multiple`; size x size is one of them.

    max_aspect: the longer side in shorter sides, at most; 1 leaves the square alone.
    """
    found = {Size(size, size)}
    for width in range(multiple, int(size * math.sqrt(max_aspect)) + 1, multiple):
        height = size**2 // width // multiple * multiple
        for one in (Size(width, height), Size(height, width)):
            if one.width == one.height:
                continue  # a smaller square
            enough = one.width * one.height >= LEAST_AREA * size**2
            if enough and abs(one.aspect) <= math.log(max_aspect) + 1e-9:
                found.add(one)
    return sorted(found, key=lambda one: (one.aspect, one.width))


def nearest(picture: Size, sizes: Sequence[Size]) -> int:
    """Which bucket a picture goes to: the nearest in aspect ratio, of two equally near the first."""
    return min(range(len(sizes)), key=lambda k: abs(sizes[k].aspect - picture.aspect))


def enlargement(picture: Size, bucket: Size) -> float:
    """By how much a picture is resized to cover its bucket."""
    return max(bucket.width / picture.width, bucket.height / picture.height)


def cropped(picture: Size, bucket: Size) -> float:
    """The share of a picture's area that its bucket cuts off."""
    scale = enlargement(picture, bucket)
    return 1 - bucket.width * bucket.height / (scale**2 * picture.width * picture.height)


@dataclass(frozen=True)
class Buckets:
    """Which picture of a source goes into which bucket."""

    sizes: Sequence[Size]  # those that hold a picture, the narrowest first
    members: Sequence[Sequence[int]]  # indices in the source, growing
    dropped: Sequence[int] = ()  # pictures that would be enlarged too much
    lost: Sequence[float] = ()  # a bucket: the mean share of its pictures that is cut off
    unreadable: Mapping[int, str] = field(default_factory=dict)  # pictures without a size, and why

    def table(self) -> str:
        """What is told before training: how many pictures go into which bucket, and what that costs them."""
        rows = [f"{'bucket':>11}  {'pictures':>8}  cropped"]
        for size, members, lost in zip(self.sizes, self.members, self.lost, strict=True):
            rows.append(f"{size!s:>11}  {len(members):>8}  {lost:>7.1%}")
        if self.dropped:
            rows.append(f"    left out  {len(self.dropped):>8}  smaller than data.max_enlargement allows")
        if self.unreadable:
            rows.append(f"    left out  {len(self.unreadable):>8}  unreadable")
        return "\n".join(rows)


def sort_into_buckets(
    pictures: Mapping[int, Size],
    sizes: Sequence[Size],
    max_enlargement: float | None,
    unreadable: Mapping[int, str] = MappingProxyType({}),
) -> Buckets:
    """The buckets of pictures by their index in the source. unreadable: others, and why they have no size.

    Raises ValueError if none is left.
    """
    members: list[list[int]] = [[] for _ in sizes]
    lost = [0.0] * len(sizes)
    dropped = []
    for index, picture in pictures.items():
        bucket = nearest(picture, sizes)
        if max_enlargement is not None and enlargement(picture, sizes[bucket]) > max_enlargement:
            dropped.append(index)
        else:
            members[bucket].append(index)
            lost[bucket] += cropped(picture, sizes[bucket])
    if len(dropped) == len(pictures):
        others = f" ({len(unreadable)} more cannot be read)" if unreadable else ""
        raise ValueError(
            f"all {len(dropped)} pictures{others} would be enlarged more than {max_enlargement} times to "
            "cover their bucket: lower data.size, or raise data.max_enlargement"
        )
    full = [k for k in range(len(sizes)) if members[k]]
    return Buckets(
        [sizes[k] for k in full],
        [members[k] for k in full],
        dropped,
        [lost[k] / len(members[k]) for k in full],
        unreadable,
    )


# ---- from a picture to its bucket


class View(NamedTuple):
    """Which part of a picture is kept, and whether it is mirrored."""

    centre: tuple[float, float] = (0.5, 0.5)  # from left and top, 0 to 1
    mirrored: bool = False


def views(index: int, crops: int, flip: bool) -> list[View]:
    """The crops * (1 + flip) views of picture `index`, always the same: the middle, then others anywhere."""
    centres = [(0.5, 0.5)]
    for crop in range(1, crops):
        x, y = torch.rand(2, generator=generator("crop", index, crop)).tolist()
        centres.append((x, y))
    return [
        View(centre, mirrored) for centre in centres for mirrored in ((False, True) if flip else (False,))
    ]


def frame(image: Image.Image, size: Size, view: View = View()) -> Image.Image:  # noqa: B008 (a constant)
    """The picture resized (Lanczos) until it covers `size`, then cropped to it."""
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=view.centre)
    return ImageOps.mirror(image) if view.mirrored else image


def crop_corner(picture: Size, bucket: Size, view: View) -> tuple[int, int]:
    """Left and top of what `frame` keeps in the resized picture, which for a mirrored view is mirrored first.

    A size conditioning wants to know them (Podell et al. 2023, SDXL, section 2.2).
    """
    scale = enlargement(picture, bucket)
    across = 1 - view.centre[0] if view.mirrored else view.centre[0]
    left = (picture.width * scale - bucket.width) * across
    top = (picture.height * scale - bucket.height) * view.centre[1]
    return round(left), round(top)
